"""Loads the files of a stack as one document, with includes, ``extends``, several files, variables and profiles.

Source: compose-spec, 13-merge.md, 14-include.md, 15-profiles.md; compose-go, loader/loader.go, loader/extends.go.
"""

import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from skep.errors import InvalidArgument, reason_of
from skep.stack.compose import dotenv
from skep.stack.compose.document import (
    FILE_BYTES_MAX,
    FilePosition,
    FileProblem,
    FileProblems,
    YamlNode,
    mapping,
    parse,
    scalar,
)
from skep.stack.compose.interpolation import interpolated
from skep.stack.compose.merging import canonical, merged, without_tags
from skep.stack.compose.paths import with_dockerfiles, with_paths, within
from skep.stack.compose.reading import MappingReader, ProblemReport

_FILES_MAX: Final = 2000
"""Maximum number of files of one stack, with all included files."""
_INCLUDES_MAX: Final = 20
"""Maximum depth of nested includes."""


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The caller's options.  ``services``: load only these and their dependencies, or all if it is empty."""

    environment: Mapping[str, str]
    env_files: tuple[Path, ...] = ()
    reads_dotenv: bool = True
    profiles: tuple[str, ...] = ()
    directory: Path | None = None
    """Base of relative paths, or None for the first file's directory."""


class LoadedStack(msgspec.Struct, frozen=True, kw_only=True):
    """A merged document, the stack's name, and the contents of secrets and configs."""

    document: YamlNode
    name: str
    contents: Mapping[tuple[str, str], bytes]
    variables: Mapping[str, str]
    directory: Path
    """Base of relative paths."""


class FileReader:
    """Reads regular files of a limited number and size from the disk."""

    def __init__(self, standard_input: str = "") -> None:
        self._standard_input = standard_input
        self._count = 0

    def text(self, path: Path | str) -> bytes:
        """Return the content of a file, or standard input for ``-``.  Raises: InvalidArgument."""
        if str(path) == "-":
            return self._standard_input.encode()
        return self.content(Path(path), FILE_BYTES_MAX + 1)

    def content(self, path: Path, most: int) -> bytes:
        """Return at most ``most`` bytes of a file.  Raises: InvalidArgument."""
        self._count += 1
        if self._count > _FILES_MAX:
            raise InvalidArgument(f"the stack has more than {_FILES_MAX} files")
        try:
            # O_NONBLOCK, because a pipe without a writer would block.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise InvalidArgument(f"{path} is not a regular file")
                return file.read(most)
        except OSError as error:
            raise InvalidArgument(f"{path} cannot be read: {reason_of(error)}") from error
        except ValueError as error:  # a zero byte
            raise InvalidArgument(f"{str(path)!r} is not a path: {error}") from error


def load(
    paths: Sequence[Path | str], choices: LoadOptions, files: FileReader, report: ProblemReport
) -> LoadedStack:
    """Load a stack's files as one document.  Raises: FileProblems, InvalidArgument: the files are invalid or
    unreadable.
    """
    first = Path(paths[0])
    directory = choices.directory or (Path.cwd() if str(first) == "-" else first.absolute().parent)
    variables = _variables(directory, choices, files, report)
    loader = _Loader(files, report)
    document = loader.project(
        [path if str(path) == "-" else Path(path).absolute() for path in paths], directory, variables
    )
    entries = document.entries or {}
    name = entries["name"].text if "name" in entries else ""
    document = _chosen(document, choices.profiles)
    document = _with_environment(document, variables, files, report)
    return LoadedStack(
        document=document,
        name=name,
        contents=_contents(document, variables, loader.values, files, report),
        variables=variables,
        directory=directory,
    )


def _variables(
    directory: Path, choices: LoadOptions, files: FileReader, report: ProblemReport
) -> dict[str, str]:
    """Return the variables of the env files and the environment, which takes precedence."""
    made: dict[str, str] = {}
    paths = list(choices.env_files)
    beside = directory / ".env"
    if not paths and choices.reads_dotenv and beside.is_file():
        report.warnings.append(
            FileProblem(FilePosition(str(beside), 1, 1), "", "variables are read from this file")
        )
        paths = [beside]
    for path in paths:
        text = files.content(path, FILE_BYTES_MAX).decode(errors="replace")
        try:
            made |= dotenv.parse(text, {**made, **choices.environment})
        except ValueError as error:
            raise InvalidArgument(f"{path}: {error}") from None
    return {**made, **choices.environment}


class _Loader:
    def __init__(self, files: FileReader, report: ProblemReport) -> None:
        self._files = files
        self._report = report
        self.values: dict[FilePosition, str] = {}
        """Contents of secrets and configs from the variables of included files, by the position of the variable."""

    def project(
        self,
        paths: Sequence[Path | str],
        directory: Path,
        variables: Mapping[str, str],
        including: tuple[str, ...] = (),
    ) -> YamlNode:
        """Load the files of one project and merge them in their order."""
        made: YamlNode | None = None
        for path in paths:
            one = self._file(path, directory, variables, including)
            whole = one if made is None else merged(made, one)
            if whole is None:
                raise FileProblems(
                    [FileProblem(one.place, "", "!reset removes a value, not all files before this one")]
                )
            made = whole
        assert made is not None
        return with_dockerfiles(made, directory)

    def _file(
        self, path: Path | str, directory: Path, variables: Mapping[str, str], including: tuple[str, ...]
    ) -> YamlNode:
        if str(path) in including:
            where = FilePosition(including[-1], 1, 1)
            raise FileProblems(
                [
                    FileProblem(
                        where, "include", f"the file includes itself: {' -> '.join([*including, str(path)])}"
                    )
                ]
            )
        if len(including) >= _INCLUDES_MAX:
            raise FileProblems(
                [
                    FileProblem(
                        FilePosition(str(path), 1, 1),
                        "include",
                        f"includes are nested more than {_INCLUDES_MAX} levels deep",
                    )
                ]
            )
        document = self._read(path, directory, variables)
        document = self._extended(document, directory, variables, (str(path),))
        entries = document.entries or {}
        if "include" not in entries:
            return document
        base = self._included(entries["include"], directory, variables, (*including, str(path)))
        rest = replace(document, value={key: one for key, one in entries.items() if key != "include"})
        made = merged(base, rest) if base is not None else rest
        assert made is not None
        return made

    def _read(self, path: Path | str, directory: Path, variables: Mapping[str, str]) -> YamlNode:
        name = "standard input" if str(path) == "-" else str(path)
        document = interpolated(parse(self._files.text(path), name), variables, self._warn_at(name))
        return with_paths(canonical(document), directory)

    def _warn_at(self, name: str) -> Callable[[str], None]:
        return lambda text: self._report.warnings.append(FileProblem(FilePosition(name, 1, 1), "", text))

    def _included(
        self, node: YamlNode, directory: Path, variables: Mapping[str, str], including: tuple[str, ...]
    ) -> YamlNode | None:
        made: YamlNode | None = None
        for one in node.items if node.items is not None else (node,):
            reader = MappingReader(
                mapping({"path": one}, one.place) if one.entries is None else one, "include", self._report
            )
            paths = [within(directory, text) for text in reader.texts("path")]
            if not paths:
                reader.problem("path", "it names no file")
                continue
            inner = (
                within(directory, reader.text("project_directory"))
                if reader.text("project_directory")
                else paths[0].parent
            )
            env_files = [within(directory, text) for text in reader.texts("env_file")]
            reader.close()
            report = ProblemReport()
            more = _variables(
                inner, LoadOptions(environment=variables, env_files=tuple(env_files)), self._files, report
            )
            self._report.warnings += report.warnings
            document = self._with_variables(self.project(paths, inner, more, including), more)
            made = document if made is None else _united(made, document, one.place, self._report)
        return made

    def _with_variables(self, document: YamlNode, variables: Mapping[str, str]) -> YamlNode:
        """Return an included document without its name, and with the names in its environments filled in from its own
        variables.

        Source: compose-go, loader/environment.go (ResolveEnvironment), loader/include.go (importResources).
        """
        entries = {key: one for key, one in (document.entries or {}).items() if key != "name"}
        for section in ("secrets", "configs"):
            found = entries.get(section)
            for node in (found.entries or {}).values() if found is not None else ():
                name = (node.entries or {}).get("environment")
                if name is not None and name.text in variables:
                    self.values.setdefault(name.place, variables[name.text])
        services = entries.get("services")
        if services is not None and services.entries is not None:
            made = {name: _filled_in(one, variables) for name, one in services.entries.items()}
            entries["services"] = replace(services, value=made)
        return replace(document, value=entries)

    # --- extends

    def _extended(
        self, document: YamlNode, directory: Path, variables: Mapping[str, str], path: tuple[str, ...]
    ) -> YamlNode:
        services = (document.entries or {}).get("services")
        if services is None or services.entries is None:
            return document
        made = {
            name: self._extended_service(name, services.entries, directory, variables, path)
            for name in services.entries
        }
        return replace(
            document, value={**(document.entries or {}), "services": replace(services, value=made)}
        )

    def _extended_service(
        self,
        name: str,
        services: Mapping[str, YamlNode],
        directory: Path,
        variables: Mapping[str, str],
        path: tuple[str, ...],
    ) -> YamlNode:
        """Return the service merged over the service that it extends.  ``path``: the file, and the services that lead
        to this one.
        """
        node = services[name]
        extends = (node.entries or {}).get("extends")
        if extends is None or node.entries is None or node.tag == "!reset":
            return node
        here = f"{path[0]}:{name}"
        if here in path[1:]:
            chain = " -> ".join([*path[1:], here])
            raise FileProblems(
                [
                    FileProblem(
                        extends.place, f"services.{name}.extends", f"services extend each other: {chain}"
                    )
                ]
            )
        reader = MappingReader(
            mapping({"service": extends}, extends.place) if extends.entries is None else extends,
            f"services.{name}.extends",
            self._report,
        )
        target, file = reader.text("service"), reader.text("file")
        reader.close()
        found, inner, source = services, directory, path[0]
        if file:
            source = str(within(directory, file))
            inner = Path(source).parent
            document = self._read(source, inner, variables)
            below = (document.entries or {}).get("services")
            found = below.entries if below is not None and below.entries is not None else {}
        if target not in found:
            raise FileProblems(
                [
                    FileProblem(
                        extends.place, f"services.{name}.extends", f"there is no service {target} in {source}"
                    )
                ]
            )
        base = self._extended_service(target, found, inner, variables, (source, *path[1:], here))
        rest = {key: one for key, one in node.entries.items() if key != "extends"}
        kept = {
            key: one
            for key, one in (base.entries or {}).items()
            if key not in ("depends_on", "links", "volumes_from")
        }
        made = merged(replace(base, value=kept), replace(node, value=rest), ("services", name))
        assert made is not None
        return made


def _filled_in(service: YamlNode, variables: Mapping[str, str]) -> YamlNode:
    """Return the service with values for the names without a value in its environment."""
    given = (service.entries or {}).get("environment")
    if given is None or given.entries is None:
        return service
    made = {
        name: scalar(variables[name], one.place) if one.value is None and name in variables else one
        for name, one in given.entries.items()
    }
    return replace(service, value={**(service.entries or {}), "environment": replace(given, value=made)})


def _united(base: YamlNode, other: YamlNode, place: FilePosition, report: ProblemReport) -> YamlNode:
    """Unite two included documents.  An object that both define is an error."""
    first, second = base.entries or {}, other.entries or {}
    for section in ("services", "networks", "volumes", "secrets", "configs"):
        if section not in first or section not in second:
            continue
        mine, theirs = first[section].entries or {}, second[section].entries or {}
        for name in mine.keys() & theirs.keys():
            if mine[name].plain() != theirs[name].plain():
                report.problems.append(
                    FileProblem(
                        theirs[name].place,
                        f"{section}.{name}",
                        f"{mine[name].place} has another {name} already",
                    )
                )
    made = merged(base, other)
    assert made is not None
    return made


# --- services ------------------------------------------------------------------------------------------------------


def _chosen(document: YamlNode, profiles: Collection[str]) -> YamlNode:
    """Return the document without the services of other profiles, without the secrets and configs that only these use,
    and without values that ``!reset`` removes.
    """
    kept = without_tags(document)
    assert kept is not None
    services = (kept.entries or {}).get("services")
    if services is None or services.entries is None or "*" in profiles:
        return kept
    made = {}
    for name, one in services.entries.items():
        wanted = (one.entries or {}).get("profiles")
        names = [item.text for item in wanted.items or ()] if wanted is not None else []
        if not names or set(names) & set(profiles):
            made[name] = one
    entries = {**(kept.entries or {}), "services": replace(services, value=made)}
    used = {word for one in made.values() for word in _words(one)}
    left_out = [one for name, one in services.entries.items() if name not in made]
    for section in ("secrets", "configs"):
        references = [(one.entries or {}).get(section) for one in left_out]
        unused = {word for one in references if one is not None for word in _words(one)} - used
        if (found := entries.get(section)) is not None and found.entries is not None:
            files = {name: one for name, one in found.entries.items() if name not in unused}
            entries[section] = replace(found, value=files)
    return replace(kept, value=entries)


def _words(node: YamlNode) -> Iterator[str]:
    """Yield all texts in a tree.  A list in one text, such as a label with names of secrets, is split."""
    if node.entries is not None or node.items is not None:
        for one in (*(node.entries or {}).values(), *(node.items or ())):
            yield from _words(one)
    else:
        yield from map(str.strip, node.text.split(","))


def _with_environment(
    document: YamlNode, variables: Mapping[str, str], files: FileReader, report: ProblemReport
) -> YamlNode:
    """Return the document with services' env files and label files read, and names without a value filled in."""
    services = (document.entries or {}).get("services")
    if services is None or services.entries is None:
        return document
    made = {
        name: _environment(
            _labels(one, f"services.{name}", files, report), f"services.{name}", variables, files, report
        )
        for name, one in services.entries.items()
    }
    return replace(document, value={**(document.entries or {}), "services": replace(services, value=made)})


def _environment(
    service: YamlNode, path: str, variables: Mapping[str, str], files: FileReader, report: ProblemReport
) -> YamlNode:
    entries = service.entries
    if entries is None or not ("environment" in entries or "env_file" in entries):
        return service
    reader = MappingReader(service, path, report)
    made: dict[str, YamlNode] = {}
    for node, where in reader.each("env_file"):
        one = MappingReader(
            mapping({"path": node}, node.place) if node.entries is None else node, where, report
        )
        found = _env_file(one, variables, files)
        made |= {name: scalar(value, node.place) for name, value in found.items()}
    given = entries.get("environment")
    if given is not None and given.entries is None:
        return service  # The conversion reports a value that is neither a mapping nor a list of texts.
    for name, node in (given.entries or {}).items() if given is not None else ():
        if node.value is not None:
            made[name] = node
        elif name in variables:
            made[name] = scalar(variables[name], node.place)
    place = given.place if given is not None else service.place
    return replace(service, value={**entries, "environment": mapping(made, place)})


def _env_file(one: MappingReader, variables: Mapping[str, str], files: FileReader) -> dict[str, str]:
    path, is_required = one.text("path"), one.boolean("required") is not False
    is_raw = one.choice("format", "raw") == "raw"
    one.close()
    if not is_required and not Path(path).exists():
        return {}
    try:
        return dotenv.parse(
            files.content(Path(path), FILE_BYTES_MAX).decode(errors="replace"), variables, is_raw=is_raw
        )
    except (InvalidArgument, ValueError) as error:
        one.problem("path", str(error) if isinstance(error, InvalidArgument) else f"{path}: {error}")
        return {}


def _labels(service: YamlNode, path: str, files: FileReader, report: ProblemReport) -> YamlNode:
    entries = service.entries
    if entries is None or "label_file" not in entries:
        return service
    reader = MappingReader(service, path, report)
    made: dict[str, YamlNode] = {}
    for text in reader.texts("label_file"):
        try:
            found = dotenv.parse(files.content(Path(text), FILE_BYTES_MAX).decode(errors="replace"), {})
        except (InvalidArgument, ValueError) as error:
            reader.problem("label_file", str(error))
            continue
        made |= {name: scalar(value, service.place) for name, value in found.items()}
    given = entries.get("labels")
    made |= dict(given.entries or {}) if given is not None else {}
    return replace(service, value={**entries, "labels": mapping(made, service.place)})


def _contents(
    document: YamlNode,
    variables: Mapping[str, str],
    included: Mapping[FilePosition, str],
    files: FileReader,
    report: ProblemReport,
) -> dict[tuple[str, str], bytes]:
    """Return the contents of secrets and configs that come from a file or the environment, by section and name.

    ``included``: values of variables of included files, by the position of the variable.
    """
    made: dict[tuple[str, str], bytes] = {}
    for section in ("secrets", "configs"):
        found = (document.entries or {}).get(section)
        for name, node in (found.entries or {}).items() if found is not None else ():
            if node.entries is None or (
                (outside := node.entries.get("external")) is not None and outside.value
            ):
                continue
            reader = MappingReader(node, f"{section}.{name}", report)
            if "file" in reader:
                try:
                    made[section, name] = files.content(Path(reader.text("file")), FILE_BYTES_MAX)
                except InvalidArgument as error:
                    reader.problem("file", str(error))
            elif "environment" in reader:
                variable = reader.text("environment")
                value = included.get(node.entries["environment"].place, variables.get(variable))
                if value is None:
                    reader.problem("environment", f"the variable {variable} is not set")
                made[section, name] = (value or "").encode()
    return made

"""Makes a deploy update a service if the content of a file has changed that it mounts from the stack's directory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from skep.model.options.labels import STACK_FILES
from skep.stack.compose.document import FileProblem
from skep.stack.compose.reading import ProblemReport
from skep.stack.project import Stack, StackService, versioned_name

_BYTES_MAX: Final = 8 << 20
"""Size in bytes up to which a file is hashed."""
_FILES_MAX: Final = 50
"""Largest number of files of one service that are hashed."""


def with_bound_files(stack: Stack, directory: Path, report: ProblemReport) -> Stack:
    """Return the stack with a label on each service: hashes of the files below ``directory`` that it mounts.

    Directories, files elsewhere and files that this machine does not have are left out, because they belong to the
    node.
    """
    return replace(
        stack,
        services={name: _with_files(name, one, directory, report) for name, one in stack.services.items()},
    )


def _with_files(name: str, service: StackService, directory: Path, report: ProblemReport) -> StackService:
    def warn(path: Path, why: str) -> None:
        text = f"a change of {path} updates nothing: {why}"
        report.warnings.append(FileProblem(service.place, f"services.{name}.volumes", text))

    found = ",".join(_contents(service, directory, warn))
    container = service.spec.task_template.container_spec
    if not found or container is None:
        return service
    container = replace(container, labels={**container.labels, STACK_FILES: found})
    template = replace(service.spec.task_template, container_spec=container)
    return replace(service, spec=replace(service.spec, task_template=template))


def _contents(service: StackService, directory: Path, warn: Callable[[Path, str], None]) -> Iterator[str]:
    count = 0
    for path in sorted(set(map(Path, service.binds))):
        try:
            if not path.is_relative_to(directory) or not path.is_file():
                continue
            count += 1
            if count > _FILES_MAX:
                warn(path, f"the service mounts more than {_FILES_MAX} files")
            elif path.stat().st_size > _BYTES_MAX:
                warn(path, f"it is larger than {_BYTES_MAX >> 20} MiB")
            else:
                name = path.relative_to(directory).as_posix()
                # A file may hold a password, and many users can read labels, so the hash takes long to compute for each
                # guess.
                yield f"{name}={versioned_name(name, path.read_bytes(), is_secret=True)[-10:]}"
        except OSError as error:
            warn(path, error.strerror or str(error))

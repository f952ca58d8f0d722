"""Changes that instructions make to an image's configuration, their history, and the variables of a build.  Pure.

Entries of ``docker history`` are as BuildKit writes them.  For a declared argument, an entry shows the default, where
BuildKit shows the given value.  The entries are part of the image that the next step starts from, so a different value
in an entry would run all later steps again.

Source: moby 20.10, builder/dockerfile/dispatchers.go, internals.go, buildargs.go; buildkit,
frontend/dockerfile/dockerfile2llb/convert.go (commitToHistory and its callers, runCommandString).
"""

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from skep.engine.build.dockerfile.dockerfile import Heredoc, parse, quoted
from skep.engine.build.dockerfile.instructions import (
    Arg,
    Cmd,
    Copy,
    Entrypoint,
    Env,
    Expose,
    Healthcheck,
    Instruction,
    Label,
    Maintainer,
    OnBuild,
    OptionLabel,
    Shell,
    StopSignal,
    User,
    Volume,
    Workdir,
    instruction_of,
)
from skep.engine.build.dockerfile.substitution import (
    VALUE_BYTES_MAX,
    Budget,
    split,
    substituted,
    substituted_document,
)
from skep.engine.containers.signals import signal_number
from skep.engine.images.image import ContainerDefaults
from skep.engine.runtime.runtime_spec import DEFAULT_PATH
from skep.errors import InvalidArgument
from skep.model.container import HealthConfig
from skep.model.values.times import SECOND_NS

DEFAULT_SHELL = ("/bin/sh", "-c")
_PREDEFINED = frozenset(
    name
    for upper in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for name in (upper, upper.lower())
)
"""Arguments that need no ARG instruction.  They are not part of cache keys."""
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/(\w+))?")
_CHANGES = (
    Cmd,
    Entrypoint,
    Env,
    Expose,
    Healthcheck,
    Label,
    OnBuild,
    StopSignal,
    User,
    Volume,
    Workdir,
)

_WITH_FILES = " # buildkit"


class StageState(msgspec.Struct, frozen=True, kw_only=True):
    """Configuration of a stage so far.  ``has_cmd``: Whether the stage itself has a CMD, which ENTRYPOINT keeps."""

    config: ContainerDefaults
    author: str = ""
    has_cmd: bool = False

    @property
    def shell(self) -> tuple[str, ...]:
        """Return the command that runs the shell form of instructions."""
        return self.config.shell or DEFAULT_SHELL


class StageArguments(msgspec.Struct):
    """Arguments that a stage has declared so far.  ``hidden``: Names that an image variable overrides."""

    declared: dict[str, str | None] = {}
    hidden: set[str] = set()


class BuildArguments:
    """Arguments of a build: values given by the user, and declarations by ARG.

    BuildKit differs from the classic builder in three rules.  A stage inherits the arguments of its base stage.  The
    later of ARG and ENV wins, not always ENV.  Proxies are set for commands only, in upper and lower case.

    Source: buildkit, frontend/dockerfile/dockerfile2llb/convert.go (dispatchArg, proxyEnvFromBuildArgs);
    moby 20.10, builder/dockerfile/buildargs.go.
    """

    def __init__(
        self, given: Mapping[str, str | None], automatic: Mapping[str, str], *, is_buildkit: bool = False
    ) -> None:
        """``automatic``: Arguments that every Dockerfile may declare without a value (``TARGETARCH``)."""
        self._given = given
        self._before: dict[str, str | None] = dict(automatic)
        self.stage = StageArguments()
        self._used: set[str] = set()
        self._is_buildkit = is_buildkit

    def begin_stage(self, base: StageArguments | None = None, env: Iterable[str] = ()) -> None:
        """Start a stage with the arguments of its base stage.

        ``env``: Variables of the base image.  They override inherited arguments.
        """
        declared = dict(base.declared) if base is not None and self._is_buildkit else {}
        self.stage = StageArguments(declared, {text.partition("=")[0] for text in env})

    def declare(self, name: str, value: str | None, *, before_stages: bool = False) -> None:
        """Declare an argument: ``ARG name=value``."""
        self._used.add(name)
        self.stage.declared[name] = value
        if before_stages:
            self._before[name] = value
        if self._value(name, value) is not None:
            self.stage.hidden.discard(name)

    def hide(self, names: Iterable[str]) -> None:
        """Let ENV override the arguments with these names."""
        self.stage.hidden.update(names)

    @property
    def of_stages(self) -> Mapping[str, str]:
        """Arguments for the variables in FROM, and in ARG before the first FROM."""
        return self._values(self._before)

    def visible(self, env: Iterable[str]) -> Mapping[str, str]:
        """Return the arguments that instructions of the stage see, without those in ``env``."""
        hidden = self.stage.hidden if self._is_buildkit else {text.partition("=")[0] for text in env}
        return {
            name: value for name, value in self._values(self.stage.declared).items() if name not in hidden
        }

    @property
    def proxies(self) -> Mapping[str, str]:
        """Proxy variables of commands.  They are not part of the history and of cache keys."""
        found: dict[str, str] = {}
        for name in sorted(_PREDEFINED) if self._is_buildkit else ():
            if value := self._given.get(name):
                found |= {name.upper(): value, name.lower(): value}
        return found

    def in_key(self, name: str) -> bool:
        """Return whether the argument's value is part of cache keys.  Proxies are part of them only if an ARG declares
        them.
        """
        return name in self.stage.declared or name not in _PREDEFINED

    @property
    def unused(self) -> tuple[str, ...]:
        """Return the given arguments that no ARG declares."""
        return tuple(sorted(self._given.keys() - self._used - _PREDEFINED))

    def _value(self, name: str, default: str | None) -> str | None:
        for value in (self._given.get(name), default, self._before.get(name)):
            if value is not None:
                return value
        return None

    def _values(self, declared: Mapping[str, str | None]) -> dict[str, str]:
        names = declared if self._is_buildkit else (*declared, *sorted(_PREDEFINED))
        found = {name: self._value(name, declared.get(name)) for name in names}
        return {name: value for name, value in found.items() if value is not None}


def begun(base: ContainerDefaults) -> StageState:
    """Return the initial state of a stage on an image with the options ``base``."""
    env = base.env or ()
    if not any(text.startswith("PATH=") for text in env):
        env = (*env, DEFAULT_PATH)
    return StageState(config=msgspec.structs.replace(base, env=env))


def expanded(
    instruction: Instruction,
    variables: Mapping[str, str],
    escape: str,
    budget: Budget | None = None,
    given: Mapping[str, str | None] | None = None,
) -> Instruction:
    """Return the instruction with its variables substituted.

    Args:
        budget: Pays for the substitutions.
        given: Values of arguments that the user has given, whose defaults are ignored.

    Raises: InvalidArgument.
    """
    if isinstance(instruction, Arg):
        return _expanded_arg(instruction, variables, escape, budget, given or {})
    if isinstance(instruction, Expose):
        ports = [port for text in instruction.ports for port in split(text, variables, escape, budget)]
        return msgspec.structs.replace(instruction, ports=tuple(ports))
    length = 0

    def expand(word: str) -> str:
        nonlocal length
        text = substituted(word, variables, escape, budget)
        length += len(text)
        if length > VALUE_BYTES_MAX:
            raise InvalidArgument(f"{instruction.keyword} has more than {VALUE_BYTES_MAX} characters")
        return text

    if isinstance(instruction, Copy) and instruction.documents:
        documents = tuple(_expanded_document(one, variables, budget) for one in instruction.documents)
        instruction = msgspec.structs.replace(instruction, documents=documents)
    return instruction.expanded(expand)


def _expanded_document(document: Heredoc, variables: Mapping[str, str], budget: Budget | None) -> Heredoc:
    text = document.text
    if document.expands:
        text = substituted_document(text, variables, budget)
    return Heredoc(document.name, text, expands=False)


def _expanded_arg(
    arg: Arg,
    variables: Mapping[str, str],
    escape: str,
    budget: Budget | None,
    given: Mapping[str, str | None],
) -> Arg:
    """Substitute variables in each argument of an ARG, using the arguments before it."""
    seen, pairs = dict(variables), list[tuple[str, str | None]]()
    for name, default in arg.pairs:
        value = given.get(name)
        if value is None and default is not None:
            value = default = substituted(default, seen, escape, budget)
        if value is not None:
            seen[name] = value
        pairs.append((name, default))
    return msgspec.structs.replace(arg, pairs=tuple(pairs))


def variables_of(state: StageState, arguments: Mapping[str, str]) -> Mapping[str, str]:
    """Return the variables for substitution: the image's own, overridden by ``arguments``."""
    pairs = (text.partition("=") for text in state.config.env or ())
    return {**{name: value for name, _, value in pairs}, **arguments}


def changed(state: StageState, instruction: Instruction) -> tuple[StageState, str]:
    """Return the state after an instruction other than RUN, COPY and ADD, and the line in the image's history.

    Raises: InvalidArgument.
    """
    config = state.config
    match instruction:
        case Env(pairs=pairs):
            comment = _joined("ENV", pairs)
            config = msgspec.structs.replace(config, env=_with_variables(config.env or (), pairs))
        case Label(pairs=pairs) | OptionLabel(pairs=pairs):
            comment = _joined("LABEL", pairs)
            config = msgspec.structs.replace(config, labels={**(config.labels or {}), **dict(pairs)})
        case Arg(pairs=arguments):
            comment = " ".join(
                ["ARG", *(name if value is None else f"{name}={value}" for name, value in arguments)]
            )
        case Maintainer(author=author):
            return msgspec.structs.replace(state, author=author), f"MAINTAINER {author}"
        case Workdir(path=path):
            directory = working_directory(config.working_dir, path)
            comment = f"WORKDIR {directory}"
            config = msgspec.structs.replace(config, working_dir=directory)
        case User(user=user):
            comment = f"USER {user}"
            config = msgspec.structs.replace(config, user=user)
        case StopSignal(signal=signal):
            signal_number(signal)
            comment = f"STOPSIGNAL {signal}"
            config = msgspec.structs.replace(config, stop_signal=signal)
        case Expose(ports=ports):
            comment = f"EXPOSE {' '.join(ports)}"
            found: dict[str, object] = {port: {} for text in ports for port in ports_of(text)}
            config = msgspec.structs.replace(config, exposed_ports={**(config.exposed_ports or {}), **found})
        case Volume(paths=paths):
            if not all(paths):
                raise InvalidArgument("VOLUME specified can not be an empty string")
            comment = f"VOLUME [{' '.join(paths)}]"
            volumes = {**(config.volumes or {}), **{path: {} for path in paths}}
            config = msgspec.structs.replace(config, volumes=volumes)
        case OnBuild(expression=expression):
            comment = f"ONBUILD {expression}"
            config = msgspec.structs.replace(config, on_build=(*(config.on_build or ()), expression))
        case Shell(words=words):
            comment = f"SHELL [{' '.join(words)}]"
            config = msgspec.structs.replace(config, shell=words)
        case Healthcheck(health=health):
            comment = f"HEALTHCHECK {shown_health(health)}"
            config = msgspec.structs.replace(config, healthcheck=health)
        case Cmd() | Entrypoint():
            return _with_command(state, instruction)
        case _:
            raise InvalidArgument(f"unsupported command type: {instruction.keyword}")
    if sum(map(len, config.env or ())) > VALUE_BYTES_MAX:
        raise InvalidArgument(f"the variables have more than {VALUE_BYTES_MAX} characters")
    return msgspec.structs.replace(state, config=config), comment


def _with_command(state: StageState, instruction: Cmd | Entrypoint) -> tuple[StageState, str]:
    config, words = state.config, instruction.command.resolved(state.shell)
    comment = f"{instruction.keyword} [{' '.join(map(quoted, words))}]"
    if isinstance(instruction, Cmd):
        has_cmd = state.has_cmd or bool(instruction.command.words)
        config = msgspec.structs.replace(config, cmd=words)
        return msgspec.structs.replace(state, config=config, has_cmd=has_cmd), comment
    config = msgspec.structs.replace(config, entrypoint=words, cmd=config.cmd if state.has_cmd else None)
    return msgspec.structs.replace(state, config=config), comment


def adapted(
    after: StageState, before: StageState, instruction: Instruction, *, is_buildkit: bool
) -> StageState:
    """Return the state after an instruction, adapted to one of the two builders.

    BuildKit marks every CMD.  In the classic builder, a HEALTHCHECK inherits missing options from the previous
    HEALTHCHECK.

    Source: buildkit, frontend/dockerfile/dockerfile2llb/convert.go (dispatchCmd); moby 20.10, daemon/commit.go (merge).
    """
    config, old = after.config, before.config.healthcheck
    if is_buildkit and isinstance(instruction, Cmd):
        config = msgspec.structs.replace(config, args_escaped=True)
    elif not is_buildkit and isinstance(instruction, Healthcheck) and old is not None:
        own = instruction.health
        health = msgspec.structs.replace(
            own,
            interval=own.interval or old.interval,
            timeout=own.timeout or old.timeout,
            start_period=own.start_period or old.start_period,
            retries=own.retries or old.retries,
        )
        config = msgspec.structs.replace(config, healthcheck=health)
    return msgspec.structs.replace(after, config=config)


def apply_changes(config: ContainerDefaults, lines: Sequence[str]) -> ContainerDefaults:
    """Return ``config`` after the instructions of ``docker commit --change``.

    Raises: InvalidArgument: a line is not an instruction, or does not change the configuration.

    Source: moby 20.10, builder/dockerfile/builder.go (BuildFromConfig).
    """
    if not lines:
        return config
    parsed = parse("\n".join(lines))
    for line in parsed.lines:
        if line.keyword.upper() not in {type.__name__.upper() for type in _CHANGES}:
            raise InvalidArgument(f"{line.keyword.lower()} is not a valid change command")
    instructions = [instruction_of(line) for line in parsed.lines]
    state, budget = StageState(config=config), Budget()
    for instruction in instructions:
        ready = expanded(instruction, variables_of(state, {}), parsed.escape, budget)
        state, _ = changed(state, ready)
    return state.config


def command_of_step(
    command: Sequence[str], arguments: BuildArguments, visible: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the command of a RUN step for history and cache, preceded by the arguments that it sees."""
    counted = sorted(f"{name}={value}" for name, value in visible.items() if arguments.in_key(name))
    return (f"|{len(counted)}", *counted, *command) if visible else tuple(command)


def working_directory(current: str, wanted: str) -> str:
    """Return the directory after ``WORKDIR wanted``.  Raises: InvalidArgument: ``wanted`` is empty."""
    if not wanted:
        raise InvalidArgument("cannot normalize nothing")
    return _clean(posixpath.join("/", current, wanted))


def _clean(path: str) -> str:
    """Return the path without dots and double slashes.  Unlike POSIX, Docker does not keep two leading slashes."""
    return "/" + posixpath.normpath(path).lstrip("/")


def _joined(keyword: str, pairs: Iterable[tuple[str, str]]) -> str:
    return " ".join([keyword, *(f"{name}={value}" for name, value in pairs)])


def _with_variables(env: Sequence[str], pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Return the variables with values replaced in place and new variables at the end."""
    values = {text.partition("=")[0]: text for text in env}
    values.update({name: f"{name}={value}" for name, value in pairs})
    return tuple(values.values())


def ports_of(text: str) -> Iterable[str]:
    """Return the container ports of ``80``, ``80-90/udp`` or ``127.0.0.1:80:90``."""
    inside = text.rpartition(":")[2]
    found = _PORTS.fullmatch(inside)
    if found is None:
        if not inside or inside.startswith("/"):
            raise InvalidArgument(f"No port specified: {text}<empty>")
        raise InvalidArgument(f"Invalid containerPort: {inside.partition('/')[0]}")
    first, last, protocol = int(found[1]), int(found[2] or found[1]), (found[3] or "tcp").lower()
    if protocol not in ("tcp", "udp", "sctp"):
        raise InvalidArgument(f"Invalid proto: {protocol}")
    if not first <= last <= 65535:
        raise InvalidArgument(f"Invalid containerPort: {inside.partition('/')[0]}")
    return (f"{port}/{protocol}" for port in range(first, last + 1))


def shown_health(health: HealthConfig, *, has_start_interval: bool = False) -> str:
    """Format the health check as Go's ``%q`` does.

    ``has_start_interval``: Whether Docker's type has the field, which 20.10 lacks.
    """
    test = " ".join(map(quoted, health.test))
    times = [health.interval, health.timeout, health.start_period]
    if has_start_interval:
        times.append(health.start_interval)
    shown = " ".join(quoted(_go_duration(ns)) for ns in times)
    return f"&{{[{test}] {shown} {_quoted_rune(health.retries)}}}"


def _quoted_rune(number: int) -> str:
    """Format a number as Go's ``%q`` does: as the character with this code."""
    escaped = repr(chr(number))[1:-1] if number < 0x110000 else "\ufffd"
    return f"'{escaped}'"


def _go_duration(ns: int) -> str:
    """Format a duration as ``1h2m3s``."""
    if ns and ns < SECOND_NS:
        return f"{ns / 1_000_000:g}ms"
    seconds = ns / SECOND_NS
    hours, minutes = int(seconds // 3600), int(seconds // 60 % 60)
    rest = f"{seconds % 60:g}s"
    if hours:
        return f"{hours}h{minutes}m{rest}"
    return f"{minutes}m{rest}" if minutes else rest


def line_of_change(instruction: Instruction, line: str) -> str:
    """Return the entry of an instruction that changes the configuration.  Empty if it has none.

    ``line``: The classic builder's entry.
    """
    match instruction:
        case OnBuild() | OptionLabel():
            return ""
        case Expose(ports=ports):
            return f"EXPOSE [{' '.join(port for text in ports for port in ports_of(text))}]"
        case Healthcheck(health=health):
            return f"HEALTHCHECK {shown_health(health, has_start_interval=True)}"
    return line


def line_of_copy(copy: Copy) -> str:
    """Return the entry of COPY or ADD, with two of its options."""
    words = [copy.keyword]
    words += [f"--{name}={value}" for name, value in (("chown", copy.chown), ("chmod", copy.chmod)) if value]
    words += [*copy.sources, *(f"<<{document.name}" for document in copy.documents), copy.destination]
    return f"{' '.join(words)}{_WITH_FILES}"


def line_of_run(command: Sequence[str], declared: Iterable[str], variables: Mapping[str, str]) -> str:
    """Return the entry of RUN.

    Args:
        command: The command, with its shell.
        declared: Arguments that the stage has declared so far, in their order.
        variables: Values of the variables that the command sees.
    """
    arguments = [f"{name}={variables.get(name, '')}" for name in declared]
    count = [f"|{len(arguments)}"] if arguments else []
    return f"RUN {' '.join([*count, *arguments, *command])}{_WITH_FILES}"

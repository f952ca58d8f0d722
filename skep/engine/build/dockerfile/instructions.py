"""Typed instructions of a Dockerfile, and its stages.

Messages are moby 20.10's for the instructions that it has.

Source: buildkit, frontend/dockerfile/instructions (parse.go, commands.go, commands_runmount.go, bflag.go).
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar, Self

import msgspec

from skep.engine.build.dockerfile.dockerfile import Heredoc, Line, Parsed, heredoc_of, parse, quoted, readable
from skep.errors import InvalidArgument
from skep.model.container import HealthConfig
from skep.model.values.times import duration_ns

Expand = Callable[[str], str]
STEPS_MAX = 1000
"""Each step is a line of the image's history and a record of the cache.  Dockerfiles have some dozen."""

_STAGE_NAME = re.compile(r"[a-z][a-z0-9-_.]*")
_HEALTH_INTERVAL_NS_MIN = 1_000_000
"""Docker's shortest interval, 1 ms, in nanoseconds."""


class Instruction(msgspec.Struct, frozen=True, kw_only=True):
    """One instruction.  ``text``: The instruction in the Dockerfile, with its lines joined."""

    expanded_fields: ClassVar[tuple[str, ...]] = ()
    """Fields in which variables are substituted, including all strings nested in them."""

    text: str
    keyword: str
    number: int = 0
    heredocs: tuple[Heredoc, ...] = ()

    def expanded(self, expand: Expand) -> Self:
        """Return the instruction with its variables substituted."""
        changes = {name: _expanded(getattr(self, name), expand) for name in self.expanded_fields}
        return msgspec.structs.replace(self, **changes) if changes else self


def _expanded(value: object, expand: Expand) -> object:
    if isinstance(value, str):
        return expand(value)
    if isinstance(value, tuple):
        return tuple(_expanded(one, expand) for one in value)
    return value


class From(Instruction, frozen=True, kw_only=True):
    """Start of a stage.  ``name``: The name after AS, in lower case."""

    base: str
    name: str = ""
    platform: str = ""


class Arg(Instruction, frozen=True, kw_only=True):
    """Variables of the build.  The value None stands for the user's value, if any."""

    pairs: tuple[tuple[str, str | None], ...]


class Env(Instruction, frozen=True, kw_only=True):
    """Variables of the image."""

    expanded_fields = ("pairs",)
    pairs: tuple[tuple[str, str], ...]


class Label(Instruction, frozen=True, kw_only=True):
    """Labels of the image."""

    expanded_fields = ("pairs",)
    pairs: tuple[tuple[str, str], ...]


class OptionLabel(Instruction, frozen=True, kw_only=True):
    """``--label`` of the build.  Variables are not substituted."""

    pairs: tuple[tuple[str, str], ...]


class Maintainer(Instruction, frozen=True, kw_only=True):
    """Author of the image."""

    author: str


class Workdir(Instruction, frozen=True, kw_only=True):
    """Working directory of the image and of the steps that follow."""

    expanded_fields = ("path",)
    path: str


class User(Instruction, frozen=True, kw_only=True):
    """User of the image and of the steps that follow."""

    expanded_fields = ("user",)
    user: str


class StopSignal(Instruction, frozen=True, kw_only=True):
    """Signal that ends containers of the image."""

    expanded_fields = ("signal",)
    signal: str


class Expose(Instruction, frozen=True, kw_only=True):
    """Exposed ports.  A variable may hold several."""

    ports: tuple[str, ...]


class Volume(Instruction, frozen=True, kw_only=True):
    """Volumes of the image's containers."""

    expanded_fields = ("paths",)
    paths: tuple[str, ...]


class OnBuild(Instruction, frozen=True, kw_only=True):
    """Instruction for builds that use the image as base."""

    expression: str


class CommandLine(msgspec.Struct, frozen=True, kw_only=True):
    """Command of an instruction.  ``words``: The program and its arguments, or one text for the shell."""

    words: tuple[str, ...]
    is_shell: bool

    def resolved(self, shell: Sequence[str]) -> tuple[str, ...]:
        """Return the program and its arguments."""
        return (*shell, " ".join(self.words)) if self.is_shell else self.words


class Cmd(Instruction, frozen=True, kw_only=True):
    """Default command of the image."""

    command: CommandLine


class Entrypoint(Instruction, frozen=True, kw_only=True):
    """Entry point of the image."""

    command: CommandLine


class Shell(Instruction, frozen=True, kw_only=True):
    """Command that runs the shell form of instructions."""

    words: tuple[str, ...]


class Healthcheck(Instruction, frozen=True, kw_only=True):
    """Health check of the image's containers."""

    health: HealthConfig


class Run(Instruction, frozen=True, kw_only=True):
    """Command of a step."""

    command: CommandLine
    flags: tuple[str, ...] = ()
    """Names of the given flags."""
    mounts: tuple[str, ...] = ()
    """``--mount``, as written."""
    network: str = ""
    security: str = ""
    devices: tuple[str, ...] = ()
    """``--device``, as written."""


class Copy(Instruction, frozen=True, kw_only=True):
    """Copy of files into the image (COPY, ADD)."""

    expanded_fields = ("sources", "destination", "chown", "chmod", "checksum")
    sources: tuple[str, ...]
    documents: tuple[Heredoc, ...] = ()
    destination: str
    is_add: bool = False
    origin: str = ""
    """``--from``."""
    chown: str = ""
    chmod: str = ""
    checksum: str = ""
    excludes: tuple[str, ...] = ()
    unpack: bool | None = None
    """Whether archives are unpacked.  By default ADD unpacks local archives and not fetched ones."""
    keep_git_dir: bool | None = None
    flags: tuple[str, ...] = ()


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """A stage of a build."""

    base: From
    instructions: tuple[Instruction, ...] = ()


class Stages(msgspec.Struct, frozen=True, kw_only=True):
    """A whole Dockerfile.  ``arguments``: ARG before the first FROM."""

    stages: tuple[Stage, ...]
    arguments: tuple[Arg, ...] = ()
    escape: str = "\\"

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.arguments) + sum(1 + len(stage.instructions) for stage in self.stages)

    def steps_before(self, stage: int) -> int:
        """Number of the steps before a stage."""
        return len(self.arguments) + sum(1 + len(one.instructions) for one in self.stages[:stage])

    def index(self, name: str, *, before: int | None = None) -> int | None:
        """Return the last stage with this name, otherwise the stage with this number, or None.

        ``before``: Search only the stages before this one.
        """
        stages = self.stages[:before]
        for number in reversed(range(len(stages))):
            if stages[number].base.name and stages[number].base.name == name.lower():
                return number
        number = int(name) if name.isascii() and name.isdigit() and len(name) < 6 else -1
        return number if 0 <= number < len(stages) else None


def stages_of(parsed: Parsed) -> Stages:
    """Return the stages of a Dockerfile.  Raises: InvalidArgument: in Docker's words, with the line number."""
    arguments: list[Arg] = []
    stages: list[Stage] = []
    if len(parsed.lines) > STEPS_MAX:
        raise InvalidArgument(f"the Dockerfile has more than {STEPS_MAX} instructions")
    for line in parsed.lines:
        try:
            found = instruction_of(line)
        except InvalidArgument as error:
            raise InvalidArgument(f"dockerfile parse error line {line.number}: {error}") from error
        if isinstance(found, From):
            stages.append(Stage(base=found))
        elif stages:
            last = stages[-1]
            stages[-1] = msgspec.structs.replace(last, instructions=(*last.instructions, found))
        elif isinstance(found, Arg):
            arguments.append(found)
        else:
            raise InvalidArgument("no build stage in current context")
    return Stages(stages=tuple(stages), arguments=tuple(arguments), escape=parsed.escape)


def instruction_of(line: Line) -> Instruction:
    """Return a line as an instruction.

    Raises: InvalidArgument: it is not an instruction, or its arguments are not valid.
    """
    keyword = line.keyword.upper()
    rule = _RULES.get(keyword)
    if rule is None:
        raise InvalidArgument(f"unknown instruction: {keyword}")
    return rule(line, _Flags(line.flags))


def trigger_of(text: str) -> Instruction:
    """Parse the instruction of an ONBUILD.  Raises: InvalidArgument."""
    lines = parse(text).lines
    if len(lines) != 1:
        raise InvalidArgument("onbuild trigger should be a single expression")
    return instruction_of(lines[0])


class _Flags:
    """Flags of an instruction."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._values: dict[str, list[str]] = {}

    def parse(
        self, texts: Collection[str] = (), *, switches: Collection[str] = (), lists: Collection[str] = ()
    ) -> None:
        """Parse the flags.  Raises: InvalidArgument: a flag is unknown, duplicate, or has no value."""
        for word in self._words:
            flag, separator, value = word.partition("=")
            name = flag.removeprefix("--")
            if name not in (*texts, *switches, *lists):
                raise InvalidArgument(f"Unknown flag: {name}")
            if name in self._values and name not in lists:
                raise InvalidArgument(f"Duplicate flag specified: {name}")
            if name in switches:
                value = value.lower() if separator else "true"
                if value not in ("true", "false"):
                    raise InvalidArgument(
                        f"Expecting boolean value for flag {name}, not: {value}"
                        if value
                        else f"Missing a value on flag: {name}"
                    )
            elif not separator:
                raise InvalidArgument(f"Missing a value on flag: {name}")
            self._values.setdefault(name, []).append(value)

    def text(self, name: str) -> str:
        return self._values.get(name, [""])[0]

    def switch(self, name: str) -> bool | None:
        """Return whether the flag is on, or None if it is not given."""
        return self.text(name) == "true" if name in self._values else None

    def list(self, name: str) -> tuple[str, ...]:
        return tuple(self._values.get(name, ()))

    @property
    def used(self) -> tuple[str, ...]:
        return tuple(name for name, values in self._values.items() if values != ["false"])


def _common(line: Line) -> dict[str, object]:
    return {
        "text": readable(line.original.strip()),
        "keyword": line.keyword.upper(),
        "number": line.number,
        "heredocs": line.heredocs,
    }


def _one(line: Line) -> str:
    if len(line.arguments) != 1:
        raise InvalidArgument(f"{line.keyword.upper()} requires exactly one argument")
    return line.arguments[0]


def _some(line: Line) -> tuple[str, ...]:
    if not line.arguments:
        raise InvalidArgument(f"{line.keyword.upper()} requires at least one argument")
    return line.arguments


def _from(line: Line, flags: _Flags) -> From:
    words = line.arguments
    name = ""
    if len(words) == 3 and words[1].lower() == "as":
        name = words[2].lower()
        if not _STAGE_NAME.fullmatch(name):
            raise InvalidArgument(
                f"invalid name for build stage: {quoted(words[2])}, name can't start with a number or contain symbols"
            )
    elif len(words) != 1:
        raise InvalidArgument("FROM requires either one or three arguments")
    flags.parse(["platform"])
    return msgspec.convert(
        {**_common(line), "base": words[0], "name": name, "platform": flags.text("platform")}, From
    )


def _arg(line: Line, flags: _Flags) -> Arg:
    pairs: list[tuple[str, str | None]] = []
    for word in _some(line):
        name, separator, value = word.partition("=")
        if separator and not name:
            raise InvalidArgument("ARG names can not be blank")
        pairs.append((name, value if separator else None))
    flags.parse()
    return msgspec.convert({**_common(line), "pairs": pairs}, Arg)


def _pairs(line: Line, flags: _Flags) -> tuple[tuple[str, str], ...]:
    flags.parse()
    words = _some(line)
    if not all(words[::3]):
        raise InvalidArgument(f"{line.keyword.upper()} names can not be blank")
    return tuple(zip(words[::3], words[1::3], strict=True))


def _command_line(line: Line) -> CommandLine:
    return CommandLine(words=line.arguments, is_shell=not line.is_json)


def _run(line: Line, flags: _Flags) -> Run:
    flags.parse(["network", "security"], lists=["mount", "device"])
    return msgspec.convert(
        {
            **_common(line),
            "command": _command_line(line),
            "flags": flags.used,
            "mounts": flags.list("mount"),
            "network": flags.text("network"),
            "security": flags.text("security"),
            "devices": flags.list("device"),
        },
        Run,
    )


def _copy(line: Line, flags: _Flags) -> Copy:
    keyword = line.keyword.upper()
    if len(line.arguments) < 2:
        raise InvalidArgument(
            f"{keyword} requires at least two arguments, but only one was provided."
            " Destination could not be determined"
        )
    if keyword == "ADD":
        flags.parse(
            ["chown", "chmod", "checksum"], switches=["link", "keep-git-dir", "unpack"], lists=["exclude"]
        )
    else:
        flags.parse(["chown", "chmod", "from"], switches=["link", "parents"], lists=["exclude"])
    *sources, destination = line.arguments
    contents = {document.name: document for document in line.heredocs}
    if heredoc_of(destination) is not None:
        raise InvalidArgument(f"{keyword} cannot accept a heredoc as a destination")
    named = {source: heredoc_of(source) for source in sources} if contents else {}
    return msgspec.convert(
        {
            **_common(line),
            "sources": [source for source in sources if named.get(source) is None],
            "documents": [contents[one.name] for one in named.values() if one is not None],
            "destination": destination,
            "is_add": keyword == "ADD",
            "origin": flags.text("from"),
            "chown": flags.text("chown"),
            "chmod": flags.text("chmod"),
            "checksum": flags.text("checksum"),
            "excludes": flags.list("exclude"),
            "unpack": flags.switch("unpack"),
            "keep_git_dir": flags.switch("keep-git-dir"),
            "flags": flags.used,
        },
        Copy,
    )


def _health(line: Line, flags: _Flags) -> Healthcheck:
    kind, *command = _some(line)
    kind = kind.upper()
    if kind == "NONE":
        if command:
            raise InvalidArgument("HEALTHCHECK NONE takes no arguments")
        return msgspec.convert({**_common(line), "health": HealthConfig(test=("NONE",))}, Healthcheck)
    flags.parse(["interval", "timeout", "start-period", "start-interval", "retries"])
    if kind != "CMD":
        raise InvalidArgument(f"Unknown type {quoted(kind)} in HEALTHCHECK (try CMD)")
    if not command:
        raise InvalidArgument("Missing command after HEALTHCHECK CMD")
    retries = flags.text("retries") or "0"
    if not re.fullmatch(r"-?[0-9]{1,9}", retries):
        raise InvalidArgument(f"strconv.ParseInt: parsing {quoted(retries)}: invalid syntax")
    if int(retries) < 0:
        raise InvalidArgument(f"--retries cannot be negative ({retries})")
    health = HealthConfig(
        test=("CMD" if line.is_json else "CMD-SHELL", *command),
        interval=_interval(flags, "interval"),
        timeout=_interval(flags, "timeout"),
        start_period=_interval(flags, "start-period"),
        start_interval=_interval(flags, "start-interval"),
        retries=int(retries),
    )
    return msgspec.convert({**_common(line), "health": health}, Healthcheck)


def _interval(flags: _Flags, name: str) -> int:
    text = flags.text(name)
    if not text:
        return 0
    interval_ns = duration_ns(text)
    if interval_ns is None:
        raise InvalidArgument(f"time: invalid duration {quoted(text)}")
    if interval_ns and interval_ns < _HEALTH_INTERVAL_NS_MIN:
        raise InvalidArgument(f"Interval {quoted(name)} cannot be less than 1ms")
    return interval_ns


def _on_build(line: Line, flags: _Flags) -> OnBuild:
    trigger = _some(line)[0].upper()
    flags.parse()
    if trigger == "ONBUILD":
        raise InvalidArgument("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed")
    if trigger in ("MAINTAINER", "FROM"):
        raise InvalidArgument(f"{trigger} isn't allowed as an ONBUILD trigger")
    expression = re.sub(r"(?i)^\s*ONBUILD\s*", "", line.original)
    for document in line.heredocs:
        expression += f"\n{document.content}{document.name}"
    return msgspec.convert({**_common(line), "expression": expression}, OnBuild)


def _shell(line: Line, flags: _Flags) -> Shell:
    flags.parse()
    words = _some(line)
    if not line.is_json:
        raise InvalidArgument("SHELL requires the arguments to be in JSON form")
    return msgspec.convert({**_common(line), "words": words}, Shell)


def _volume(line: Line, flags: _Flags) -> Volume:
    flags.parse()
    paths = [path.strip() for path in _some(line)]
    if not all(paths):
        raise InvalidArgument("VOLUME specified can not be an empty string")
    return msgspec.convert({**_common(line), "paths": paths}, Volume)


def _simple(
    type: Callable[..., Instruction], field: str, value: Callable[[Line], object]
) -> Callable[[Line, _Flags], Instruction]:
    def rule(line: Line, flags: _Flags) -> Instruction:
        flags.parse()
        return type(**_common(line), **{field: value(line)})

    return rule


_RULES: Mapping[str, Callable[[Line, _Flags], Instruction]] = {
    "ADD": _copy,
    "ARG": _arg,
    "CMD": _simple(Cmd, "command", _command_line),
    "COPY": _copy,
    "ENTRYPOINT": _simple(Entrypoint, "command", _command_line),
    "ENV": lambda line, flags: Env(**_common(line), pairs=_pairs(line, flags)),  # type: ignore[arg-type]
    "EXPOSE": _simple(Expose, "ports", lambda line: tuple(sorted(_some(line)))),
    "FROM": _from,
    "HEALTHCHECK": _health,
    "LABEL": lambda line, flags: Label(**_common(line), pairs=_pairs(line, flags)),  # type: ignore[arg-type]
    "MAINTAINER": _simple(Maintainer, "author", _one),
    "ONBUILD": _on_build,
    "RUN": _run,
    "SHELL": _shell,
    "STOPSIGNAL": _simple(StopSignal, "signal", _one),
    "USER": _simple(User, "user", _one),
    "VOLUME": _volume,
    "WORKDIR": _simple(Workdir, "path", _one),
}

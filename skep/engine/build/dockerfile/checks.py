"""Build checks: constructions in a Dockerfile that are valid but probably a mistake.  Pure.

Names, texts and order are BuildKit's.  ``# check=skip=NAME,...;error=true`` selects the checks of a Dockerfile.  A
comment ``# check=skip=NAME`` selects the checks of the next instruction.

Source: buildkit, frontend/dockerfile/linter (ruleset.go, linter.go), dockerfile2llb/validations.go, convert.go.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import msgspec

from skep.engine.build.dockerfile.config import (
    BuildArguments,
    StageArguments,
    StageState,
    begun,
    changed,
    expanded,
    variables_of,
)
from skep.engine.build.dockerfile.dockerfile import Line, Parsed, quoted
from skep.engine.build.dockerfile.instructions import (
    Arg,
    Cmd,
    Copy,
    Entrypoint,
    Env,
    Expose,
    From,
    Healthcheck,
    Instruction,
    Label,
    Maintainer,
    Stages,
    Workdir,
)
from skep.engine.build.dockerfile.substitution import Budget, split, substituted
from skep.engine.images.image import ContainerDefaults
from skep.engine.images.platforms import parse_platform
from skep.engine.images.reference import parse_reference
from skep.errors import InvalidArgument

_URL = "https://docs.docker.com/go/dockerfile/rule/"
_SUGGESTED_DISTANCE_MAX = 2
"""A name is suggested up to this edit distance, as in BuildKit's util/suggest."""
_SUGGESTED_LENGTH_MAX = 64
"""Longer names are not compared, because the cost of a comparison grows with the product of both lengths."""
_COMPARISONS_MAX = 100_000
"""Maximum number of comparisons for suggestions in one Dockerfile.  Further unknown variables get no suggestion."""
_FINDINGS_MAX = 1000
"""Maximum number of findings in one Dockerfile.  Further findings are left out."""
_RESERVED = ("context", "scratch")
_SECRET = re.compile(
    r"(?:_|^)(?:apikey|auth|credentials?|key|password|pword|passwd|secret|token)(?:_|$)", re.IGNORECASE
)
_NO_SECRET = re.compile(r"(?:_|^)(?:public|file|version)(?:_|$)", re.IGNORECASE)
_DESCRIPTIONS = {
    "NoEmptyContinuation": "Empty continuation lines will become errors in a future release",
    "StageNameCasing": "Stage names should be lowercase",
    "FromAsCasing": "The 'as' keyword should match the case of the 'from' keyword",
    "MaintainerDeprecated": (
        "The MAINTAINER instruction is deprecated, use a label instead to define an image author"
    ),
    "ReservedStageName": "Reserved words should not be used as stage names",
    "DuplicateStageName": "Stage names should be unique",
    "ConsistentInstructionCasing": (
        "All commands within the Dockerfile should use the same casing (either upper or lower)"
    ),
    "InvalidDefaultArgInFrom": (
        "Default value for global ARG results in an empty or invalid base image name"
    ),
    "UndefinedArgInFrom": "FROM command must use declared ARGs",
    "RedundantTargetPlatform": (
        "Setting platform to predefined $TARGETPLATFORM in FROM is redundant as this is the default behavior"
    ),
    "FromPlatformFlagConstDisallowed": "FROM --platform flag should not use a constant value",
    "UndefinedVar": "Variables should be defined before their use",
    "LegacyKeyValueFormat": "Legacy key/value format with whitespace separator should not be used",
    "SecretsUsedInArgOrEnv": "Sensitive data should not be used in the ARG or ENV commands",
    "WorkdirRelativePath": (
        "Relative workdir without an absolute workdir declared within the build can have unexpected results if the"
        " base image changes"
    ),
    "JSONArgsRecommended": (
        "JSON arguments recommended for ENTRYPOINT/CMD to prevent unintended behavior related to OS signals"
    ),
    "MultipleInstructionsDisallowed": (
        "Multiple instructions of the same type should not be used in the same stage"
    ),
    "ExposeProtoCasing": "Protocol in EXPOSE instruction should be lowercase",
    "ExposeInvalidFormat": (
        "IP address and host-port mapping should not be used in EXPOSE instruction. This will become an error in a"
        " future release"
    ),
}


class Finding(msgspec.Struct, frozen=True):
    """Finding of a check on lines ``first`` to ``last``."""

    rule: str
    text: str
    first: int
    last: int

    @property
    def description(self) -> str:
        """Description of the rule."""
        return _DESCRIPTIONS[self.rule]

    @property
    def url(self) -> str:
        """Page of the rule in Docker's documentation."""
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+", self.rule)
        return _URL + "-".join(words).lower() + "/"

    @property
    def summary(self) -> str:
        """The finding in one line, as BuildKit shows it in a build."""
        return f"{self.rule}: {self.text} (line {self.first})"


class CheckSelection(msgspec.Struct, frozen=True):
    """Selection of checks.  ``is_error``: Whether a finding fails the build."""

    skips_all: bool = False
    skipped: frozenset[str] = frozenset()
    is_error: bool = False

    def has(self, rule: str) -> bool:
        """Return whether the rule is checked."""
        return not self.skips_all and rule not in self.skipped


def parse_choice(text: str) -> CheckSelection:
    """Parse ``skip=a,b;error=true``.  Raises: InvalidArgument, in BuildKit's words."""
    choice = CheckSelection()
    for part in text.strip().split(";", 2) if text.strip() else ():
        name, separator, value = part.partition("=")
        name, value = name.strip(), value.strip()
        if not separator:
            raise InvalidArgument(f"invalid check option {quoted(part)}")
        if name == "skip":
            names = frozenset(one.strip() for one in value.split(","))
            choice = CheckSelection(value == "all", names, choice.is_error)
        elif name == "error":
            if value.lower() not in ("1", "t", "true", "0", "f", "false"):
                raise InvalidArgument(f"failed to parse check option {quoted(part)}")
            choice = msgspec.structs.replace(choice, is_error=value.lower() in ("1", "t", "true"))
        elif name != "experimental":  # the only experimental rule, about descriptions, is not implemented
            raise InvalidArgument(f"invalid check option {quoted(name)}")
    return choice


def suggested(word: str, options: Collection[str]) -> str:
    """Return the option that is closest to ``word``.  Empty if none is within two edits."""
    best, found = _SUGGESTED_DISTANCE_MAX + 1, ""
    for option in options:
        if option == word:
            return ""
        distance = _distance(word, option)
        if distance < best:
            best, found = distance, option
    return found


def _distance(one: str, other: str) -> int:
    """Return Levenshtein's distance, or a larger number than the maximum."""
    if (
        max(len(one), len(other)) > _SUGGESTED_LENGTH_MAX
        or abs(len(one) - len(other)) > _SUGGESTED_DISTANCE_MAX
    ):
        return _SUGGESTED_DISTANCE_MAX + 1
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


class _Seen(Mapping[str, str]):
    """Variables that record failed lookups."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self.missing: list[str] = []

    def __getitem__(self, name: str) -> str:
        try:
            return self._variables[name]
        except KeyError:
            self.missing.append(name)
            raise

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)


EnvOf = Callable[[str], Sequence[str] | None]
"""Returns the variables of an image, or None if the image is not on this node."""


class Checks:
    """Checks one Dockerfile."""

    def __init__(
        self,
        parsed: Parsed,
        stages: Stages,
        given: Mapping[str, str | None],
        automatic: Mapping[str, str],
        env_of: EnvOf,
        choice: CheckSelection,
    ) -> None:
        self._parsed = parsed
        self._stages = stages
        self._given = given
        self._automatic = automatic
        self._env_of = env_of
        self._choice = choice
        self._budget = Budget()
        self._comparisons = 0
        self._lines = {line.number: line for line in parsed.lines}
        self._found: list[Finding] = []
        self._arguments = BuildArguments(given, automatic, is_buildkit=True)
        self._states: dict[int, tuple[StageState, bool]] = {}
        """Final state of each checked stage, and whether all its variables are known."""
        self._ended: dict[int, StageArguments] = {}
        self._has_directory: dict[int, bool] = {}

    def run(self, needed: Collection[int]) -> Sequence[Finding]:
        """Return the findings in BuildKit's order.  ``needed``: Stages whose instructions are checked."""
        for number in self._parsed.empty_continuations:
            self._add("NoEmptyContinuation", "Empty continuation line", number)
        self._names_and_cases()
        self._default_arguments()
        for arg in self._stages.arguments:
            self._declare(arg, self._arguments.of_stages, is_checked=False, before_stages=True)
        for stage in self._stages.stages:
            self._from(stage.base)
        for number in range(len(self._stages.stages)):
            if number in needed:
                self._stage(number)
        return self._found

    def _add(self, rule: str, text: str, place: Instruction | int) -> None:
        number = place if isinstance(place, int) else place.number
        line = self._lines.get(number)
        if len(self._found) >= _FINDINGS_MAX:
            return
        if self._choice.has(rule) and (line is None or _own_choice(line).has(rule)):
            self._found.append(Finding(rule, text, number, line.last if line is not None else number))

    def _suggested(self, word: str, options: Collection[str]) -> str:
        self._comparisons += len(options)
        return suggested(word, options) if self._comparisons <= _COMPARISONS_MAX else ""

    # --- names and cases ------------------------------------------------------------------------------------------

    def _names_and_cases(self) -> None:
        for stage in self._stages.stages:
            self._case_of_from(stage.base)
            for one in stage.instructions:
                if isinstance(one, Maintainer):
                    text = "Maintainer instruction is deprecated in favor of using label"
                    self._add("MaintainerDeprecated", text, one)
        names = set[str]()
        for stage in self._stages.stages:
            name = stage.base.name
            if name in _RESERVED:
                text = f"Stage name should not use the same name as reserved stage {quoted(name)}"
                self._add("ReservedStageName", text, stage.base)
            if name in names:
                text = f"Duplicate stage name {quoted(name)}, stage names should be unique"
                self._add("DuplicateStageName", text, stage.base)
            names |= {name} - {""}
        self._casing_of_keywords()

    def _case_of_from(self, base: From) -> None:
        line = self._lines[base.number]
        if len(line.arguments) != 3:
            return
        _, word, name = line.arguments
        if name != name.lower():
            self._add("StageNameCasing", f"Stage name '{name}' should be lowercase", base)
        keyword = line.keyword
        wanted = {keyword.lower(): word.lower(), keyword.upper(): word.upper()}.get(keyword, word)
        if word != wanted:
            self._add("FromAsCasing", f"'{word}' and '{keyword}' keywords' casing do not match", base)

    def _casing_of_keywords(self) -> None:
        first = self._stages.stages[0].base.number
        keywords = [(line.keyword, line.number) for line in self._parsed.lines if line.number >= first]
        consistent = [word for word, _ in keywords if word in (word.lower(), word.upper())]
        lower = sum(word == word.lower() for word in consistent)
        is_lower = lower > len(consistent) - lower
        for word, number in keywords:
            if word != (word.lower() if is_lower else word.upper()):
                case = "lowercase" if is_lower else "uppercase"
                text = f"Command '{word}' should match the case of the command majority ({case})"
                self._add("ConsistentInstructionCasing", text, number)

    # --- FROM -----------------------------------------------------------------------------------------------------

    def _default_arguments(self) -> None:
        defaults = BuildArguments({}, self._automatic, is_buildkit=True)
        try:
            for arg in self._stages.arguments:
                ready = expanded(arg, defaults.of_stages, self._stages.escape, self._budget)
                assert isinstance(ready, Arg), "expanding keeps the type"
                for name, value in ready.pairs:
                    defaults.declare(name, value, before_stages=True)
            for stage in self._stages.stages:
                name = substituted(stage.base.base, defaults.of_stages, self._stages.escape, self._budget)
                if not _is_reference(name):
                    text = (
                        f"Default value for ARG {stage.base.base} results in empty or invalid base image name"
                    )
                    self._add("InvalidDefaultArgInFrom", text, stage.base)
        except InvalidArgument:
            return  # the build fails with the reason

    def _from(self, base: From) -> None:
        known = self._arguments.of_stages
        declared = {name for arg in self._stages.arguments for name, _ in arg.pairs} | known.keys()
        for word in filter(None, (base.base, base.platform)):
            seen = _Seen(known)
            substituted(word, seen, self._stages.escape, self._budget)
            for name in seen.missing:
                if name not in declared:
                    hint = self._suggested(name, sorted(declared))
                    text = f"FROM argument '{name}' is not declared" + (
                        f" (did you mean {hint}?)" if hint else ""
                    )
                    self._add("UndefinedArgInFrom", text, base)
        if base.platform in ("$TARGETPLATFORM", "${TARGETPLATFORM}"):
            text = (
                f"Setting platform to predefined {base.platform} in FROM is redundant as this is the default"
                " behavior"
            )
            self._add("RedundantTargetPlatform", text, base)
        if base.platform and "$" not in base.platform:
            try:
                platform = parse_platform(base.platform)
            except InvalidArgument:
                return
            if platform.os not in base.name and platform.architecture not in base.name:
                text = f"FROM --platform flag should not use constant value {quoted(base.platform)}"
                self._add("FromPlatformFlagConstDisallowed", text, base)

    # --- the instructions of a stage ------------------------------------------------------------------------------

    def _stage(self, number: int) -> None:
        stage = self._stages.stages[number]
        name = substituted(stage.base.base, self._arguments.of_stages, self._stages.escape, self._budget)
        index = self._stages.index(name, before=number) if not name.isdigit() else None
        if index is not None and index not in self._states:
            self._stage(index)
        env: Sequence[str] | None = ()
        if index is not None:
            state, is_known = self._states[index]
            state = msgspec.structs.replace(state, has_cmd=False)
            self._arguments.begin_stage(self._ended[index], state.config.env or ())
        else:
            env = () if name == "scratch" else self._env_of(name)
            state, is_known = begun(ContainerDefaults(env=tuple(env or ()))), env is not None
            self._arguments.begin_stage()
        used = dict[type[Instruction], Instruction]()
        has_directory = self._has_directory.get(index, False) if index is not None else False
        for one in stage.instructions:
            variables = variables_of(state, self._arguments.visible(state.config.env or ()))
            if isinstance(one, Arg):
                self._declare(one, variables, is_checked=is_known)
                continue
            if is_known:
                self._undefined(one, variables)
            self._one(one, state, has_directory=has_directory)
            has_directory = has_directory or isinstance(one, Workdir)
            if isinstance(one, Cmd | Entrypoint | Healthcheck):
                if before := used.get(type(one)):
                    text = (
                        f"Multiple {one.keyword} instructions should not be used in the same stage because only the"
                        " last one will be used"
                    )
                    self._add("MultipleInstructionsDisallowed", text, before)
                used[type(one)] = one
            state = self._after(state, one, variables)
        self._states[number] = (state, is_known)
        self._ended[number] = self._arguments.stage
        self._has_directory[number] = has_directory

    def _after(self, state: StageState, one: Instruction, variables: Mapping[str, str]) -> StageState:
        try:
            ready = expanded(one, variables, self._stages.escape, self._budget)
            if isinstance(ready, Env):
                self._arguments.hide(name for name, _ in ready.pairs)
            return changed(state, ready)[0]
        except InvalidArgument:
            return state  # RUN and COPY change no configuration; an invalid instruction fails the build

    def _declare(
        self, arg: Arg, variables: Mapping[str, str], *, is_checked: bool, before_stages: bool = False
    ) -> None:
        for name, default in arg.pairs:
            if not before_stages:
                self._secret("ARG", name, arg)
            if default is not None and self._given.get(name) is None and is_checked:
                self._missing(default, variables, arg)
        try:
            ready = expanded(arg, variables, self._stages.escape, self._budget, self._given)
        except InvalidArgument:
            return
        assert isinstance(ready, Arg), "expanding keeps the type"
        for name, value in ready.pairs:
            self._arguments.declare(name, value, before_stages=before_stages)

    def _undefined(self, one: Instruction, variables: Mapping[str, str]) -> None:
        for word in _words_of(one):
            self._missing(word, variables, one)

    def _missing(self, word: str, variables: Mapping[str, str], place: Instruction) -> None:
        seen = _Seen(variables)
        try:
            substituted(word, seen, self._stages.escape, self._budget)
        except InvalidArgument:
            return
        for name in dict.fromkeys(seen.missing):
            if name not in self._arguments.stage.declared:
                hint = self._suggested(name, variables)
                text = f"Usage of undefined variable '${name}'" + (
                    f" (did you mean ${hint}?)" if hint else ""
                )
                self._add("UndefinedVar", text, place)

    def _one(self, one: Instruction, state: StageState, *, has_directory: bool) -> None:
        line = self._lines.get(one.number)
        match one:
            case Env(pairs=pairs):
                self._legacy(one, line)
                for name, _ in pairs:
                    self._secret("ENV", name, one)
            case Label():
                self._legacy(one, line)
            case Workdir(path=path) if not has_directory and not path.startswith("/"):
                text = (
                    f"Relative workdir {quoted(path)} can have unexpected results if the base image changes"
                )
                self._add("WorkdirRelativePath", text, one)
            case Cmd(command=command) | Entrypoint(command=command) if command.is_shell:
                if not state.config.shell:
                    text = (
                        f"JSON arguments recommended for {one.keyword} to prevent unintended behavior related to OS"
                        " signals"
                    )
                    self._add("JSONArgsRecommended", text, one)
            case Expose(ports=ports):
                self._ports(one, ports, state)

    def _legacy(self, one: Instruction, line: Line | None) -> None:
        for separator in line.arguments[2::3] if line is not None else ():
            if not separator:
                word = one.keyword
                text = f'"{word} key=value" should be used instead of legacy "{word} key value" format'
                self._add("LegacyKeyValueFormat", text, one)

    def _secret(self, keyword: str, name: str, place: Instruction) -> None:
        if _SECRET.search(name) and not _NO_SECRET.search(name):
            text = f"Do not use ARG or ENV instructions for sensitive data ({keyword} {quoted(name)})"
            self._add("SecretsUsedInArgOrEnv", text, place)

    def _ports(self, one: Instruction, ports: Sequence[str], state: StageState) -> None:
        variables = variables_of(state, self._arguments.visible(state.config.env or ()))
        for port in (
            word for text in ports for word in split(text, variables, self._stages.escape, self._budget)
        ):
            if port.partition("/")[2] != port.partition("/")[2].lower():
                text = f"Defined protocol '{port}' in EXPOSE instruction should be lowercase"
                self._add("ExposeProtoCasing", text, one)
            if ":" in port:
                text = (
                    f"EXPOSE instruction should not define an IP address or host-port mapping, found '{port}'"
                )
                self._add("ExposeInvalidFormat", text, one)


def _own_choice(line: Line) -> CheckSelection:
    """Return the selection in the comments before an instruction.  An invalid one selects every check."""
    for comment in line.comments:
        found = re.fullmatch(r"(?i:check)\s*=\s*(\S+).*", comment)
        if found is not None:
            try:
                return parse_choice(found[1])
            except InvalidArgument:
                return CheckSelection()
    return CheckSelection()


def _words_of(one: Instruction) -> Iterator[str]:
    """Yield the texts of an instruction that have variables."""
    if isinstance(one, Expose):
        return
    if isinstance(one, Copy):
        yield from one.sources
        yield one.destination
        yield one.chown
        yield one.chmod
        return
    pending: list[object] = [getattr(one, name) for name in reversed(one.expanded_fields)]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple):
            pending += reversed(value)


def _is_reference(name: str) -> bool:
    try:
        parse_reference(name)
    except InvalidArgument:
        return False
    return True

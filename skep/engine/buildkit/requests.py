"""Requests to a front end that do not build: checks, targets and arguments of a Dockerfile (``build --call``).

Source: buildkit, frontend/subrequests (lint, outline, targets), frontend/dockerfile/dockerfile2llb/outline.go.
"""

from base64 import b64encode
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from skep.engine.build.dockerfile import targets
from skep.engine.build.dockerfile.checks import Checks, CheckSelection, EnvOf, Finding, parse_choice
from skep.engine.build.dockerfile.config import BuildArguments, expanded
from skep.engine.build.dockerfile.dockerfile import Line, Parsed, parse
from skep.engine.build.dockerfile.instructions import Arg, Run, Stages, stages_of
from skep.engine.build.dockerfile.mounts import parse_mount
from skep.engine.build.dockerfile.substitution import Budget, substituted
from skep.engine.buildkit.options import BuildOptions, check_syntax
from skep.errors import InvalidArgument, SkepError, Unimplemented

_VERSION = "1.0.0"
_REQUESTS = {
    "frontend.outline": "List all parameters current build target supports",
    "frontend.targets": "List all targets current build supports",
    "frontend.lint": "Lint a Dockerfile",
    "frontend.subrequests.describe": "List available subrequest types",
}


def findings(text: str, build: BuildOptions, env_of: EnvOf, *, all_stages: bool = False) -> Sequence[Finding]:
    """Return the findings of the checks of a Dockerfile.

    Args:
        env_of: Returns the variables of an image on this node.
        all_stages: Whether to check stages that the target does not need.

    Raises: InvalidArgument: it cannot be read.
    """
    parsed = parse(text)
    choice = parse_choice(build.checks or parsed.check)
    stages = stages_of(parsed)
    if not stages.stages:
        return ()
    automatic = targets.automatic_arguments(stages, build.target, build.platforms[0])
    needed = range(len(stages.stages)) if all_stages else _needed(stages, build)
    return Checks(parsed, stages, build.arguments, automatic, env_of, choice).run(needed)


def findings_of_build(text: str, build: BuildOptions, env_of: EnvOf) -> tuple[Sequence[Finding], str]:
    """Return the findings before a build, and the error if they fail the build, or an empty text.

    Raises: InvalidArgument: the choice of checks cannot be read; Unimplemented: the Dockerfile has another language.
    """
    parsed = parse(text)
    if not build.has_syntax:
        check_syntax(parsed.syntax)
    choice: CheckSelection = parse_choice(build.checks or parsed.check)
    try:
        found = findings(text, build, env_of)
    except InvalidArgument:
        return (), ""  # the build fails later with the reason
    rules = ", ".join(dict.fromkeys(one.rule for one in found))
    return found, f"lint violation found for rules: {rules}" if choice.is_error and found else ""


def answer(text: str, build: BuildOptions, request: str, env_of: EnvOf) -> Mapping[str, bytes]:
    """Return the response to a request, as metadata of a result.

    Raises: Unimplemented: the request is unknown; InvalidArgument: the Dockerfile cannot be read.
    """
    if request == "frontend.subrequests.describe":
        requests: Sequence[Mapping[str, object]] = [
            {"name": name, "version": _VERSION, "type": "rpc", "description": words}
            for name, words in _REQUESTS.items()
        ]
        return _result(requests, "".join(f"{one['name']}\n" for one in requests))
    if request == "frontend.lint":
        return _lint(text, build, env_of)
    given: dict[str, Callable[[str, BuildOptions], Mapping[str, Any]]] = {
        "frontend.targets": _targets,
        "frontend.outline": _outline,
    }
    if request not in given:
        raise Unimplemented(f"unsupported request {request}")
    found = given[request](text, build)
    rows = [*found.get("targets", ()), *found.get("args", ())]
    return _result(found, "".join(f"{row.get('name', '')}\n" for row in rows))


def _result(document: object, text: str, **more: str) -> Mapping[str, bytes]:
    encoded = msgspec.json.format(msgspec.json.encode(document), indent=2)
    found = {"result.json": encoded, "result.txt": text.encode(), "version": _VERSION.encode()}
    return {**found, **{f"result.{name}": value.encode() for name, value in more.items()}}


def _lint(text: str, build: BuildOptions, env_of: EnvOf) -> Mapping[str, bytes]:
    """Check a Dockerfile.  Its errors are part of the response."""
    error, found = "", list[Finding]()
    try:
        found = list(findings(text, build, env_of, all_stages=not build.target))
    except SkepError as refused:
        error = str(refused)
    document: dict[str, object] = {
        "warnings": [
            {
                "ruleName": one.rule,
                "description": one.description,
                "url": one.url,
                "detail": one.text,
                "location": _location(one.first, one.last),
            }
            for one in found
        ],
        "sources": [
            {"filename": build.filename, "language": "Dockerfile", "data": b64encode(text.encode()).decode()}
        ],
    }
    if error:
        document["buildError"] = {"message": error, "location": {}}
    lines = "".join(f"{one.summary}\n" for one in found) + (f"{error}\n" if error else "")
    return _result(document, lines, statuscode="1" if found or error else "0")


def _location(first: int, last: int) -> Mapping[str, object]:
    return {"ranges": [{"start": {"line": first}, "end": {"line": last}}]}


def base_names(text: str, build: BuildOptions) -> Collection[str]:
    """Return the base images and stages of a Dockerfile's stages.  Empty if it cannot be read."""
    try:
        stages = stages_of(parse(text))
        if not stages.stages:
            return ()
        arguments = _global_arguments(stages, build).of_stages
        budget = Budget()
        return {substituted(stage.base.base, arguments, stages.escape, budget) for stage in stages.stages}
    except InvalidArgument:
        return ()


def _global_arguments(stages: Stages, build: BuildOptions) -> BuildArguments:
    """Return the arguments before the first FROM.  Raises: InvalidArgument."""
    automatic = targets.automatic_arguments(stages, build.target, build.platforms[0])
    arguments, budget = BuildArguments(build.arguments, automatic, is_buildkit=True), Budget()
    for arg in stages.arguments:
        ready = expanded(arg, arguments.of_stages, stages.escape, budget, build.arguments)
        assert isinstance(ready, Arg), "expanding keeps the type"
        for name, value in ready.pairs:
            arguments.declare(name, value, before_stages=True)
    return arguments


def _needed(stages: Stages, build: BuildOptions) -> Sequence[int]:
    """Return the stages that the target needs.  Raises: InvalidArgument."""
    last = _target(stages, build)
    chosen = msgspec.structs.replace(stages, stages=stages.stages[: last + 1])
    arguments = _global_arguments(stages, build).of_stages
    contexts = {*build.images, *build.directories, *build.remotes}
    return sorted(targets.needed(chosen, arguments, Budget(), contexts))


def _target(stages: Stages, build: BuildOptions) -> int:
    last = stages.index(build.target) if build.target else len(stages.stages) - 1
    if last is None or last < 0:
        raise InvalidArgument(f"target stage {build.target} could not be found")
    return last


def _described(line: Line, name: str) -> str:
    """Return the description of a name in a comment before the line: ``# NAME description``."""
    for comment in line.comments:
        if name and comment.startswith(f"{name} "):
            return comment.removeprefix(f"{name} ")
    return ""


def _targets(text: str, build: BuildOptions) -> Mapping[str, Any]:
    parsed = parse(text)
    stages = stages_of(parsed)
    lines = {line.number: line for line in parsed.lines}
    found = []
    for number, stage in enumerate(stages.stages):
        base, line = stage.base, lines[stage.base.number]
        row = {
            "name": base.name,
            "default": number == len(stages.stages) - 1,
            "description": _described(line, base.name),
            "base": base.base,
            "platform": base.platform,
            "location": _location(line.number, line.last),
        }
        found.append({name: value for name, value in row.items() if value})
    return {"targets": found, "sources": [b64encode(text.encode()).decode()]}


def _outline(text: str, build: BuildOptions) -> Mapping[str, Any]:
    """Return arguments, secrets and ssh agents of the target."""
    parsed = parse(text)
    stages = stages_of(parsed)
    if not stages.stages:
        raise InvalidArgument("dockerfile contains no stages to build")
    lines = {line.number: line for line in parsed.lines}
    automatic = targets.automatic_arguments(stages, build.target, build.platforms[0])
    base = stages.stages[_target(stages, build)].base
    found: dict[str, dict[str, dict[str, object]]] = {"args": {}, "secrets": {}, "ssh": {}}
    needed = _needed(stages, build)
    for arg, value in _arguments(parsed, stages, build, automatic, needed):
        line = lines[arg.number]
        for name, _ in arg.pairs:
            row: dict[str, object] = {
                "name": name,
                "description": _described(line, name),
                "value": value.get(name),
            }
            found["args"].setdefault(name, {**row, "location": _location(line.number, line.last)})
    for run in (one for number in needed for one in stages.stages[number].instructions):
        for mount in (parse_mount(text, str) for text in (run.mounts if isinstance(run, Run) else ())):
            if mount.type in ("secret", "ssh"):
                kind, default = ("secrets", mount.source) if mount.type == "secret" else ("ssh", "default")
                name = mount.id or default or mount.target.rpartition("/")[2]
                line = lines[run.number]
                found[kind].setdefault(
                    name,
                    {"name": name, "required": mount.required, "location": _location(line.number, line.last)},
                )
    document = {
        "name": base.name,
        "description": _described(lines[base.number], base.name),
        **{kind: [_present(row) for row in rows.values()] for kind, rows in found.items()},
        "sources": [b64encode(text.encode()).decode()],
    }
    return _present(document)


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value}


def _arguments(
    parsed: Parsed, stages: Stages, build: BuildOptions, automatic: Mapping[str, str], needed: Sequence[int]
) -> Sequence[tuple[Arg, Mapping[str, str]]]:
    """Return the declarations that the target uses, with their values.

    Declarations before the first FROM are included if a stage or a base image uses them.
    """
    known, budget = BuildArguments(build.arguments, automatic, is_buildkit=True), Budget()

    def declared(arg: Arg, *, before_stages: bool) -> Mapping[str, str]:
        variables = known.of_stages if before_stages else known.visible(())
        ready = expanded(arg, variables, stages.escape, budget, build.arguments)
        assert isinstance(ready, Arg), "expanding keeps the type"
        for name, value in ready.pairs:
            known.declare(name, value, before_stages=before_stages)
        return dict(known.of_stages if before_stages else known.visible(()))

    before = [(arg, declared(arg, before_stages=True)) for arg in stages.arguments]
    names = {
        name
        for number in needed
        for one in stages.stages[number].instructions
        if isinstance(one, Arg)
        for name, default in one.pairs
        if default is None
    }
    texts = " ".join(stages.stages[number].base.base for number in needed)
    found = [
        (arg, values)
        for arg, values in before
        if any(name in names or _is_used(name, texts, stages.escape) for name, _ in arg.pairs)
    ]
    for number in needed:
        known.begin_stage()
        own = [one for one in stages.stages[number].instructions if isinstance(one, Arg)]
        found += [(one, declared(one, before_stages=False)) for one in own]
    return found


def _is_used(name: str, text: str, escape: str) -> bool:
    """Return whether the value of a variable changes a text."""
    return len({substituted(text, values, escape) for values in ({name: "a"}, {name: "b"})}) > 1

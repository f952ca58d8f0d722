"""The target of a build: up to which stage, on which of them it depends, for which platform.  Pure."""

from collections.abc import Collection, Mapping

import msgspec

from skep.engine.build.instructions import Copy, OptionLabel, Run, Stages
from skep.engine.build.interface import BuildRequest
from skep.engine.build.mounts import parse_mount
from skep.engine.build.substitution import Budget, substituted
from skep.engine.images.platforms import parse_platform, this_platform
from skep.errors import InvalidArgument, Unimplemented


def chosen(stages: Stages, request: BuildRequest) -> Stages:
    """The stages up to the target, with the labels of the request at the end of it.

    Raises: InvalidArgument: there is no such stage.
    """
    if not stages.stages:
        raise InvalidArgument("No image was generated. Is your Dockerfile empty?")
    last: int | None = len(stages.stages) - 1
    if request.target:
        last = stages.index(request.target)
        if last is None:
            raise InvalidArgument(f"failed to reach build target {request.target} in Dockerfile")
    assert last is not None, "there is a stage"
    target = stages.stages[last]
    labels = tuple(
        OptionLabel(text=f"LABEL {name}={value}", keyword="LABEL", pairs=((name, value),))
        for name, value in sorted(request.labels.items())
    )
    target = msgspec.structs.replace(target, instructions=(*target.instructions, *labels))
    return msgspec.structs.replace(stages, stages=(*stages.stages[:last], target))


def require_platform(platform: str) -> None:
    """Raises: InvalidArgument: it is none; Unimplemented: it is another machine's."""
    here = this_platform()
    if platform:
        wanted = parse_platform(platform)
        if (wanted.os, wanted.architecture) != (here.os, here.architecture):
            raise Unimplemented(f"this node builds for {here}, and not for {wanted}")


def needed(stages: Stages, arguments: Mapping[str, str], budget: Budget | None = None) -> Collection[int]:
    """The last stage and those that it is made from.

    ``arguments``: what FROM may use; ``budget``: pays for their substitution.  Raises: InvalidArgument.
    """
    found, pending = set[int](), [len(stages.stages) - 1]
    while pending:
        number = pending.pop()
        if number in found:
            continue
        found.add(number)
        stage = stages.stages[number]
        names = [substituted(stage.base.base, arguments, stages.escape, budget)]
        for one in stage.instructions:
            if isinstance(one, Copy):
                names.append(one.origin)
            elif isinstance(one, Run):
                names += [parse_mount(text, str).origin for text in one.mounts]
        indices = (stages.index(name) for name in names if name)
        pending += [index for index in indices if index is not None and index < number]
    return found

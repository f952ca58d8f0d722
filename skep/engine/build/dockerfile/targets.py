"""Target of a build: the last stage, the stages that it depends on, the platform.  Pure."""

from collections.abc import Collection, Iterable, Mapping

import msgspec

from skep.engine.build.dockerfile.instructions import Copy, OptionLabel, Run, Stages
from skep.engine.build.dockerfile.mounts import mount_origin
from skep.engine.build.dockerfile.substitution import Budget, substituted
from skep.engine.build.interface import BuildRequest
from skep.engine.images.platforms import ImagePlatform, normalized, parse_platform, this_platform
from skep.engine.images.reference import Reference, parse_reference
from skep.errors import InvalidArgument, SkepError, Unimplemented

_EPOCH_S_MAX = 253_402_300_799
"""End of the year 9999, the last that RFC 3339 can represent."""


def chosen(stages: Stages, request: BuildRequest) -> Stages:
    """Return the stages up to the target, with the request's labels added to the target.

    Raises: InvalidArgument: there is no such stage.
    """
    if not stages.stages:
        raise InvalidArgument("No image was generated. Is your Dockerfile empty?")
    last: int | None = len(stages.stages) - 1
    if request.target:
        last = stages.index(request.target)
        if last is None:
            raise InvalidArgument(
                f'target stage "{request.target}" could not be found'
                if request.is_buildkit
                else f"failed to reach build target {request.target} in Dockerfile"
            )
    assert last is not None, "there is a stage"
    target = stages.stages[last]
    labels = tuple(
        OptionLabel(text=f"LABEL {name}={value}", keyword="LABEL", pairs=((name, value),))
        for name, value in sorted(request.labels.items())
    )
    target = msgspec.structs.replace(target, instructions=(*target.instructions, *labels))
    return msgspec.structs.replace(stages, stages=(*stages.stages[:last], target))


def tags_of(names: Iterable[str], refusal: type[SkepError] = InvalidArgument) -> tuple[Reference, ...]:
    """Return the tags of an image's names, each one once.  Empty names do not count.

    Args:
        refusal: Error for a name with a digest.

    Raises: InvalidArgument: a name is not valid.

    Source: moby 20.10, builder/builder-next/tag.go (sanitizeRepoAndTags).
    """
    found: dict[Reference, None] = {}
    for name in filter(None, names):
        reference = parse_reference(name)
        if reference.digest:
            raise refusal("build tag cannot contain a digest")
        found[reference.with_default_tag()] = None
    return tuple(found)


def automatic_arguments(stages: Stages, target: str, platform: str = "") -> Mapping[str, str]:
    """Return the arguments that every Dockerfile may declare without a value.

    ``platform``: Platform of the image.  Empty for this machine's.

    Source: buildkit, frontend/dockerfile/dockerfile2llb/platform.go (defaultArgs).
    """
    found: dict[str, str] = {}
    for whose, one in (("TARGET", normalized(parse_platform(platform))), ("BUILD", this_platform())):
        parts = {
            "PLATFORM": str(one),
            "OS": one.os,
            "OSVERSION": "",
            "ARCH": one.architecture,
            "VARIANT": one.variant,
        }
        found |= {f"{whose}{part}": value for part, value in parts.items()}
    return {**found, "TARGETSTAGE": target or stages.stages[-1].base.name or "default"}


def parse_epoch(text: str) -> int | None:
    """Return ``SOURCE_DATE_EPOCH`` in seconds.  None if it is empty.  Raises: InvalidArgument."""
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 13 and int(text) <= _EPOCH_S_MAX):
        raise InvalidArgument(f"invalid SOURCE_DATE_EPOCH: {text}: give seconds since 1970")
    return int(text)


def require_distinct_names(stages: Stages) -> None:
    """Refuse two stages with the same name.  BuildKit uses the last of them.

    Raises: InvalidArgument, in the classic builder's words.
    """
    names = [stage.base.name for stage in stages.stages if stage.base.name]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InvalidArgument(f"{name} stage name already used")


def context_name(name: str) -> str:
    """Return the key of a named context: ``docker.io/library/alpine:latest`` is ``alpine``.

    Source: buildkit, frontend/dockerui/namedcontext.go (namedContextRecursive).
    """
    try:
        familiar = parse_reference(name).familiar
    except InvalidArgument:
        familiar = name
    return familiar.removesuffix(":latest").lower()


def wanted_platform(text: str) -> ImagePlatform | None:
    """Return the platform that a request or FROM names.  None if it names none.

    Raises: InvalidArgument: it is not a platform; Unimplemented: it is for another operating system.
    """
    wanted = normalized(parse_platform(text)) if text else None
    if wanted is not None and wanted.os != "linux":
        raise Unimplemented(f"this node builds images for Linux, and not for {wanted}")
    return wanted


def carried_out(
    stages: Stages, request: BuildRequest, arguments: Mapping[str, str], budget: Budget
) -> Collection[int]:
    """Return the stages that a build runs.  The classic builder runs all.  Raises: InvalidArgument."""
    if not request.is_buildkit:
        return range(len(stages.stages))
    return needed(stages, arguments, budget, {*request.images, *request.directories})


def needed(
    stages: Stages,
    arguments: Mapping[str, str],
    budget: Budget | None = None,
    contexts: Collection[str] = (),
) -> Collection[int]:
    """Return the last stage and the stages that it depends on, according to the Dockerfile.

    A trigger of a base image may use a further stage.

    Args:
        arguments: Arguments for FROM.
        budget: Pays for their substitution.
        contexts: Names of named contexts, which replace stages with these names.

    Raises: InvalidArgument.
    """
    found, pending = set[int](), [len(stages.stages) - 1]
    while pending:
        number = pending.pop()
        if number in found:
            continue
        found.add(number)
        stage = stages.stages[number]
        base = substituted(stage.base.base, arguments, stages.escape, budget)
        indices = [] if context_name(base) in contexts else [stages.index(base, before=number)]
        names = []
        for one in stage.instructions:
            if isinstance(one, Copy):
                names.append(one.origin)
            elif isinstance(one, Run):
                names += [mount_origin(text) for text in one.mounts]
        indices += [stages.index(name) for name in names if name and context_name(name) not in contexts]
        pending += [index for index in indices if index is not None and index < number]
    return found

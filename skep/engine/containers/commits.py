"""``docker commit``: creates an image from a container's file system and options.

Source: moby 20.10, daemon/commit.go (CreateImageFromContainer, merge), daemon/images/image_commit.go.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import msgspec

from skep import __version__
from skep.aio.race import afterwards, run_to_end
from skep.engine.containers.container import BeingRemoved, Container, ContainerState
from skep.engine.engine import Engine
from skep.engine.images.child import HistoryStep, child_config
from skep.engine.images.image import ContainerDefaults, Image, as_docker_writes
from skep.engine.images.reference import Reference
from skep.engine.runtime.bundle import OUTSIDE_OF_IMAGES
from skep.errors import FailedPrecondition, SkepError
from skep.model.values.times import Timestamp


class CommitRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Options of ``docker commit``."""

    reference: Reference | None = None
    author: str = ""
    comment: str = ""
    pauses: bool = True
    """Whether the container's processes are frozen during the commit."""
    config: ContainerDefaults | None = None
    """Default options for containers of the new image, or None to use the committed container's."""
    changes: tuple[str, ...] = ()
    """Dockerfile instructions that change ``config``."""


def with_changes(config: ContainerDefaults, lines: Sequence[str]) -> ContainerDefaults:
    """Return ``config`` after Dockerfile instructions.  Raises: InvalidArgument: a line does not change it."""
    if not lines:
        return config
    from skep.engine.build.dockerfile.config import apply_changes  # imported here: few commits have changes

    return apply_changes(config, lines)


async def commit(
    engine: Engine, word: str, request: CommitRequest, own: ContainerDefaults, now: Timestamp
) -> Image:
    """Create an image from the container ``word``.  ``own`` has the options with which the container was created.

    Raises: NotFound: no such container, or its image was removed; InvalidArgument: a change is not an instruction, or
    a file cannot be stored in an image; FailedPrecondition: it has no image; BeingRemoved; ResourceExhausted;
    UnpackFailed.
    """
    container = engine.get(word)
    _require_present(container)
    if container.config.is_process:
        raise FailedPrecondition(
            f"container {container.name} runs a program of its machine, without an image: build one with docker build"
        )
    config = merged(with_changes(request.config or own, request.changes), own)
    parent = engine.images.get(container.image_id)
    upper = engine.bundles.path(container.id) / "upper"
    async with keep_paused(engine, container, pauses=request.pauses):
        async with engine.images.layer_of_changes(upper, parent, without=OUTSIDE_OF_IMAGES) as layer:
            _require_present(
                engine.get(container.id)
            )  # if the container was removed meanwhile, files are missing in the layer
            step = HistoryStep(
                created=now,
                diff_id=layer.diff_id,
                created_by=" ".join(container.config.command),
                author=request.author,
                comment=request.comment,
            )
            image = await engine.images.add(
                child_config(
                    engine.images.config_file(parent).read_bytes(),
                    step,
                    as_docker_writes(config),
                    more={
                        "container": container.id,
                        "container_config": as_docker_writes(own),
                        "docker_version": __version__,
                    },
                ),
                [request.reference] if request.reference is not None else [],
                parent=parent.id,
                is_tagged=request.reference is not None,
            )
        name = request.reference.familiar if request.reference is not None else ""
        if name:
            engine.images.announce("tag", image.id, name)
        engine.events.publish("commit", container, comment=request.comment, imageID=image.id, imageRef=name)
    return image


def _require_present(container: Container) -> None:
    if container.state is ContainerState.REMOVING:
        raise BeingRemoved(f"You cannot commit container {container.id} which is being removed")


@asynccontextmanager
async def keep_paused(engine: Engine, container: Container, *, pauses: bool) -> AsyncIterator[None]:
    """Pause a running container for the block, unless it is paused already."""
    if not pauses or container.state is not ContainerState.RUNNING:
        yield
        return
    # Otherwise a client that disconnects at this moment would leave the container frozen forever.
    async with afterwards(partial(_unpause, engine, container.id)):
        with suppress(SkepError):  # it has ended meanwhile
            await run_to_end(engine.pause(container.id))
        yield


async def _unpause(engine: Engine, id: str) -> None:
    with suppress(SkepError):
        if engine.get(id).state is ContainerState.PAUSED:
            await engine.unpause(id)


def merged(config: ContainerDefaults, other: ContainerDefaults) -> ContainerDefaults:
    """Return ``config`` with its unset fields from ``other``.

    Source: moby 20.10, daemon/commit.go (merge).
    """
    env = config.env or ()
    names = {text.partition("=")[0] for text in env}
    changes: dict[str, Any] = {
        "user": config.user or other.user,
        "exposed_ports": {**(other.exposed_ports or {}), **(config.exposed_ports or {})} or None,
        "env": (*env, *(text for text in other.env or () if text.partition("=")[0] not in names)) or None,
        "labels": {**(other.labels or {}), **(config.labels or {})} or None,
        "healthcheck": config.healthcheck or other.healthcheck,
        "working_dir": config.working_dir or other.working_dir,
        "volumes": {**(other.volumes or {}), **(config.volumes or {})} or None,
        "stop_signal": config.stop_signal or other.stop_signal,
    }
    if not config.entrypoint:
        changes["cmd"] = config.cmd or other.cmd
        changes["entrypoint"] = other.entrypoint if config.entrypoint is None else config.entrypoint
    return msgspec.structs.replace(config, **changes)

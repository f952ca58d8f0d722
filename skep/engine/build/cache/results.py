"""Results of the steps of one build: found on this node, found in a cache source, or committed as a new image.

A step has two keys.  The local key is computed from the id of the image before the step, so it finds results of this
node only.  The shared key is computed from the id of the stage's base image and all instructions since, so it is the
same on every node (``step_records``).
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from skep.aio.clock import Clock
from skep.engine.build.addresses import redacted
from skep.engine.build.bases import Bases
from skep.engine.build.cache.cache import StepCache, keys_of
from skep.engine.build.dockerfile.config import StageState
from skep.engine.build.files import copies
from skep.engine.build.interface import BuildStep, FoundStep, StepRecord, StepSource, WantedStep
from skep.engine.build.stage import StagePosition, StepImage
from skep.engine.images import child
from skep.engine.images.digest import Digest, chain_ids
from skep.engine.images.image import ContainerDefaults, Image
from skep.engine.images.platforms import ImagePlatform, this_platform
from skep.errors import InvalidArgument, NotFound, SkepError
from skep.model.values.times import SECOND_NS, timestamp

BUILDKIT = "buildkit.dockerfile.v0"
_CONFIG_BYTES_MAX = 1 << 20
"""A client's configuration has some KiB.  It is stored in every image that is built from it."""


class StepKey(msgspec.Struct, frozen=True):
    """Keys of a step: ``local`` in the index of this node, ``shared`` in caches that nodes exchange."""

    local: str
    shared: str


class StepChange(msgspec.Struct, frozen=True, kw_only=True):
    """Step to carry out: the stage after it, and the step's identity."""

    state: StageState
    container: dict[str, Any]
    """Configuration of the step's container, as in the history and in Docker's classic cache."""
    key: StepKey
    line: str | None = None
    """Entry of the history, or None to use the container's command.  Empty for no entry."""
    adds_layer: bool | None = None
    """See ``WantedStep``."""


class Results:
    """Results of one build, and the position of its current stage."""

    def __init__(self, bases: Bases, steps: StepCache, clock: Clock) -> None:
        self._bases = bases
        self._images = bases.images
        self._request = bases.request
        self._steps = steps
        self._clock = clock
        self._refused: set[str] = set()
        """Cache sources that provided a wrong layer.  They are not used again."""
        self.position = StagePosition(state=StageState(config=ContainerDefaults()), image=None)
        self.inherited = 0
        """Number of history entries that the stage's base image had before the build."""
        self.uses_cache = self._request.use_cache
        """Whether steps of the current stage may come from a cache."""
        self._is_known_here = not self._request.only_sources
        """Whether every step of the stage so far was found on this node, which may provide the next one."""
        self.platform: ImagePlatform | None = None
        """Platform that the build names for the current stage.  None if it names none."""
        self.records: dict[str, StepRecord] = {}
        """Steps of this build, by their shared keys."""

    def begin_stage(self, *, uses_cache: bool) -> None:
        """Reset the state for a new stage."""
        self.uses_cache = uses_cache
        self._is_known_here = not self._request.only_sources

    @property
    def place(self) -> tuple[StagePosition, int, bool, bool, ImagePlatform | None]:
        """Saved state of the current stage.  To return to a stage later, assign its state."""
        return self.position, self.inherited, self.uses_cache, self._is_known_here, self.platform

    @place.setter
    def place(self, place: tuple[StagePosition, int, bool, bool, ImagePlatform | None]) -> None:
        self.position, self.inherited, self.uses_cache, self._is_known_here, self.platform = place

    @property
    def may_be_cached(self) -> bool:
        """Whether a lookup of the next step can find a result."""
        return self.uses_cache and (self._is_known_here or bool(self._request.step_sources))

    @property
    def state(self) -> StageState:
        """Configuration of the stage so far."""
        return self.position.state

    @property
    def chain(self) -> tuple[Digest, ...]:
        """Layers of the stage so far."""
        return self.position.image.chain if self.position.image is not None else ()

    @property
    def diff_ids(self) -> tuple[str, ...]:
        """Digests of the stage's layers as tar files, bottom first."""
        image = self.position.image
        return tuple(image.config.diff_ids) if image is not None else ()

    def change(
        self,
        state: StageState,
        container: dict[str, Any],
        line: str | None,
        *more: str,
        adds_layer: bool | None = None,
    ) -> StepChange:
        """Return the step that leads from here to ``state``.

        ``more``: All other inputs of the step.
        """
        kind: tuple[str, ...] = (BUILDKIT,) if self._request.is_buildkit else ()
        if self._request.rewrites_times:
            kind += (f"epoch={self._request.epoch_s}",)
        if self.position.image is None and self.platform not in (
            None,
            this_platform(),
        ):
            # A base image tells the platform.
            kind += (f"platform={self.platform}",)
        options = {**container, "": [*kind, *more]} if kind or any(more) else container
        image = self.position.image
        link = image.link if image is not None else ""
        local, shared = keys_of((self.position.image_id, link), options, state.author)
        key = StepKey(local=local, shared=shared)
        return StepChange(state=state, container=container, key=key, line=line, adds_layer=adds_layer)

    async def take_cached(self, step: BuildStep, change: StepChange) -> bool:
        """Return whether the step's result is in a cache.  If so, make it the position."""
        if not self.uses_cache:
            return False
        if await self._take_here(change) or await self._take_from_sources(step, change):
            self._bases.progress.cached(step)
            return True
        return False

    async def _take_here(self, change: StepChange) -> bool:
        found = self._steps.find(change.key.local) if self._is_known_here else None
        try:
            made = await self._bases.keep(found) if found is not None else None
        except (NotFound, OSError):
            made = None
        if made is None:
            self._is_known_here = False
            return False
        self._reach(change, made)
        return True

    async def _take_from_sources(self, step: BuildStep, change: StepChange) -> bool:
        image = self.position.image
        wanted = WantedStep(
            key=change.key.shared,
            diff_ids=self.diff_ids,
            config=image.content if image is not None else None,
            command=tuple(change.container.get("Cmd") or ()),
            adds_layer=change.adds_layer,
        )
        for source in self._request.step_sources:
            found = source.find(wanted) if source.name not in self._refused else None
            if found is not None and await self._take_found(step, change, source, found):
                return True
        return False

    async def _take_found(
        self, step: BuildStep, change: StepChange, source: StepSource, found: FoundStep
    ) -> bool:
        """Make an image of a result from another node.

        The result is not added to the index of this node, so later builds without this source do not trust it.
        """
        chain = self.chain
        try:
            if found.diff_id:
                chain = chain_ids((*self.diff_ids, found.diff_id))
                await self._bases.pin(chain)
                await source.fetch(found, chain[-1])
            await self._commit(change, diff_id=found.diff_id, chain=chain, created=found.created)
        except (SkepError, OSError) as error:
            self._refused.add(source.name)
            self._bases.progress.warning(step, f"cache source {source.name} is not used: {error}")
            return False
        self._is_known_here = not self._request.only_sources  # steps on top of it may have run here
        return True

    async def commit_changes(self, change: StepChange, upper: Path, *, without: Sequence[str] = ()) -> None:
        """Make a layer of the changes in ``upper``, and an image with it."""
        if self._request.rewrites_times and self._request.epoch_s is not None:
            await asyncio.to_thread(copies.make_not_newer, upper, self._request.epoch_s * SECOND_NS)
        image = self.position.image
        below = Image(id=image.id, config=image.config) if image is not None else None
        async with self._images.layer_of_changes(upper, below, without=without, take=True) as layer:
            is_empty = layer.diff_id == child.EMPTY_LAYER
            chain = self.chain if is_empty else (*self.chain, layer.chain_id)
            await self._commit_new(change, layer.diff_id, chain)

    async def commit(self, change: StepChange) -> None:
        """Make an image of a step without a layer."""
        await self._commit_new(change, "", self.chain)

    async def _commit_new(self, change: StepChange, diff_id: str, chain: Sequence[Digest]) -> None:
        created = timestamp(self._clock.now_ns())
        image = await self._commit(change, diff_id=diff_id, chain=chain, created=created)
        self._steps.note(change.key.local, image.id)

    async def _commit(
        self, change: StepChange, *, diff_id: str, chain: Sequence[Digest], created: str
    ) -> Image:
        """Make an image of the step's result, and make it the position."""
        own, parent, line = self.platform or this_platform(), self.position.image, change.line
        step = child.HistoryStep(
            created=created,
            diff_id=diff_id,
            created_by=redacted(line if line is not None else " ".join(change.container.get("Cmd") or ())),
            author=change.state.author,
            comment=BUILDKIT if line is not None else "",
            has_entry=line != "",
        )
        content = child.child_config(
            parent.content if parent is not None else None,
            step,
            options_of(change.state.config),
            more={} if line is not None else {"container_config": _shown(change.container)},
            platform={
                "architecture": own.architecture,
                "os": own.os,
                **({"variant": own.variant} if own.variant else {}),
            },
        )
        if len(content) > _CONFIG_BYTES_MAX:
            raise InvalidArgument(f"the image's configuration has more than {_CONFIG_BYTES_MAX} bytes")
        await self._bases.pin(chain)
        image = await self._images.add(
            content, parent=parent.id if parent is not None else "", is_step=self._request.is_buildkit
        )
        self._reach(change, StepImage(id=image.id, content=content, config=image.config, chain=tuple(chain)))
        return image

    def _reach(self, change: StepChange, made: StepImage) -> None:
        before = self.position.image
        key = change.key.shared
        self.records[key] = StepRecord(
            key=key,
            parent=before.link if before is not None else "",
            diff_ids=cast("tuple[Digest, ...]", tuple(made.config.diff_ids)),
            created=made.config.created or "",
        )
        self.position = StagePosition(state=change.state, image=msgspec.structs.replace(made, link=key))


def _shown(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of a step's container for the image, whose users may read the command."""
    return {**container, "Cmd": [*map(redacted, container["Cmd"])]} if container.get("Cmd") else container


def options_of(config: ContainerDefaults) -> dict[str, Any]:
    """Return the options of an image's containers by their names in JSON."""
    options: dict[str, Any] = msgspec.to_builtins(config)
    return options

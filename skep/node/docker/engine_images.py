"""Presents the images of this node and of the machine's Docker Engine as one store.

There are two stores: services use images of this node's store, plain containers and builds use images of the engine's
store. An image is copied to the other store when it is needed there.  It is not known in advance which images a build
needs.  So before a build, all images that users have loaded, tagged or pulled here are copied, but no images that the
node has fetched for its tasks.

A name means the image in the store where it changed last.  ``theirs_is_newer`` compares the engine's image of a name
with its image at the last check.  If a name now means another image in the engine, this node removes the name from its
own image at once (``reconcile``), so that the old image is no longer found.  The new image is copied when a service
needs it.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import log_error
from skep.aio.race import wait_first
from skep.engine.images.reference import Reference, parse_any
from skep.engine.images.removal import ImageUser
from skep.engine.images.store import ImageStore
from skep.errors import NotFound, SkepError
from skep.linux.files import replace_file
from skep.node.docker.docker_engine import DockerEngine

log = structlog.get_logger()

COPY_S_MAX = 1800.0
"""Time limit in seconds for copying an image from one store to the other."""
LOOK_AGAIN_S = 30.0
"""Seconds between checks if the engine sends no event."""
GIVEN_MAX = 1000
"""Limit for the recorded names that users have set.  The oldest are dropped first."""
SETTLE_S = 0.05
"""Seconds to wait after an event, because a build or a load causes several."""

Names = Mapping[str, str]
"""Image ids by familiar name with tag."""


def theirs_is_newer(name: str, ours: str, theirs: str, seen: Names) -> bool:
    """Return whether ``name`` means the engine's image and not this node's image.

    Args:
        ours: Id of this node's image, or empty.
        theirs: Id of the engine's image, or empty.
        seen: The names in the engine at the last check.
    """
    return bool(theirs) and theirs != ours and (not ours or seen.get(name) != theirs)


def merged(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], untagged: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return one list of both stores' images, newest first.

    An image that both have is one entry with all its names.  If a name means different images in the two stores, this
    node's image has it, because otherwise ``reconcile`` would have removed the name here.  ``untagged`` are the fields
    of an image without names.
    """
    entries = {one["Id"]: dict(one) for one in ours}
    taken = {name for one in ours for name in one.get("RepoTags") or ()}
    for one in theirs:
        present = entries.setdefault(one["Id"], dict(one, RepoTags=[], RepoDigests=one.get("RepoDigests")))
        tags = [name for name in one.get("RepoTags") or () if name not in taken]
        for field, names in (("RepoTags", tags), ("RepoDigests", one.get("RepoDigests") or ())):
            known = [name for name in present.get(field) or () if not name.startswith("<none>")]
            named = [name for name in names if not name.startswith("<none>")]
            present[field] = sorted({*known, *named})
    for one in entries.values():
        if not one.get("RepoTags") and not one.get("RepoDigests"):
            one.update(untagged)
    return sorted(entries.values(), key=lambda one: int(one.get("Created", 0)), reverse=True)


class EngineImages:
    """Exchanges images with the Docker Engine of this machine.

    Args:
        users: Returns every container of this node.
        file: File with the names in the engine at the last check.
    """

    def __init__(
        self, docker: DockerEngine, images: ImageStore, users: Callable[[], Collection[ImageUser]], file: Path
    ) -> None:
        self._docker = docker
        self._images = images
        self._users = users
        self._file = file
        self._seen = _read(file)
        self._given_file = file.with_name("given-to-engine.json")
        self._given = _read(self._given_file) or {}
        """Names that users pulled, loaded, imported or tagged through the API, oldest first."""
        self._handed: dict[str, tuple[str, str]] = {}
        """For each name that was copied to the engine: the image's id here and in the engine."""
        self._copying = asyncio.Lock()
        self._changed = asyncio.Event()

    async def follow(self, clock: Clock, rng: Callable[[], float]) -> None:
        """Reconcile after each event of the engine's images, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(clock, rng), name="events of the engine's images")
            while True:
                self._changed.clear()
                try:
                    await self.reconcile()
                except SkepError as error:
                    log.debug("images of the docker engine not read", reason=str(error))
                except Exception as error:
                    log_error(error, "images of the docker engine not compared")
                await wait_first(self._changed.wait(), clock.sleep(LOOK_AGAIN_S))
                await clock.sleep(SETTLE_S)

    async def _listen(self, clock: Clock, rng: Callable[[], float]) -> None:
        backoff = Backoff(0.5, LOOK_AGAIN_S, rng=rng)
        while True:
            try:
                async with self._docker.api.stream("/events", filters={"type": ["image"]}) as events:
                    self._changed.set()  # check once, because earlier changes caused no event
                    async for _ in events.objects():
                        backoff.reset()
                        self._changed.set()
            except (SkepError, msgspec.DecodeError) as error:
                log.debug("event stream of docker engine ended", reason=str(error))
            await backoff.sleep(clock)

    async def reconcile(self) -> None:
        """Remove names from this node's images that now mean other images in the engine.  Raises: SkepError."""
        async with self._copying:  # a copy moves names in one of the stores, and records that only at its end
            names = await self._their_names()
            if self._seen is not None:
                for name, id in names.items():
                    ours = self._images.lookup(name)
                    if ours is not None and theirs_is_newer(name, ours.id, id, self._seen):
                        log.info(
                            "image name has moved in the docker engine", name=name, before=ours.id, now=id
                        )
                        await self._images.remove(name, force=True, users=self._users)
            await self._see(names)

    async def bring(self, word: str) -> None:
        """Copy the image ``word`` from the engine if this node has none or an older one.

        A failure is logged, and the node then keeps its own image.
        """
        try:
            name = _name_of(word)
            theirs = await self._docker.image_id(word)
            ours = self._images.lookup(word)
            if not theirs_is_newer(name, ours.id if ours is not None else "", theirs, self._seen or {}):
                return
            if ours is not None and self._seen is None:
                return
            async with self._copying, asyncio.timeout(COPY_S_MAX):
                again = self._images.lookup(word)
                if (again.id if again is not None else "") != (ours.id if ours is not None else ""):
                    return
                log.info("image copied from the docker engine", image=word)
                async with self._docker.api.stream(f"/images/{quote(word)}/get") as archive:
                    await self._images.load(archive.pieces())
                await self._see({**(self._seen or {}), name: theirs})
        except NotFound:
            return
        except (SkepError, TimeoutError) as error:
            log.warning("image not copied from the docker engine", image=word, reason=str(error) or "timeout")

    async def hand_over(self, word: str) -> None:
        """Copy the image ``word`` to the engine if the engine has none or an older one.

        Raises: Unavailable.
        """
        ours = self._images.resolve(word)
        if ours is None or not await self._is_missing_there(word, ours.id):
            return
        try:
            async with self._copying, asyncio.timeout(COPY_S_MAX):
                if not await self._is_missing_there(word, ours.id):
                    return  # it was copied, or the engine's name has moved, while this waited
                log.info("image copied to the docker engine", image=word)
                await self._docker.load(self._images.save([word]))
                given = await self._docker.image_id(word)
                self._handed[_name_of(word)] = (ours.id, given)
                await self._see({**(self._seen or {}), _name_of(word): given})
        except NotFound:
            log.info("image was removed while it was copied to the docker engine", image=word)
        except TimeoutError:
            log.warning("image not copied to the docker engine in time", image=word)

    async def _is_missing_there(self, word: str, ours: str) -> bool:
        """Return whether the engine has neither this node's image ``ours`` by this name nor a newer one."""
        name, theirs = _name_of(word), await self._docker.image_id(word)
        if theirs == ours or theirs_is_newer(name, ours, theirs, self._seen or {}):
            return False
        # The engine identifies images by their manifest.
        return not theirs or self._handed.get(name) != (ours, theirs)

    def names(self) -> Names:
        """Return the names of this node's images."""
        return {
            reference.familiar: image.id
            for image in self._images.images()
            for reference in image.references
            if reference.tag
        }

    async def _their_names(self) -> Names:
        """Read the names of the engine's images.  Raises: SkepError."""
        names = {
            name: str(one["Id"]) for one in await self._docker.images() for name in one.get("RepoTags") or ()
        }
        return {name: id for name, id in names.items() if not name.startswith("<none>")}

    async def note_given(self, names: Collection[str]) -> None:
        """Record names that a user set through the API, because a build in the engine may use them."""
        given = {**self._given, **dict.fromkeys(sorted(names), "")}
        given = dict(list(given.items())[-GIVEN_MAX:])
        if given != self._given:
            self._given = given
            await asyncio.to_thread(replace_file, self._given_file, msgspec.json.encode(given))

    async def hand_over_given(self) -> None:
        """Copy images that users gave this node to the engine, before a build there.

        An image that cannot be copied is logged, and the build then fails with the image's name.
        """
        ours = self.names()
        try:
            theirs = await self._their_names()
        except SkepError as error:
            log.warning("images of the docker engine not read before a build", reason=str(error))
            return
        for name in self._given:
            if name in ours and theirs.get(name) != ours[name]:
                try:
                    await self.hand_over(name)
                except (SkepError, OSError) as error:
                    log.warning("image not copied to the docker engine", image=name, reason=str(error))

    async def _see(self, names: Names) -> None:
        if names != self._seen:
            self._seen = names
            await asyncio.to_thread(replace_file, self._file, msgspec.json.encode(names))


def _name_of(word: str) -> str:
    """Return the familiar name with its tag.  An id is returned unchanged.  Raises: InvalidArgument."""
    named = parse_any(word)
    return named.with_default_tag().familiar if isinstance(named, Reference) else named


def _read(file: Path) -> Names | None:
    """Read the names in ``file``.  Return None if the engine was never checked, so that there is nothing to compare."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        log_error(error, "names of the docker engine's images forgotten", file=str(file))
        return None

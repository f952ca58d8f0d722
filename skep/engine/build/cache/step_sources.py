"""Cache sources of builds: read the steps of other nodes.

An artifact or an image is read from a registry, a directory of the client, or the image store.  Its layers are fetched
when a step needs them, and checked against the digests of the step before they are used.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

import msgspec

from skep.engine.build.addresses import redacted
from skep.engine.build.cache.step_records import (
    CACHE_CONFIG_TYPE,
    CONFIG_BYTES_MAX,
    CacheLayer,
    StepTable,
    is_time,
)
from skep.engine.build.interface import FoundStep, StepSource, WantedStep
from skep.engine.images import child
from skep.engine.images.digest import Digest, parse_digest, short
from skep.engine.images.image import Image, ImageConfig, parse_config
from skep.engine.images.platforms import ImagePlatform, choose, parse_platform
from skep.engine.images.progress import ProgressMessage
from skep.engine.images.reference import Reference
from skep.engine.images.registry import pulling
from skep.engine.images.registry.manifests import Descriptor, Manifest, decoded
from skep.engine.images.registry.refusals import NOT_JSON
from skep.engine.images.store import ImageStore
from skep.errors import InvalidArgument, SkepError, Unavailable
from skep.model.values.times import ZERO_TIME

T = TypeVar("T")

SOURCES_MAX = 16
"""Number of sources of a build, each of which may take ``READ_S``."""
READ_S = 60.0
"""Seconds to read the records of a source.  A slower source is left out, because the build waits for it."""
_IMAGE_CONFIG_BYTES_MAX = 8 << 20
"""An image's configuration with the cache in it (``CONFIG_BYTES_MAX``), and as much again for the rest."""
_BAD = (SkepError, OSError, TimeoutError, *NOT_JSON)
"""Errors of a source that is missing, refuses the request, or is malformed."""


class SourceLocation(Protocol):
    """Location of a source's manifests and blobs."""

    @property
    def name(self) -> str:
        """Name for messages."""

    async def at(self, action: Callable[[pulling.BlobSource], Awaitable[T]]) -> T:
        """Return the result of ``action``, called with this location.  Raises: SkepError."""


class RegistryPlace:
    """A repository of a registry."""

    def __init__(self, images: ImageStore, reference: Reference, auth: str) -> None:
        """``auth``: The ``X-Registry-Auth`` value of the user for the registry."""
        self._images = images
        self._reference = reference
        self._auth = auth
        self.name = reference.familiar

    async def at(self, action: Callable[[pulling.BlobSource], Awaitable[T]]) -> T:
        """See ``SourceLocation``."""
        return await self._images.at_registry(self._reference, self._auth, action)


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """The slowest download of a layer that a build waits for.

    Without this limit, a source that sends a byte now and then could block the build, the layer's lock and the reserved
    disk for hours.  If another build or pull already fetches the layer, the build waits as long as the layer would take
    at this rate, then downloads it.
    """

    silent_s: float = 60.0
    """Seconds without a byte, which include the connection, a login, and waits that a busy registry requests."""
    bytes_per_s: int = 1 << 20
    """Lowest average rate.  Below 1 MiB/s, running a step is usually faster than fetching its layer."""

    def seconds_for(self, received_bytes: int) -> float:
        """Return the seconds since the start within which more than ``received_bytes`` have to arrive."""
        return self.silent_s + received_bytes / self.bytes_per_s


class FetchedSteps:
    """Steps whose layers are fetched from a source location."""

    def __init__(self, images: ImageStore, place: SourceLocation, table: StepTable, pace: Pace) -> None:
        self._images = images
        self._place = place
        self._table = table
        self._pace = pace

    @property
    def name(self) -> str:
        """Name for messages."""
        return self._place.name

    def find(self, step: WantedStep) -> FoundStep | None:
        """See ``StepSource``."""
        return self._table.find(step)

    async def fetch(self, found: FoundStep, chain_id: Digest) -> None:
        """See ``StepSource``.  Raises: Unavailable: the layer arrives too slowly."""
        if self._images.layer_store.get(chain_id) is not None:
            return
        descriptor = Descriptor(digest=found.blob, size=found.size)
        arrival = _Arrival(self._pace, found)
        try:
            async with asyncio.timeout(self._pace.silent_s) as arrival.deadline:
                await self._place.at(
                    lambda repository: pulling.fetch_layer(
                        self._images, repository, descriptor, chain_id, found.diff_id, arrival.note
                    )
                )
        except TimeoutError as error:
            raise Unavailable(arrival.reason) from error


class _Arrival:
    """Deadline of one layer, moved by the progress of its download."""

    def __init__(self, pace: Pace, found: FoundStep) -> None:
        self._pace = pace
        self._found = found
        self._loop = asyncio.get_running_loop()
        self._start_s = self._loop.time()
        self._is_waiting = False
        self.deadline = asyncio.timeout(None)

    def note(self, message: ProgressMessage) -> None:
        """Move the deadline.  A ``Report``."""
        match message.status:
            case "Waiting":
                self._is_waiting = True
                self.deadline.reschedule(self._loop.time() + self._pace.seconds_for(self._found.size))
            case "Pulling fs layer":
                self._is_waiting = False
                self._start_s = self._loop.time()
                self.deadline.reschedule(self._start_s + self._pace.silent_s)
            case "Downloading" if message.progress_detail is not None:
                until_s = self._start_s + self._pace.seconds_for(message.progress_detail.current)
                self.deadline.reschedule(max(until_s, self.deadline.when() or 0.0))
            case "Download complete":  # unpacking has limits of its own
                self.deadline.reschedule(None)

    @property
    def reason(self) -> str:
        """Reason why the layer did not arrive in time."""
        layer = f"layer {short(self._found.blob)}"
        if self._is_waiting:
            seconds = self._pace.seconds_for(self._found.size)
            return (
                f"{layer} is fetched by another build or pull, which has not ended in {seconds:.0f} seconds"
            )
        return f"{layer} arrives at less than {self._pace.bytes_per_s} bytes per second"


class _LocalSteps:
    """Steps of an image of this node, whose layers are here."""

    def __init__(self, images: ImageStore, name: str) -> None:
        self._images = images
        self.name = name

    async def fetch(self, found: FoundStep, chain_id: Digest) -> None:
        """Check that the layer still exists.  Raises: NotFound: the image was removed."""
        self._images.layer_store.directory(chain_id)


class ImageSteps(_LocalSteps):
    """Steps in the configuration of an image of this node."""

    def __init__(self, images: ImageStore, name: str, table: StepTable) -> None:
        super().__init__(images, name)
        self._table = table

    def find(self, step: WantedStep) -> FoundStep | None:
        """See ``StepSource``."""
        return self._table.find(step)


class HistorySteps(_LocalSteps):
    """Steps in the history of an image of this node, as the classic builder compares them: by their commands.

    Source: moby 20.10, image/cache/cache.go (ImageCache.GetCache, isValidParent, isValidConfig).
    """

    def __init__(self, images: ImageStore, name: str, config: ImageConfig) -> None:
        super().__init__(images, name)
        self._config = config

    def find(self, step: WantedStep) -> FoundStep | None:
        """See ``StepSource``."""
        before = (parse_config(step.config).history or ()) if step.config is not None else ()
        own = self._config.history or ()
        if len(own) <= len(before) or tuple(own[: len(before)]) != tuple(before):
            return None
        layers = tuple(self._config.diff_ids)
        entry, count = own[len(before)], len(step.diff_ids)
        command = " ".join(step.command)
        # This engine's history has no passwords of addresses. Commands that differ only in a password look equal here,
        # but may produce different files. So such an entry can match only a step without a layer.
        shown = redacted(command) if step.adds_layer is False else command
        if entry.created_by not in (command, shown) or layers[:count] != tuple(step.diff_ids):
            return None
        if step.adds_layer not in (None, not entry.empty_layer):
            return None
        created = entry.created if is_time(entry.created or "") else None
        found = FoundStep(created=created or ZERO_TIME)
        if entry.empty_layer:
            return found
        if count == len(layers) or layers[count] == child.EMPTY_LAYER:
            return None
        return msgspec.structs.replace(found, diff_id=layers[count])


def history_sources(images: ImageStore, names: Sequence[str]) -> tuple[StepSource, ...]:
    """Return the images of ``--cache-from`` of a classic build that are on this node, each one once."""
    found: dict[Digest, StepSource] = {}
    for name in names:
        if (image := images.lookup(name)) is not None:
            found.setdefault(image.id, HistorySteps(images, name, image.config))
    return tuple(found.values())


def image_source(images: ImageStore, image: Image, name: str) -> StepSource | None:
    """Return the steps in the configuration of an image.  None if it has none.  Blocks.

    Raises: InvalidArgument: the configuration is missing or malformed.
    """
    try:
        content = images.config_file(image).read_bytes()
        layers = [CacheLayer(blob=id, size=0, diff_id=id) for id in image.config.diff_ids]
        table = _table_of_image(content, layers)
    except _BAD as error:
        raise InvalidArgument(f"the cache in image {name} is malformed: {error}") from error
    return ImageSteps(images, name, table) if table is not None else None


async def read_source(
    images: ImageStore, place: SourceLocation, target: str, pace: Pace | None = None, *, platform: str = ""
) -> StepSource | None:
    """Read the records of a cache artifact, or of an image.  None if the image has none.

    ``target``: Tag or digest of its manifest.  ``pace``: Slowest download of a layer.
    ``platform``: Platform of the image in an index.  Empty for this machine's.

    Raises: InvalidArgument: it is missing, refused, slow or malformed.
    """

    wanted = parse_platform(platform) if platform else None

    async def load_records(repository: pulling.BlobSource) -> StepTable | None:
        return await _table(repository, target, images.limits.manifest_bytes_max, wanted)

    try:
        async with asyncio.timeout(READ_S):
            table = await place.at(load_records)
    except _BAD as error:
        reason = f"no response in {READ_S:.0f} s" if isinstance(error, TimeoutError) else str(error)
        raise InvalidArgument(reason) from error
    return FetchedSteps(images, place, table, pace or Pace()) if table is not None else None


async def _table(
    repository: pulling.BlobSource, target: str, bytes_max: int, wanted: ImagePlatform | None
) -> StepTable | None:
    manifest = decoded(
        await pulling.run_with_retries(lambda: repository.manifest(target, bytes_max), repository.transfers)
    )
    listed = manifest.manifests
    if listed is None:
        return await _table_of_manifest(repository, manifest)
    config = next((one for one in listed if one.media_type == CACHE_CONFIG_TYPE), None)
    if config is not None:
        return await _table_of_artifact(repository, config, listed)
    digest = parse_digest(choose(listed, wanted).digest)
    chosen = decoded(
        await pulling.run_with_retries(lambda: repository.manifest(digest, bytes_max), repository.transfers)
    )
    return await _table_of_manifest(repository, chosen)


async def _table_of_manifest(repository: pulling.BlobSource, manifest: Manifest) -> StepTable | None:
    config = manifest.config
    if config is None:
        raise InvalidArgument("the image index contains another index")
    if config.media_type == CACHE_CONFIG_TYPE:
        return await _table_of_artifact(repository, config, manifest.layers)
    content = await pulling.small_blob(repository, config.digest, _IMAGE_CONFIG_BYTES_MAX)

    def read() -> StepTable | None:
        diff_ids = parse_config(content).diff_ids
        if len(diff_ids) != len(manifest.layers):
            raise InvalidArgument("the manifest does not match the image's configuration")
        layers = [
            CacheLayer(blob=layer.digest, size=layer.size, diff_id=diff_id)
            for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)
        ]
        return _table_of_image(content, layers)

    return await asyncio.to_thread(read)


async def _table_of_artifact(
    repository: pulling.BlobSource, config: Descriptor, blobs: Sequence[Descriptor]
) -> StepTable:
    content = await pulling.small_blob(repository, config.digest, CONFIG_BYTES_MAX)
    return await asyncio.to_thread(StepTable.of_config, content, blobs)


def _table_of_image(config: bytes, layers: Sequence[CacheLayer]) -> StepTable | None:
    """Read the records of an image's configuration.  Raises: ValueError: they are malformed."""
    cache = child.cache_in(config)
    return StepTable.of_image(cache, layers) if cache else None

"""``docker pull``: fetches an image.

Manifest, configuration and layers are each verified against their digests before anything is unpacked.  Layers are
downloaded in parallel, and broken transfers resume where they stopped.  Simultaneous pulls of one reference share the
work of the first.

Source: moby 20.10, distribution/pull_v2.go, distribution/xfer/download.go.
"""

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias, TypeVar
from weakref import WeakValueDictionary

import msgspec

from skep.aio.backoff import Backoff
from skep.aio.failures import describe_error
from skep.aio.groups import first_alone
from skep.engine.images.archives.workers import ImageLimits, UnpackFailed
from skep.engine.images.digest import Digest, chain_ids, digest_of, parse_digest, short
from skep.engine.images.image import Image, ImageConfig, parse_config
from skep.engine.images.layers import DigestMismatch
from skep.engine.images.local import LocalImages
from skep.engine.images.platforms import ImagePlatform, choose, parse_platform, require_platform
from skep.engine.images.progress import ProgressMessage, Report, quiet, step, transfer
from skep.engine.images.reference import Reference
from skep.engine.images.registry.credentials import RegistryCredentials
from skep.engine.images.registry.endpoints import RegistryPolicy, TransferLimits
from skep.engine.images.registry.manifests import Descriptor, Manifest, decoded, require_image
from skep.engine.images.registry.registry import (
    OCI_MANIFEST,
    Absent,
    Denied,
    Document,
    RegistryError,
    at_endpoints,
)
from skep.engine.images.sharing.spreading import NodeFetcher
from skep.errors import InvalidArgument, NotFound, SkepError
from skep.linux.files import allocate

T = TypeVar("T")
K = TypeVar("K")

_CONFIG_BYTES_MAX = 8 << 20
"""Longest configuration of an image in bytes.  Limited, because it is read into memory."""
_MISMATCH = "layers from manifest don't match image configuration"
_REPORT_BYTES = 512 << 10
"""Bytes between two progress messages.  Source: moby, pkg/progress (512 KiB)."""


class BlobSource(Protocol):
    """Source of an image: a registry's repository, or the nodes that have it (``spreading.Spread``)."""

    @property
    def transfers(self) -> TransferLimits:
        """Times and attempts of requests."""

    async def manifest(self, target: str, bytes_max: int) -> Document:
        """Return the manifest or index for ``target``, a tag or a digest.  If it is a digest, the document is verified.

        Raises: NotFound, PermissionDenied, InvalidArgument, RegistryError.
        """

    def blob(
        self, digest: str, start: int = 0
    ) -> AbstractAsyncContextManager[tuple[int, AsyncIterator[bytes]]]:
        """Stream a blob from the offset ``start`` on.

        Yields the offset at which the stream really starts, and its pieces, which are not verified.

        Raises: NotFound, PermissionDenied, RegistryError.
        """

    def mistrust(self, digest: str) -> bool:
        """Report that the last blob received for ``digest`` does not match.

        Returns whether another source may have the right one.
        """


class WrongBlob(InvalidArgument):
    """A blob does not match its digest."""


class Variety(msgspec.Struct, frozen=True):
    """Platform of a pull, and the names that its image gets.

    Args:
        platform: ``os[/architecture[/variant]]``.  Empty for this machine's.
        aside: Whether the image gets only its digest as a name, so that the tag stays with another image.
    """

    platform: str = ""
    aside: bool = False


ANY = Variety()


async def pull(
    images: LocalImages,
    policy: RegistryPolicy,
    reference: Reference,
    credentials: RegistryCredentials,
    report: Report,
    wanted: Variety = ANY,
) -> Image:
    """Pull the image ``reference``, which has a tag or digest.  Raises: as ``ImageStore.pull``."""
    parse_platform(wanted.platform)
    async with _lock(_pulls, (images, reference)):
        return await at_endpoints(
            policy,
            reference,
            credentials,
            lambda repository: pull_from(images, repository, reference, report, wanted),
        )


async def pull_from_nodes(
    images: LocalImages,
    nodes: NodeFetcher,
    reference: Reference,
    report: Report,
    wanted: Variety = ANY,
    *,
    only_own: bool = False,
) -> Image:
    """Pull the image ``reference`` from the nodes of the cluster.

    ``only_own``: See ``spreading.Spread``.  Raises: as ``ImageStore.pull``.
    """
    repository = nodes.repository(reference, only_own=only_own)
    async with _lock(_pulls, (images, reference)), repository as found:
        return await pull_from(images, found, reference, report, wanted)


async def pull_from(
    images: LocalImages, repository: BlobSource, reference: Reference, report: Report, variety: Variety = ANY
) -> Image:
    """Pull the image ``reference`` from ``repository``.  Raises: as ``ImageStore.pull``.

    If the registry has the image for a single platform only, the image is accepted even if its platform differs, with a
    warning.

    Source: moby, daemon/images/image_pull.go (PullImage).
    """
    wanted = parse_platform(variety.platform) if variety.platform else None
    document = await run_with_retries(
        lambda: repository.manifest(reference.digest or reference.tag, images.limits.manifest_bytes_max),
        repository.transfers,
    )
    report(ProgressMessage(id=reference.tag or reference.digest, status=f"Pulling from {reference.path}"))
    manifest, contents = await _for_platform(repository, document, wanted, images.limits.manifest_bytes_max)
    require_image(manifest)
    before = images.resolve(str(reference))
    names = _names(reference, document)
    if variety.aside:
        names = [reference.with_digest(digest_of(contents[-1]))] if document.is_of_registry else []
    image = await _pull_image(images, repository, manifest, names, report)
    is_new = before is None or before.id != image.id
    if document.is_of_registry:
        await images.keep_documents(image, contents)
        report(ProgressMessage(status=f"Digest: {document.digest}"))
    state = "Downloaded newer image" if is_new else "Image is up to date"
    report(ProgressMessage(status=f"Status: {state} for {reference.familiar}"))
    images.announce("pull", reference.familiar, reference.familiar_name)
    is_index = len(contents) > 1
    if wanted is not None and not is_index:
        try:
            require_platform(image, reference.familiar, wanted)
        except NotFound as error:  # only a warning, as in Docker, because the registry has no other image
            report(ProgressMessage(status=f"WARNING: {error}"))
    return image


async def tags(
    policy: RegistryPolicy, reference: Reference, credentials: RegistryCredentials, limits: ImageLimits
) -> Sequence[str]:
    """Return all tags of a repository.  Raises: NotFound, RegistryError."""
    return await at_endpoints(
        policy, reference, credentials, lambda repository: repository.tags(limits.manifest_bytes_max)
    )


async def inspect(
    policy: RegistryPolicy, reference: Reference, credentials: RegistryCredentials, limits: ImageLimits
) -> Mapping[str, Any]:
    """Return the registry's description of ``reference``: digest and platforms, as ``GET /distribution`` shows them.

    Raises: NotFound, PermissionDenied, RegistryError.
    """
    return await at_endpoints(
        policy,
        reference,
        credentials,
        lambda repository: _inspect(repository, reference, limits.manifest_bytes_max),
    )


async def small_blob(repository: BlobSource, digest: str, bytes_max: int) -> bytes:
    """Return a blob that fits into memory.  Raises: InvalidArgument: it is larger, or does not match; as ``blob``."""
    async with repository.blob(digest) as (_, pieces):
        content = await _whole(pieces, bytes_max)
    if digest_of(content) != digest:
        raise InvalidArgument(f"image verification failed for digest {digest}")
    return content


async def fetch_layer(
    images: LocalImages,
    repository: BlobSource,
    descriptor: Descriptor,
    chain_id: Digest,
    diff_id: str,
    report: Report = quiet,
) -> None:
    """Fetch one layer into the store, unless it is there.  The caller must pin its chain, and set a time limit.

    While another pull or build fetches the layer, its state is "Waiting".  "Pulling fs layer" follows.

    Raises: InvalidArgument: it is not the layer ``diff_id``; UnpackFailed; as ``BlobSource.blob``.
    """
    id = short(descriptor.digest)
    report(step(id, "Waiting"))
    async with _lock(_layers, (images, chain_id)), images.workspace("layer") as directory:
        if images.layer_store.get(chain_id) is not None:
            return
        report(step(id, "Pulling fs layer"))
        try:
            path = await _download(repository, images, descriptor, directory / "layer", report)
            await _unpack(images, path, descriptor, chain_id, diff_id, report)
        finally:
            images.arriving.discard(descriptor.digest)


async def _inspect(repository: BlobSource, reference: Reference, bytes_max: int) -> Mapping[str, Any]:
    try:
        document = await repository.manifest(reference.digest or reference.tag, bytes_max)
    except Denied as error:  # keep the type, so that the caller tries other credentials
        raise Denied(error.cause, error.cause) from error
    except Absent as error:
        raise NotFound(error.cause) from error
    manifest = decoded(document)
    platforms = [one.platform for one in manifest.manifests or () if one.platform]
    if manifest.config is not None:
        content = await small_blob(repository, manifest.config.digest, _CONFIG_BYTES_MAX)
        config = parse_config(content)
        platforms = [{"architecture": config.architecture, "os": config.os}]
    return _described(document, manifest, platforms)


async def pulled_aside(images: LocalImages, reference: Reference, wanted: ImagePlatform) -> Image | None:
    """Return the image for another platform that an earlier pull left beside the image ``reference``.

    The index that came with the image names it by its digest.
    """
    image = images.resolve(str(reference))
    for content in await asyncio.to_thread(images.documents, image) if image is not None else ():
        manifests = decoded(Document(content, OCI_MANIFEST)).manifests
        with suppress(NotFound):
            digest = parse_digest(choose(manifests or (), wanted).digest)
            if (found := images.resolve(str(reference.with_digest(digest)))) is not None:
                return found
    return None


async def inspect_here(images: LocalImages, reference: Reference) -> Mapping[str, Any] | None:
    """Return the description of an image on this node, made from its registry's documents, if it has any."""
    image = images.resolve(str(reference))
    digests = {one.digest for one in image.digests if one.name == reference.name} if image is not None else ()
    if image is None or not digests:
        return None
    for content in await asyncio.to_thread(images.documents, image):
        document = Document(content, OCI_MANIFEST)
        if document.digest in digests:
            manifest = decoded(document)
            platforms = [one.platform for one in manifest.manifests or () if one.platform]
            own = {"architecture": image.config.architecture, "os": image.config.os}
            return _described(document, manifest, platforms or [own])
    return None


def _described(
    document: Document, manifest: Manifest, platforms: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any]:
    return {
        "Descriptor": {
            "mediaType": manifest.media_type or document.media_type,
            "digest": document.digest,
            "size": len(document.content),
        },
        "Platforms": platforms,
    }


async def _whole(pieces: AsyncIterator[bytes], bytes_max: int) -> bytes:
    content = bytearray()
    async for piece in pieces:
        content += piece
        if len(content) > bytes_max:
            raise InvalidArgument(f"the image's configuration is larger than {bytes_max} bytes")
    return bytes(content)


_Locks: TypeAlias = WeakValueDictionary[tuple[LocalImages, K], asyncio.Lock]

_pulls: _Locks[Reference] = WeakValueDictionary()
"""One lock for each reference that is being pulled.  It exists while it is held or awaited."""
_layers: _Locks[Digest] = WeakValueDictionary()
"""One lock for each layer that is being downloaded, by chain id."""


def _lock(locks: _Locks[K], key: tuple[LocalImages, K]) -> asyncio.Lock:
    lock = locks.get(key)
    if lock is None:
        lock = locks[key] = asyncio.Lock()
    return lock


def _names(reference: Reference, document: Document) -> Sequence[Reference]:
    """Return the image's references after the pull: its tag, and its repository at the manifest's digest."""
    if not document.is_of_registry:
        return (reference,)
    at_digest = reference.with_digest(document.digest)
    return (at_digest,) if reference.digest else (reference, at_digest)


async def _for_platform(
    repository: BlobSource, document: Document, wanted: ImagePlatform | None, bytes_max: int
) -> tuple[Manifest, Sequence[bytes]]:
    """Return the manifest in ``document``, or the one for ``wanted`` if it is an index, and the bytes of all documents.

    ``wanted``: None for the best platform of this machine.
    """
    manifest = decoded(document)
    if manifest.manifests is None:
        return manifest, (document.content,)
    digest = parse_digest(choose(manifest.manifests, wanted).digest)
    found = await run_with_retries(lambda: repository.manifest(digest, bytes_max), repository.transfers)
    chosen = decoded(found)
    if chosen.manifests is not None:
        raise InvalidArgument("invalid manifest: the image index contains another index")
    return chosen, (document.content, found.content)


async def _pull_image(
    images: LocalImages,
    repository: BlobSource,
    manifest: Manifest,
    names: Sequence[Reference],
    report: Report,
) -> Image:
    assert manifest.config is not None, "an index was resolved before"
    config_digest = parse_digest(manifest.config.digest)
    present = images.resolve(config_digest)
    async with images.pin(present.chain if present is not None else ()):
        if present is not None:
            with suppress(FileNotFoundError):  # a removal has deleted it by now, but not its pinned layers
                content = await asyncio.to_thread(images.config_file(present).read_bytes)
                return await images.add(content, names, is_fetched=True)
        blobs = {manifest.config.digest, *(layer.digest for layer in manifest.layers)}
        async with images.workspace("pull") as directory:
            with images.arriving.expecting(blobs, names):
                return await _pull_blobs(images, repository, manifest, names, directory, report)


async def _pull_blobs(
    images: LocalImages,
    repository: BlobSource,
    manifest: Manifest,
    names: Sequence[Reference],
    directory: Path,
    report: Report,
) -> Image:
    assert manifest.config is not None, "an index was resolved before"
    content = await _fetched_config(repository, images, manifest.config, directory)
    config = parse_config(content)
    if len(config.diff_ids) != len(manifest.layers):
        raise InvalidArgument(_MISMATCH)
    async with images.pin(chain_ids(config.diff_ids)):
        await _pull_layers(images, repository, manifest, config, directory, report)
        return await images.add(content, names, is_fetched=True)


def _check_room(images: LocalImages, manifest: Manifest, config: ImageConfig, directory: Path) -> None:
    """Refuse an image before its first byte if its declared sizes do not fit.  Raises: UnpackFailed.

    The check assumes that a layer that has to be fetched needs at least the same space again when it is unpacked.
    """
    missing = [
        max(descriptor.size, 0)
        for descriptor, chain_id in zip(manifest.layers, chain_ids(config.diff_ids), strict=True)
        if images.layer_store.get(chain_id) is None
    ]
    room = images.limits.room_on(directory)
    if sum(missing) > room:
        raise UnpackFailed(
            f"{directory}: no space left on device: the image has {sum(missing)} bytes to download, and "
            f"{max(room, 0)} may be used"
        )


async def _pull_layers(
    images: LocalImages,
    repository: BlobSource,
    manifest: Manifest,
    config: ImageConfig,
    directory: Path,
    report: Report,
) -> None:
    await asyncio.to_thread(_check_room, images, manifest, config, directory)
    downloads = asyncio.Semaphore(3)  # Docker's max-concurrent-downloads

    async def layer(number: int, descriptor: Descriptor, chain_id: Digest, diff_id: str) -> None:
        id = short(descriptor.digest)
        # If two simultaneous pulls share the layer, the second waits for the download of the first.
        async with _lock(_layers, (images, chain_id)):
            if images.layer_store.get(chain_id) is not None:
                report(step(id, "Already exists"))
                return
            try:
                async with downloads:
                    path = await _download(
                        repository, images, descriptor, directory / f"layer-{number}", report
                    )
                await _unpack(images, path, descriptor, chain_id, diff_id, report)
            except OSError as error:
                raise UnpackFailed(f"failed to register layer: {describe_error(error)}") from error
            finally:
                images.arriving.discard(descriptor.digest)

    chain = chain_ids(config.diff_ids)
    with first_alone(SkepError):  # later errors are consequences of the first, or the same
        async with asyncio.TaskGroup() as group:
            for number, (descriptor, chain_id, diff_id) in enumerate(
                zip(manifest.layers, chain, config.diff_ids, strict=True)
            ):
                present = images.layer_store.get(chain_id) is not None
                report(step(short(descriptor.digest), "Already exists" if present else "Pulling fs layer"))
                if not present:
                    group.create_task(layer(number, descriptor, chain_id, diff_id), name=f"layer-{number}")


async def _unpack(
    images: LocalImages, path: Path, descriptor: Descriptor, chain_id: Digest, diff_id: str, report: Report
) -> None:
    id = short(descriptor.digest)
    report(step(id, "Download complete"))
    report(transfer(id, "Extracting", descriptor.size, descriptor.size))
    try:
        await images.layer_store.add(
            path, chain_id=chain_id, diff_id=Digest(diff_id), blob=Digest(descriptor.digest)
        )
    except DigestMismatch as error:
        raise InvalidArgument(_MISMATCH) from error
    except SkepError as error:
        raise type(error)(f"failed to register layer: {error}") from error
    report(step(id, "Pull complete"))


async def _fetched_config(
    repository: BlobSource, images: LocalImages, descriptor: Descriptor, directory: Path
) -> bytes:
    if descriptor.size > _CONFIG_BYTES_MAX:
        raise InvalidArgument(f"the image's configuration is larger than {_CONFIG_BYTES_MAX} bytes")
    try:
        path = await _download(repository, images, descriptor, directory / "config", lambda _: None)
    finally:
        images.arriving.discard(descriptor.digest)
    return await asyncio.to_thread(path.read_bytes)


async def _download(
    repository: BlobSource, images: LocalImages, descriptor: Descriptor, path: Path, report: Report
) -> Path:
    """Download a blob to a file and verify it.

    If the bytes of a resumed download do not match, the blob is downloaded again from the start, as in Docker.

    Raises: InvalidArgument: the bytes do not match the digest; UnpackFailed: there is no space for them.
    """
    digest = parse_digest(descriptor.digest)
    may_begin_again, is_resumed = True, False

    async def resume() -> None:
        nonlocal is_resumed
        is_resumed = file.seek(0, os.SEEK_END) > 0
        await _transfer(repository, images, descriptor, file, report)

    with path.open("w+b") as file:
        await asyncio.to_thread(_reserve, file, descriptor.size, images.limits)
        while True:
            try:
                await run_with_retries(resume, repository.transfers)
                report(step(short(digest), "Verifying Checksum"))
                if await asyncio.to_thread(_digest_of_file, path, digest.partition(":")[0]) == digest:
                    return path
                raise WrongBlob(f"filesystem layer verification failed for digest {digest}")
            except WrongBlob:
                if not repository.mistrust(digest):
                    if not (is_resumed and may_begin_again):
                        raise
                    may_begin_again = False
                file.truncate(0)


async def _transfer(
    repository: BlobSource, images: LocalImages, descriptor: Descriptor, file: BinaryIO, report: Report
) -> None:
    """Append the missing bytes."""
    id = short(descriptor.digest)
    present = file.seek(0, os.SEEK_END)
    if present == descriptor.size > 0:  # the transfer broke after the last byte, and no range can start there
        return
    async with repository.blob(descriptor.digest, start=present) as (start, pieces):
        images.arriving.add(descriptor.digest)
        if start < present:  # truncating to the present size would release the reserved space
            file.truncate(start)
        written = reported = file.seek(start)
        async for piece in pieces:
            written += len(piece)
            if written > descriptor.size:
                raise WrongBlob(f"blob {descriptor.digest} is larger than its {descriptor.size} bytes")
            await asyncio.to_thread(file.write, piece)
            if written - reported >= _REPORT_BYTES or written == descriptor.size:
                reported = written
                report(transfer(id, "Downloading", written, descriptor.size))
    await asyncio.to_thread(file.flush)
    if written < descriptor.size:
        raise RegistryError(f"blob {descriptor.digest} ended after {written} of {descriptor.size} bytes")


def _reserve(file: BinaryIO, size: int, limits: ImageLimits) -> None:
    """Reserve ``size`` bytes on the file system for ``file``, so that other downloads cannot use them.

    Raises: InvalidArgument: the size is negative; UnpackFailed: there is no space.
    """
    if size < 0:
        raise InvalidArgument(f"invalid manifest: a blob of {size} bytes")
    directory = Path(file.name).parent
    if size > limits.room_on(directory):
        raise UnpackFailed(f"{directory}: no space left on device")
    try:
        allocate(file.fileno(), size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UnpackFailed(f"{directory}: no space left on device") from error
        # The file system does not support reservations, so another download may take the space first.


async def run_with_retries(action: Callable[[], Awaitable[T]], transfers: TransferLimits) -> T:
    """Run ``action``, and retry network failures after increasing, jittered waits.

    If the registry names a waiting time, the next attempt is not earlier.
    """
    backoff = Backoff(transfers.backoff_s)
    for attempt in range(transfers.attempts):
        try:
            return await action()
        except RegistryError as error:
            if attempt == transfers.attempts - 1:
                raise
            await asyncio.sleep(max(backoff.next_delay_s(), error.retry_after_s))
    raise AssertionError("the last attempt returns or raises")


def _digest_of_file(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"

"""``docker push``: sends images to a registry.

Each layer is sent once, even if many tags have it.  It is not sent at all if the registry already has it.  A pulled
image is pushed with its original manifest, so its digest stays the same.  For other images, a manifest of schema 2 is
created, as in Docker.  The manifest is sent last, after everything that it names, so an interrupted push leaves no tag.

Source: moby 20.10, distribution/{push,push_v2}.go, distribution/xfer/upload.go.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from skep.aio.groups import first_alone
from skep.engine.images.digest import Digest, digest_of, short
from skep.engine.images.image import Image
from skep.engine.images.layers import Blob
from skep.engine.images.local import LocalImages
from skep.engine.images.progress import ProgressMessage, Report, quiet, step, transfer
from skep.engine.images.reference import Reference
from skep.engine.images.registry.credentials import RegistryCredentials
from skep.engine.images.registry.endpoints import RegistryPolicy
from skep.engine.images.registry.manifests import Manifest, decoded
from skep.engine.images.registry.pulling import run_with_retries
from skep.engine.images.registry.refusals import NOT_JSON
from skep.engine.images.registry.registry import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Document,
    NoCredentials,
    RegistryRepository,
    at_endpoints,
)
from skep.engine.images.registry.uploads import (
    BlobUpload,
    ContentRefused,
    check,
    has_blob,
    require_digest,
    send,
)
from skep.errors import InvalidArgument, NotFound, SkepError
from skep.model.values.counts import counted

_UPLOADS_MAX = 5
"""Limit for concurrent uploads, Docker's max-concurrent-uploads."""
_MOUNTS_MAX = 3
"""Limit for the repositories from which a push tries to mount a layer."""
_REPORT_BYTES = 512 << 10
"""Bytes between two progress messages.  Source: moby, pkg/progress (512 KiB)."""
_ZSTD = b"\x28\xb5\x2f\xfd"
_CONFIG_TYPES = {
    DOCKER_MANIFEST: "application/vnd.docker.container.image.v1+json",
    OCI_MANIFEST: "application/vnd.oci.image.config.v1+json",
}
_LAYER_TYPES = {
    DOCKER_MANIFEST: "application/vnd.docker.image.rootfs.diff.tar.gzip",
    OCI_MANIFEST: "application/vnd.oci.image.layer.v1.tar+gzip",
}
_ZSTD_TYPE = "application/vnd.oci.image.layer.v1.tar+zstd"


async def push(
    images: LocalImages,
    policy: RegistryPolicy,
    reference: Reference,
    credentials: RegistryCredentials,
    report: Report,
) -> None:
    """Push the image ``reference`` to its registry.  Without a tag, push all tags of the repository.

    Raises:
        NotFound: there is no such image here.
        InvalidArgument: the reference has a digest, or the registry stored something else.
        Refused, PermissionDenied: the registry does not accept it.
        RegistryError: it cannot be reached.
    """
    name = reference.familiar_name
    if reference.digest:
        raise InvalidArgument("cannot push a digest reference")
    report(ProgressMessage(status=f"The push refers to repository [{reference.name}]"))
    tags = {
        tag: image
        for image in images.images()
        for tag in image.tags
        if tag.repository == reference.repository
    }
    if not any(
        one.repository == reference.repository for image in images.images() for one in image.references
    ):
        raise NotFound(f"An image does not exist locally with the tag: {name}")
    if reference.tag and reference not in tags:
        raise NotFound(f"tag does not exist: {reference.familiar}")
    if not tags:
        raise NotFound(f"no tags to push for {name}")
    chosen = [reference] if reference.tag else sorted(tags)
    wanted = {tag: PushedImage(tags[tag], tuple(images.index(tag, is_whole=True))) for tag in chosen}
    await _push_tags(images, policy, wanted, credentials, report)


async def push_image(
    images: LocalImages,
    policy: RegistryPolicy,
    image: "PushedImage",
    tag: Reference,
    credentials: RegistryCredentials,
    report: Report = quiet,
) -> Digest:
    """Push an image under a tag, whatever the tag names here, and return the digest of its manifest or index.

    Raises: as ``push``.
    """
    (digest,) = await _push_tags(images, policy, {tag: image}, credentials, report)
    return digest


class PushedImage(msgspec.Struct, frozen=True):
    """Image of a push.  ``index``: All images of a name with several platforms.  Empty for the one image."""

    image: Image
    index: tuple[Image, ...] = ()

    @property
    def all(self) -> Sequence[Image]:
        """Images whose manifests are pushed."""
        return self.index or (self.image,)


async def _push_tags(
    images: LocalImages,
    policy: RegistryPolicy,
    wanted: Mapping[Reference, PushedImage],
    credentials: RegistryCredentials,
    report: Report,
) -> Sequence[Digest]:
    """Push images under tags of one repository, and return the digests of their manifests."""
    name = next(iter(wanted)).repository

    async def send_all(repository: RegistryRepository) -> Sequence[Digest]:
        push = _Push(images, repository, name, report)
        return [await push.tag(tag, image) for tag, image in wanted.items()]

    try:
        async with AsyncExitStack() as stack:
            for image in (one for pushed in wanted.values() for one in pushed.all):
                await stack.enter_async_context(images.pin(image.chain))
            digests = await at_endpoints(policy, name, credentials, send_all, to_push=True)
    except NoCredentials as error:
        raise ContentRefused(error.cause) from error
    images.announce("push", name.familiar_name, name.familiar_name)
    return digests


class _Push:
    """One push to one repository."""

    def __init__(
        self, images: LocalImages, repository: RegistryRepository, name: Reference, report: Report
    ) -> None:
        self._images = images
        self._repository = repository
        self._name = name
        self._report = report
        self._slots = asyncio.Semaphore(_UPLOADS_MAX)
        self._pushed: dict[str, Blob] = {}
        """Layers that the registry already has, by the digest of the plain tar."""

    async def tag(self, tag: Reference, pushed: PushedImage) -> Digest:
        """Send the missing blobs, then the manifest or index under ``tag``.  Return its digest."""
        manifests = [await self._manifest(image) for image in pushed.all]
        document = manifests[0]
        if pushed.index:
            for manifest in manifests:
                await put_manifest(self._repository, tag.with_digest(manifest.digest), manifest)
            document = index_of(pushed.index, manifests)
        await put_manifest(self._repository, tag, document)
        for image, manifest in zip(pushed.index, manifests, strict=False):
            await self._images.keep_documents(image, (document.content, manifest.content))
        self._report(
            ProgressMessage(status=f"{tag.tag}: digest: {document.digest} size: {len(document.content)}")
        )
        id = pushed.image.id
        if self._images.resolve(id) is not None:
            config = await asyncio.to_thread(self._images.config_file(pushed.image).read_bytes)
            await self._images.add(config, (self._name.with_digest(document.digest),))
        result = {"Tag": tag.tag, "Digest": document.digest, "Size": len(document.content)}
        self._report(ProgressMessage(aux=result))
        return document.digest

    async def _manifest(self, image: Image) -> Document:
        """Send the missing blobs of an image, and return its manifest."""
        config = await asyncio.to_thread(self._images.config_file(image).read_bytes)
        layers = dict(zip(image.config.diff_ids, image.chain, strict=True))
        for diff_id in reversed(layers):
            self._report(step(short(diff_id), "Preparing"))
        with first_alone(SkepError):  # later errors follow from the first, or are the same
            async with asyncio.TaskGroup() as group:
                for diff_id, chain_id in reversed(layers.items()):
                    group.create_task(self._layer(diff_id, chain_id), name=f"push-{short(diff_id)}")
        await self._blob(BlobUpload(digest=image.id, size=len(config), content=config))
        blobs = [self._pushed[diff_id] for diff_id in image.config.diff_ids]
        return await asyncio.to_thread(_manifest_for, self._images, image, config, blobs)

    async def _layer(self, diff_id: str, chain_id: Digest) -> None:
        id = short(diff_id)
        if diff_id in self._pushed:
            self._report(step(id, "Layer already exists"))
            return
        if self._slots.locked():
            self._report(step(id, "Waiting"))
        async with self._slots:
            blob = await self._images.layer_store.blob(chain_id)
            upload = BlobUpload(
                digest=blob.digest,
                size=blob.size,
                path=blob.path,
                mounts=mount_sources(self._images.images(), self._name, chain_id),
            )
            self._report(step(id, await self._blob(upload, id)))
        self._pushed[diff_id] = blob

    async def _blob(self, upload: BlobUpload, id: str = "") -> str:
        """Send a blob unless the registry has it.  Return the text for the progress."""
        reported = 0

        def sent(count: int) -> None:
            nonlocal reported
            if id and (count - reported >= _REPORT_BYTES or count == upload.size or count < reported):
                reported = count
                self._report(transfer(id, "Pushing", count, upload.size))

        def waiting(seconds: float) -> None:
            if id:
                whole = max(round(seconds), 1)
                self._report(step(id, f"Retrying in {counted(whole, 'second')}"))

        return await put_blob(self._repository, self._name, upload, sent, waiting)


async def put_blob(
    repository: RegistryRepository,
    name: Reference,
    upload: BlobUpload,
    report: Callable[[int], None] = lambda _: None,
    waiting: Callable[[float], None] = lambda _: None,
) -> str:
    """Send a blob unless the repository has it.  Return the text for the progress.

    If two callers upload the same blob at the same time, the second waits for the first and then finds the blob.

    Args:
        name: Name of the repository, without a tag.
        report: Called with the number of bytes sent.
        waiting: Called with the seconds until the next attempt after a network failure.

    Raises: ContentRefused, InvalidArgument, RegistryError.
    """
    key = f"{name} {upload.digest}"
    lock = _blobs.get(key)
    if lock is None:
        lock = _blobs[key] = asyncio.Lock()
    async with lock:
        if await run_with_retries(
            lambda: has_blob(repository, upload.digest, upload.size), repository.transfers
        ):
            return "Layer already exists"
        mounted = await send(repository, upload, report, waiting)
    return f"Mounted from {mounted}" if mounted else "Pushed"


async def put_manifest(repository: RegistryRepository, tag: Reference, manifest: Document) -> None:
    """Send a manifest whose blobs are there, under a tag or its digest.  Raises: ContentRefused, RegistryError."""

    async def put() -> None:
        async with repository.request(
            "PUT",
            f"{repository.path}/manifests/{tag.digest or tag.tag}",
            headers={"Content-Type": manifest.media_type},
            content=manifest.content,
            timeout=repository.transfers.response_timeout,
        ) as response:
            await check(response)
            require_digest(response, manifest.digest)

    await run_with_retries(put, repository.transfers)


_blobs: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
"""One lock for each blob and repository in a push.  It exists while it is held or awaited."""


def mount_sources(images: Sequence[Image], target: Reference, chain_id: str) -> Sequence[str]:
    """Return paths of other repositories of the same registry that have the layer.

    These are the repositories with images that have the layer.  An image was pulled from a repository or pushed to it
    if it has a reference with a digest there.
    """
    paths = {
        one.path
        for image in images
        if chain_id in image.chain
        for one in image.digests
        if one.domain == target.domain and one.path != target.path
    }
    return sorted(paths)[:_MOUNTS_MAX]


def _manifest_for(images: LocalImages, image: Image, config: bytes, blobs: Sequence[Blob]) -> Document:
    """Return the image's original manifest if it names these blobs, or else one of schema 2.  Blocks."""
    for content in images.documents(image):
        kept = _kept(content)
        if (
            kept is not None
            and kept.config is not None
            and kept.config.digest == image.id
            and [(one.digest, one.size) for one in kept.layers] == [(one.digest, one.size) for one in blobs]
        ):
            return Document(content, kept.media_type or OCI_MANIFEST)
    are_zstd = [_begins_with(blob, _ZSTD) for blob in blobs]
    kind = OCI_MANIFEST if any(are_zstd) else DOCKER_MANIFEST  # schema 2 has no media type for zstd
    layers = [
        _descriptor(_ZSTD_TYPE if is_zstd else _LAYER_TYPES[kind], blob.size, blob.digest)
        for blob, is_zstd in zip(blobs, are_zstd, strict=True)
    ]
    document = {
        "schemaVersion": 2,
        "mediaType": kind,
        "config": _descriptor(_CONFIG_TYPES[kind], len(config), digest_of(config)),
        "layers": layers,
    }
    # Indented by three spaces, as in Docker, so that both engines push an image with the same digest.
    return Document(msgspec.json.format(msgspec.json.encode(document), indent=3), kind)


def index_of(images: Sequence[Image], manifests: Sequence[Document]) -> Document:
    """Return the index of images for several platforms.  Docker's list has no manifests of other types."""
    kind = DOCKER_LIST if {one.media_type for one in manifests} == {DOCKER_MANIFEST} else OCI_INDEX
    entries = []
    for image, manifest in zip(images, manifests, strict=True):
        config = image.config
        platform = {"architecture": config.architecture, "os": config.os}
        if config.variant:
            platform["variant"] = config.variant
        entry = _descriptor(manifest.media_type, len(manifest.content), manifest.digest)
        entries.append({**entry, "platform": platform})
    document = {"schemaVersion": 2, "mediaType": kind, "manifests": entries}
    return Document(msgspec.json.format(msgspec.json.encode(document), indent=3), kind)


def _kept(content: bytes) -> Manifest | None:
    try:
        media_type = str(msgspec.json.decode(content, type=dict[str, Any]).get("mediaType") or OCI_MANIFEST)
        return decoded(Document(content, media_type))
    except (*NOT_JSON, InvalidArgument):
        return None


def _descriptor(media_type: str, size: int, digest: str) -> Mapping[str, object]:
    return {"mediaType": media_type, "size": size, "digest": digest}


def layer_type(blob: Blob, kind: str) -> str:
    """Return the media type of a layer in a manifest of the type ``kind``.  Blocks for a moment."""
    return _ZSTD_TYPE if _begins_with(blob, _ZSTD) else _LAYER_TYPES[kind]


def _begins_with(blob: Blob, magic: bytes) -> bool:
    with blob.path.open("rb") as file:
        return file.read(len(magic)) == magic

"""``docker save`` and ``docker load``: images as one tar.

An archive is written both as an OCI layout (``index.json``, ``blobs/``) and in Docker's own layout (``manifest.json``),
as Docker does since version 25.  Either layout can be read, and also the one from before 2015 (a directory per layer).

The confined worker unpacks an archive into a directory of plain files.  Files are then read by names that cannot leave
that directory.  Every layer is verified against its digest before it is used.

Source: moby, image/tarexport/{load,save}.go; OCI image-spec, image-layout.md.
"""

import asyncio
import os
import tarfile
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from skep.api.formats.bodies import decode_body
from skep.engine.images.archives.legacy import DOCUMENT_BYTES_MAX, legacy_items
from skep.engine.images.archives.streams import plain_chunks
from skep.engine.images.archives.workers import unpack
from skep.engine.images.digest import Digest, chain_ids, digest_of, hex_of, is_digest, parse_digest, short
from skep.engine.images.image import Image, parse_config
from skep.engine.images.layers import DigestMismatch
from skep.engine.images.local import LocalImages
from skep.engine.images.platforms import ImagePlatform, is_for, require_platform
from skep.engine.images.progress import ProgressMessage, Report, transfer
from skep.engine.images.reference import Reference, parse_reference
from skep.errors import InvalidArgument, NotFound

T = TypeVar("T")

_CHUNK_BYTES = 1 << 20
"""Number of bytes that are copied at a time."""

_OCI_INDEX = "application/vnd.oci.image.index.v1+json"
_OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
_OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
_NAME_ANNOTATION = "io.containerd.image.name"
_TAG_ANNOTATION = "org.opencontainers.image.ref.name"


class Item(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """One image of an archive: an entry of ``manifest.json``.

    ``layers`` has the layers' paths in the archive, bottom first.
    """

    __go_name__ = "tarexport.manifestItem"

    config: str = ""
    repo_tags: tuple[str, ...] | None = None
    layers: tuple[str, ...] | None = None
    parent: str = ""


class Unpackaged(msgspec.Struct, frozen=True, kw_only=True):
    """One image to write: its configuration, a file per layer (plain or compressed tar), and its names."""

    config: bytes
    layers: Sequence[Path]
    layer_bytes: Sequence[int] = ()
    """Lengths of the plain tars.  If empty, each layer is read twice."""
    names: Sequence[Reference] = ()


# --- load ----------------------------------------------------------------------------------------------------------


async def load(
    images: LocalImages,
    archive: AsyncIterable[bytes],
    report: Report,
    platforms: Sequence[ImagePlatform] = (),
) -> Sequence[Image]:
    """Load every image of ``archive``, and send Docker's messages to ``report``.

    If an image is broken, it is discarded, and the images before it are kept, as in Docker.

    Args:
        platforms: Platforms of the images to load.  Empty for all images.

    Raises:
        InvalidArgument: it is not an image archive, or its content does not match its manifest.
        NotFound: it has no image for one of ``platforms``.
        ResourceExhausted: it is larger than this node accepts.
    """
    async with images.workspace("load") as directory:
        await unpack(archive, directory, limits=images.limits, is_layer=False)
        items = await asyncio.to_thread(_items, directory)
        if platforms:
            items = await asyncio.to_thread(_for_platforms, directory, items, platforms)
        loaded = [await _load_item(images, directory, item, report) for item in items]
        for item, image in zip(items, loaded, strict=True):
            if not item.repo_tags:
                report(ProgressMessage(stream=f"Loaded image ID: {image.id}\n"))
        return loaded


def _for_platforms(
    directory: Path, items: Sequence[Item], platforms: Sequence[ImagePlatform]
) -> Sequence[Item]:
    """Return the images of an archive for ``platforms``.  Raises: NotFound: there is none for one of them."""
    configs = [parse_config(_document(directory, item.config)) for item in items]
    chosen = []
    for wanted in platforms:
        fitting = [item for item, config in zip(items, configs, strict=True) if is_for(config, wanted)]
        if not fitting:
            raise NotFound(f"the archive has no image for platform {wanted}")
        chosen += [item for item in fitting if item not in chosen]
    return chosen


async def _load_item(images: LocalImages, directory: Path, item: Item, report: Report) -> Image:
    content = await asyncio.to_thread(_document, directory, item.config)
    config = parse_config(content)
    if config.os not in ("", "linux"):
        raise InvalidArgument(f"cannot load {config.os} image on linux")
    layers = item.layers or ()
    if len(layers) != len(config.diff_ids):
        raise InvalidArgument(
            f"invalid manifest, layers length mismatch: expected {len(layers)}, got {len(config.diff_ids)}"
        )
    references = [_tagged(name) for name in item.repo_tags or ()]
    chain = chain_ids(config.diff_ids)
    async with images.pin(chain):
        for number, (path, chain_id, diff_id) in enumerate(zip(layers, chain, config.diff_ids, strict=True)):
            if images.layer_store.get(chain_id) is None:
                await _load_layer(images, directory, path, number, chain_id, Digest(diff_id), report)
        previous = [images.resolve(str(reference)) for reference in references]
        image = await images.add(content, references, parent=_parent(images, item))
    for reference, before in zip(references, previous, strict=True):
        if before is not None and before.id != image.id:
            report(
                ProgressMessage(
                    stream=f"The image {reference.familiar} already exists, renaming the old one"
                    f" with ID {before.id} to empty string\n"
                )
            )
        report(ProgressMessage(stream=f"Loaded image: {reference.familiar}\n"))
    images.announce("load", image.id, image.id)
    return image


async def _load_layer(
    images: LocalImages,
    directory: Path,
    path: str,
    number: int,
    chain_id: Digest,
    diff_id: Digest,
    report: Report,
) -> None:
    file = _inside(directory, path)
    size = file.stat().st_size
    report(transfer(short(diff_id), "Loading layer", 0, size))
    # A hard link, because two images of one archive may share the file.
    own = directory / f"layer-{number}-{hex_of(chain_id)}"
    await asyncio.to_thread(os.link, file, own)
    try:
        await images.layer_store.add(own, chain_id=chain_id, diff_id=diff_id)
    except DigestMismatch as error:
        raise InvalidArgument(
            f'invalid diffID for layer {number}: expected "{error.expected}", got "{error.found}"'
        ) from error
    report(transfer(short(diff_id), "Loading layer", size, size))


def _items(directory: Path) -> Sequence[Item]:
    """Return the archive's manifest, from the first layout that is present."""
    names = {path.name for path in directory.iterdir()}
    if "manifest.json" in names:
        content = _document(directory, "manifest.json")
        if content.strip() == b"null":
            raise InvalidArgument("invalid manifest, manifest cannot be null (but can be [])")
        return decode_body(content, list[Item])
    if "index.json" in names:
        return list(_oci_items(directory, "index.json", names=()))
    return [Item(**found) for found in legacy_items(directory, _inside)]


class _Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    media_type: str = ""
    digest: str = ""
    size: int = 0
    annotations: Mapping[str, str] | None = None
    platform: Mapping[str, object] | None = None


class _Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """OCI index or manifest.  An index has ``manifests``, a manifest has the other fields."""

    manifests: tuple[_Descriptor, ...] | None = None
    config: _Descriptor | None = None
    layers: tuple[_Descriptor, ...] = ()


def _oci_items(directory: Path, path: str, names: Sequence[str], depth: int = 0) -> Iterator[Item]:
    """Yield the images of an OCI layout.  Indexes within indexes are followed three levels deep."""
    document = _decoded(_document(directory, path), _Manifest, path)
    if document.config is not None:
        yield Item(
            config=_blob_path(document.config.digest),
            repo_tags=tuple(names),
            layers=tuple(_blob_path(layer.digest) for layer in document.layers),
        )
        return
    if depth == 3:
        raise InvalidArgument("invalid archive: indexes are nested too deeply")
    for descriptor in document.manifests or ():
        if (descriptor.platform or {}).get("os") == "unknown":
            continue  # an attestation of an image
        annotations = descriptor.annotations or {}
        name = annotations.get(_NAME_ANNOTATION, "")
        below = (name,) if name else tuple(names)
        found = _blob_path(descriptor.digest)
        if _inside(directory, found, must_exist=False).exists():
            content = _document(directory, found)
            if digest_of(content) != descriptor.digest:
                raise InvalidArgument(f"invalid archive: {found} does not match its digest")
            yield from _oci_items(directory, found, below, depth + 1)


def _blob_path(digest: str) -> str:
    return f"blobs/{parse_digest(digest).replace(':', '/')}"


def _parent(images: LocalImages, item: Item) -> str:
    return item.parent if is_digest(item.parent) and images.resolve(item.parent) is not None else ""


def _tagged(name: str) -> Reference:
    reference = parse_reference(name)
    if not reference.tag:
        raise InvalidArgument(f'invalid tag "{name}"')
    return reference


def _document(directory: Path, path: str) -> bytes:
    """Read a small file of the archive.  Raises: InvalidArgument."""
    file = _inside(directory, path)
    if file.stat().st_size > DOCUMENT_BYTES_MAX:
        raise InvalidArgument(f"invalid archive: {path} is larger than {DOCUMENT_BYTES_MAX} bytes")
    return file.read_bytes()


def _inside(directory: Path, path: str, *, must_exist: bool = True) -> Path:
    """Return the regular file at ``path`` in the archive.  Links are resolved as if ``directory`` were the root.

    No other process writes below ``directory``, so the checks stay valid.
    """
    base = os.path.realpath(directory)
    current, rest, followed = base, path.split("/"), 0
    while rest:
        part = rest.pop(0)
        if part in ("", "."):
            continue
        if part == "..":
            current = current if current == base else os.path.dirname(current)
            continue
        step = os.path.join(current, part)
        if not os.path.islink(step):
            current = step
            continue
        followed += 1
        if followed > 255:
            raise InvalidArgument(f"evalSymlinksInScope: too many links in {path}")
        target = os.readlink(step)
        rest = target.split("/") + rest
        current = base if target.startswith("/") else current
    if must_exist and not os.path.isfile(current):
        found = os.path.relpath(current, base)
        raise InvalidArgument(f"open {found}: no such file or directory")
    return Path(current)


def _decoded(content: bytes, type_: type[T], name: str) -> T:
    try:
        return msgspec.json.decode(content, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"invalid {name}: {error}") from error


# --- save ----------------------------------------------------------------------------------------------------------


async def save(
    images: LocalImages, words: Sequence[str], platforms: Sequence[ImagePlatform] = ()
) -> AsyncGenerator[bytes, None]:
    """Yield the pieces of an archive with the images that ``words`` name.  The name of a repository means all its tags.

    Args:
        platforms: Platforms that each image must have.  This node has an image for one platform only.

    Raises:
        NotFound: ``reference does not exist``, no such image or another platform, before the first piece.
    """
    chosen: dict[Digest, list[Reference]] = {}
    for word in words:
        for image, reference in _meant(images, word):
            for platform in platforms:
                require_platform(image, word, platform)
            names = chosen.setdefault(image.id, [])
            if reference is not None and reference not in names:
                names.append(reference)
    found = [images.get(id) for id in chosen]
    # No await before, because a removal would delete layers of an image that is read after another one.
    async with images.pin([chain_id for image in found for chain_id in image.chain]):
        packages = [
            Unpackaged(
                config=await asyncio.to_thread(images.config_file(image).read_bytes),
                layers=[images.layer_store.content(chain_id) for chain_id in image.chain],
                layer_bytes=[images.layer_store.all()[chain_id].plain_bytes for chain_id in image.chain],
                names=chosen[image.id],
            )
            for image in found
        ]
        pieces = archive_pieces(packages)
        while piece := await asyncio.to_thread(next, pieces, b""):
            yield piece
    for id in chosen:
        images.announce("save", id, id)


def write_archive(target: BinaryIO, packages: Iterable[Unpackaged]) -> None:
    """Write ``packages`` to ``target`` as ``docker load`` and OCI tools read them."""
    for piece in archive_pieces(packages):
        target.write(piece)


def archive_pieces(packages: Iterable[Unpackaged]) -> Iterator[bytes]:
    """Yield the archive in bounded pieces.  Layers are written plain, once each.  Blocks on files."""
    written: set[str] = set()
    items, manifests = [], []
    repositories: dict[str, dict[str, str]] = {}
    for package in packages:
        config = parse_config(package.config)
        layers = []
        sizes = package.layer_bytes or [_plain_size(file) for file in package.layers]
        for diff_id, file, size in zip(config.diff_ids, package.layers, sizes, strict=True):
            layers.append({"mediaType": _OCI_LAYER, "size": size, "digest": diff_id})
            if diff_id not in written:
                written.add(diff_id)
                yield from _member(_blob_path(diff_id), size, _plain(file))
        yield from _blob(package.config, written)
        descriptor = {
            "mediaType": _OCI_CONFIG,
            "size": len(package.config),
            "digest": digest_of(package.config),
        }
        manifest = msgspec.json.encode(
            {"schemaVersion": 2, "mediaType": _OCI_MANIFEST, "config": descriptor, "layers": layers}
        )
        yield from _blob(manifest, written)
        manifests += list(_index_entries(manifest, package.names))
        items.append(
            Item(
                config=_blob_path(digest_of(package.config)),
                repo_tags=tuple(name.familiar for name in package.names) or None,
                layers=tuple(_blob_path(diff_id) for diff_id in config.diff_ids),
            )
        )
        top = hex_of(config.diff_ids[-1]) if config.diff_ids else ""
        for name in package.names:
            repositories.setdefault(name.familiar_name, {})[name.tag] = top
    index = {"schemaVersion": 2, "mediaType": _OCI_INDEX, "manifests": manifests}
    for path, content in (
        ("index.json", msgspec.json.encode(index)),
        ("manifest.json", msgspec.json.encode(items)),
        ("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'),
        ("repositories", msgspec.json.encode(repositories)),
    ):
        yield from _member(path, len(content), iter((content,)))
    yield bytes(2 * tarfile.BLOCKSIZE)


def _index_entries(manifest: bytes, names: Sequence[Reference]) -> Iterator[Mapping[str, object]]:
    entry = {"mediaType": _OCI_MANIFEST, "digest": digest_of(manifest), "size": len(manifest)}
    if not names:
        yield entry
    for name in names:
        yield {**entry, "annotations": {_NAME_ANNOTATION: str(name), _TAG_ANNOTATION: name.tag}}


def _meant(images: LocalImages, word: str) -> Sequence[tuple[Image, Reference | None]]:
    """Return the images that an argument of ``docker save`` names, each with the tag to write into the archive, if
    any.
    """
    try:
        named = parse_reference(word)
    except InvalidArgument:
        return [(images.get(word), None)]
    if named.is_name_only:
        tags = [(image, tag) for image in images.images() for tag in image.tags if tag.repository == named]
        if tags:
            return tags
    image = images.resolve(word)
    if image is None:
        raise NotFound(f"No such image: {word}")
    return [(image, named if named.tag and named in image.references else None)]


def _blob(content: bytes, written: set[str]) -> Iterator[bytes]:
    digest = digest_of(content)
    if digest not in written:
        written.add(digest)
        yield from _member(_blob_path(digest), len(content), iter((content,)))


def _member(path: str, size: int, content: Iterator[bytes]) -> Iterator[bytes]:
    """Yield one file of the tar.  All times are zero, so that the same images result in the same archive."""
    header = tarfile.TarInfo(path)
    header.size, header.mode = size, 0o644
    yield header.tobuf(tarfile.GNU_FORMAT)
    given = 0
    for piece in content:
        given += len(piece)
        yield piece
    assert given == size, f"{path} has {given} bytes, not {size}"
    if size % tarfile.BLOCKSIZE:
        yield bytes(tarfile.BLOCKSIZE - size % tarfile.BLOCKSIZE)


def _plain(file: Path) -> Iterator[bytes]:
    with file.open("rb") as source:
        yield from plain_chunks(source)


def _plain_size(file: Path) -> int:
    return sum(len(piece) for piece in _plain(file))

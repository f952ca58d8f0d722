"""Local image store of a node, without pulls, pushes and removals.

``<root>/configs/<id>`` holds each image's configuration, the bytes whose digest is its id.  ``catalog.json`` maps
references to images.  ``layers`` has the files.  ``manifests/<id>/<digest>`` has the documents from the image's
registry.  An image exists when its configuration and all its layers do, so it appears and disappears in one step.  The
catalog is written to a temporary file, synced and renamed before a change is visible.

Files that cannot be read at the start (no free descriptor, a failing disk) are read later.  Until then, no image
changes its names, or no layer is deleted, since it is not known which are used.

An image is *damaged* when its configuration does not match its id, or a layer is missing.  It cannot be run, but other
images can.  Its layers are kept, since containers may use them.  While its configuration cannot be read, its layers are
not known, so no layer at all is deleted.  Pulling or loading it again repairs it, and removing it ends the damage.

Reads are synchronous, from memory.  Layers that a load or pull is about to use are *pinned*, so that a concurrent
removal keeps them.  Layers that are neither pinned nor part of an image are deleted.  A removed image is *retired*
first: it can no longer be found, and is deleted once no container uses its layers.
"""

import asyncio
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec
import structlog

from skep.aio.clock import Clock, SystemClock
from skep.aio.failures import describe_error, log_error, retry
from skep.aio.race import afterwards, thread_to_end
from skep.aio.trees import discard_tree, discard_tree_now
from skep.engine.images.archives.workers import ImageLimits
from skep.engine.images.catalog import Catalog, read_catalog, with_image, with_references, without
from skep.engine.images.digest import Digest, chain_ids, digest_of, hex_of, is_digest
from skep.engine.images.image import Image, ImageConfig, parse_config, read_config
from skep.engine.images.layers import Layer, Layers
from skep.engine.images.progress import Arriving
from skep.engine.images.reference import Reference, parse_any, parse_reference, tagged
from skep.errors import InvalidArgument, NotFound, Unavailable
from skep.linux.files import NEW_SUFFIX, is_no_file, replace_file
from skep.model.values.times import ZERO_TIME, Timestamp, timestamp

log = structlog.get_logger()

_ASIDE = "gone-"
"""Prefix of directories that are about to be removed."""


InUse = Callable[[], Collection[str]]
"""Returns the ids of images that containers have, running or not."""


class ImageEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Event of an image (``docker events``): pull, load, save, tag, untag, delete.

    Args:
        id: Id of the image.  For a pull, its reference.
        attributes: Has ``name`` and the image's labels.
    """

    action: str
    id: str
    time_ns: int
    attributes: Mapping[str, str] = {}


class Damage(msgspec.Struct, frozen=True):
    """Damage of an image.  ``config`` is None if the configuration is damaged, so that the layers are unknown."""

    reason: str
    config: ImageConfig | None


class LocalImages:
    """All images below one directory.  Only one process may use it.  Call ``open`` first.

    ``report``: Called with the present problem of the images, or an empty text without one.
    """

    def __init__(
        self,
        root: Path,
        *,
        limits: ImageLimits | None = None,
        clock: Clock | None = None,
        on_event: Callable[[ImageEvent], None] = lambda _: None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.limits = limits or ImageLimits()
        self.scratch = root / "tmp"
        self.builds = root / "builds"
        """Data that builds keep for later builds."""
        self.contexts = self.builds / "contexts"
        """Build contexts from clients.  Only the process that received them can use them."""
        self._root = root
        self._clock = clock or SystemClock()
        self._on_event = on_event
        self._report = report
        self._catalog = Catalog()
        self._knows_catalog = False
        self._is_written = True
        """Whether the file has the current catalog.  After a failed write, its content is unknown."""
        self._configs: dict[str, ImageConfig] = {}
        self._damaged: dict[str, Damage] = {}
        self._images: dict[str, Image] = {}
        self._by_reference: dict[Reference, Image] = {}
        self.pins: Counter[str] = Counter()
        self.arriving = Arriving()
        self._writing = asyncio.Lock()
        self.error = ""
        """Reason why images that may exist could not be read.  Empty if all were read."""
        self.layer_store = Layers(root / "layers", self.scratch, self.limits)

    async def open(self) -> None:
        """Read the images of earlier processes.  ``settle`` does the rest."""
        await asyncio.to_thread(self._set_aside)
        await self._read_or_report()

    async def settle(self) -> None:
        """Read what could not be read before, then remove unfinished work of earlier processes."""

        async def read_again() -> None:
            if self.error:
                async with self._writing:
                    await self._read_or_report()
            if self.error:
                raise Unavailable(self.error)

        await retry(read_again, "images not read yet", clock=self._clock, first_s=1.0)
        for leftover in sorted(self._root.glob(f"{_ASIDE}*")):
            await discard_tree(leftover)
        await self._collect()

    # --- looking ---------------------------------------------------------------------------------------------------

    def images(self) -> Sequence[Image]:
        """Return all images, sorted by id."""
        return tuple(self._images[id] for id in sorted(self._images))

    def resolve(self, word: str) -> Image | None:
        """Return the image with this name: an id, a reference (``latest`` without a tag), or a unique id prefix.

        Raises:
            InvalidArgument: it cannot be a reference ("invalid reference format").

        Source: moby 20.10, daemon/images/image.go (GetImage).
        """
        named = parse_any(word)
        if not isinstance(named, Reference):
            return self._images.get(named)
        if named.digest:
            named = named.with_digest(named.digest)  # the digest decides, and a tag is then ignored
        found = self._by_reference.get(named.with_default_tag())
        return found or self._by_prefix(word)

    def get(self, word: str) -> Image:
        """Return the image with this name.  Raises: NotFound: ``No such image: nosuch:latest``; InvalidArgument."""
        image = self.resolve(word)
        if image is None:
            named = parse_any(word)
            text = named.with_default_tag().familiar if isinstance(named, Reference) else named
            raise NotFound(f"No such image: {text}")
        return image

    def lookup(self, word: str) -> Image | None:
        """Return the image with this name, or None without one.  An invalid name is not an error."""
        try:
            return self.resolve(word)
        except InvalidArgument:
            return None

    def damaged(self, word: str) -> Image | None:
        """Return the damaged image with this name.  It has only id and references.  Raises: InvalidArgument."""
        named = parse_any(word)
        reference = named.with_default_tag() if isinstance(named, Reference) else None
        digits = word.removeprefix("sha256:")
        for id in self._damaged:
            references = tuple(sorted(self._references_of(id)))
            if reference in references or hex_of(id).startswith(digits):
                return Image(id=Digest(id), config=ImageConfig(), references=references)
        return None

    def layers(self, image: Image) -> tuple[Path, ...]:
        """Return the lower directories of a container of ``image``, top first.  Raises: NotFound: it was removed."""
        return tuple(self.layer_store.directory(chain_id) for chain_id in reversed(image.chain))

    def config(self, image: Image) -> ImageConfig:
        """Return the image's configuration."""
        return image.config

    def config_file(self, image: Image) -> Path:
        """Return the file with the image's original configuration."""
        return self._root / "configs" / hex_of(image.id)

    def is_fetched(self, image: Image) -> bool:
        """Return whether the image came from a registry or node, and no user has loaded or tagged it here since."""
        return image.id in self._catalog.fetched

    def document(self, digest: str, name: str = "") -> bytes | None:
        """Return the manifest or index with this digest, if an image came with it.  Blocks; call it in a thread.

        ``name``: Repository that the image must have a reference to.  Empty for any.
        """
        for file, _ in self.with_document(digest, name):
            with suppress(OSError):
                content = file.read_bytes()
                if digest_of(content) == digest:
                    return content
        return None

    def with_document(self, digest: str, name: str = "") -> Iterator[tuple[Path, Image | None]]:
        """Yield the files with this manifest or index, and their images of the repository ``name``.  Blocks."""
        for file in (self._root / "manifests").glob(f"*/{hex_of(digest)}"):
            image = self._images.get(f"sha256:{file.parent.name}")
            if not name or (image is not None and any(one.name == name for one in image.references)):
                yield file, image

    def documents(self, image: Image) -> Sequence[bytes]:
        """Return the manifests and indexes that ``image`` came with, the latest first.  Blocks; call it in a thread."""
        found = []
        for file in (self._root / "manifests" / hex_of(image.id)).glob("*"):
            with suppress(OSError):
                found.append((file.stat().st_mtime_ns, file.read_bytes()))
        return [content for _, content in sorted(found, reverse=True)]

    def index(self, reference: Reference, *, is_whole: bool = False) -> Sequence[Image]:
        """Return the images of a name that has several platforms, without damaged ones.  Empty for other names.

        ``is_whole``: Raises NotFound if one is damaged.
        """
        ids = self._catalog.indexes.get(str(reference), ())
        return tuple(self.get(id) for id in ids if is_whole or id in self._images)

    def children(self, image_id: str) -> Sequence[Image]:
        """Return the images that were made from the image ``image_id``."""
        return tuple(image for image in self.images() if image.parent == image_id)

    # --- changing --------------------------------------------------------------------------------------------------

    async def add(
        self,
        content: bytes,
        references: Iterable[Reference] = (),
        *,
        parent: str = "",
        is_fetched: bool = False,
        is_tagged: bool = False,
        is_step: bool = False,
    ) -> Image:
        """Make an image from a configuration whose layers are in the store, and move its references to it.

        ``is_fetched``: It comes from a registry or another node.  ``is_tagged``: A user tags it now.  ``is_step``:
        It is an intermediate image of a build, hidden until it is also something else.

        Raises:
            InvalidArgument: the configuration is not valid.
            NotFound: a layer is missing.
        """
        config = parse_config(content)
        id, chain = digest_of(content), chain_ids(config.diff_ids)
        async with self.pin(chain), self._writing:
            for chain_id in chain:
                self.layer_store.directory(chain_id)
            is_new = id not in self._images
            catalog = with_image(
                with_references(self._catalog, references, id),
                id,
                parent=parent,
                is_fetched=is_fetched and (is_new or id in self._catalog.fetched),
                is_step=is_step and (is_new or id in self._catalog.steps),
                tagged_at=timestamp(self._clock.now_ns()) if is_tagged else Timestamp(""),
            )
            async with self._undone_on_error(id):
                if id not in self._configs:
                    await self._replace(self._root / "configs" / hex_of(id), content)
                    self._configs[id] = config
                else:
                    await asyncio.to_thread(self._touch, id)
                self._damaged.pop(id, None)
                if catalog != self._catalog or id not in self._images or not self._is_written:
                    await self._put(catalog)
            self._report(self._problem())
        return self._images[id]

    def _touch(self, id: Digest) -> None:
        """Reset the image's age for garbage collection, because it was fetched or loaded again."""
        now_s = self._clock.now_ns() / 1e9
        with suppress(OSError):
            os.utime(self._root / "configs" / hex_of(id), (now_s, now_s))

    async def keep_documents(self, image: Image, contents: Iterable[bytes]) -> None:
        """Keep the manifest and index from the image's registry, since other nodes may request them."""

        def write() -> None:
            directory = self._root / "manifests" / hex_of(image.id)
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            for content in contents:
                replace_file(directory / hex_of(digest_of(content)), content)

        async with self._writing:
            if image.id in self._configs:
                await asyncio.to_thread(write)

    async def tag(self, word: str, reference: Reference) -> None:
        """Add ``reference`` to the image ``word``.  Raises: NotFound, InvalidArgument."""
        image = self.get(word)
        reference = reference.with_default_tag()
        async with self._writing:
            if image.id not in self._images:
                raise NotFound(f"No such image: {word}")
            index = self._catalog.indexes.get(str(tagged(word)), ())
            catalog = with_references(self._catalog, (reference,), image.id, index)
            stamps = {**catalog.tagged_at, image.id: timestamp(self._clock.now_ns())}
            fetched = catalog.fetched - {image.id}
            await self._put(msgspec.structs.replace(catalog, tagged_at=stamps, fetched=fetched))
        self.announce("tag", image.id, reference.familiar)

    async def sweep(self, in_use: InUse) -> None:
        """Delete retired images that no container uses any longer."""
        if self._catalog.retired:
            async with self._writing:
                await self._forget_unused(in_use)
            await self._collect()

    @asynccontextmanager
    async def pin(self, chain: Sequence[str]) -> AsyncIterator[None]:
        """Keep layers, present or future, from being deleted while the block runs."""
        self.pins.update(chain)
        async with afterwards(self._collect):
            try:
                yield
            finally:
                self.pins.subtract(chain)
                self.pins += Counter()  # removes layers without pins

    @asynccontextmanager
    async def layer_of_changes(
        self, changes: Path, below: Image | None, *, without: Collection[str] = (), take: bool = False
    ) -> AsyncIterator[Layer]:
        """Make a layer of an overlay's changes to ``below``, and keep it while the block runs.

        ``add`` makes an image of it with the configuration from ``child.child_config``.  Arguments and errors are those
        of ``Layers.add_changes``.
        """
        self._require_catalog()
        chain = below.chain if below is not None else ()
        top = chain[-1] if chain else None
        async with self.pin(chain), self.pinning() as pin:
            yield await self.layer_store.add_changes(changes, below=top, pin=pin, without=without, take=take)

    @asynccontextmanager
    async def layer_of_archive(self, archive: AsyncIterable[bytes]) -> AsyncIterator[Layer]:
        """Make a bottom layer of a tar, and keep it while the block runs.  Raises: as ``Layers.add``."""
        self._require_catalog()
        async with self.pinning() as pin:
            yield await self.layer_store.add_archive(archive, pin=pin)

    @asynccontextmanager
    async def pinning(self) -> AsyncIterator[Callable[[Digest], None]]:
        """Yield a function that pins a layer until the end of the block, as soon as its id is known."""
        pinned: list[Digest] = []

        def pin(chain_id: Digest) -> None:
            pinned.append(chain_id)
            self.pins[chain_id] += 1

        async with self.pin(pinned):
            yield pin

    @asynccontextmanager
    async def workspace(self, prefix: str) -> AsyncIterator[Path]:
        """Provide a directory while the block runs.  Raises: Unavailable: no image can be added now."""
        self._require_catalog()
        # Not in a thread: a cancelled caller would leave the directory behind.
        path = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=self.scratch))
        async with afterwards(partial(discard_tree, path)):
            yield path

    def announce(self, action: str, id: str, name: str) -> None:
        """Publish an event of an image."""
        image = self._images.get(id)
        labels = (image.config.defaults.labels if image else None) or {}
        self._on_event(
            ImageEvent(
                action=action, id=id, time_ns=self._clock.now_ns(), attributes={**labels, "name": name}
            )
        )

    # --- inside ----------------------------------------------------------------------------------------------------

    def _set_aside(self) -> None:
        """Move aside unfinished work of earlier processes.  It may be large, and is removed later (``settle``)."""
        for directory in (self.scratch, self.contexts):
            try:
                if directory.exists():
                    directory.rename(self._root / f"{_ASIDE}{secrets.token_hex(8)}")
            except OSError as error:
                log_error(error, "leftover image files not moved aside", directory=str(directory))

    async def _read_or_report(self) -> None:
        try:
            await asyncio.to_thread(self._read)
        except OSError as error:
            self.error = f"images of this node cannot be read: {describe_error(error)}"
        else:
            self.error = ""
        self._index()
        self._report(self._problem())

    def _problem(self) -> str:
        """Return a sentence about the problem with the images and its fix, or an empty text."""
        if self.error or not self._damaged:
            return self.error
        id, damage = min(self._damaged.items())
        first = f"{id[: len('sha256:') + 12]}: {damage.reason}"
        which = (
            f"an image is damaged ({first})"
            if len(self._damaged) == 1
            else f"{len(self._damaged)} images are damaged (the first is {first})"
        )
        keeps_all = any(one.config is None for one in self._damaged.values())
        return f"{which}: pull or load it again, or remove it by its id" + (
            "; until then no unused layer is deleted" if keeps_all else ""
        )

    def _read(self) -> None:
        """Read the catalog, layers and image configurations.  Raises: OSError: a file cannot be read now."""
        unread: OSError | None = None
        for directory in (self._root, self._root / "configs", self.scratch):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            if not self._knows_catalog:
                self._catalog = read_catalog(self._root / "catalog.json")
                self._knows_catalog = True
        except OSError as error:
            unread = error
        try:
            self.layer_store.open()
        except OSError as error:
            unread = error
        for file in sorted((self._root / "configs").iterdir()):
            if file.suffix == NEW_SUFFIX:
                discard_tree_now(file)
                continue
            unread = self._read_image(file, layers_are_known=unread is None) or unread
        if unread is not None:
            raise unread

    def _read_image(self, file: Path, *, layers_are_known: bool) -> OSError | None:
        """Read an image's configuration.  Return the error if the file cannot be read now, but perhaps later."""
        id = Digest(f"sha256:{file.name}")
        if not is_digest(id):
            log.warning("unknown file ignored", file=str(file))
            return None
        config = None
        try:
            config = read_config(file, id)
            if not all(self.layer_store.get(chain_id) for chain_id in chain_ids(config.diff_ids)):
                raise InvalidArgument("a layer is missing")
        except Exception as error:  # any error affects only one image
            if isinstance(error, OSError) and not is_no_file(error):
                log_error(error, "image not read yet", image=id)
                return error
            if config is not None and not layers_are_known:
                return None
            if id not in self._damaged:
                log_error(error, "image is damaged", image=id, file=str(file))
            self._damaged[id] = Damage(describe_error(error), config)
        else:
            self._configs[id] = config
            self._damaged.pop(id, None)
        return None

    def _references_of(self, image_id: str) -> Iterator[Reference]:
        return (parse_reference(text) for text, id in self._catalog.references.items() if id == image_id)

    def _index(self) -> None:
        """Rebuild the images from configurations and catalog."""
        references: dict[str, list[Reference]] = {}
        for text, id in self._catalog.references.items():
            references.setdefault(id, []).append(parse_reference(text))
        members = self._catalog.members - references.keys()
        self._images = {
            id: Image(
                id=Digest(id),
                config=config,
                references=tuple(sorted(references.get(id, ()))),
                size_bytes=self._size(config),
                parent=self._catalog.parents.get(id, ""),
                tagged_at=self._catalog.tagged_at.get(id, ZERO_TIME),
                is_step=id in self._catalog.steps,
                is_member=id in members,
            )
            for id, config in self._configs.items()
            if id not in self._catalog.retired
        }
        self._by_reference = {
            reference: image for image in self._images.values() for reference in image.references
        }

    def _size(self, config: ImageConfig) -> int:
        layers = (self.layer_store.get(chain_id) for chain_id in chain_ids(config.diff_ids))
        return sum(layer.size_bytes for layer in layers if layer is not None)

    def _by_prefix(self, word: str) -> Image | None:
        digits = word.removeprefix("sha256:")
        found = [image for id, image in self._images.items() if digits and hex_of(id).startswith(digits)]
        return found[0] if len(found) == 1 else None

    async def _put(self, catalog: Catalog) -> None:
        """Write the catalog, then use it.  Requires ``_writing``.  Raises: Unavailable: it was not read yet."""
        self._require_catalog()
        self._is_written = False
        await self._replace(self._root / "catalog.json", msgspec.json.encode(catalog))
        self._is_written = True
        self._catalog = catalog
        self._index()

    async def _replace(self, file: Path, content: bytes) -> None:
        """Replace a file.  Requires ``_writing``, which a cancelled caller holds until the file is written."""
        await thread_to_end(partial(replace_file, file, content))

    def _require_catalog(self) -> None:
        """Raise Unavailable while the catalog is not read.  Writing it would lose the contents of its file."""
        if not self._knows_catalog:
            raise Unavailable(self.error)

    @asynccontextmanager
    async def _undone_on_error(self, id: Digest) -> AsyncIterator[None]:
        """Remove an image that is being added if the block fails, so that it has no names.  Requires ``_writing``."""
        is_new, damage = id not in self._configs, self._damaged.get(id)
        try:
            yield
        except BaseException:
            if is_new:
                self._configs.pop(id, None)
            if damage is not None:
                self._damaged[id] = damage
            elif is_new:
                # Half of it would leave files of an image that this process no longer knows.
                with suppress(OSError):  # the next start finds it, without a name
                    await asyncio.shield(self._forget(id))
            raise

    async def _discard(
        self, references: Collection[Reference], image_ids: Collection[str], in_use: InUse
    ) -> None:
        """Remove the names and images chosen by ``removal``, except layers ``in_use``.  Requires ``_writing``."""
        # Retire images first: a container under creation is either among the users by now, or does not find the image.
        await self._put(without(self._catalog, references, image_ids))
        await self._forget_unused(in_use)

    async def _forget_unused(self, in_use: InUse) -> None:
        """Delete retired images that are not in use.  Requires ``_writing``."""
        gone: set[str] = set()
        for id in self._catalog.retired - set(in_use()):
            try:
                await self._forget(id)
                gone.add(id)
            except OSError as error:  # it stays retired, because otherwise it would become an image again
                log_error(error, "removed image not deleted yet", image=id)
        if gone:
            await self._put(msgspec.structs.replace(self._catalog, retired=self._catalog.retired - gone))

    async def _forget(self, id: str) -> None:
        """Delete a configuration.  Requires ``_writing``.  Raises: OSError."""
        (self._root / "configs" / hex_of(id)).unlink(missing_ok=True)
        self._configs.pop(id, None)  # before the first await, because a concurrent pull writes its file again
        self._damaged.pop(id, None)
        self._index()
        self._report(self._problem())
        await discard_tree(self._root / "manifests" / hex_of(id))

    async def _collect(self) -> Sequence[Digest]:
        """Delete layers that no image has and that are not pinned.  Return their chain ids, top first."""
        damaged = [one.config for one in self._damaged.values()]
        if self.error or None in damaged:
            return ()
        known = [config for config in (*self._configs.values(), *damaged) if config is not None]
        needed = set[str](self.pins).union(*(chain_ids(config.diff_ids) for config in known))
        unneeded = [layer for id, layer in self.layer_store.all().items() if id not in needed]
        chain = [layer.chain_id for layer in reversed(unneeded)]
        for directory in self.layer_store.detach(chain):
            await discard_tree(directory)
        return chain

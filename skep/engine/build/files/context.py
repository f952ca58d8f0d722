"""Context of a classic build, in a directory of the build: an archive from the client, or files from an address.

If an archive is byte for byte equal to an earlier one, it is unpacked only if a step needs its files.  The engine
remembers the Dockerfile and the digests of copied files, which is enough to find all steps in the cache.

The node fetches repositories, archives and Dockerfiles from addresses (``POST /build?remote=``).

Source: moby 20.10, builder/remotecontext/detect.go, archive.go, git.go, remote.go.
"""

import asyncio
import hashlib
import os
import stat
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from pathlib import Path

import msgspec

from skep.aio.trees import discard_tree
from skep.api.errors import Untranslated
from skep.engine.build.addresses import redacted_address
from skep.engine.build.dockerfile.dockerfile import FILE_BYTES_MAX, parse
from skep.engine.build.dockerfile.patterns import ignored_patterns, is_ignored
from skep.engine.build.files.copies import is_archive
from skep.engine.build.files.remotes import Download, KnownAnswers, is_remote, repository_address
from skep.engine.build.files.repositories import GitRepository, address_of
from skep.engine.build.files.sources import CopySource
from skep.engine.build.files.trees import Tree
from skep.engine.images.archives.workers import ImageLimits, UnpackFailed, unpack
from skep.errors import InvalidArgument
from skep.linux.trees import remove_tree

DEFAULT_NAME = "Dockerfile"
_IGNORE_FILE = ".dockerignore"


_COMPARED_BYTES_MAX = 64 << 20
"""Larger archives are unpacked while they arrive, and not compared with earlier archives."""
_CONTEXTS_MAX = 64
"""Contexts in memory, each with a Dockerfile (``_TEXT_BYTES_MAX``): at most 16 MiB."""
_TEXT_BYTES_MAX = 256 << 10
"""Size of a remembered Dockerfile."""
_DIGESTS_MAX = 1000
"""Digests of one context's files that are remembered.  A Dockerfile names fewer sources."""
_CHUNK_BYTES = 1 << 20
"""Bytes read in one call of a thread, so that its cost does not count."""


class KnownContext:
    """Remembered content of a context: its Dockerfile, and the digests of the files of COPY and ADD."""

    def __init__(self) -> None:
        self.dockerfile = ""
        self._digests: dict[str, str] = {}

    def digest(self, sources: Sequence[str], *, is_add: bool) -> str:
        """Return the digest of these sources, or an empty string if it is not known."""
        return self._digests.get(_name_of(sources, is_add), "")

    def note(self, sources: Sequence[str], digest: str, *, is_add: bool) -> None:
        """Record the digest of these sources."""
        if len(self._digests) < _DIGESTS_MAX:
            self._digests[_name_of(sources, is_add)] = digest


def _name_of(sources: Sequence[str], is_add: bool) -> str:
    return hashlib.sha256(msgspec.json.encode([is_add, sources])).hexdigest()


class KnownContexts:
    """Contexts of the latest builds, by digest of the archive and name of the Dockerfile.  In memory only."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], KnownContext] = {}

    def of(self, digest: str, name: str) -> KnownContext:
        """Return the context and make it the most recent.  The least recently used one is dropped."""
        known = self._known.pop((digest, name), None) or KnownContext()
        self._known[digest, name] = known
        while len(self._known) > _CONTEXTS_MAX:
            del self._known[next(iter(self._known))]
        return known


class BuildContext:
    """Context of one build.  ``directory``: An empty directory of the build."""

    def __init__(self, directory: Path, limits: ImageLimits, name: str) -> None:
        self._archive, self._files = directory / "archive", directory / "files"
        self._limits = limits
        self._name = name
        self._is_unpacked = False
        self.known: KnownContext | None = None
        """None if the context is too large to be compared."""

    async def receive(self, pieces: AsyncIterable[bytes], contexts: KnownContexts) -> None:
        """Receive the archive.

        Raises:
            InvalidArgument: it is not an archive, or is damaged.
            ResourceExhausted: it is larger than the node accepts.
            UnpackFailed: the disk has no space for it.
        """
        arriving, hashed, size = aiter(pieces), hashlib.sha256(), 0
        with self._archive.open("wb") as file:
            async for piece in arriving:
                try:
                    await asyncio.to_thread(_keep, file.fileno(), piece, hashed)
                except OSError as error:
                    raise UnpackFailed(f"{self._archive}: {os.strerror(error.errno or 0).lower()}") from error
                size += len(piece)
                if size > _COMPARED_BYTES_MAX:
                    await self._unpack(self._and_then(arriving))
                    return
        self.known = contexts.of(hashed.hexdigest(), self._name)

    async def dockerfile(self) -> str:
        """Return the text of the Dockerfile.  Raises: as ``receive`` and ``read_dockerfile``."""
        if self.known is not None and self.known.dockerfile:
            return self.known.dockerfile
        text = await self._ready()
        if self.known is not None and len(text) <= _TEXT_BYTES_MAX:
            self.known.dockerfile = text
        return text

    async def directory(self) -> Path:
        """Return the directory with the context's files.  Raises: as ``receive``."""
        if not self._is_unpacked:
            await self._ready()
        return self._files

    async def _ready(self) -> str:
        """Unpack the archive if needed and return the Dockerfile, as ``read_dockerfile`` does."""
        if not self._is_unpacked:
            with self._archive.open("rb") as file:
                await self._unpack(file.fileno())
        return await asyncio.to_thread(read_dockerfile, self._files, self._name)

    async def _unpack(self, source: int | AsyncIterable[bytes]) -> None:
        self._files.mkdir(mode=0o700)
        await unpack(source, self._files, limits=self._limits, is_layer=True, has_whiteouts=False)
        self._archive.unlink()
        self._is_unpacked = True

    async def _and_then(self, arriving: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        with self._archive.open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
                yield chunk
        async for piece in arriving:
            yield piece


def _keep(descriptor: int, piece: bytes, hashed: "hashlib._Hash") -> None:
    hashed.update(piece)
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]


def read_dockerfile(directory: Path, name: str) -> str:
    """Return the text of the Dockerfile ``name``.  Links cannot lead out of the context.

    Removes the Dockerfile and .dockerignore from the context if the latter says so.  Blocks; call it in a thread.

    Raises:
        InvalidArgument: it is empty, not text, or not a Dockerfile.
        Untranslated: it does not exist.
    """
    with Tree(directory) as tree:
        chosen = name
        content = _read(tree, chosen)
        if content is None and name == DEFAULT_NAME:
            chosen = name.lower()
            content = _read(tree, chosen)
        if content is None:
            raise Untranslated(f"Cannot locate specified Dockerfile: {name}")
        if not content:
            raise InvalidArgument(f"the Dockerfile ({chosen}) cannot be empty")
        text = content.decode("utf-8", "surrogateescape")
        try:
            parse(text)
        except InvalidArgument as error:
            raise InvalidArgument(f"failed to parse {chosen}: {error}") from error
        _exclude(tree, chosen)
    return text


def _exclude(tree: Tree, dockerfile: str) -> None:
    content = _read(tree, _IGNORE_FILE)
    if content is None:
        return
    patterns = ignored_patterns(content.decode("utf-8", "surrogateescape"))
    for name in (_IGNORE_FILE, os.path.normpath(dockerfile).lstrip("/")):
        if is_ignored(name, patterns):
            directory, last = os.path.split(
                tree.resolve(os.path.dirname(name)) + "/" + os.path.basename(name)
            )
            with tree.opened(directory.strip("/")) as parent:
                remove_tree(Path(f"/proc/self/fd/{parent}") / last)


def _read(tree: Tree, name: str) -> bytes | None:
    """Return a file of the context, or None if it does not exist.

    Raises: InvalidArgument: it is not a regular file, or is too large.
    """
    path = tree.resolve(name)
    status = tree.status(path)
    if status is None:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidArgument(f"{name} is not a regular file")
    with tree.opened(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as descriptor:
        content = bytearray()
        while data := os.read(descriptor, FILE_BYTES_MAX + 1):
            content += data
            if len(content) > FILE_BYTES_MAX:
                raise InvalidArgument(f"{name} has more than {FILE_BYTES_MAX} bytes")
    return bytes(content)


async def fetch_context(address: str, directory: Path, limits: ImageLimits, name: str) -> tuple[str, Path]:
    """Fetch a context, and return the text of its Dockerfile and the directory with its files.

    A file that is not an archive is the Dockerfile, and the directory is empty.

    Args:
        directory: Empty, for the files.
        name: Path of the Dockerfile in the context.

    Raises: SkepError: it cannot be fetched, or has no Dockerfile.
    """
    files, fetched = directory / "files", directory / "fetched"
    for one in (files, fetched):
        one.mkdir(mode=0o700)
    if repository := repository_address(address):
        source = await GitRepository(address_of(repository), files, limits, None).fetch()
        files = source.root / source.resolved
    elif is_remote(address):
        room = max(min(limits.archive_bytes_max, limits.room_on(fetched)), 0)
        file = await Download(address, "", fetched, room, KnownAnswers(), None).fetch()
        if not await asyncio.to_thread(is_archive, file):
            return await asyncio.to_thread(_text_of, file), files
        descriptor = os.open(file.root / file.resolved, os.O_RDONLY | os.O_CLOEXEC)
        try:
            await unpack(descriptor, files, limits=limits, is_layer=True, has_whiteouts=False)
        finally:
            os.close(descriptor)
        await discard_tree(fetched)  # the build, which may take hours, needs only the files
    else:
        raise Untranslated(f"remoteURL ({redacted_address(address)}) could not be recognized as URL")
    return await asyncio.to_thread(read_dockerfile, files, name), files


def _text_of(file: CopySource) -> str:
    with (file.root / file.resolved).open("rb") as opened:
        content = opened.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise InvalidArgument(f"the Dockerfile has more than {FILE_BYTES_MAX} bytes")
    return content.decode("utf-8", "surrogateescape")

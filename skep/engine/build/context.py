"""The context of a classic build: an archive from the client, unpacked into a directory of the build's own.

One that came before, byte for byte, is unpacked only if a step needs its files: what a build reads of it to find all
steps in the cache is remembered.

Source: moby 20.10, builder/remotecontext/detect.go, archive.go.
"""

import asyncio
import hashlib
import os
import stat
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from pathlib import Path

import msgspec

from skep.api.errors import Untranslated
from skep.engine.build.dockerfile import FILE_BYTES_MAX, parse
from skep.engine.build.patterns import ignored_patterns, is_ignored
from skep.engine.build.trees import Tree
from skep.engine.images.workers import Limits, UnpackFailed, unpack
from skep.errors import InvalidArgument
from skep.linux.trees import remove_tree

DEFAULT_NAME = "Dockerfile"
_IGNORE_FILE = ".dockerignore"


_COMPARED_BYTES_MAX = 64 << 20
"""A larger archive is unpacked while it arrives, and not compared with others."""
_CONTEXTS_MAX = 64
_TEXT_BYTES_MAX = 256 << 10
"""Of a Dockerfile that is remembered."""
_DIGESTS_MAX = 1000
_CHUNK_BYTES = 1 << 20


class KnownContext:
    """What was read of a context: its Dockerfile, and the digests of what COPY and ADD took."""

    def __init__(self) -> None:
        self.dockerfile = ""
        self._digests: dict[str, str] = {}

    def digest(self, sources: Sequence[str], *, is_add: bool) -> str:
        """Of these sources; empty: it is not known."""
        return self._digests.get(_name_of(sources, is_add), "")

    def note(self, sources: Sequence[str], digest: str, *, is_add: bool) -> None:
        """These sources have this digest."""
        if len(self._digests) < _DIGESTS_MAX:
            self._digests[_name_of(sources, is_add)] = digest


def _name_of(sources: Sequence[str], is_add: bool) -> str:
    return hashlib.sha256(msgspec.json.encode([is_add, sources])).hexdigest()


class KnownContexts:
    """Contexts of the last builds, by the digest of the archive and the name of the Dockerfile; in memory alone."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], KnownContext] = {}

    def of(self, digest: str, name: str) -> KnownContext:
        """The context, which is now the youngest; the oldest goes."""
        known = self._known.pop((digest, name), None) or KnownContext()
        self._known[digest, name] = known
        while len(self._known) > _CONTEXTS_MAX:
            del self._known[next(iter(self._known))]
        return known


class Context:
    """The context of one build.  ``directory``: of the build's own, empty; the rest as ``receive`` has it."""

    def __init__(self, directory: Path, limits: Limits, name: str) -> None:
        self._archive, self._files = directory / "archive", directory / "files"
        self._limits = limits
        self._name = name
        self._is_unpacked = False
        self.known: KnownContext | None = None
        """None: it is too large to be compared."""

    async def receive(self, pieces: AsyncIterable[bytes], contexts: KnownContexts) -> None:
        """Take the archive.

        Raises: InvalidArgument: it is no archive, or a damaged one; ResourceExhausted: it is larger than the node
        takes; UnpackFailed: the disk has no room for it.
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
        """Its text.  Raises: as ``receive``, and as ``read_dockerfile``."""
        if self.known is not None and self.known.dockerfile:
            return self.known.dockerfile
        text = await self._ready()
        if self.known is not None and len(text) <= _TEXT_BYTES_MAX:
            self.known.dockerfile = text
        return text

    async def directory(self) -> Path:
        """Its files.  Raises: as ``receive``."""
        if not self._is_unpacked:
            await self._ready()
        return self._files

    async def _ready(self) -> str:
        """Unpack it, if that was not done, and take out what .dockerignore says; the Dockerfile's text."""
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
    """The text of the Dockerfile ``name`` in a context, which it never leads out of.

    The Dockerfile and .dockerignore are taken out of the context if the latter says so.  Blocks; for a thread.
    Raises: InvalidArgument: it is empty, no text, or no Dockerfile; Untranslated: it is not there.
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
    """A file of the context; None: there is none.  Raises: InvalidArgument: it is no file, or too large."""
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

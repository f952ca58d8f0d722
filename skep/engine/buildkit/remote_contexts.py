"""Contexts outside the client's directories: an archive that it uploads, a web address, a git repository.

An archive is unpacked.  Any other file is a Dockerfile, and the context has no other files.  A .dockerignore file has
no effect, as in BuildKit.  A named context at a web address is the file itself.

Source: moby/buildkit, frontend/dockerui/context.go (initContext, DetectHTTPContext, DetectGitContext),
frontend/dockerui/namedcontext.go, session/upload.
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
from yarl import URL

from skep.engine.build.addresses import check_address, redacted_address
from skep.engine.build.files.copies import is_archive
from skep.engine.build.files.remotes import Download, KnownAnswers, is_git, repository_address
from skep.engine.build.files.repositories import GitRepository, RepositoryAddress, address_of
from skep.engine.build.files.sources import CopySource
from skep.engine.build.interface import Provider
from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.contexts import ContextStore
from skep.engine.buildkit.protocol.filesend import spool
from skep.engine.buildkit.protocol.sessions import BuildSession
from skep.engine.buildkit.uploads import OpenUpload
from skep.errors import InvalidArgument, Unimplemented

_PULL = "/moby.upload.v1.Upload/Pull"
_UPLOAD_HOST = "buildkit-session"
_HTTP = re.compile(r"https?://")
_COMPRESSED = (b"BZh", b"\x1f\x8b\x08", b"\xfd7zXZ\x00")
"""Source: buildkit, frontend/dockerui/context.go (isArchive)."""
_FILE = "context"
"""Name of the only file in a context: of a Dockerfile, and of what is at the address of a named context."""


@asynccontextmanager
async def remote_context(
    contexts: ContextStore,
    session: BuildSession,
    address: str,
    provider: Provider,
    *,
    keeps_git_dir: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> AsyncIterator[tuple[Path, str]]:
    """Fetch a context while the block runs.

    Yields its directory, and the name of its Dockerfile if it has no other files, otherwise an empty name.

    Args:
        keeps_git_dir: Whether the context has the repository's own directory ``.git``.
        progress: Called with the number of bytes that a client has uploaded so far.

    Raises: SkepError: it cannot be fetched, or is not a context.
    """
    async with AsyncExitStack() as stack:
        place = await stack.enter_async_context(contexts.scratch())
        if repository := repository_address(address):
            found = _repository_at(repository, keeps_git_dir=keeps_git_dir)
            yield await _fetch_repository(contexts, found, place, provider), ""
            return
        if not _HTTP.match(address):
            raise Unimplemented(
                f"a build context at this address is not supported: {redacted_address(address)}"
            )
        check_address(address)
        if URL(address).host == _UPLOAD_HOST:
            pieces = _count_bytes(_read_upload(session, URL(address)), progress)
            await spool(pieces, place / _FILE, contexts.accepted_on(place), "the build context")
        else:
            await _download(contexts, address, place, provider)
        yield await _unpack_if_archive(contexts, place, stack)


@asynccontextmanager
async def named_context(contexts: ContextStore, address: str, provider: Provider) -> AsyncIterator[Path]:
    """Fetch a named context while the block runs: a repository, or a file that gets the name ``context``.

    Raises: SkepError: it cannot be fetched.
    """
    async with contexts.scratch() as place:
        if is_git(address):
            yield await _fetch_repository(contexts, address_of(address), place, provider)
            return
        check_address(address)
        await _download(contexts, address, place, provider)
        yield place


@asynccontextmanager
async def uploaded_context(
    contexts: ContextStore, open_upload: OpenUpload, progress: Callable[[int], None] = lambda _: None
) -> AsyncIterator[tuple[Path, str]]:
    """Receive an upload of docker 20.10 while the block runs.  See ``remote_context``."""
    async with AsyncExitStack() as stack:
        place = await stack.enter_async_context(contexts.scratch())
        async with open_upload() as pieces:
            await spool(
                _count_bytes(pieces, progress),
                place / _FILE,
                contexts.accepted_on(place),
                "the build context",
            )
        yield await _unpack_if_archive(contexts, place, stack)


async def _fetch_repository(
    contexts: ContextStore, address: RepositoryAddress, place: Path, provider: Provider
) -> Path:
    """Clone a repository into ``place``, and return the directory that its address names."""
    source = await GitRepository(address, place, contexts.limits, provider).fetch()
    return source.root / source.resolved


async def _download(contexts: ContextStore, address: str, place: Path, provider: Provider) -> None:
    """Write the file at a web address to ``place``."""
    file = await Download(address, "", place, contexts.accepted_on(place), KnownAnswers(), provider).fetch()
    (place / file.resolved).rename(place / _FILE)


async def _unpack_if_archive(contexts: ContextStore, place: Path, stack: AsyncExitStack) -> tuple[Path, str]:
    """Unpack the file in ``place`` if it is an archive.  Return as ``remote_context`` yields."""
    if not await asyncio.to_thread(_is_context_archive, place):
        return place, _FILE
    root = await stack.enter_async_context(contexts.scratch())
    await contexts.unpack(place / _FILE, root)
    await asyncio.to_thread(os.unlink, place / _FILE)
    return root, ""


def _is_context_archive(place: Path) -> bool:
    """Return whether the file in ``place`` is a tar, or compressed: a damaged archive is not a Dockerfile."""
    with (place / _FILE).open("rb") as file:
        is_compressed = file.read(6).startswith(_COMPRESSED)
    return is_compressed or is_archive(CopySource(place, _FILE, _FILE, False, ""))


async def _count_bytes(pieces: AsyncIterator[bytes], progress: Callable[[int], None]) -> AsyncIterator[bytes]:
    """Yield the pieces, and report their bytes so far."""
    size = 0
    async for piece in pieces:
        size += len(piece)
        progress(size)
        yield piece


def _repository_at(address: str, *, keeps_git_dir: bool) -> RepositoryAddress:
    found = address_of(address)
    return msgspec.structs.replace(found, keep_git_dir=keeps_git_dir or found.keep_git_dir)


async def _read_upload(session: BuildSession, url: URL) -> AsyncIterator[bytes]:
    """Yield the client's upload for an address of its own.  Raises: SkepError."""
    metadata = [("urlpath", url.path), ("urlhost", url.host or "")]
    is_empty = True
    async with session.stream(_PULL, metadata, silent_s=session.silent_s) as messages:
        await messages.end()
        while (data := await messages.receive()) is not None:
            piece = pb.BytesMessage.FromString(data).data
            is_empty &= not piece
            yield piece
    if is_empty:
        raise InvalidArgument("the client has uploaded an empty context")

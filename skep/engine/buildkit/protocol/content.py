"""Caches in client directories: OCI layouts that the client serves over containerd's content protocol.

The client names the manifest to read, and records the written manifest in the directory's ``index.json``.

Source: moby/buildkit, session/content, cache/remotecache/local, client/solve.go (parseCacheOptions); containerd,
api/services/content/v1/content.proto, core/content/proxy.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TypeVar

from google.protobuf.message import DecodeError

from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.protocol.sessions import BuildSession, Messages
from skep.engine.images.digest import digest_of, is_digest
from skep.engine.images.registry import pulling
from skep.engine.images.registry.endpoints import TRANSFERS
from skep.engine.images.registry.registry import OCI_MANIFEST, Document
from skep.engine.images.registry.uploads import BlobUpload
from skep.errors import AlreadyExists, InvalidArgument

T = TypeVar("T")

_SERVICE = "/containerd.services.content.v1.Content/"
_STORE = "buildkit-attachable-store-id"
_PIECE_BYTES = 1 << 20
"""Well below the message limit of 16 MiB, and one window of a stream."""


class ClientStore:
    """Content of one directory of a client: a location of cache sources, and a destination of exports."""

    transfers = TRANSFERS

    def __init__(self, session: BuildSession, directory: str) -> None:
        self._session = session
        self._metadata = [(_STORE, f"local:{directory}")]
        self.name = directory

    async def at(self, action: Callable[[pulling.BlobSource], Awaitable[T]]) -> T:
        """Return the result of ``action`` with the content.  See ``step_sources.Place``."""
        return await action(self)

    # --- reading ----------------------------------------------------------------------------------------------------

    async def manifest(self, target: str, bytes_max: int) -> Document:
        """Return the manifest with the digest ``target``.  Raises: NotFound, InvalidArgument, SkepError."""
        if not is_digest(target):
            raise InvalidArgument(
                f"a local cache needs the digest of its manifest, and got {target or 'none'}"
            )
        content = bytearray()
        async with self.blob(target) as (_, pieces):
            async for piece in pieces:
                content += piece
                if len(content) > bytes_max:
                    raise InvalidArgument(f"manifest {target} is larger than {bytes_max} bytes")
        if digest_of(bytes(content)) != target:
            raise InvalidArgument(f"manifest verification failed for digest {target}")
        return Document(bytes(content), OCI_MANIFEST, is_of_registry=False)

    @asynccontextmanager
    async def blob(self, digest: str, start: int = 0) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Stream a blob's bytes from ``start`` on.  See ``pulling.Repository``."""
        async with self._stream("Read") as messages:
            await messages.send(pb.ReadContentRequest(digest=digest, offset=start))
            await messages.end()
            yield start, _data_of(messages)

    def mistrust(self, _digest: str) -> bool:
        """Return False: the client has no other copy of the blob."""
        return False

    # --- writing ----------------------------------------------------------------------------------------------------

    async def put(self, upload: BlobUpload) -> None:
        """Write a blob unless the client has it.  Raises: SkepError: with the client's status."""
        with suppress(AlreadyExists):
            async with self._stream("Write") as messages:
                await self._write(messages, upload)

    async def put_manifest(self, document: Document) -> None:
        """Write the manifest.  The client records it in its index."""
        await self.put(
            BlobUpload(digest=document.digest, size=len(document.content), content=document.content)
        )

    async def _write(self, messages: Messages, upload: BlobUpload) -> None:
        def request(
            action: pb.WriteAction.ValueType, offset: int, data: bytes = b""
        ) -> pb.WriteContentRequest:
            return pb.WriteContentRequest(
                action=action,
                ref=upload.digest,
                total=upload.size,
                expected=upload.digest,
                offset=offset,
                data=data,
            )

        offset = (await self._answer(messages, request(pb.STAT, 0))).offset
        if not 0 <= offset <= upload.size:
            raise InvalidArgument(f"the client has {offset} of {upload.size} bytes of {upload.digest}")
        async for piece in _pieces(upload, offset):
            await self._answer(messages, request(pb.WRITE, offset, piece))
            offset += len(piece)
        written = (await self._answer(messages, request(pb.COMMIT, offset))).digest
        if written != upload.digest:
            raise InvalidArgument(f"the client stored {written[:200]} instead of {upload.digest}")

    async def _answer(self, messages: Messages, request: pb.WriteContentRequest) -> pb.WriteContentResponse:
        await messages.send(request)
        data = await messages.receive()
        if data is None:
            raise InvalidArgument("the client ended the transfer")
        return pb.WriteContentResponse.FromString(data)

    def _stream(self, method: str) -> AbstractAsyncContextManager[Messages]:
        return self._session.stream(_SERVICE + method, self._metadata, silent_s=self._session.silent_s)


async def _data_of(messages: Messages) -> AsyncIterator[bytes]:
    """Yield the data of a blob.  Raises: InvalidArgument: a message cannot be read."""
    while (data := await messages.receive()) is not None:
        try:
            yield pb.ReadContentResponse.FromString(data).data
        except DecodeError as error:
            raise InvalidArgument("the client's content cannot be decoded") from error


async def _pieces(upload: BlobUpload, start: int) -> AsyncIterator[bytes]:
    if upload.path is None:
        for at in range(start, upload.size, _PIECE_BYTES):
            yield upload.content[at : at + _PIECE_BYTES]
        return
    with upload.path.open("rb") as file:
        file.seek(start, os.SEEK_SET)
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            yield piece

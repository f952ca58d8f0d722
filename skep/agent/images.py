"""Image transfer between the nodes of a cluster: serves this node's images and fetches other nodes' images.

Each node serves its images on a separate port, over mutual TLS with the cluster's certificates, and reports the port in
its description.  A manager tells which nodes may have an image.  It also tells whether a caller still belongs to the
cluster, because the certificate of a removed node stays valid.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TypeAlias, TypeVar

import structlog

from skep.agent.session.session_state import SessionState
from skep.aio.clock import Clock
from skep.aio.failures import retry
from skep.engine.images.reference import Reference
from skep.engine.images.registry.registry import Document
from skep.engine.images.sharing.serving import ServedImages
from skep.engine.images.sharing.spreading import FindSources, ImageSource
from skep.errors import NotFound, PermissionDenied, Unavailable
from skep.model.networks.reserved_ports import IMAGES_PORT
from skep.model.node import NodeRole
from skep.model.values.ids import NodeId
from skep.rpc.client import Bounds
from skep.security.identity import ROLE_NAMES
from skep.security.keypair import KeyPair
from skep.security.tls import ServerTls, client_context
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.client import ManagerChannel, open_channel
from skep.wire.server import serve
from skep.wire.service import Handler, server_stream, unary

log = structlog.get_logger(__name__)

CHECKED_S = 30.0
"""Seconds for which a node may read an image after a manager has allowed it."""
CHECKED_MAX = 4096
"""Limit for the number of cached permissions."""
NAMES_MAX = 1000
"""Limit for the image names in one request to a manager."""
MANIFEST_S = 15.0
"""Seconds to wait for another node's manifest."""
BOUNDS = Bounds(stream_window=4 << 20, connection_window=16 << 20, message=(4 << 20) + (64 << 10))
"""Limits for data from another node, which is less trusted than a manager.

A manifest has at most 4 MiB, as in a registry, and a piece of a layer at most 512 KiB.
"""
BIND_AGAIN_S_MAX = 30.0
"""Longest delay in seconds before an address is bound again."""

T = TypeVar("T")

PresentPair: TypeAlias = Callable[[], KeyPair]
"""Returns the node's current key pair.  A function, because the pair is renewed over time."""


class ImagePort:
    """Serves this node's images to other nodes of its cluster.

    ``port`` is the port in use, or 0 while nothing is served.
    """

    def __init__(
        self, images: ServedImages, session: SessionState, clock: Clock, wanted_port: int = 0
    ) -> None:
        """``wanted_port`` is 0 for the default port.  If the default port is taken, any free port is used."""
        self._images = images
        self._session = session
        self._clock = clock
        self._wanted_port = wanted_port
        self._checked: dict[tuple[str, str, frozenset[str]], float] = {}
        """Time of a manager's permission by node id, certificate serial number and image names."""
        self.port = 0

    async def run(self, pair: PresentPair, host: str) -> None:
        """Serve until cancelled.  If an address cannot be bound, retry."""

        async def serve_images() -> None:
            try:
                await self._serve(pair, host, self._wanted_port or IMAGES_PORT)
            except Unavailable:
                if self._wanted_port:
                    raise
                await self._serve(pair, host, 0)

        await retry(
            serve_images, "images not served to other nodes", clock=self._clock, longest_s=BIND_AGAIN_S_MAX
        )

    async def _serve(self, pair: PresentPair, host: str, port: int) -> None:
        async with serve(
            self.handlers(),
            host=host,
            port=port,
            tls=ServerTls(pair(), pair).front,
            cluster_id=pair().identity.cluster_id,
        ) as bound:
            self.port = bound.port
            try:
                await asyncio.Event().wait()
            finally:
                self.port = 0

    def handlers(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (
            unary(methods.IMAGE_MANIFEST, self._manifest),
            server_stream(methods.IMAGE_BLOB, self._blob, taken_s=self._images.pace.stalled_s),
        )

    async def _manifest(
        self, request: skep.ImageManifestRequest, caller: Caller
    ) -> skep.ImageManifestResponse:
        await self._check(caller, await self._images.names_of(request.target))
        document = await self._images.manifest(request.target)
        return skep.ImageManifestResponse(
            content=document.content,
            media_type=document.media_type,
            made=not document.is_of_registry,
            own=document.is_own,
        )

    async def _blob(
        self, request: skep.ImageBlobRequest, caller: Caller
    ) -> AsyncIterator[skep.ImageBlobPiece]:
        to = await self._check(caller, self._images.names_with(request.digest))
        async with self._images.blob(request.digest, to, last_resort=request.last_resort) as blob:
            yield skep.ImageBlobPiece(size=blob.size)
            async for piece in blob.pieces:
                yield skep.ImageBlobPiece(data=piece)

    async def _check(self, caller: Caller, names: frozenset[str]) -> NodeId:
        """Ask a manager whether the caller may read an image that has all of ``names``, and return its node id.

        Raises:
            NotFound: The image is not on this node.
            PermissionDenied: The caller is no longer a node of the cluster, or has no task of the image.
            Unavailable: No manager responds.
        """
        assert caller.identity is not None, "the method is for nodes"
        key = caller.identity.node_id, caller.identity.serial, names
        now = self._clock.monotonic()
        if now - self._checked.get(key, -CHECKED_S) >= CHECKED_S:
            self._checked.pop(key, None)
            try:
                await self._ask_manager(key[0], key[1], sorted(names))
            except PermissionDenied as refusal:
                log.warning("image refused to a node", node=key[0], peer=caller.address, reason=str(refusal))
                raise
            while len(self._checked) >= CHECKED_MAX:
                del self._checked[next(iter(self._checked))]
            self._checked[key] = now
        if not names:
            raise NotFound("No such image")
        return key[0]

    async def _ask_manager(self, node: NodeId, serial: str, names: Sequence[str]) -> None:
        """Ask whether the node may read an image by one of its names.

        Raises:
            PermissionDenied: The node may not read it by any name.
            SkepError: No manager responds.
        """
        for first in range(0, max(len(names), 1), NAMES_MAX):
            asked = names[first : first + NAMES_MAX]
            request = skep.CheckNodeRequest(node_id=node, serial=serial, images=asked)
            try:
                await self._session.channel.call(methods.CHECK_NODE, request)
            except PermissionDenied:
                if first + NAMES_MAX >= len(names):
                    raise
            else:
                return


class ClusterSources:
    """Finds other nodes from which images can be fetched.  Implements ``spreading.Neighbors``."""

    def __init__(self, session: SessionState) -> None:
        self._session = session
        self._pair: PresentPair | None = None

    @contextmanager
    def using(self, pair: PresentPair) -> Iterator[None]:
        """Set the key pair for connections while this node is in a cluster."""
        self._pair = pair
        try:
            yield
        finally:
            self._pair = None

    @asynccontextmanager
    async def sources(self, reference: Reference) -> AsyncIterator[FindSources]:
        """Find the nodes that may have an image.  Connections to them are kept while the context is open.

        Raises:
            Unavailable: This node is not in a cluster.
        """
        pair = self._pair
        if pair is None:
            raise Unavailable("this node is not in a cluster")
        request = skep.FindImageRequest(images=reference.spellings)
        known: dict[tuple[str, str], NodeSource] = {}
        async with AsyncExitStack() as stack:

            async def find() -> Sequence[ImageSource]:
                response = await self._session.channel.call(methods.FIND_IMAGE, request)
                found = [(one.node_id, one.addr, one.manager) for one in response.sources]
                for id, addr, is_manager in found:
                    if (id, addr) not in known:
                        known[id, addr] = NodeSource(id, addr, is_manager, pair, stack)
                return [known[id, addr] for id, addr, _ in found]

            yield find


async def needed_images(session: SessionState, names: Sequence[str]) -> Collection[str]:
    """Return the ``names`` under which services of the cluster may need an image.

    Raises:
        SkepError: No manager responds, or this node is not in a cluster.
    """
    needed: set[str] = set()
    for first in range(0, len(names), NAMES_MAX):
        request = skep.NeededImagesRequest(images=names[first : first + NAMES_MAX])
        response = await session.channel.call(methods.NEEDED_IMAGES, request)
        # Managers of older versions return the names of all images as specs write them.  A digest matches every name
        # that has it.
        needed.update(form for name in response.images for form in (name, name.rpartition("@")[2]))
    return needed


class NodeSource:
    """Another node from which images can be fetched.  Implements ``spreading.Source``.  Connects at its first use.

    Args:
        stack: Exit stack that closes the connection.
    """

    def __init__(
        self, name: str, addr: str, is_manager: bool, pair: PresentPair, stack: AsyncExitStack
    ) -> None:
        self.name = name
        self.is_manager = is_manager
        self._addr = addr
        self._pair = pair
        self._stack = stack
        self._channel: ManagerChannel | None = None
        self._connecting = asyncio.Lock()

    async def manifest(self, target: str, bytes_max: int) -> Document:
        """Return a manifest, which is not verified.  See ``ServedImages.manifest``.  Raises: SkepError."""
        channel = await self._connect()
        request = skep.ImageManifestRequest(target=target)
        response = await self._await_response(
            channel.call(methods.IMAGE_MANIFEST, request, timeout_s=MANIFEST_S)
        )
        return Document(
            response.content,
            response.media_type,
            is_of_registry=not response.made,
            is_own=response.made and response.own,
        )

    @asynccontextmanager
    async def blob(self, digest: str, *, last_resort: bool) -> AsyncIterator[AsyncIterator[bytes]]:
        """Yield the pieces of a blob, which are not verified.  Raises: SkepError."""
        channel = await self._connect()
        async with channel.stream(methods.IMAGE_BLOB) as call:
            request = skep.ImageBlobRequest(digest=digest, last_resort=last_resort)
            await self._await_response(call.send(request, end=True))
            if await self._await_response(call.receive()) is None:
                raise Unavailable(f"{self._addr} sent no blob")

            async def pieces() -> AsyncIterator[bytes]:
                async for piece in call:
                    yield piece.data

            yield pieces()

    async def _connect(self) -> ManagerChannel:
        """Return the connection.  A broken connection is opened again.  Raises: Unavailable."""
        async with self._connecting:
            if self._channel is None:
                present = self._pair()
                role = NodeRole.MANAGER if self.is_manager else NodeRole.WORKER
                self._channel = await self._stack.enter_async_context(
                    open_channel(self._addr, client_context(present), ROLE_NAMES[role], bounds=BOUNDS)
                )
            return self._channel

    async def _await_response(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except Unavailable:
            self._channel = None
            raise

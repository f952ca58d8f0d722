"""Bidirectional streams with the nodes that have a session here.  Each node has one stream, which either side may
end.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from skep.errors import InvalidArgument, SkepError, Unavailable
from skep.manager.nodes.node_session import NodeSession, StreamWaker
from skep.model.values.ids import NodeId
from skep.rpc.errors import LOST_PEER

FIRST_MESSAGE_SECONDS_MAX = 20.0
"""Timeout in seconds for the first message.  The peer is authenticated, but only that message names its session."""


class NodeMessage(Protocol):
    """A node's message.  The first message names its session."""

    session_id: str


class NodeStream:
    """The stream of one node, woken by ``signal``."""

    __slots__ = ("error", "node_id", "session", "signal")

    def __init__(self, node_id: NodeId, session: NodeSession, signal: StreamWaker) -> None:
        self.node_id = node_id
        self.session = session
        self.signal = signal
        self.error: Exception | None = None
        """The error that ended the stream."""

    def end(self, error: Exception) -> None:
        """End the stream.  Only the first error counts."""
        self.error = self.error or error
        self.signal.wake()

    def require_open(self) -> None:
        """Raise the error that ended the stream or its session, if one did."""
        self.session.require_open()
        if self.error is not None:
            raise self.error


S = TypeVar("S", bound=NodeStream)
Q = TypeVar("Q", bound=NodeMessage)


class NodeStreams(dict[NodeId, S]):
    """All streams of one kind.  ``what`` names their content in error messages."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    @contextmanager
    def open(self, stream: S) -> Iterator[S]:
        """Register the stream for the block.  An earlier stream of the node ends."""
        if (earlier := self.get(stream.node_id)) is not None:
            earlier.end(Unavailable(f"the node has opened another stream of {self._what}"))
        self[stream.node_id] = stream
        try:
            yield stream
        finally:
            stream.end(Unavailable(f"the node's stream of {self._what} has ended"))
            if self.get(stream.node_id) is stream:
                del self[stream.node_id]


async def session_named(
    requests: AsyncIterator[NodeMessage], within_s: float = FIRST_MESSAGE_SECONDS_MAX
) -> str:
    """Return the session that the first message names.  Raises: InvalidArgument: no message came in time."""
    try:
        async with asyncio.timeout(within_s):
            first = await anext(requests, None)
    except TimeoutError:
        first = None
    if first is None:
        raise InvalidArgument("the stream's first message names no session, or is late")
    return first.session_id


async def run_stream(
    stream: NodeStream,
    requests: AsyncIterator[Q],
    receive: Callable[[Q], None],
    send: Coroutine[Any, Any, None],
) -> None:
    """Receive and send until either ends.  Raises: the error that ended the stream."""
    # Each stream has only one additional asyncio task, because there are thousands of streams.
    async with asyncio.TaskGroup() as group:
        receiving = group.create_task(_receive_all(stream, requests, receive), name="receive from a node")
        try:
            await send
        except (SkepError, *LOST_PEER) as error:
            stream.end(error)
        finally:
            receiving.cancel()
    if stream.error is not None:
        raise stream.error


async def _receive_all(stream: NodeStream, requests: AsyncIterator[Q], receive: Callable[[Q], None]) -> None:
    try:
        async for request in requests:
            receive(request)
            del request  # the next request may come much later
        stream.end(Unavailable("the node has ended the stream"))
    except (SkepError, *LOST_PEER) as error:
        stream.end(error)

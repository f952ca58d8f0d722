"""Streams both ways with the nodes that have a session here: one for each node, over when either side says no more."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from skep.errors import InvalidArgument, SkepError, Unavailable
from skep.manager.node_session import Line, NodeSession
from skep.model.ids import NodeId
from skep.wire.errors import LOST_PEER

FIRST_MESSAGE_SECONDS_MAX = 20.0
"""A stream that says nothing would stay for ever: its peer is known, its session is not."""


class OfSession(Protocol):
    """What a node says; the first message names its session."""

    session_id: str


class NodeStream:
    """One node's.  ``line``: what wakes it."""

    __slots__ = ("error", "line", "node_id", "session")

    def __init__(self, node_id: NodeId, session: NodeSession, line: Line) -> None:
        self.node_id = node_id
        self.session = session
        self.line = line
        self.error: Exception | None = None
        """Why it is over."""

    def end(self, error: Exception) -> None:
        """The first reason counts."""
        self.error = self.error or error
        self.line.wake()

    def require_open(self) -> None:
        """Raises: why the stream is over."""
        self.session.require_open()
        if self.error is not None:
            raise self.error


S = TypeVar("S", bound=NodeStream)
Q = TypeVar("Q", bound=OfSession)


class NodeStreams(dict[NodeId, S]):
    """All of one kind.  ``what``: what they are about, in words."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    @contextmanager
    def open(self, stream: S) -> Iterator[S]:
        """The only one of its node for the block: an earlier one ends."""
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
    requests: AsyncIterator[OfSession], within_s: float = FIRST_MESSAGE_SECONDS_MAX
) -> str:
    """The session that the first message names.  Raises: InvalidArgument: none comes."""
    try:
        async with asyncio.timeout(within_s):
            first = await anext(requests, None)
    except TimeoutError:
        first = None
    if first is None:
        raise InvalidArgument("the session is missing")
    return first.session_id


async def converse(
    stream: NodeStream,
    requests: AsyncIterator[Q],
    hear: Callable[[Q], None],
    tell: Coroutine[Any, Any, None],
) -> None:
    """Hear and tell until either is over.  Raises: why it is."""
    # One task more, and no more: there are thousands of these streams.
    async with asyncio.TaskGroup() as group:
        hearing = group.create_task(_hear_all(stream, requests, hear), name="hear a node")
        try:
            await tell
        except (SkepError, *LOST_PEER) as error:
            stream.end(error)
        finally:
            hearing.cancel()
    if stream.error is not None:
        raise stream.error


async def _hear_all(stream: NodeStream, requests: AsyncIterator[Q], hear: Callable[[Q], None]) -> None:
    try:
        async for request in requests:
            hear(request)
            del request  # the next may be long in coming
        stream.end(Unavailable("the node has ended the stream"))
    except (SkepError, *LOST_PEER) as error:
        stream.end(error)

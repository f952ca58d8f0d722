"""Streams of nodes: one each, with a session, over when either side says no more."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext

import pytest

from skep.errors import InvalidArgument, Unavailable
from skep.manager.nodes.node_session import StreamWaker
from skep.manager.nodes.node_streams import NodeStream, NodeStreams, run_stream, session_named
from skep.model.values.ids import NodeId

NODE = NodeId("node")


class ALine:
    def __init__(self) -> None:
        self._changed_event = asyncio.Event()

    def wake(self) -> None:
        self._changed_event.set()

    async def wait(self) -> None:
        await self._changed_event.wait()
        self._changed_event.clear()


class ASession:
    id = "session"

    def require_open(self) -> None:
        """It stays open."""

    def signal(self) -> AbstractContextManager[StreamWaker]:
        return nullcontext(ALine())


class Said:
    def __init__(self, session_id: str) -> None:
        self.session_id = session_id


async def saying(*sessions: str, then_waits: bool = False) -> AsyncIterator[Said]:
    for session in sessions:
        yield Said(session)
    if then_waits:
        await asyncio.Event().wait()


def a_stream() -> NodeStream:
    return NodeStream(NODE, ASession(), ALine())


async def reported(stream: NodeStream) -> None:
    while True:
        stream.require_open()
        await stream.signal.wait()


async def test_the_first_message_names_the_session() -> None:
    assert await session_named(saying("one", "two")) == "one"


@pytest.mark.parametrize("then_waits", [False, True])
async def test_a_stream_that_names_no_session_is_refused(then_waits: bool) -> None:
    with pytest.raises(InvalidArgument, match="names no session"):
        await session_named(saying(then_waits=then_waits), within_s=0.01)


async def test_a_second_stream_of_a_node_ends_the_first() -> None:
    streams: NodeStreams[NodeStream] = NodeStreams("tables")
    first, second = a_stream(), a_stream()
    with streams.open(first):
        with streams.open(second):
            with pytest.raises(Unavailable, match="the node has opened another stream of tables"):
                first.require_open()
            second.require_open()
            assert streams[NODE] is second
        assert NODE not in streams


async def test_an_earlier_stream_that_closes_late_leaves_the_later_one() -> None:
    streams: NodeStreams[NodeStream] = NodeStreams("tables")
    later = a_stream()
    with streams.open(a_stream()):
        opened = streams.open(later)
        opened.__enter__()
    assert streams[NODE] is later
    opened.__exit__(None, None, None)
    assert not streams


async def test_messages_are_taken_until_the_node_ends_the_stream() -> None:
    received: list[str] = []
    stream = a_stream()
    with pytest.raises(Unavailable, match="the node has ended the stream"):
        await run_stream(
            stream, saying("a", "b"), lambda said: received.append(said.session_id), reported(stream)
        )
    assert received == ["a", "b"]


async def test_what_a_node_says_wrongly_ends_the_stream() -> None:
    def refuse(_said: Said) -> None:
        raise InvalidArgument("too much")

    stream = a_stream()
    with pytest.raises(InvalidArgument, match="too much"):
        await run_stream(stream, saying("a", then_waits=True), refuse, reported(stream))

"""gRPC calls as the store makes them, answered by an implementation that is not ours."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Cardinality, Handler, Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError
from grpclib.server import Server

from skep.rpc.status import CallFailed, Lost
from skep.store.etcd.client import BOUNDS, EtcdClient
from tests.support.store.etcd_rig import Relay

MEGABYTE = bytes(range(256)) * 4096
TIMEOUT_S = 10.0


class Bytes(CodecBase):
    """Messages are just bytes."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return bytes(message)

    def decode(self, data: bytes, message_type: Any) -> bytes:
        return data


class Peer:
    """Answers calls of ``/t/<name>``; ``cancelled``: calls that ended before their answer."""

    def __init__(self) -> None:
        self.sent = 0
        self.hanging = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.metadata: dict[str, Any] = {}

    async def echo(self, stream: Any) -> None:
        self.metadata = dict(stream.metadata)
        await stream.send_message(await stream.recv_message())

    async def fail(self, stream: Any) -> None:
        await stream.recv_message()
        raise GRPCError(Status.UNAVAILABLE, "etcdserver: no leader, 100 % übel")

    async def hang(self, stream: Any) -> None:
        await stream.recv_message()
        self.hanging.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def pour(self, stream: Any) -> None:
        """As many messages of a megabyte as the request's number says."""
        for number in range(int(await stream.recv_message())):
            await stream.send_message(bytes([number]) + MEGABYTE)
            self.sent += 1

    async def talk(self, stream: Any) -> None:
        async for message in stream:
            await stream.send_message(message.upper())

    def __mapping__(self) -> Mapping[str, Handler]:
        def handler(method: Callable[[Any], Awaitable[None]], cardinality: Cardinality) -> Handler:
            return Handler(method, cardinality, bytes, bytes)

        return {
            "/t/echo": handler(self.echo, Cardinality.UNARY_UNARY),
            "/t/fail": handler(self.fail, Cardinality.UNARY_UNARY),
            "/t/hang": handler(self.hang, Cardinality.UNARY_UNARY),
            "/t/pour": handler(self.pour, Cardinality.UNARY_STREAM),
            "/t/talk": handler(self.talk, Cardinality.STREAM_STREAM),
        }


@asynccontextmanager
async def serving(peer: Peer, socket: Path) -> AsyncIterator[Server]:
    server = Server([peer], codec=Bytes())
    await server.start(path=str(socket))
    try:
        yield server
    finally:
        server.close()
        await server.wait_closed()


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
async def peer(socket: Path) -> AsyncIterator[Peer]:
    peer = Peer()
    async with serving(peer, socket):
        yield peer


@pytest.fixture
async def calls(socket: Path) -> AsyncIterator[EtcdClient]:
    calls = EtcdClient(socket)
    yield calls
    calls.close()


@pytest.mark.parametrize("size", [0, 1, 16_000, 16_384, 70_000, 1_500_000, 20 * 1024 * 1024])
async def test_a_message_of_any_size_goes_and_comes_back(peer: Peer, calls: EtcdClient, size: int) -> None:
    message = (MEGABYTE * (size // len(MEGABYTE) + 1))[:size]
    for _ in range(2):
        assert await calls.unary("/t/echo", message, TIMEOUT_S) == message


async def test_many_calls_share_the_connection_and_its_window(peer: Peer, calls: EtcdClient) -> None:
    messages = [bytes([number]) * 1_000_000 for number in range(20)]
    responses = await asyncio.gather(*(calls.unary("/t/echo", message, TIMEOUT_S) for message in messages))
    assert responses == messages


async def test_a_refusal_says_why(peer: Peer, calls: EtcdClient) -> None:
    for _ in range(2):
        with pytest.raises(CallFailed, match="etcdserver: no leader, 100 % übel"):
            await calls.unary("/t/fail", b"", TIMEOUT_S)
    with pytest.raises(CallFailed):
        await calls.unary("/t/unheard-of", b"", TIMEOUT_S)


async def test_a_call_that_is_given_up_ends_at_the_peer_too(peer: Peer, calls: EtcdClient) -> None:
    with pytest.raises(TimeoutError):
        await calls.unary("/t/hang", b"", 0.05)
    await asyncio.wait_for(peer.cancelled.wait(), TIMEOUT_S)
    peer.cancelled.clear()
    call = asyncio.create_task(calls.unary("/t/hang", b"", TIMEOUT_S))
    assert await calls.unary("/t/echo", b"after it", TIMEOUT_S) == b"after it"
    call.cancel()
    await asyncio.wait_for(peer.cancelled.wait(), TIMEOUT_S)
    assert await calls.unary("/t/echo", b"still there", TIMEOUT_S) == b"still there"


async def test_without_a_server_a_call_fails_and_a_later_one_finds_it(
    peer: Peer, socket: Path, tmp_path: Path
) -> None:
    calls = EtcdClient(tmp_path / "relay")
    with pytest.raises(OSError, match="No such file"):
        await calls.unary("/t/echo", b"", TIMEOUT_S)
    relay = Relay(socket)
    async with relay.listening(tmp_path / "relay"):
        for message in (b"first life", b"second life"):
            assert await calls.unary("/t/echo", message, TIMEOUT_S) == message
            relay.cut()
            with pytest.raises(OSError, match="the connection broke"):
                await calls.unary("/t/echo", b"", TIMEOUT_S)
            relay.reconnect()
    calls.close()


async def test_calls_under_way_are_lost_with_the_connection(socket: Path, calls: EtcdClient) -> None:
    async with serving(Peer(), socket):
        call = asyncio.create_task(calls.unary("/t/hang", b"", TIMEOUT_S))
        async with calls.stream("/t/talk", b"hello", timeout_s=TIMEOUT_S) as stream:
            assert await stream.receive() == b"HELLO"
            calls.close()
            with pytest.raises(Lost):
                await stream.receive()
            with pytest.raises(Lost):
                stream.send(b"anybody?")
        with pytest.raises(Lost):
            await call


async def test_a_stream_brings_all_messages_and_then_its_end(peer: Peer, calls: EtcdClient) -> None:
    async with calls.stream("/t/pour", b"40", timeout_s=TIMEOUT_S, is_last=True) as stream:
        for number in range(40):
            assert await stream.receive() == bytes([number]) + MEGABYTE
        assert await stream.receive() is None


async def test_a_peer_is_not_ahead_of_its_reader_by_more_than_the_window(
    peer: Peer, calls: EtcdClient
) -> None:
    async with calls.stream("/t/pour", b"100", timeout_s=TIMEOUT_S, is_last=True) as stream:
        assert await stream.receive() is not None
        before = -1
        while before != peer.sent:  # until the peer gets no further; other calls do
            before = peer.sent
            for _ in range(20):
                assert await calls.unary("/t/echo", b"by the way", TIMEOUT_S) == b"by the way"
        assert peer.sent <= 2 + BOUNDS.stream_window // len(MEGABYTE)
        assert peer.sent < BOUNDS.connection_window // len(MEGABYTE)
        for _ in range(99):
            assert await stream.receive() is not None


async def test_both_talk_on_one_stream(peer: Peer, calls: EtcdClient) -> None:
    async with calls.stream("/t/talk", b"one", timeout_s=TIMEOUT_S) as stream:
        assert await stream.receive() == b"ONE"
        stream.send(b"two")
        stream.send(b"three")
        assert await stream.receive() == b"TWO"
        assert await stream.receive() == b"THREE"


async def test_a_message_consumer_gets_messages_while_the_reader_waits(peer: Peer, calls: EtcdClient) -> None:
    """In order, and what it leaves is the reader's."""
    taken: list[bytes] = []

    def take(message: bytes) -> bool:
        if message.startswith(b"NOT"):
            return False
        taken.append(message)
        return True

    async with calls.stream("/t/talk", b"one", timeout_s=TIMEOUT_S) as stream:
        assert await stream.receive() == b"ONE"
        stream.offer_to(take)
        for message in (b"two", b"three", b"not this", b"four"):
            stream.send(message)
        assert await stream.receive() == b"NOT THIS"
        assert taken == [b"TWO", b"THREE"]
        # The last came with the one that the reader was woken for, or comes now; either way after it.
        stream.send(b"not that")
        rest = [await stream.receive()]
        if rest == [b"FOUR"]:
            rest.append(await stream.receive())
        assert taken[2:] + rest == [b"FOUR", b"NOT THAT"]


async def test_an_error_of_the_message_consumer_is_raised_in_the_reader(
    peer: Peer, calls: EtcdClient
) -> None:
    def fail(message: bytes) -> bool:
        raise LookupError(message)

    async with calls.stream("/t/talk", b"one", timeout_s=TIMEOUT_S) as stream:
        assert await stream.receive() == b"ONE"
        stream.offer_to(fail)
        stream.send(b"two")
        with pytest.raises(LookupError, match="TWO"):
            await stream.receive()
    assert await calls.unary("/t/echo", b"still there", TIMEOUT_S) == b"still there"


async def test_a_call_that_was_begun_is_on_its_way_before_it_is_awaited(
    peer: Peer, calls: EtcdClient
) -> None:
    assert calls.begin("/t/echo", b"nobody is there yet", TIMEOUT_S) is None
    assert await calls.unary("/t/echo", b"now", TIMEOUT_S) == b"now"
    call, late = calls.begin("/t/echo", b"one", TIMEOUT_S), calls.begin("/t/hang", b"", 0.05)
    assert call is not None
    assert late is not None
    await asyncio.wait_for(peer.hanging.wait(), TIMEOUT_S)  # though its response is not awaited
    assert await call.response() == b"one"
    with pytest.raises(TimeoutError):
        await late.response()
    await asyncio.wait_for(peer.cancelled.wait(), TIMEOUT_S)


async def test_metadata_and_deadline_reach_the_peer(peer: Peer, calls: EtcdClient) -> None:
    async with calls.stream(
        "/t/echo", b"", timeout_s=TIMEOUT_S, metadata=(("hasleader", "true"),), is_last=True
    ) as stream:
        assert await stream.receive() == b""
    assert peer.metadata["hasleader"] == "true"


async def test_what_is_no_http2_is_a_lost_call(socket: Path, calls: EtcdClient) -> None:
    async def talk_nonsense(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with closing(await asyncio.start_unix_server(talk_nonsense, socket)), pytest.raises(Lost):
        await calls.unary("/t/echo", b"", TIMEOUT_S)

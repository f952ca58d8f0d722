"""A client's end of an HTTP/2 connection, in memory: what a server may say, and what it may not."""

import asyncio

import pytest
from hpack import Encoder
from hypothesis import given
from hypothesis import strategies as st

from skep.rpc import frames, headers
from skep.rpc.client import RESPONSES_WHILE_PAUSED_MAX, Bounds, ClientConnection, ClientStream
from skep.rpc.frames import Code
from skep.rpc.status import CallFailed, Lost, StatusCode
from tests.support.clients.http2_rig import BROKEN, Wire

BOUNDS = Bounds(stream_window=100_000, connection_window=250_000, message=150_000)


class ClientWire(Wire):
    """``is_aborted``: whether the client has dropped the connection."""

    is_aborted = False

    def abort(self) -> None:
        self.is_aborted = True


@pytest.fixture
def wire() -> ClientWire:
    return ClientWire()


@pytest.fixture
async def connection(wire: ClientWire) -> ClientConnection:
    connection = ClientConnection(BOUNDS)
    connection.connection_made(wire)
    wire.written.clear()
    return connection


def begun(connection: ClientConnection) -> ClientStream:
    stream = connection.open()
    stream.begin(headers.request_block("/a/B", None), b"request", is_last=True)
    return stream


def block(stream: ClientStream, *said: tuple[str, str], is_last: bool = False) -> bytes:
    encoder = Encoder()
    encoder.header_table_size = 0
    flags = frames.END_HEADERS | (frames.END_STREAM if is_last else 0)
    return frames.frame(frames.HEADERS, flags, stream.id, encoder.encode(list(said)))


def data(stream: ClientStream, message: bytes) -> bytes:
    framed = b"\0" + len(message).to_bytes(4, "big") + message
    pieces = [framed[start : start + 16_000] for start in range(0, len(framed), 16_000)]
    return b"".join(frames.frame(frames.DATA, 0, stream.id, piece) for piece in pieces)


def answered(stream: ClientStream, message: bytes = b"answer") -> bytes:
    return (
        block(stream, (":status", "200"))
        + data(stream, message)
        + block(stream, ("grpc-status", "0"), is_last=True)
    )


async def test_an_answer_is_the_message_before_a_good_status(connection: ClientConnection) -> None:
    stream = begun(connection)
    connection.data_received(answered(stream))
    assert await stream.only_message() == b"answer"


@pytest.mark.parametrize("what", BROKEN)
async def test_what_is_no_http2_ends_the_connection_and_its_calls(
    connection: ClientConnection, wire: ClientWire, what: str
) -> None:
    """The same words that end a server's: both ends are of one core."""
    stream = begun(connection)
    raw, _ = BROKEN[what]
    connection.data_received(raw)
    assert connection.is_lost
    assert wire.is_aborted
    with pytest.raises(Lost, match="not HTTP/2 as agreed"):
        await stream.only_message()


async def test_another_call_on_a_lost_connection_is_lost(connection: ClientConnection) -> None:
    connection.connection_lost(None)
    with pytest.raises(Lost):
        begun(connection)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"\x01" + (3).to_bytes(4, "big") + b"abc", "compressed"),
        (b"\0" + (150_001).to_bytes(4, "big"), "a message of 150001 bytes"),
    ],
)
async def test_a_message_that_is_not_taken_ends_the_connection(
    connection: ClientConnection, wire: ClientWire, raw: bytes, why: str
) -> None:
    """By the length that it says, before it has come."""
    stream = begun(connection)
    connection.data_received(frames.frame(frames.DATA, 0, stream.id, raw))
    assert wire.is_aborted
    with pytest.raises(Lost, match=why):
        await stream.receive()


async def test_a_server_that_sends_beyond_the_window_is_cut_off(
    connection: ClientConnection, wire: ClientWire
) -> None:
    stream = begun(connection)
    connection.data_received(b"".join(data(stream, bytes(10_000)) for _ in range(9)))
    assert not wire.is_aborted
    connection.data_received(b"".join(data(stream, bytes(10_000)) for _ in range(2)))
    assert wire.is_aborted


async def test_what_is_read_may_be_sent_again(connection: ClientConnection, wire: ClientWire) -> None:
    stream = begun(connection)
    for _ in range(100):
        connection.data_received(data(stream, bytes(10_000)))
        assert len(await stream.receive() or b"") == 10_000
    assert not wire.is_aborted
    granted, _ = frames.split(bytes(wire.written))
    updates = [
        frames.number(one.payload) for one in granted if one.kind == frames.WINDOW_UPDATE and one.stream_id
    ]
    assert sum(updates) >= 900_000


async def test_a_server_that_asks_and_does_not_read_is_not_answered_for_ever(
    connection: ClientConnection, wire: ClientWire
) -> None:
    connection.pause_writing()
    ping = frames.frame(frames.PING, 0, 0, b"12345678")
    connection.data_received(ping * RESPONSES_WHILE_PAUSED_MAX)
    assert not wire.is_aborted
    connection.data_received(ping)
    assert wire.is_aborted


async def test_a_message_waits_for_a_server_that_reads(
    connection: ClientConnection, wire: ClientWire
) -> None:
    stream = connection.open()
    connection.pause_writing()
    stream.begin(headers.request_block("/a/B", None), bytes(100_000), is_last=True)
    drained = asyncio.ensure_future(stream.drain())
    await asyncio.sleep(0)
    assert sent_bytes(wire) == 0
    connection.resume_writing()
    await asyncio.sleep(0)
    assert sent_bytes(wire) == frames.WINDOW
    assert not drained.done()
    connection.data_received(frames.window_update(0, 100_000) + frames.window_update(stream.id, 100_000))
    await asyncio.wait_for(drained, 1)
    assert sent_bytes(wire) == 100_005
    assert stream.has_said_all


def sent_bytes(wire: ClientWire) -> int:
    whole, _ = frames.split(bytes(wire.written))
    return sum(len(one.payload) for one in whole if one.kind == frames.DATA)


async def test_a_refusal_counts_for_more_than_the_reset_after_it(connection: ClientConnection) -> None:
    """A server that refuses a call in its middle says why, and then that no more is wanted."""
    stream = connection.open()
    stream.begin(headers.request_block("/a/B", None), bytes(100_000), is_last=False)
    sending = asyncio.ensure_future(stream.drain())
    await asyncio.sleep(0)
    refusal = block(
        stream, (":status", "200"), ("grpc-status", "8"), ("grpc-message", "too %C3%A4"), is_last=True
    )
    connection.data_received(refusal + frames.reset(stream.id, Code.NO_ERROR))
    with pytest.raises(CallFailed, match="too ä") as failed:
        await sending
    assert failed.value.status is StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(CallFailed):
        stream.send(b"more")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (lambda stream: frames.reset(stream.id, Code.CANCEL), "reset, code 8"),
        (lambda stream: block(stream, (":status", "503"), is_last=True), "HTTP status 503"),
        (lambda stream: block(stream, ("x", "y"), is_last=True), "without a status"),
        (lambda stream: frames.frame(frames.DATA, frames.END_STREAM, stream.id), "without a status"),
        (lambda stream: frames.goaway(0, Code.NO_ERROR), "goes away"),
        (lambda stream: block(stream, ("grpc-status", "0"), is_last=True), "not exactly one message"),
    ],
)
async def test_a_call_that_ends_without_its_answer_is_lost(connection: ClientConnection, said, why) -> None:
    stream = begun(connection)
    connection.data_received(said(stream))
    with pytest.raises(Lost, match=why):
        await stream.only_message()


async def test_an_unassigned_status_code_is_unknown(connection: ClientConnection) -> None:
    stream = begun(connection)
    connection.data_received(block(stream, ("grpc-status", "4711"), is_last=True))
    with pytest.raises(CallFailed) as failed:
        await stream.only_message()
    assert failed.value.status is StatusCode.UNKNOWN


@given(st.lists(st.binary(max_size=100), max_size=10))
async def test_anything_is_survived(pieces: list[bytes]) -> None:
    connection, wire = ClientConnection(BOUNDS), ClientWire()
    connection.connection_made(wire)
    stream = begun(connection)
    for piece in pieces:
        connection.data_received(piece)
    connection.connection_lost(None)
    with pytest.raises((Lost, CallFailed)):
        await asyncio.wait_for(stream.only_message(), 5)

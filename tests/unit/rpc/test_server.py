"""HTTP/2 as the server speaks it, against another implementation of it (h2) as the client."""

import asyncio
from contextlib import suppress

import pytest
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    PingAckReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes
from hpack import Encoder
from hypothesis import given
from hypothesis import strategies as st

from skep.rpc import frames, headers
from skep.rpc.frames import Code, Violation
from skep.rpc.headers import CallHeaders
from skep.rpc.server import ServerConnection, ServerStream
from skep.rpc.status import CallFailed, StatusCode
from tests.support.clients.http2_rig import BROKEN, LIMITS, REQUEST, Rig, Wire, framed, of


@pytest.fixture
async def rig() -> Rig:
    rig = Rig()
    await rig.turn()
    return rig


async def test_a_call_is_answered_with_headers_message_and_status(rig):
    stream_id = rig.open()
    rig.client.send_data(stream_id, framed(b"hello"), end_stream=True)
    received = await rig.turn()
    assert rig.calls[0].request == CallHeaders("POST", "/a/B", "application/grpc", "5S")
    assert of(ResponseReceived, received)[0].headers == [
        (":status", "200"),
        ("content-type", "application/grpc+proto"),
    ]
    assert b"".join(event.data for event in of(DataReceived, received)) == framed(b"hello")
    assert of(TrailersReceived, received)[0].headers == [("grpc-status", "0")]
    assert [event.stream_id for event in of(StreamEnded, received)] == [stream_id]


async def test_a_refused_client_gets_the_reason_and_a_reset(rig):
    async def refuse(stream: ServerStream) -> None:
        await stream.send_status(CallFailed(StatusCode.NOT_FOUND, "no such node: ä%"))

    rig.answer = refuse
    rig.open()
    received = await rig.turn()
    assert of(ResponseReceived, received)[0].headers[2:] == [
        ("grpc-status", "5"),
        ("grpc-message", "no such node: %C3%A4%25"),
    ]
    assert of(StreamReset, received)[0].error_code == Code.NO_ERROR


async def test_a_table_that_the_client_forbids_is_not_used(rig):
    rig.client.update_settings({SettingCodes.HEADER_TABLE_SIZE: 0})
    await rig.turn()
    for _ in range(2):
        rig.open(end=True)
        received = await rig.turn()
        assert of(ResponseReceived, received)[0].headers[2:] == [("grpc-status", "0")]


async def test_large_messages_pass_through_small_windows(rig):
    """Both ways; the client's window is smaller than a frame."""
    rig.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1000})
    await rig.turn()
    stream_id = rig.open()
    sending, response = framed(b"x" * 200_000), b""
    while sending:
        room = min(rig.client.local_flow_control_window(stream_id) - 256, 16_000)
        if room > 0:
            rig.client.send_data(stream_id, sending[:room], pad_length=200)
            sending = sending[room:]
        response += b"".join(event.data for event in of(DataReceived, await rig.turn()))
    rig.client.end_stream(stream_id)
    while len(response) < 200_000:
        response += b"".join(event.data for event in of(DataReceived, await rig.turn()))
    assert response == framed(b"x" * 200_000)


async def test_half_messages_hold_no_more_than_the_connections_window(rig):
    """A window that were filled again for what has arrived of them would let each grow to the largest message."""
    ids = [rig.open() for _ in range(LIMITS.streams)]
    for stream_id in ids:
        rig.client.send_data(stream_id, b"\0" + (1_000_000).to_bytes(4, "big"))
    for stream_id in ids * 100:
        await rig.turn()
        room = min(rig.client.local_flow_control_window(stream_id), 16_000)
        if room:
            rig.client.send_data(stream_id, bytes(room))
    assert LIMITS.connection_window - 16_000 < rig.connection.held <= LIMITS.connection_window
    for stream_id in ids:
        rig.client.reset_stream(stream_id)
    await rig.turn()
    assert rig.connection.held == 0


async def test_empty_messages_give_their_window_back(rig):
    async def count(stream: ServerStream) -> None:
        while await stream.recv_data(5):
            await stream.recv_data(0)

    rig.answer = count
    for _ in range(3):
        stream_id = rig.open()
        for _ in range(200):
            rig.client.send_data(stream_id, bytes(500))
            await rig.turn()
        rig.client.end_stream(stream_id)
        await rig.turn()
    assert rig.client.outbound_flow_control_window >= LIMITS.connection_window - LIMITS.stream_window
    assert rig.connection.held == 0


async def test_a_message_counts_until_its_handler_is_done_with_it(rig):
    done = asyncio.Event()

    async def work(stream: ServerStream) -> None:
        await stream.recv_data(50_000)
        await done.wait()

    rig.answer = work
    stream_id = rig.open()
    for _ in range(5):
        rig.client.send_data(stream_id, bytes(10_000))
    await rig.turn()
    assert rig.connection.held == 50_000
    done.set()
    await rig.turn()
    assert rig.connection.held == 0


async def test_the_connection_window_is_returned_for_discarded_data_only(rig):
    rig.answer = rig.wait_for_nothing
    ids = [rig.open() for _ in range(2)]
    for stream_id in ids:
        rig.client.send_data(stream_id, b"x" * 10_000)
        for _ in range(9):
            rig.client.send_data(stream_id, b"x" * 10_000)
            await rig.turn()
    assert rig.client.local_flow_control_window(ids[0]) == 0
    before = rig.client.outbound_flow_control_window
    assert before == 50_000
    for stream_id in ids:
        rig.client.reset_stream(stream_id)
    await rig.turn()
    assert rig.client.outbound_flow_control_window == LIMITS.connection_window


@pytest.mark.parametrize(("streams", "pieces"), [(1, 7), (3, 6)], ids=["of a stream", "of the connection"])
async def test_a_peer_that_sends_more_than_its_window_is_cut_off(rig, streams, pieces):
    rig.answer = rig.wait_for_nothing
    ids = [rig.open() for _ in range(streams)]
    await rig.turn()
    for _ in range(pieces):
        for stream_id in ids:
            rig.say(frames.frame(frames.DATA, 0, stream_id, b"x" * 16_000))
    received = await rig.turn()
    assert of(ConnectionTerminated, received)[0].error_code == Code.FLOW_CONTROL_ERROR
    assert (rig.wire.is_closed, sorted(rig.ended)) == (True, ids)


async def test_streams_that_were_reset_count_until_their_handlers_have_ended(rig):
    release = asyncio.Event()

    async def hold_on(stream: ServerStream) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await release.wait()

    rig.answer = hold_on
    for _ in range(LIMITS.streams):
        stream_id = rig.open()
        await rig.turn()
        rig.client.reset_stream(stream_id)
        await rig.turn()
    refused = rig.open()
    received = await rig.turn()
    assert [(event.stream_id, event.error_code) for event in of(StreamReset, received)] == [
        (refused, Code.REFUSED_STREAM)
    ]
    assert len(rig.calls) == LIMITS.streams
    release.set()
    await rig.turn()
    rig.answer = rig.echo
    rig.open(end=True)
    assert of(StreamEnded, await rig.turn())


async def test_data_for_a_call_that_has_ended_is_dropped(rig):
    async def refuse(stream: ServerStream) -> None:
        await stream.send_status(CallFailed(StatusCode.UNIMPLEMENTED))

    rig.answer = refuse
    stream_id = rig.open()
    rig.client.send_data(stream_id, b"x" * 100)
    await rig.turn()
    rig.say(frames.frame(frames.DATA, 0, stream_id, b"late"))
    rig.say(frames.window_update(stream_id, 5) + frames.reset(stream_id, Code.NO_ERROR))
    rig.answer = rig.echo
    rig.open(end=True)
    assert of(StreamEnded, await rig.turn())


async def test_trailers_of_the_client_end_its_messages(rig):
    stream_id = rig.open()
    await rig.turn()
    rig.client.send_headers(stream_id, [("x-last", "1")], end_stream=True)
    assert of(StreamEnded, await rig.turn())


async def test_a_peer_that_does_not_read_is_not_read_from_and_its_answers_wait(rig):
    rig.connection.pause_writing()
    assert not rig.wire.is_reading_now
    stream_id = rig.open()
    rig.client.send_data(stream_id, framed(b"a"), end_stream=True)
    assert not await rig.turn()
    rig.connection.resume_writing()
    assert rig.wire.is_reading_now
    assert of(StreamEnded, await rig.turn())


async def test_a_connection_that_ends_says_so_and_ends_its_calls(rig):
    rig.answer = rig.wait_for_nothing
    ids = [rig.open(), rig.open()]
    await rig.turn()
    rig.connection.close()
    await asyncio.wait_for(rig.connection.wait_closed(), 1)
    assert rig.ended == ids
    assert of(ConnectionTerminated, await rig.turn())[0].last_stream_id == ids[-1]
    assert rig.wire.is_closed


async def test_pings_are_answered(rig):
    rig.client.ping(b"12345678")
    assert of(PingAckReceived, await rig.turn())[0].ping_data == b"12345678"


@pytest.mark.parametrize("what", BROKEN)
async def test_what_is_no_http2_ends_the_connection(rig, what):
    raw, code = BROKEN[what]
    rig.say(raw)
    received = await rig.turn()
    assert [event.error_code for event in of(ConnectionTerminated, received)] == [code]
    assert rig.wire.is_closed
    assert not rig.calls


async def test_a_client_with_another_protocol_is_disconnected() -> None:
    connection, wire = ServerConnection(Rig().echo), Wire()
    connection.begin(wire, LIMITS)
    connection.data_received(b"GET / HTTP/1.1\r\n")
    assert wire.is_closed


@given(st.data())
async def test_what_arrives_means_the_same_however_it_is_cut(data):
    whole = frames.PREFACE + b"".join(
        frames.frame(frames.PING, 0, 0, b"ping %03d" % number) for number in range(9)
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=30)))
    connection, wire = ServerConnection(Rig().echo), Wire()
    connection.begin(wire, LIMITS)
    for first, last in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        connection.data_received(whole[first:last])
    await asyncio.sleep(0)
    received, _ = frames.split(bytes(wire.written))
    assert [frame.payload for frame in received if frame.kind == frames.PING] == [
        b"ping %03d" % n for n in range(9)
    ]


PATHS = st.sampled_from(["/a/B", "/c/D", "/" + "long" * 500])


@given(st.lists(st.lists(st.tuples(PATHS, st.integers(0, 99)), max_size=8), max_size=4))
def test_header_blocks_do_not_depend_on_other_connections(connections):
    """Each connection has a table of its own, though what others have said is remembered."""
    for calls in connections:
        encoder, table = Encoder(), headers.EMPTY
        for path, number in calls:
            block = encoder.encode([*REQUEST[:2], (":path", path), ("grpc-timeout", f"{number}S")])
            request, table = headers.decoded(table, block)
            assert request == CallHeaders("POST", path, "", f"{number}S")


def test_a_decoder_shrinks_its_table_on_request():
    encoder = Encoder()
    _, table = headers.decoded(headers.EMPTY, encoder.encode([(":path", "/a")]))
    assert len(table.entries) == 1
    encoder.header_table_size = 0
    _, table = headers.decoded(table, encoder.encode([(":path", "/a")]))
    assert (table.entries, table.size, table.size_max) == ((), 0, 0)


@given(st.binary(max_size=200))
def test_a_block_of_anything_is_a_request_or_a_fault(block):
    with suppress(Violation):
        headers.decoded(headers.EMPTY, block)


@given(st.lists(st.binary(max_size=100), max_size=10))
async def test_anything_after_the_preface_is_survived(pieces):
    connection, wire = ServerConnection(Rig().echo), Wire()
    connection.begin(wire, LIMITS)
    connection.data_received(frames.PREFACE)
    for piece in pieces:
        connection.data_received(piece)
    connection.connection_lost(None)
    await asyncio.wait_for(connection.wait_closed(), 5)

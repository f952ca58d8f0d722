"""Frames and header blocks."""

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived
from hpack import Encoder
from hypothesis import given
from hypothesis import strategies as st

from skep.store.etcd import http2
from skep.store.etcd.http2 import Frame, Violation

frames = st.lists(
    st.builds(
        Frame, st.integers(0, 9), st.integers(0, 255), st.integers(0, 2**31 - 1), st.binary(max_size=50)
    )
)


@given(frames, st.data())
def test_frames_are_the_same_wherever_the_stream_is_cut(sent: list[Frame], data: st.DataObject) -> None:
    stream = b"".join(http2.frame(*frame) for frame in sent)
    came: list[Frame] = []
    rest = b""
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        part, stream = stream[:size], stream[size:]
        taken, rest = http2.split(rest + part)
        came += taken
    assert came == sent
    assert rest == b""


def test_a_frame_longer_than_agreed_is_a_violation() -> None:
    with pytest.raises(Violation):
        http2.split(http2.frame(http2.DATA, 0, 1, bytes(http2.FRAME_BYTES + 1)))


def test_padding_and_priority_are_no_content() -> None:
    padded = Frame(http2.DATA, 0x8, 1, b"\x03" + b"content" + bytes(3))
    assert http2.content(padded) == b"content"
    both = Frame(http2.HEADERS, 0x8 | 0x20, 1, b"\x02" + bytes(5) + b"block" + bytes(2))
    assert http2.content(both) == b"block"


@pytest.mark.parametrize("payload", [b"", b"\x05abc"])
def test_more_padding_than_there_is_is_a_violation(payload: bytes) -> None:
    with pytest.raises(Violation):
        http2.content(Frame(http2.DATA, 0x8, 1, payload))


def test_a_request_reads_the_same_each_time_it_is_sent() -> None:
    """To an independent reader with a header table, which a block must not rely on."""
    reader = H2Connection(H2Configuration(client_side=False))
    reader.initiate_connection()
    reader.receive_data(http2.greeting(100_000, 200_000))
    block = http2.request_block("/a.B/C", 1.5, (("hasleader", "true"),))
    for stream_id in (1, 3):
        events = reader.receive_data(
            http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream_id, block)
        )
        headers = dict(next(event for event in events if isinstance(event, RequestReceived)).headers)
        assert headers[b":path"] == b"/a.B/C"
        assert headers[b"grpc-timeout"] == b"1500m"
        assert headers[b"hasleader"] == b"true"


def test_a_block_of_a_peer_without_a_table_is_read_by_itself() -> None:
    encoder = Encoder()
    encoder.header_table_size = 0
    first = encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
    again = encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
    assert first != again  # the first one says that there is no table
    for block in (again, first, again):
        assert http2.headers_of(block) == {":status": "200", "content-type": "application/grpc"}


def test_a_block_that_refers_to_one_before_it_is_a_violation() -> None:
    encoder = Encoder()
    encoder.encode([("x-a", "b")])
    with pytest.raises(Violation):
        http2.headers_of(encoder.encode([("x-a", "b")]))

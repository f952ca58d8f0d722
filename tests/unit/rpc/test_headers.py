"""Header blocks of clients."""

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived
from hpack import Encoder

from skep.rpc import frames, headers
from skep.rpc.client import Bounds
from skep.rpc.frames import Violation


def test_a_request_reads_the_same_each_time_it_is_sent() -> None:
    """To an independent reader with a header table, which a block must not rely on."""
    reader = H2Connection(H2Configuration(client_side=False))
    reader.initiate_connection()
    reader.receive_data(Bounds(stream_window=100_000, connection_window=200_000, message=1).greeting())
    block = headers.request_block("/a.B/C", 1.5, (("hasleader", "true"),))
    for stream_id in (1, 3):
        events = reader.receive_data(
            frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, stream_id, block)
        )
        said = dict(next(event for event in events if isinstance(event, RequestReceived)).headers)
        assert said[b":path"] == b"/a.B/C"
        assert said[b"grpc-timeout"] == b"1500m"
        assert said[b"hasleader"] == b"true"


def test_a_block_of_a_peer_without_a_table_is_read_by_itself() -> None:
    encoder = Encoder()
    encoder.header_table_size = 0
    first = encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
    again = encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
    assert first != again  # the first one says that there is no table
    for block in (again, first, again):
        assert headers.response_headers(block) == {":status": "200", "content-type": "application/grpc"}


def test_a_block_that_refers_to_one_before_it_is_a_violation() -> None:
    encoder = Encoder()
    encoder.encode([("x-a", "b")])
    with pytest.raises(Violation):
        headers.response_headers(encoder.encode([("x-a", "b")]))

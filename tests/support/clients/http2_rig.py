"""The server side of an HTTP/2 connection in memory, with another implementation (h2) as its client."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.wrappers_pb2 import BytesValue
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event

from skep.rpc import frames
from skep.rpc.core import HEADER_BLOCK_BYTES_MAX
from skep.rpc.frames import Code
from skep.rpc.server import PeerLimits, ServerConnection, ServerStream

LIMITS = PeerLimits(streams=3, stream_window=100_000, connection_window=250_000)
REQUEST = (
    *((":method", "POST"), (":scheme", "https"), (":path", "/a/B"), (":authority", "manager")),
    *(("content-type", "application/grpc"), ("te", "trailers"), ("grpc-timeout", "5S")),
)


class Wire(asyncio.Transport):
    """The bytes that the server writes.  ``is_reading_now``: whether it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_reading_now = True
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.is_reading_now = False

    def resume_reading(self) -> None:
        self.is_reading_now = True

    def close(self) -> None:
        self.is_closed = True


class Rig:
    """A server's connection with an h2 client at its other end."""

    def __init__(self) -> None:
        self.calls: list[ServerStream] = []
        self.ended: list[int] = []
        self.connection = ServerConnection(self._answer)
        self.wire = Wire()
        self.client = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.connection.begin(self.wire, LIMITS)
        self.client.initiate_connection()
        self.answer: Callable[[ServerStream], Awaitable[None]] = self.echo

    async def _answer(self, stream: ServerStream) -> None:
        self.calls.append(stream)
        try:
            await self.answer(stream)
        finally:
            self.ended.append(stream.id)

    async def echo(self, stream: ServerStream) -> None:
        while prefix := await stream.recv_data(5):
            await stream.send_message(
                BytesValue.FromString(await stream.recv_data(int.from_bytes(prefix[1:], "big")))
            )
        await stream.send_status()

    async def wait_for_nothing(self, stream: ServerStream) -> None:
        """Handle a stream without reading or responding."""
        await asyncio.Event().wait()

    async def turn(self) -> list[Event]:
        """Transfer bytes in both directions until none are left.  Return the events of the client."""
        received: list[Event] = []
        while True:
            if data := self.client.data_to_send():
                self.connection.data_received(data)
            for _ in range(5):
                await asyncio.sleep(0)
            said = bytes(self.wire.written)
            self.wire.written.clear()
            received += self.client.receive_data(said) if said else []
            for event in received:
                if isinstance(event, DataReceived) and event.flow_controlled_length:
                    self.client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    event.flow_controlled_length = 0
            if not said and not self.client.data_to_send():
                return received

    def open(self, *, end: bool = False, **other: str) -> int:
        """Open a stream.  ``other``: headers that differ from ``REQUEST``, with names without colon or hyphen."""
        stream_id = self.client.get_next_available_stream_id()
        headers = [(name, other.get(name.strip(":").replace("-", "_"), value)) for name, value in REQUEST]
        self.client.send_headers(stream_id, headers, end_stream=end)
        return stream_id

    def say(self, raw: bytes) -> None:
        """Send bytes that h2 would not send."""
        self.connection.data_received(self.client.data_to_send() + raw)


def framed(value: bytes) -> bytes:
    message = BytesValue(value=value).SerializeToString()
    return b"\0" + len(message).to_bytes(4, "big") + message


def of(kind: type[Any], received: list[Event]) -> list[Any]:
    return [event for event in received if isinstance(event, kind)]


HEADERS, CONTINUATION = frames.HEADERS, frames.CONTINUATION
BROKEN: dict[str, tuple[bytes, Code]] = {
    "a frame that is too long": (frames.frame(frames.PING, 0, 0, b"x" * 16_385), Code.FRAME_SIZE_ERROR),
    "data of no stream": (frames.frame(frames.DATA, 0, 0, b"x"), Code.PROTOCOL_ERROR),
    "data of a stream to come": (frames.frame(frames.DATA, 0, 7, b"x"), Code.PROTOCOL_ERROR),
    "a reset of a stream to come": (frames.reset(7, Code.NO_ERROR), Code.PROTOCOL_ERROR),
    "an even stream": (frames.frame(HEADERS, 4, 8, b"\x83"), Code.PROTOCOL_ERROR),
    "more padding than frame": (frames.frame(HEADERS, 0xC, 1, b"\x09\x83"), Code.PROTOCOL_ERROR),
    "a priority that ends early": (frames.frame(HEADERS, 0x24, 1, b"\x83"), Code.PROTOCOL_ERROR),
    "another frame amid headers": (
        frames.frame(HEADERS, 0, 1, b"\x83") + frames.frame(frames.PING, 0, 0, b"12345678"),
        Code.PROTOCOL_ERROR,
    ),
    "a continuation of nothing": (frames.frame(CONTINUATION, 4, 1, b"\x83"), Code.PROTOCOL_ERROR),
    "empty continuations": (
        frames.frame(HEADERS, 0, 1, b"\x83") + frames.frame(CONTINUATION, 0, 1),
        Code.ENHANCE_YOUR_CALM,
    ),
    "headers without end": (
        frames.frame(HEADERS, 0, 1, b"\x83" * 16_000)
        + frames.frame(CONTINUATION, 0, 1, b"\x83" * 16_000)
        + frames.frame(CONTINUATION, 0, 1, b"\x83" * (HEADER_BLOCK_BYTES_MAX - 31_999)),
        Code.ENHANCE_YOUR_CALM,
    ),
    "headers that unfold": (
        # A header of 4,000 bytes that is sent once and referenced a hundred times.
        frames.frame(HEADERS, 4, 1, b"\x40\x01a\x7f" + b"\xa1\x1e" + b"b" * 4000 + b"\xbe" * 100),
        Code.COMPRESSION_ERROR,
    ),
    "an index of nothing": (frames.frame(HEADERS, 4, 1, b"\xff\x7f"), Code.COMPRESSION_ERROR),
    "a window of zero more": (frames.window_update(0, 0), Code.FLOW_CONTROL_ERROR),
    "a window beyond all": (frames.window_update(0, 2**31 - 1), Code.FLOW_CONTROL_ERROR),
    "a setting that ends early": (frames.frame(frames.SETTINGS, 0, 0, b"x"), Code.FRAME_SIZE_ERROR),
    "a ping of the wrong length": (frames.frame(frames.PING, 0, 0, b"x"), Code.FRAME_SIZE_ERROR),
    "a ping of a stream": (frames.frame(frames.PING, 0, 1, b"12345678"), Code.PROTOCOL_ERROR),
    "a push": (frames.frame(frames.PUSH_PROMISE, 4, 1, b"12345"), Code.PROTOCOL_ERROR),
}
"""Raw frames that violate the protocol, and the code with which the other end closes the connection."""

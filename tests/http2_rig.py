"""A server's end of an HTTP/2 connection in memory, with another implementation (h2) as its client."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.wrappers_pb2 import BytesValue
from grpclib.const import Status
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event

from skep.wire.http2.connection import Connection, Limits
from skep.wire.http2.stream import Stream

LIMITS = Limits(streams=3, stream_window=100_000, connection_window=250_000)
REQUEST = (
    *((":method", "POST"), (":scheme", "https"), (":path", "/a/B"), (":authority", "manager")),
    *(("content-type", "application/grpc"), ("te", "trailers"), ("grpc-timeout", "5S")),
)


class Wire(asyncio.Transport):
    """What the server writes; ``is_reading``: whether it reads."""

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
    """A server's connection with a client of h2 at its other end."""

    def __init__(self) -> None:
        self.calls: list[Stream] = []
        self.ended: list[int] = []
        self.connection = Connection(self._answer)
        self.wire = Wire()
        self.client = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.connection.begin(self.wire, LIMITS)
        self.client.initiate_connection()
        self.answer: Callable[[Stream], Awaitable[None]] = self.echo

    async def _answer(self, stream: Stream) -> None:
        self.calls.append(stream)
        try:
            await self.answer(stream)
        finally:
            self.ended.append(stream.id)

    async def echo(self, stream: Stream) -> None:
        while prefix := await stream.recv_data(5):
            await stream.send_message(
                BytesValue.FromString(await stream.recv_data(int.from_bytes(prefix[1:], "big")))
            )
        await stream.send_status(Status.OK)

    async def wait_for_nothing(self, stream: Stream) -> None:
        """A handler that neither reads nor answers."""
        await asyncio.Event().wait()

    async def turn(self) -> list[Event]:
        """Carry what either has to say until both are silent; gives what the client heard."""
        heard: list[Event] = []
        while True:
            if data := self.client.data_to_send():
                self.connection.data_received(data)
            for _ in range(5):
                await asyncio.sleep(0)
            said = bytes(self.wire.written)
            self.wire.written.clear()
            heard += self.client.receive_data(said) if said else []
            for event in heard:
                if isinstance(event, DataReceived) and event.flow_controlled_length:
                    self.client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    event.flow_controlled_length = 0
            if not said and not self.client.data_to_send():
                return heard

    def open(self, *, end: bool = False, **other: str) -> int:
        """Open a stream.  ``other``: headers that are not as in ``REQUEST``; their names without colon or hyphen."""
        stream_id = self.client.get_next_available_stream_id()
        headers = [(name, other.get(name.strip(":").replace("-", "_"), value)) for name, value in REQUEST]
        self.client.send_headers(stream_id, headers, end_stream=end)
        return stream_id

    def say(self, raw: bytes) -> None:
        """Send bytes that h2 would not."""
        self.connection.data_received(self.client.data_to_send() + raw)


def framed(value: bytes) -> bytes:
    message = BytesValue(value=value).SerializeToString()
    return b"\0" + len(message).to_bytes(4, "big") + message


def of(kind: type[Any], heard: list[Event]) -> list[Any]:
    return [event for event in heard if isinstance(event, kind)]

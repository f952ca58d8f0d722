"""The other process of ``bench.dispatching``: agents, each with a certificate, a TLS connection and three streams.

A load generator, so that the manager is measured and not this: the protocol is the real one, but each agent makes the
same four calls in the same order, so their headers are encoded once for all.
"""

import asyncio
import ssl
import sys
import time
from pathlib import Path

from hpack import Encoder

from bench.machine import resident_mib
from skep.aio import collector, http2, lean_tls
from skep.model.node import NodeDescription
from skep.model.task import TaskState, TaskStatus
from skep.security import keypair
from skep.security.tls import MANAGER_NAME, client_context
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.client import split_address
from skep.wire.convert.node import description_to_pb
from skep.wire.convert.task import status_to_pb

REGISTERING_AT_ONCE = 50
CONNECT_SECONDS_MAX = 60.0
WINDOW = 2**30
"""More than an agent is ever sent."""
CALLS = (methods.SESSION, methods.HEARTBEATS, methods.REVISED_ASSIGNMENTS, methods.UPDATE_TASK_STATUS)
SESSION, HEARTBEATS, ASSIGNMENTS, STATUS = 1, 3, 5, 7
"""Their streams: the order is part of the headers' encoding."""


async def run(directory: Path, address: str) -> None:
    """Do what standard input says, a word a line; each is answered with a figure (seconds, or MiB)."""
    lean_tls.make_lean()
    crowd = _Crowd(address, [client_context(keypair.load(path)) for path in sorted(directory.iterdir())])
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    collector.settle()
    print("ready", flush=True)
    while line := await reader.readline():
        began = time.monotonic()
        match line.decode().strip():
            case "register":
                await crowd.register()
            case "assigned":
                await crowd.assigned.wait()
            case "status":
                await crowd.report()
            case "memory":
                print(resident_mib(), flush=True)
                continue
            case "processor":
                print(time.process_time(), flush=True)
                continue
        print(time.monotonic() - began, flush=True)


class _Crowd:
    """All agents."""

    def __init__(self, address: str, contexts: list[ssl.SSLContext]) -> None:
        self._address = address
        self._contexts = contexts
        self._agents: list[_Agent] = []
        self._missing = len(contexts)
        self.assigned = asyncio.Event()
        """Every agent has its task."""
        encoder = Encoder()
        self.headers = [encoder.encode(_headers(address, method.path)) for method in CALLS]

    def note_assigned(self) -> None:
        self._missing -= 1
        if not self._missing:
            self.assigned.set()

    async def register(self) -> None:
        loop, turn = asyncio.get_running_loop(), asyncio.Semaphore(REGISTERING_AT_ONCE)
        host, port = split_address(self._address)

        async def one(tls: ssl.SSLContext) -> None:
            async with turn, asyncio.timeout(CONNECT_SECONDS_MAX):
                _, agent = await loop.create_connection(
                    lambda: _Agent(self), host, port, ssl=tls, server_hostname=MANAGER_NAME
                )
                self._agents.append(agent)
                await agent.registered

        await asyncio.gather(*map(one, self._contexts))

    async def report(self) -> None:
        await asyncio.gather(*[agent.report() for agent in self._agents])


def _headers(address: str, path: str) -> list[tuple[str, str]]:
    return [
        (":method", "POST"),
        (":scheme", "https"),
        (":path", path),
        (":authority", address),
        ("te", "trailers"),
        ("content-type", "application/grpc+proto"),
        ("user-agent", "bench"),
    ]


class _Agent(asyncio.Protocol):
    """One agent: registers when it is connected, then opens its other streams, and heartbeats as it is told to."""

    __slots__ = (
        "_assigned",
        "_crowd",
        "_messages",
        "_received",
        "_reported",
        "_session_id",
        "_transport",
        "registered",
    )

    def __init__(self, crowd: _Crowd) -> None:
        self._crowd = crowd
        self._received = b""
        self._messages: dict[int, bytes] = {}
        """Of each stream what has come of a message that is not complete."""
        loop = asyncio.get_running_loop()
        self.registered: asyncio.Future[None] = loop.create_future()
        self._reported: asyncio.Future[None] = loop.create_future()
        self._assigned = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        settings = http2.settings({http2.ENABLE_PUSH: 0, http2.INITIAL_WINDOW_SIZE: WINDOW})
        request = pb.SessionRequest(description=description_to_pb(NodeDescription(hostname="agent")))
        transport.write(
            http2.PREFACE
            + settings
            + http2.window_update(0, WINDOW)
            + self._call(SESSION, request.SerializeToString(), is_last=True)
        )

    def data_received(self, data: bytes) -> None:
        came, self._received = http2.split(self._received + data)
        for frame in came:
            if frame.kind == http2.SETTINGS and not frame.flags & http2.ACK:
                self._transport.write(http2.frame(http2.SETTINGS, http2.ACK, 0))
            elif frame.kind == http2.DATA:
                self._take(frame.stream_id, self._messages.pop(frame.stream_id, b"") + frame.payload)
            elif frame.kind == http2.HEADERS and frame.flags & http2.END_STREAM:
                self._end(frame)

    def _take(self, stream_id: int, data: bytes) -> None:
        while len(data) >= 5 and len(data) >= 5 + (size := int.from_bytes(data[1:5], "big")):
            self._hear(stream_id, data[5 : 5 + size])
            data = data[5 + size :]
        if data:
            self._messages[stream_id] = data

    def _hear(self, stream_id: int, message: bytes) -> None:
        if stream_id == SESSION and not self.registered.done():
            self._session_id = pb.SessionMessage.FromString(message).session_id
            assignments = pb.AssignmentsRequest(session_id=self._session_id).SerializeToString()
            self._transport.write(
                self._call(HEARTBEATS, self._heartbeat()) + self._call(ASSIGNMENTS, assignments, is_last=True)
            )
            self.registered.set_result(None)
        elif stream_id == HEARTBEATS:
            period = skep.HeartbeatPeriod.FromString(message).period
            wait_s = period.seconds + period.nanos / 1e9
            asyncio.get_running_loop().call_later(wait_s, self._beat)
        elif stream_id == ASSIGNMENTS and not self._assigned:
            for change in skep.RevisedAssignments.FromString(message).message.changes:
                self._assigned = change.assignment.task.id
                self._crowd.note_assigned()

    def _end(self, frame: http2.Frame) -> None:
        """A call has ended, which only that of the status may: well, if an answer came before."""
        assert frame.stream_id == STATUS, f"call {CALLS[frame.stream_id // 2].path} has ended"
        self._reported.set_result(None)

    async def report(self) -> None:
        """Say that the task runs; returns when the manager has answered."""
        status = status_to_pb(TaskStatus(state=TaskState.RUNNING, message="started"))
        update = pb.UpdateTaskStatusRequest.TaskStatusUpdate(task_id=self._assigned, status=status)
        request = pb.UpdateTaskStatusRequest(session_id=self._session_id, updates=[update])
        self._transport.write(self._call(STATUS, request.SerializeToString(), is_last=True))
        await self._reported

    def _beat(self) -> None:
        self._transport.write(_data(HEARTBEATS, self._heartbeat()))

    def _heartbeat(self) -> bytes:
        return skep.Heartbeat(session_id=self._session_id).SerializeToString()

    def _call(self, stream_id: int, message: bytes, *, is_last: bool = False) -> bytes:
        headers = self._crowd.headers[stream_id // 2]
        return http2.frame(http2.HEADERS, http2.END_HEADERS, stream_id, headers) + _data(
            stream_id, message, is_last=is_last
        )

    def connection_lost(self, exc: BaseException | None) -> None:
        for waiter in (self.registered, self._reported):
            if not waiter.done():
                waiter.set_exception(ConnectionResetError("the manager has closed the connection"))


def _data(stream_id: int, message: bytes, *, is_last: bool = False) -> bytes:
    framed = b"\0" + len(message).to_bytes(4, "big") + message
    return http2.frame(http2.DATA, http2.END_STREAM if is_last else 0, stream_id, framed)


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), sys.argv[2]))

"""The other process of ``bench.dispatching``: agents, each with a certificate, a TLS connection and three streams.

It must cost little, so that the manager is measured instead of this process.  The protocol is real, but each agent
makes the same calls in the same order, so their headers are encoded only once.
"""

import asyncio
import ssl
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hpack import Encoder

from bench.machine import resident_mib
from skep.aio.event_loop import gc_settings
from skep.model.node import NodeDescription
from skep.model.task import TaskState, TaskStatus
from skep.rpc import frames
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
"""Flow control window in bytes, larger than everything that an agent ever receives."""
CALLS = (methods.SESSION, methods.HEARTBEATS, methods.REVISED_ASSIGNMENTS, methods.UPDATE_TASK_STATUS)
SESSION, HEARTBEATS, ASSIGNMENTS, STATUS = 1, 3, 5, 7
"""Stream numbers of an agent's calls.  Their order is part of the headers' encoding.  Later streams report statuses."""
CLOSED = ConnectionResetError("the manager has closed the connection")
RUNS = TaskStatus(state=TaskState.RUNNING, message="started")


async def run(directory: Path, address: str) -> None:
    """Run commands from standard input, one word per line, and respond to each with a number (seconds, or MiB)."""
    crowd = _Patient(address, [client_context(keypair.load(path)) for path in sorted(directory.iterdir())])
    await obey(crowd)


async def obey(crowd: "Crowd") -> None:
    """Let ``crowd`` execute the commands from standard input."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    gc_settings.configure_gc()
    print("ready", flush=True)
    while line := await reader.readline():
        began = time.monotonic()
        figure = await crowd.obey(line.decode().strip())
        print(time.monotonic() - began if figure is None else figure, flush=True)


class Crowd:
    """All agents."""

    def __init__(self, address: str, contexts: Sequence[ssl.SSLContext]) -> None:
        self._address = address
        self._contexts = contexts
        self.agents: list[Agent] = []
        encoder = Encoder()
        calls = (
            *CALLS,
            CALLS[-1],
        )  # from the second call on, the headers are indices into the table
        self.headers = [encoder.encode(_headers(address, method.path)) for method in calls]

    def agent(self) -> "Agent":
        """Return a new agent."""
        raise NotImplementedError

    async def obey(self, word: str) -> float | None:
        """Run a command.  Return None if its duration is the result.  Raises: ValueError: unknown command."""
        match word:
            case "register":
                await self.register()
            case "memory":
                return resident_mib()
            case "processor":
                return time.process_time()
            case _:
                raise ValueError(word)
        return None

    async def register(self) -> None:
        """Connect all agents, some at a time, and return when each has its session."""
        turn = asyncio.Semaphore(REGISTERING_AT_ONCE)

        async def one(tls: ssl.SSLContext) -> None:
            async with turn:
                await self.connect(tls, self.agent)

        await asyncio.gather(*map(one, self._contexts))

    async def connect(self, tls: ssl.SSLContext, new: Callable[[], "Agent"]) -> None:
        """Return when the agent has its session.  Raises: OSError, TimeoutError."""
        host, port = split_address(self._address)
        async with asyncio.timeout(CONNECT_SECONDS_MAX):
            _, agent = await asyncio.get_running_loop().create_connection(
                new, host, port, ssl=tls, server_hostname=MANAGER_NAME
            )
            agent.tls = tls
            await agent.registered
            self.agents.append(agent)


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


class Agent(asyncio.Protocol):
    """One agent: it registers when connected, then opens its other streams, and sends heartbeats at the given
    period.
    """

    __slots__ = ("_crowd", "_messages", "_received", "_session_id", "_transport", "registered", "tls")

    tls: ssl.SSLContext

    description = NodeDescription(hostname="agent")

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._received = b""
        self._messages: dict[int, bytes] = {}
        """Incomplete message of each stream."""
        self.registered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take_assignments(self, message: pb.AssignmentsMessage) -> None:
        """Handle the assignments that the manager sent."""
        raise NotImplementedError

    def answered(self, stream_id: int) -> None:
        """Handle the end of a call with statuses."""
        raise NotImplementedError

    def ended(self, stream_id: int) -> None:
        """Handle the end of a call.  Only the call with statuses may end, after a response."""
        assert stream_id >= STATUS, f"call {CALLS[stream_id // 2].path} has ended"
        self.answered(stream_id)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        settings = frames.settings({frames.ENABLE_PUSH: 0, frames.INITIAL_WINDOW_SIZE: WINDOW})
        request = pb.SessionRequest(description=description_to_pb(self.description))
        transport.write(
            frames.PREFACE
            + settings
            + frames.window_update(0, WINDOW)
            + self._call(SESSION, request.SerializeToString(), is_last=True)
        )

    def data_received(self, data: bytes) -> None:
        came, self._received = frames.split(self._received + data)
        for frame in came:
            if frame.kind == frames.SETTINGS and not frame.flags & frames.ACK:
                self._transport.write(frames.frame(frames.SETTINGS, frames.ACK, 0))
            elif frame.kind == frames.DATA:
                self._take(frame.stream_id, self._messages.pop(frame.stream_id, b"") + frame.payload)
            elif frame.kind == frames.HEADERS and frame.flags & frames.END_STREAM:
                self.ended(frame.stream_id)

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
        elif stream_id == ASSIGNMENTS:
            self.take_assignments(skep.RevisedAssignments.FromString(message).message)

    def send_statuses(self, stream_id: int, states: Mapping[str, TaskStatus]) -> None:
        """Report to the manager, in a call on a new stream."""
        updates = [
            pb.UpdateTaskStatusRequest.TaskStatusUpdate(task_id=id, status=status_to_pb(status))
            for id, status in states.items()
        ]
        request = pb.UpdateTaskStatusRequest(session_id=self._session_id, updates=updates)
        self._transport.write(self._call(stream_id, request.SerializeToString(), is_last=True))

    def _beat(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(_data(HEARTBEATS, self._heartbeat()))

    def _heartbeat(self) -> bytes:
        return skep.Heartbeat(session_id=self._session_id).SerializeToString()

    def _call(self, stream_id: int, message: bytes, *, is_last: bool = False) -> bytes:
        headers = self._crowd.headers[min(stream_id // 2, len(self._crowd.headers) - 1)]
        return frames.frame(frames.HEADERS, frames.END_HEADERS, stream_id, headers) + _data(
            stream_id, message, is_last=is_last
        )

    def connection_lost(self, exc: BaseException | None) -> None:
        if not self.registered.done():
            self.registered.set_exception(CLOSED)


class _Patient(Crowd):
    """Agents that wait for a task each, and report it as running on command."""

    def __init__(self, address: str, contexts: Sequence[ssl.SSLContext]) -> None:
        super().__init__(address, contexts)
        self._missing = len(contexts)
        self._assigned = asyncio.Event()
        """Set when every agent has its task."""

    def agent(self) -> Agent:
        return _PatientAgent(self)

    def note_assigned(self) -> None:
        self._missing -= 1
        if not self._missing:
            self._assigned.set()

    async def obey(self, word: str) -> float | None:
        match word:
            case "assigned":
                await self._assigned.wait()
            case "status":
                await asyncio.gather(
                    *[agent.report() for agent in self.agents if isinstance(agent, _PatientAgent)]
                )
            case _:
                return await super().obey(word)
        return None


class _PatientAgent(Agent):
    __slots__ = ("_assigned", "_patients", "_reported")

    def __init__(self, patients: _Patient) -> None:
        super().__init__(patients)
        self._patients = patients
        self._reported: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._assigned = ""

    def take_assignments(self, message: pb.AssignmentsMessage) -> None:
        if self._assigned:
            return
        for change in message.changes:
            if change.assignment.HasField("task"):  # the same message has all objects that the task needs
                self._assigned = change.assignment.task.id
                self._patients.note_assigned()

    async def report(self) -> None:
        """Report that the task runs, and return when the manager has responded."""
        self.send_statuses(STATUS, {self._assigned: RUNS})
        await self._reported

    def answered(self, stream_id: int) -> None:
        self._reported.set_result(None)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        if not self._reported.done():
            self._reported.set_exception(CLOSED)


def _data(stream_id: int, message: bytes, *, is_last: bool = False) -> bytes:
    framed = b"\0" + len(message).to_bytes(4, "big") + message
    return frames.frame(frames.DATA, frames.END_STREAM if is_last else 0, stream_id, framed)


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), sys.argv[2]))

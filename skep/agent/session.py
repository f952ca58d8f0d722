"""One session with one manager: register, heartbeat, receive assignments, report, answer for logs.

A session ends when any part of it does; the agent then begins another one, with this manager or the next.  What
lies between sessions (statuses not delivered, the revision seen) is kept by the agent.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol, TypeAlias

import structlog
from google.protobuf.duration_pb2 import Duration

from skep.agent.assignments import AssignmentSink, LogSource
from skep.agent.path_stream import PathSource, PathStream
from skep.agent.publishing import LogPublisher
from skep.agent.reports import Reports
from skep.agent.revisions import Revision
from skep.agent.session_state import SessionState
from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.first import Overtaken, unless, wait_first
from skep.aio.groups import first_alone
from skep.aio.guard import persist
from skep.dataplane.tables.stream import TableSink, TableStream
from skep.errors import PermissionDenied, SkepError, Unavailable, Unimplemented
from skep.model.node import NodeDescription
from skep.model.times import SECOND_NS
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.client import Call, Channel
from skep.wire.convert.assignments import assignments_from_pb
from skep.wire.convert.node import description_to_pb
from skep.wire.convert.task import status_to_pb
from skep.wire.convert.values import duration_from_pb

log = structlog.get_logger(__name__)

FIRST_MESSAGE_SECONDS_MAX = 5.0
REPLY_SECONDS_MAX = 5.0
PERIOD_SECONDS_MIN = 0.05
PATIENCE_SLICES = 5
DESCRIPTION_CHECK_S = 10.0
STATUS_SECONDS_MAX = 15.0
"""A manager answers when a status is written, which takes until its store has a leader again."""


PART_RETRY_S_MAX = 5.0
STATUS_TRIES_MAX = 4
"""Until another manager is asked to write statuses: a short loss of quorum is no reason to leave one."""

Part: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


def unknown_load() -> None:
    """Of a node that does not measure its load."""


class SessionHost(Protocol):
    """What a session tells the agent around it."""

    def session_message(self, message: pb.SessionMessage) -> None:
        """The manager said who this node is, who the managers are, whom to trust."""

    def accept_revision(self, revision: Revision) -> None:
        """Raises: FailedPrecondition: older than what this node has seen."""

    def heard(self, asked_at: float) -> None:
        """The manager answered a heartbeat sent at ``asked_at`` (clock's monotonic time)."""

    def patience_s(self, period_s: float) -> float:
        """How long to wait for the answer to a heartbeat; ``period_s``: between two, 0 before the first."""

    @property
    def session_state(self) -> SessionState:
        """Where a planned stop is announced, and noted when the manager has heard of it."""


class Session:
    """Runs once."""

    def __init__(
        self,
        channel: Channel,
        host: SessionHost,
        sink: AssignmentSink,
        reports: Reports,
        logs: LogSource,
        clock: Clock,
        describe: Callable[[], NodeDescription],
        described_anew: asyncio.Event | None = None,
        load: Callable[[], float | None] = unknown_load,
        tables: TableSink | None = None,
        paths: PathSource | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """
        Args:
            described_anew: set when ``describe`` gives something else; it is looked at now and then anyway.
            load: the share of the node in use, 0 to 1, None while it is not known; told with each heartbeat.
            tables: takes what the manager says of networks; None: the node has none of its own.
            paths: probes other nodes; None: this node does not.
        """
        self._channel = channel
        self._host = host
        self._sink = sink
        self._reports = reports
        self._clock = clock
        self._describe = describe
        self._described_anew = described_anew or asyncio.Event()
        self._load = load
        self._chance = chance
        self._publisher = LogPublisher(channel, logs)
        self._tables = TableStream(channel, tables) if tables is not None else None
        self._paths = PathStream(channel, paths) if paths is not None else None
        self._id = ""
        self._described = NodeDescription()

    async def run(self) -> None:
        """Hold the session until it breaks.  Raises: SkepError: why."""
        with first_alone(SkepError):
            async with asyncio.TaskGroup() as group:
                group.create_task(self._hold(group), name="session")

    async def _hold(self, group: asyncio.TaskGroup) -> None:
        async with self._channel.stream(methods.SESSION) as call:
            self._described = self._describe()
            description = description_to_pb(self._described)
            await call.send(pb.SessionRequest(description=description), end=True)
            try:
                async with asyncio.timeout(FIRST_MESSAGE_SECONDS_MAX):
                    message = await call.receive()
            except TimeoutError as error:
                raise Unavailable(f"{self._channel.address} gave no session in time") from error
            if message is not None:
                self._id = message.session_id
                self._host.session_message(message)
                self._reports.report_again(self._sink.statuses())
                parts: dict[str, Part] = {
                    "heartbeats": self._heartbeats,
                    "assignments": self._assignments,
                    "reports": self._report,
                    "logs": self._publisher.run,
                    "description": self._watch_description,
                }
                if self._tables is not None:
                    parts["tables"] = partial(self._tables.run, self._id)
                if self._paths is not None:
                    parts["paths"] = partial(self._paths.run, self._id)
                for name, part in parts.items():
                    group.create_task(self._keep(name, part), name=f"session {name}")
                async for message in call:
                    self._host.session_message(message)
        raise Unavailable(f"{self._channel.address} ended the session")

    async def _keep(self, name: str, part: Part) -> None:
        """Run one part; a bug that it meets ends neither the session nor the other parts.

        Raises: SkepError: the session is over.
        """

        async def run() -> None:
            with first_alone(SkepError):
                await part()

        await persist(
            run,
            "part of the session failed",
            clock=self._clock,
            longest_s=PART_RETRY_S_MAX,
            chance=self._chance,
            passes=(SkepError,),
            part=name,
        )

    async def _watch_description(self) -> None:
        """Say anew what the node is when that has changed, within the session if the manager knows how."""
        while True:
            await wait_first(self._described_anew.wait(), self._clock.sleep(DESCRIPTION_CHECK_S))
            self._described_anew.clear()
            description = self._describe()
            if description == self._described:
                continue
            request = skep.DescribeRequest(session_id=self._id, description=description_to_pb(description))
            try:
                await self._channel.call(methods.DESCRIBE, request, timeout_s=STATUS_SECONDS_MAX)
            except Unimplemented as error:  # a Docker manager hears of it with a new session
                raise Unavailable("the node's description has changed") from error
            self._described = description

    # -- heartbeats -----------------------------------------------------------------------------------------------

    async def _heartbeats(self) -> None:
        try:
            await self._stream_heartbeats()
        except Unimplemented:  # a Docker manager
            await self._call_heartbeats()

    async def _stream_heartbeats(self) -> None:
        period_s = 0.0
        async with self._channel.stream(methods.HEARTBEATS) as call:
            while True:
                asked_at = self._clock.monotonic()
                is_away = self._host.session_state.is_stopping
                try:
                    reply = await unless(self._beat(call, is_away), self._lose_patience(period_s))
                except Overtaken as error:
                    raise Unavailable(f"{self._channel.address} is silent") from error
                if reply is None:
                    raise Unavailable(f"{self._channel.address} ended the heartbeats")
                self._host.heard(asked_at)
                if is_away:
                    self._host.session_state.stop_announced()
                    await asyncio.Event().wait()  # any further heartbeat would take it back
                period_s = _seconds(reply.period)
                await wait_first(self._clock.sleep(period_s), self._host.session_state.wait_stopping())

    async def _beat(
        self, call: Call[skep.Heartbeat, skep.HeartbeatPeriod], is_away: bool
    ) -> skep.HeartbeatPeriod | None:
        load = self._load()
        thousandths = round(1000 * load) if load is not None else None
        await call.send(skep.Heartbeat(session_id=self._id, away=is_away, load=thousandths))
        return await call.receive()

    async def _lose_patience(self, period_s: float) -> None:
        """Return when the answer to a heartbeat is overdue.

        In slices: while this process stood still, the manager was not silent.
        """
        slice_s = self._host.patience_s(period_s) / PATIENCE_SLICES
        for _ in range(PATIENCE_SLICES):
            await self._clock.sleep(slice_s)

    async def _call_heartbeats(self) -> None:
        while True:
            asked_at = self._clock.monotonic()
            reply = await self._channel.call(
                methods.HEARTBEAT, pb.HeartbeatRequest(session_id=self._id), timeout_s=REPLY_SECONDS_MAX
            )
            self._host.heard(asked_at)
            await self._clock.sleep(_seconds(reply.period))

    # -- assignments ----------------------------------------------------------------------------------------------

    async def _assignments(self) -> None:
        try:
            while True:
                await self._read_revised_assignments()
        except Unimplemented:  # a Docker manager
            while True:
                await self._read_assignments()

    async def _read_revised_assignments(self) -> None:
        applied = ""
        async with self._channel.stream(methods.REVISED_ASSIGNMENTS) as call:
            await call.send(pb.AssignmentsRequest(session_id=self._id), end=True)
            async for revised in call:
                if not _follows(revised.message, applied):
                    return
                self._host.accept_revision(Revision(revised.incarnation, revised.revision))
                await self._sink.assign(assignments_from_pb(revised.message, revised.revision))
                applied = revised.message.results_in
        raise Unavailable(f"{self._channel.address} ended the assignments")

    async def _read_assignments(self) -> None:
        applied = ""
        async with self._channel.stream(methods.ASSIGNMENTS) as call:
            await call.send(pb.AssignmentsRequest(session_id=self._id), end=True)
            async for message in call:
                if not _follows(message, applied):
                    return
                await self._sink.assign(assignments_from_pb(message))
                applied = message.results_in
        raise Unavailable(f"{self._channel.address} ended the assignments")

    # -- statuses -------------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        """One call at a time; meanwhile later statuses replace earlier ones."""
        backoff, failures = Backoff(0.5, 5.0, chance=self._chance), 0
        while True:
            batch = await self._reports.take()
            request = pb.UpdateTaskStatusRequest(
                session_id=self._id,
                updates=[
                    pb.UpdateTaskStatusRequest.TaskStatusUpdate(task_id=task_id, status=status_to_pb(status))
                    for task_id, status in batch.items()
                ],
            )
            try:
                await self._channel.call(methods.UPDATE_TASK_STATUS, request, timeout_s=STATUS_SECONDS_MAX)
            except PermissionDenied as error:
                # Kept, it would be refused again in every session.
                log.warning("statuses refused", tasks=sorted(batch), error=str(error))
            except Unavailable as error:
                self._reports.put_back(batch)
                failures += 1
                if failures >= STATUS_TRIES_MAX:
                    raise
                log.warning("statuses not written yet", tasks=len(batch), error=str(error))
                await backoff.sleep(self._clock)
            except BaseException:
                self._reports.put_back(batch)
                raise
            else:
                failures = 0
                backoff.reset()


def _seconds(period: Duration) -> float:
    """Between two heartbeats, as the manager wishes."""
    return max(duration_from_pb(period) / SECOND_NS, PERIOD_SECONDS_MIN)


def _follows(message: pb.AssignmentsMessage, applied: str) -> bool:
    """Whether ``message`` continues the chain that ``applied`` ended; if not, the stream is opened again."""
    if message.type == pb.AssignmentsMessage.COMPLETE or message.applies_to == applied:
        return True
    log.warning("assignments lost", expected=applied, got=message.applies_to)
    return False

"""One session with one manager: register, heartbeat, receive assignments, report statuses, publish logs.

A session ends when one of its parts ends.  The agent then starts another session with this or another manager.  The
agent keeps state between sessions: undelivered statuses, and the newest revision.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Protocol, TypeAlias

import msgspec
import structlog
from google.protobuf.duration_pb2 import Duration

from skep.agent.session.address_stream import AddressStream, HeldAddresses
from skep.agent.session.probe_stream import ProbeSource, ProbeStream
from skep.agent.session.reports import Reports
from skep.agent.session.revisions import SeenRevision
from skep.agent.session.session_state import SessionState
from skep.agent.session.table_stream import TableSink, TableStream
from skep.agent.session.wakes import HeldSource, WakeCalls
from skep.agent.tasks.publishing import LogPublisher, LogSource
from skep.agent.tunnels import TunnelHost
from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import retry
from skep.aio.groups import first_alone
from skep.aio.race import wait_first
from skep.errors import PermissionDenied, SkepError, Unavailable, Unimplemented
from skep.model.assignment import AssignmentSet
from skep.model.door.traffic import RouteTraffic
from skep.model.measures.readings import ServiceRequests
from skep.model.node import NodeDescription
from skep.model.node_reports.revisions import Revision
from skep.model.options.autoscaling import TaskUsage
from skep.model.options.slot_volumes import differ_beyond_slots
from skep.model.staging.updates import TaskRequests
from skep.model.task import TaskStatus
from skep.model.values.encoding import to_json
from skep.model.values.ids import ServiceId, TaskId, VolumeId
from skep.model.values.times import SECOND_NS
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.client import ManagerChannel, StreamCall
from skep.wire.convert.assignments import assignments_from_pb, revised_from_pb
from skep.wire.convert.node import description_to_pb
from skep.wire.convert.task import end_to_pb, status_to_pb
from skep.wire.convert.usages import (
    idle_to_pb,
    requests_to_pb,
    routes_to_pb,
    service_requests_to_pb,
    usages_to_pb,
)
from skep.wire.convert.values import duration_from_pb

log = structlog.get_logger(__name__)

FIRST_MESSAGE_SECONDS_MAX = 5.0
"""Seconds to wait for the manager to accept the session."""
REPLY_SECONDS_MAX = 5.0
"""Seconds to wait for a Docker manager's response to a heartbeat."""
PERIOD_SECONDS_MIN = 0.05
"""Shortest heartbeat period that this node uses.  A manager that sends zero would otherwise make it spin."""
TIMEOUT_SLICES = 5
"""Number of slices into which the wait for a heartbeat's response is split (``_wait_overdue``)."""
DESCRIPTION_CHECK_S = 10.0
"""Seconds between two comparisons of the node's description."""
SLOTS_BYTES_PER_S = 1024
"""Average bytes per second allowed for descriptions that differ only in the slots whose volumes are here.

A job that runs on many nodes each minute would otherwise fill the store's log with descriptions.
"""
REPORT_SECONDS_MAX = 15.0
"""Seconds to wait for the response to a report.

A manager responds after it has written the report, which may have to wait for the election of a leader.
"""


PART_RETRY_S_MAX = 5.0
"""Longest delay in seconds before a failed part of the session is repeated."""
VOLUME_REPORTS_MAX = 500
"""Limit for the number of volumes in one report."""
REPORT_TRIES_MAX = 4
"""Attempts to send a report before the node switches to another manager.

More than one, because a short loss of quorum is no reason to leave a manager.
"""

Part: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


def unknown_load() -> None:
    """Return None, on a node that does not measure its load."""


class AssignmentSink(Protocol):
    """Receives assignments and applies them (``agent/tasks/worker.py``)."""

    async def assign(self, change: AssignmentSet) -> None:
        """Apply ``change``.  Returns when it is accepted, not when its tasks run.  Calls do not overlap."""

    def statuses(self) -> Mapping[TaskId, TaskStatus]:
        """Return the current status of every known task.  The agent reports all of them in each new session."""


class VolumeSource(Protocol):
    """Reports which cluster volumes were unmounted (``agent/tasks/cluster_volumes.py``)."""

    async def take_reports(self) -> Sequence[VolumeId]:
        """Wait for volumes to report.  They are returned again until ``reported``."""

    def reported(self, ids: Iterable[VolumeId]) -> None:
        """Record that a manager has accepted the reports."""


class UsageSource(Protocol):
    """Measures the usage of tasks (``node/telemetry/task_usage.py``)."""

    def measure(self, task_ids: Sequence[TaskId]) -> None:
        """Measure these tasks from now on, and no others."""

    def present(self) -> Mapping[TaskId, TaskUsage]:
        """Return the latest usage of each measured task."""


class DoorSource(Protocol):
    """The requests over this node's front door (``dataplane.door.listener``).  All but ``held`` go with heartbeats."""

    @property
    def held(self) -> HeldSource:
        """Requests that are held for services without a task."""

    def requests(self) -> Mapping[TaskId, TaskRequests]:
        """Return the recent requests of new tasks in staged updates."""

    def recent_routes(self) -> Sequence[RouteTraffic]:
        """Return the recent requests by route."""

    def service_requests(self) -> Mapping[ServiceId, ServiceRequests]:
        """Return the recent requests of services that are autoscaled by them."""

    def idle(self) -> Mapping[ServiceId, float]:
        """Return the seconds without a request, by service."""


class NodeServices(msgspec.Struct, frozen=True, kw_only=True):
    """Parts of a node that its sessions deliver to and report from.

    Args:
        load: Returns which share of the node is in use (0 to 1), or None while unknown.  Sent with each heartbeat.
        tables: Receives the network tables, or None if the node has no cluster networks.
        probes: Probes other nodes, or None.
        seen: Newest revision of assignments.
        tunnels: Serves tunnels to this node's containers, or None.
        volumes: Reports unmounted cluster volumes, or None.
        usages: Measures tasks that a manager asks about, sent with each heartbeat, or None.
        addresses: Holds failover addresses, or None.
        door: This node's front door, or None.
        serve_images: Serves this node's images to other nodes until cancelled, or None.
    """

    sink: AssignmentSink
    reports: Reports
    logs: LogSource
    seen: SeenRevision
    load: Callable[[], float | None] = unknown_load
    tables: TableSink | None = None
    probes: ProbeSource | None = None
    tunnels: TunnelHost | None = None
    serve_images: Callable[[], Coroutine[Any, Any, None]] | None = None
    volumes: VolumeSource | None = None
    usages: UsageSource | None = None
    addresses: HeldAddresses | None = None
    door: DoorSource | None = None


class SessionHost(Protocol):
    """The agent's interface for its sessions."""

    def session_message(self, message: pb.SessionMessage) -> None:
        """Apply the manager's message with this node's role, the list of managers and the root certificates."""

    def accept_revision(self, revision: Revision) -> None:
        """Record the revision of a manager.

        Raises: FailedPrecondition: it is older than the newest revision that this node has seen.
        """

    def record_response(self, requested_at: float) -> None:
        """Record that the manager has responded to a heartbeat sent at ``requested_at`` (the clock's
        monotonic time).
        """

    def response_timeout_s(self, period_s: float) -> float:
        """Return how long to wait for the response to a heartbeat.

        ``period_s`` is the period of heartbeats, or 0 before the first one.
        """

    def connect(self, address: str, *, timeout_s: float) -> AbstractAsyncContextManager[ManagerChannel]:
        """Open one more connection to a manager, for streams that exceed the limit of the session's connection.

        Raises: Unavailable.
        """

    @property
    def session_state(self) -> SessionState:
        """State of this node's session, through which a planned stop is announced and confirmed."""


class ReportRetries:
    """Counts the retries of one kind of report (statuses, descriptions or volumes) that a manager could not write."""

    def __init__(self, what: str, clock: Clock, rng: Callable[[], float]) -> None:
        self._what = what
        self._clock = clock
        self._backoff = Backoff(0.5, 5.0, rng=rng)
        self._failures = 0

    async def wait_again(self, error: Unavailable) -> None:
        """Wait until the next attempt is due.  Raises: Unavailable: ``error`` itself, after too many attempts."""
        self._failures += 1
        if self._failures >= REPORT_TRIES_MAX:
            raise error
        log.warning("report not written, will retry", report=self._what, error=str(error))
        await self._backoff.sleep(self._clock)

    def written(self) -> None:
        """Record that a report was written.  The next report starts with all attempts."""
        self._failures = 0
        self._backoff.reset()


class ManagerSession:
    """One session.  Runs once."""

    def __init__(
        self,
        channel: ManagerChannel,
        host: SessionHost,
        services: NodeServices,
        clock: Clock,
        describe: Callable[[], NodeDescription],
        description_changed: asyncio.Event,
        rng: Callable[[], float],
    ) -> None:
        """
        Args:
            description_changed: Set when ``describe`` returns something else.  The description is also compared
                periodically.
            rng: Returns numbers from 0 to 1.
        """
        self._channel = channel
        self._host = host
        self._services = services
        self._clock = clock
        self._describe = describe
        self._description_changed = description_changed
        self._rng = rng
        self._publisher = LogPublisher(channel, services.logs, host.connect)
        self._tables = TableStream(channel, services.tables) if services.tables is not None else None
        self._probes = ProbeStream(channel, services.probes) if services.probes is not None else None
        self._id = ""
        self._described = NodeDescription()

    async def run(self) -> None:
        """Hold the session until it breaks.  Raises: SkepError: the reason."""
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
                raise Unavailable(f"{self._channel.address} did not accept a session in time") from error
            if message is not None:
                self._id = message.session_id
                self._host.session_message(message)
                self._services.reports.report_again(self._services.sink.statuses())
                for name, part in self._parts().items():
                    group.create_task(self._repeat(name, part), name=f"session {name}")
                async for message in call:
                    self._host.session_message(message)
        raise Unavailable(f"{self._channel.address} ended the session")

    def _parts(self) -> dict[str, Part]:
        parts: dict[str, Part] = {
            "heartbeats": self._heartbeats,
            "assignments": self._assignments,
            "reports": self._report,
            "logs": self._publisher.run,
            "description": self._watch_description,
        }
        if self._tables is not None:
            parts["tables"] = partial(self._run_if_implemented, "tables", self._tables.run)
        if self._probes is not None:
            parts["probes"] = partial(self._run_if_implemented, "probes", self._probes.run)
        if self._services.volumes is not None:
            report = partial(self._report_volumes, self._services.volumes)
            parts["volumes"] = partial(self._run_if_implemented, "volumes", report)
        if self._services.addresses is not None:
            addresses = AddressStream(self._channel, self._services.addresses, self._clock)
            parts["addresses"] = partial(self._run_if_implemented, "addresses", addresses.run)
        if self._services.door is not None:
            wakes = WakeCalls(self._channel, self._services.door.held, self._clock, self._rng)
            parts["wakes"] = partial(self._run_if_implemented, "wakes", wakes.run)
        if self._services.tunnels is not None:
            orders = partial(self._services.tunnels.receive_orders, self._channel)
            parts["tunnels"] = partial(self._run_if_implemented, "tunnels", orders)
        return parts

    async def _run_if_implemented(self, name: str, run: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        """Run a stream that Docker managers and earlier versions lack.  The session continues without it."""
        try:
            with first_alone(SkepError):
                await run(self._id)
        except Unimplemented as error:
            log.info(
                "not implemented by this manager",
                manager=self._channel.address,
                stream=name,
                reason=str(error),
            )

    async def _repeat(self, name: str, part: Part) -> None:
        """Run one part, and run it again after an unexpected error, which does not affect the session's other parts.

        Raises:
            SkepError: The session is over.
        """

        async def run() -> None:
            with first_alone(SkepError):
                await part()

        await retry(
            run,
            "part of the session failed",
            clock=self._clock,
            longest_s=PART_RETRY_S_MAX,
            rng=self._rng,
            passes=(SkepError,),
            part=name,
        )

    async def _watch_description(self) -> None:
        """Send the node's description whenever it changes.  Within the session, if the manager supports that."""
        retries = ReportRetries("description", self._clock, self._rng)
        slots_from = self._slots_due_at(self._described)
        while True:
            await wait_first(self._description_changed.wait(), self._clock.sleep(DESCRIPTION_CHECK_S))
            self._description_changed.clear()
            description = self._describe()
            is_slots_alone = not differ_beyond_slots(description, self._described)
            if description == self._described or (is_slots_alone and self._clock.monotonic() < slots_from):
                continue
            request = skep.DescribeRequest(session_id=self._id, description=description_to_pb(description))
            try:
                await self._channel.call(methods.DESCRIBE, request, timeout_s=REPORT_SECONDS_MAX)
            except Unimplemented as error:  # a Docker manager only accepts it with a new session
                raise Unavailable("the node's description has changed") from error
            except Unavailable as error:
                await retries.wait_again(error)
                self._description_changed.set()
                continue
            retries.written()
            self._described = description
            slots_from = self._slots_due_at(description)

    def _slots_due_at(self, sent: NodeDescription) -> float:
        """Return when a description may be sent that differs from ``sent`` only in its slots."""
        wait_s = len(to_json(sent)) / SLOTS_BYTES_PER_S
        return self._clock.monotonic() + max(wait_s, DESCRIPTION_CHECK_S)

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
                sent_at = self._clock.monotonic()
                is_stopping = self._host.session_state.is_stopping
                try:
                    async with self._overdue(period_s):
                        reply = await self._beat(call, is_stopping)
                except TimeoutError as error:
                    raise Unavailable(f"{self._channel.address} is silent") from error
                if reply is None:
                    raise Unavailable(f"{self._channel.address} ended the heartbeats")
                self._host.record_response(sent_at)
                if is_stopping:
                    self._host.session_state.stop_announced()
                    await asyncio.Event().wait()  # a further heartbeat would revoke the announcement
                period_s = _seconds(reply.period)
                await self._host.session_state.is_stopping_within(period_s)

    async def _beat(
        self, call: StreamCall[skep.Heartbeat, skep.HeartbeatPeriod], is_stopping: bool
    ) -> skep.HeartbeatPeriod | None:
        load = self._services.load()
        thousandths = round(1000 * load) if load is not None else None
        usages = self._services.usages
        used = usages_to_pb(usages.present()) if usages is not None else ()
        beat = skep.Heartbeat(session_id=self._id, away=is_stopping, load=thousandths, usages=used)
        if (door := self._services.door) is not None:
            beat.requests.extend(requests_to_pb(door.requests()))
            beat.routes.extend(routes_to_pb(door.recent_routes()))
            beat.service_requests.extend(service_requests_to_pb(door.service_requests()))
            beat.idle.extend(idle_to_pb(door.idle()))
        await call.send(beat)
        reply = await call.receive()
        if usages is not None and reply is not None:
            usages.measure([TaskId(id) for id in reply.measured])
        return reply

    @asynccontextmanager
    async def _overdue(self, period_s: float) -> AsyncIterator[None]:
        """Raise TimeoutError when the response to a heartbeat is overdue.

        The wait is split into slices.  If this process stands still for a while, only one slice expires, so the pause
        does not count as silence of the manager.
        """
        slice_s = self._host.response_timeout_s(period_s) / TIMEOUT_SLICES
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None

        def expire(left: int) -> None:
            nonlocal timer
            if left:
                timer = loop.call_later(slice_s, expire, left - 1)
            else:
                timeout.reschedule(loop.time())

        async with asyncio.timeout(None) as timeout:
            expire(TIMEOUT_SLICES)
            try:
                yield
            finally:
                if timer is not None:
                    timer.cancel()

    async def _call_heartbeats(self) -> None:
        while True:
            sent_at = self._clock.monotonic()
            reply = await self._channel.call(
                methods.HEARTBEAT, pb.HeartbeatRequest(session_id=self._id), timeout_s=REPLY_SECONDS_MAX
            )
            self._host.record_response(sent_at)
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
                await self._services.sink.assign(revised_from_pb(revised))
                applied = revised.message.results_in
        raise Unavailable(
            f"the manager {self._channel.address} ended the stream of assignments: the node reconnects by itself"
        )

    async def _read_assignments(self) -> None:
        applied = ""
        async with self._channel.stream(methods.ASSIGNMENTS) as call:
            await call.send(pb.AssignmentsRequest(session_id=self._id), end=True)
            async for message in call:
                if not _follows(message, applied):
                    return
                await self._services.sink.assign(assignments_from_pb(message))
                applied = message.results_in
        raise Unavailable(
            f"the manager {self._channel.address} ended the stream of assignments: the node reconnects by itself"
        )

    # -- statuses -------------------------------------------------------------------------------------------------

    async def _send_statuses(
        self, request: pb.UpdateTaskStatusRequest, ends: Mapping[str, skep.TaskEnd]
    ) -> None:
        """Send statuses, with the reasons of tasks' ends if the manager accepts them."""
        if ends:
            reported = skep.ReportedStatuses(request=request, ends=ends)
            try:
                await self._channel.call(methods.REPORT_STATUSES, reported, timeout_s=REPORT_SECONDS_MAX)
            except Unimplemented:  # a Docker manager, or one of an earlier version
                pass
            else:
                return
        await self._channel.call(methods.UPDATE_TASK_STATUS, request, timeout_s=REPORT_SECONDS_MAX)

    async def _report(self) -> None:
        """Send statuses, one call at a time.  During a call, later statuses replace queued earlier ones."""
        retries = ReportRetries("statuses", self._clock, self._rng)
        while True:
            batch = await self._services.reports.take()
            request = pb.UpdateTaskStatusRequest(
                session_id=self._id,
                updates=[
                    pb.UpdateTaskStatusRequest.TaskStatusUpdate(task_id=task_id, status=status_to_pb(status))
                    for task_id, status in batch.items()
                ],
            )
            ends = {str(id): end_to_pb(status.end) for id, status in batch.items() if status.end is not None}
            try:
                await self._send_statuses(request, ends)
            except PermissionDenied as error:
                # it would be refused again in every session
                log.warning("statuses refused", tasks=sorted(batch), error=str(error))
            except Unavailable as error:
                self._services.reports.put_back(batch)
                await retries.wait_again(error)
            except BaseException:
                self._services.reports.put_back(batch)
                raise
            else:
                retries.written()

    async def _report_volumes(self, volumes: VolumeSource, session_id: str) -> None:
        """Report unmounted volumes.  Reports that a manager does not write are sent to the next one."""
        retries = ReportRetries("volumes", self._clock, self._rng)
        while True:
            ids = await volumes.take_reports()
            updates = [
                pb.UpdateVolumeStatusRequest.VolumeStatusUpdate(id=id, unpublished=True)
                for id in ids[:VOLUME_REPORTS_MAX]
            ]
            request = pb.UpdateVolumeStatusRequest(session_id=session_id, updates=updates)
            try:
                await self._channel.call(methods.UPDATE_VOLUME_STATUS, request, timeout_s=REPORT_SECONDS_MAX)
            except Unavailable as error:
                await retries.wait_again(error)
                continue
            retries.written()
            volumes.reported(ids[:VOLUME_REPORTS_MAX])


def _seconds(period: Duration) -> float:
    """Return the period of heartbeats that the manager has set, in seconds."""
    return max(duration_from_pb(period) / SECOND_NS, PERIOD_SECONDS_MIN)


def _follows(message: pb.AssignmentsMessage, applied: str) -> bool:
    """Return whether ``message`` follows directly on the message ``applied``.  If not, the stream is opened again."""
    if message.type == pb.AssignmentsMessage.COMPLETE or message.applies_to == applied:
        return True
    log.warning("assignments lost", expected=applied, got=message.applies_to)
    return False

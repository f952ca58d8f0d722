"""Reports of nodes about their tasks, volumes and themselves, written before they are acknowledged."""

from collections.abc import Sequence

from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.cluster import known_cluster
from skep.manager.dispatcher.node_sessions.registration import RegistrationRate, describe_node
from skep.manager.dispatcher.node_sessions.sessions import Sessions
from skep.manager.dispatcher.repeated_reports import RepeatedReports
from skep.manager.dispatcher.statuses import StatusReport, bounded, record_status, record_unpublished
from skep.model.options.labels import last_lines
from skep.model.task import TaskState, TaskStatus
from skep.model.task_end import LAST_LINES_MAX
from skep.model.values.ids import TaskId, VolumeId
from skep.store.interface import Store
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.convert.node import description_from_pb
from skep.wire.convert.task import end_from_pb, status_from_pb
from skep.wire.service import Handler, unary


class NodeReports:
    """Writes what nodes with a session here report."""

    def __init__(self, store: Store, sessions: Sessions, clock: Clock) -> None:
        self._store = store
        self._sessions = sessions
        self._clock = clock
        self._description_rate = RegistrationRate()
        self.repeats = RepeatedReports(store, sessions.live, clock)

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (
            unary(methods.UPDATE_TASK_STATUS, self._update_task_status),
            unary(methods.REPORT_STATUSES, self._report_statuses),
            unary(methods.UPDATE_VOLUME_STATUS, self._update_volume_status),
            unary(methods.DESCRIBE, self._describe),
        )

    async def run(self) -> None:
        """Write delayed reports until cancelled."""
        await self.repeats.run()

    async def _update_task_status(
        self, request: pb.UpdateTaskStatusRequest, caller: Caller
    ) -> pb.UpdateTaskStatusResponse:
        return await self._report_statuses(skep.ReportedStatuses(request=request), caller)

    async def _report_statuses(
        self, reported: skep.ReportedStatuses, caller: Caller
    ) -> pb.UpdateTaskStatusResponse:
        """Write statuses, then respond: a node sends unacknowledged reports again.

        Too frequent repetitions of a state are written later (``RepeatedReports``).
        """
        request = reported.request
        session = self._sessions.require(caller.node_id, request.session_id)
        reports = {
            update.task_id: StatusReport(
                node_id=session.node_id,
                session_id=session.id,
                task_id=TaskId(update.task_id),
                status=bounded(_status_of(reported, update), self._last_lines_max()),
            )
            for update in request.updates
        }
        for result in await self._store.update_each(record_status, self.repeats.due(reports.values())):
            if isinstance(result, SkepError):
                raise result
        return pb.UpdateTaskStatusResponse()

    async def _update_volume_status(
        self, request: pb.UpdateVolumeStatusRequest, caller: Caller
    ) -> pb.UpdateVolumeStatusResponse:
        """Write the node's report about volumes, then respond."""
        session = self._sessions.require(caller.node_id, request.session_id)
        ids = [VolumeId(update.id) for update in request.updates if update.unpublished]
        reports = [(session.node_id, session.id, id) for id in sorted(set(ids))]
        for result in await self._store.update_each(record_unpublished, reports):
            if isinstance(result, SkepError):
                raise result
        return pb.UpdateVolumeStatusResponse()

    def _last_lines_max(self) -> int:
        swarm = known_cluster(self._store.view())
        return last_lines(swarm.spec.labels) if swarm is not None else LAST_LINES_MAX

    async def _describe(self, request: skep.DescribeRequest, caller: Caller) -> skep.DescribeResponse:
        """Write the changed certificate, trusted roots or resources of a node."""
        session = self._sessions.require(caller.node_id, request.session_id)
        self._description_rate.note(session.node_id, self._clock.monotonic())
        description = description_from_pb(request.description)
        await self._store.update(describe_node, session.node_id, session.id, description)
        return skep.DescribeResponse()


def _status_of(
    reported: skep.ReportedStatuses, update: pb.UpdateTaskStatusRequest.TaskStatusUpdate
) -> TaskStatus:
    status = status_from_pb(update.status)
    if status.state < TaskState.RUNNING or update.task_id not in reported.ends:
        return status
    return replace(status, end=end_from_pb(reported.ends[update.task_id]))

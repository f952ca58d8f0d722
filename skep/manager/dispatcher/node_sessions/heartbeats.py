"""Receives the heartbeats of nodes and answers each with the period until the next one."""

from collections.abc import AsyncIterator, Sequence

from skep.manager.dispatcher.loads import load_from_heartbeat
from skep.manager.dispatcher.node_sessions.heartbeat_deadlines import HeartbeatDeadlines
from skep.model.values.times import SECOND_NS
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.convert.usages import usages_from_pb
from skep.wire.convert.values import duration_to_pb
from skep.wire.service import Handler, both_stream, unary


class Heartbeats:
    """Heartbeats of Docker's engines, one call each, and of Skep nodes, on a stream with their load and usage."""

    def __init__(self, deadlines: HeartbeatDeadlines) -> None:
        self._deadlines = deadlines

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return unary(methods.HEARTBEAT, self._heartbeat), both_stream(methods.HEARTBEATS, self._heartbeats)

    async def _heartbeat(self, request: pb.HeartbeatRequest, caller: Caller) -> pb.HeartbeatResponse:
        session = self._deadlines.sessions.require(caller.node_id, request.session_id)
        period_s = self._deadlines.record_heartbeat(session)
        return pb.HeartbeatResponse(period=duration_to_pb(int(period_s * SECOND_NS)))

    async def _heartbeats(
        self, requests: AsyncIterator[skep.Heartbeat], caller: Caller
    ) -> AsyncIterator[skep.HeartbeatPeriod]:
        session = None
        try:
            async for request in requests:
                session = self._deadlines.sessions.require(caller.node_id, request.session_id)
                session.is_skep = True
                if request.HasField("load"):
                    session.load = load_from_heartbeat(request.load)
                if request.usages or session.usages:
                    session.usages = usages_from_pb(request.usages, frozenset(session.measured))
                period_s = self._deadlines.record_heartbeat(session, is_away=request.away)
                yield skep.HeartbeatPeriod(
                    period=duration_to_pb(int(period_s * SECOND_NS)), measured=session.measured
                )
                del request
        finally:
            if session is not None and caller.has_crashed():
                self._deadlines.extend_after_crash(session)

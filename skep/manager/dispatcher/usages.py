"""Load of autoscaled services, as nodes with a session here report it.  In memory only.

Only nodes on which a task of the front door runs are believed about requests over it.

The response to a heartbeat names the tasks to measure, and the next heartbeat has their usage: nothing is measured or
sent for other services.  The last report of a session counts until the session ends, which is soon after a node has
become silent.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence

from skep.aio.clock import Clock, tick
from skep.aio.time_slices import TimeSlices
from skep.manager.control_loops.informer import run_informer
from skep.manager.dispatcher.node_sessions.sessions import LiveSession, Sessions
from skep.manager.services.routes import proxies_in
from skep.model.door.settings import is_door
from skep.model.door.traffic import REPORTED_MAX, RouteTraffic, added
from skep.model.measures.readings import QueryAnswer, ServiceRequests
from skep.model.options.autoscaling import TaskUsage, autoscaling_of
from skep.model.service import Service
from skep.model.staging.updates import TaskRequests
from skep.model.task import Task
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.store.interface import Commit, Created, Deleted, Store, Updated, View
from skep.store.transactions.updates import batched
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.convert.usages import (
    answers_to_pb,
    idle_to_pb,
    requests_to_pb,
    routes_to_pb,
    service_requests_to_pb,
    usages_to_pb,
)
from skep.wire.service import Handler, server_stream

CHECK_S = 2.0
"""Seconds between updates of the tasks to measure."""
MEASURED_MAX = 1000
"""Maximum measured tasks of one node, so that their report fits into a heartbeat.  Others count as not measured."""
IDLE_S_MAX = 7.0
"""Seconds for which a report of idle times counts.  A request after the report does not keep the last task.  With the
age of the node's reading and the time for its collection, a report is younger than the shortest ``idle-after``.
"""
_PIECE = 1000
"""Usages in one message to another manager."""


class MeasuredTasks:
    """Keeps each session's list of tasks to measure.  Their usage is in the session."""

    def __init__(self, store: Store, sessions: Sessions, clock: Clock) -> None:
        self._store = store
        self._sessions = sessions
        self._clock = clock
        self._services: set[ServiceId] = set()
        self.doors: set[ServiceId] = set()
        """Services of the front door."""
        self.answers: Mapping[ServiceId, Mapping[str, QueryAnswer]] = {}
        """Answers to queries.  The autoscaling of this manager sets them while it leads."""

    def publish(self, answers: Mapping[ServiceId, Mapping[str, QueryAnswer]]) -> None:
        """Show the answers to other managers, which explain services to their users."""
        self.answers = answers

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (server_stream(methods.COLLECT_USAGES, self._collect),)

    def present(self) -> dict[TaskId, TaskUsage]:
        """Return the usage reported by nodes with a session here."""
        return {id: usage for session in self._sessions.all() for id, usage in session.usages.items()}

    def requests(self) -> dict[TaskId, TaskRequests]:
        """Return the requests of new tasks, as proxies with a session here report them."""
        found: dict[TaskId, TaskRequests] = {}
        for session in self._proxies():
            for id, one in session.requests.items():
                found[id] = found.get(id, TaskRequests()) + one
        return found

    def routes(self) -> list[RouteTraffic]:
        """Return the requests by route, as proxies with a session here report them."""
        return list(added(one for session in self._proxies() for one in session.routes))

    def _proxies(self) -> list[LiveSession]:
        """Return the sessions of nodes on which a task of the front door runs."""
        nodes = proxies_in(self._store.view(), self.doors)
        return [session for session in self._sessions.all() if session.node_id in nodes]

    def service_requests(self) -> dict[ServiceId, dict[NodeId, ServiceRequests]]:
        """Return the requests of services, as proxies with a session here report them."""
        found: defaultdict[ServiceId, dict[NodeId, ServiceRequests]] = defaultdict(dict)
        for session in self._proxies():
            for id, one in session.service_requests.items():
                found[id][session.node_id] = one
        return dict(found)

    def idle(self) -> dict[NodeId, Mapping[ServiceId, float]]:
        """Return the idle times that nodes with a session here have reported just now."""
        since = self._clock.monotonic() - IDLE_S_MAX
        return {
            session.node_id: session.idle
            for session in self._sessions.all()
            if session.idle and session.idle_at >= since
        }

    async def run(self) -> None:
        """Keep the lists until cancelled."""
        await run_informer(
            self._store,
            (Service,),
            on_snapshot=self._on_snapshot,
            on_commit=self._on_commit,
            work=self._work,
        )

    def _on_snapshot(self, view: View) -> None:
        self._services.clear()
        self.doors.clear()
        for service in view.find(Service):
            self._note(service)

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Service() as service) | Updated(_, Service() as service):
                    self._note(service)
                case Deleted(Service() as service):
                    self._services.discard(service.id)
                    self.doors.discard(service.id)

    def _note(self, service: Service) -> None:
        for found, is_one in ((self._services, _is_measured(service)), (self.doors, _is_door(service))):
            (found.add if is_one else found.discard)(service.id)

    async def _work(self) -> None:
        was_any = True  # sessions may have lists of services that an earlier run knew
        while True:
            if self._services or was_any:
                await self._update()
            was_any = bool(self._services)
            await tick(self._clock, CHECK_S)

    async def _update(self) -> None:
        view, slices = self._store.view(), TimeSlices(self._clock)
        tasks: defaultdict[NodeId, list[TaskId]] = defaultdict(list)
        for id in sorted(self._services):
            for task in view.find(Task, service_id=id):
                if task.node_id and task.is_active:
                    tasks[task.node_id].append(task.id)
            if await slices.yield_if_due():
                view = self._store.view()
        for session in self._sessions.all():
            session.measured = tuple(tasks.get(session.node_id, ())[:MEASURED_MAX])

    async def _collect(self, _: skep.CollectUsagesRequest, caller: Caller) -> AsyncIterator[skep.TaskUsages]:
        present = self.present()
        for ids in batched(list(present), _PIECE):
            yield skep.TaskUsages(usages=usages_to_pb({id: present[id] for id in ids}))
        requests = self.requests()
        for ids in batched(list(requests), _PIECE):
            yield skep.TaskUsages(requests=requests_to_pb({id: requests[id] for id in ids}))
        for routes in batched(self.routes(), REPORTED_MAX):
            yield skep.TaskUsages(routes=routes_to_pb(routes))
        for session in self._proxies():
            if session.service_requests:
                counted = service_requests_to_pb(session.service_requests, session.node_id)
                yield skep.TaskUsages(service_requests=counted)
        for answers in batched(answers_to_pb(self.answers), _PIECE):
            yield skep.TaskUsages(answers=answers)
        for node_id, idle in self.idle().items():
            yield skep.TaskUsages(idle=idle_to_pb(idle, node_id))


def _is_measured(service: Service) -> bool:
    return service.removed_at is None and autoscaling_of(service.spec.labels) is not None


def _is_door(service: Service) -> bool:
    return service.removed_at is None and is_door(service.spec.labels)

"""The allocator's loop: gives services their endpoints, then lets their tasks go from NEW to PENDING."""

from random import Random

import structlog
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.errors import SkepError, Unavailable
from skep.manager.agenda import Agenda
from skep.manager.allocator.attachments import Attached, NotAttached, attachments_for
from skep.manager.allocator.grants import Explain, GiveEndpoint, Grant, Release, apply, service_of
from skep.manager.allocator.ports import PortBook, endpoint_for
from skep.manager.follow import State, follow
from skep.manager.guard import Guard, contained
from skep.model.ids import IdSource, ServiceId, TaskId
from skep.model.network import Network
from skep.model.service import Service, ServiceSpec
from skep.model.task import Task, TaskState
from skep.model.times import timestamp
from skep.store.interface import Commit, Created, Deleted, NotLeader, Transaction, Updated, View
from skep.store.kinds import SpecVersion, spec_version_id

log = structlog.get_logger()

BATCH = 500
"""Services looked at before their changes are committed together."""
RETRY_S = 0.5
"""Until the next attempt when the store did not take a change (jittered)."""


class Allocator:
    """Gives services their published ports, and tasks what they need before they can be placed."""

    def __init__(self, term: State, clock: Clock, new_id: IdSource, random: Random) -> None:
        self._term = term
        self._clock = clock
        self._random = random
        self._agenda: Agenda[ServiceId] = Agenda(clock)
        self._guard = Guard(clock, random)
        self._ports = PortBook()
        self._new: dict[ServiceId, dict[TaskId, None]] = {}
        """Tasks not yet released, by service: work is in proportion to them, not to what the service has."""

    async def run(self) -> None:
        """Allocate until cancelled.  Runs on the leader only."""
        kinds = (Service, Task, Network)
        await follow(self._term, kinds, start=self._start, note=self._note, work=self._work)

    def _start(self, snapshot: View) -> None:
        self._ports = PortBook()
        self._new.clear()
        for service in snapshot.find(Service):
            self._ports.enter(service)
            self._agenda.add((service.id,))
        for task in snapshot.find(Task):
            self._note_task(task)

    def _note(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Service() as service) | Updated(_, Service() as service):
                    self._ports.enter(service)
                    self._agenda.add((service.id,))
                case Deleted(Service() as service):
                    self._ports.leave(service.id)
                    self._new.pop(service.id, None)
                    self._guard.forget(service.id)
                    self._guard.forget(f"tasks of {service.id}")
                case Created(Task() as task):
                    self._note_task(task)
                case Created(Network()) | Updated(_, Network()):
                    self._agenda.add(self._new)  # those that wait for a network may be among them

    def _note_task(self, task: Task) -> None:
        if task.service_id and _is_new(task):
            self._new.setdefault(task.service_id, {})[task.id] = None
            self._agenda.add((task.service_id,))

    async def _work(self) -> None:
        while True:
            service_ids = await self._agenda.take(BATCH)
            await self._commit([grant for id in service_ids for grant in self._endpoints(id)])
            await self._commit([grant for id in service_ids for grant in self._releases(id)])

    # -- deciding ----------------------------------------------------------------------------------------------

    def _endpoints(self, service_id: ServiceId) -> list[Grant]:
        """The endpoint of a service, where it is not what it should be."""
        service = self._term.view().lookup(Service, service_id)
        if service is None or service.removed_at is not None:
            return []
        with self._guard.guarded(service_id):
            endpoint = endpoint_for(service, self._ports.is_free_for(service_id))
            if endpoint != service.endpoint:
                # Entered at once, so that the next service of this batch gets another number.
                self._ports.enter(replace(service, endpoint=endpoint))
                return [GiveEndpoint(service, endpoint)]
        return []

    def _releases(self, service_id: ServiceId) -> list[Grant]:
        """What becomes of the service's new tasks: on to the scheduler, or a reason to wait."""
        grants: list[Grant] = []
        key = f"tasks of {service_id}"
        with self._guard.guarded(key):
            view = self._term.view()
            tasks = self._new_tasks(view, service_id)
            if (trouble := self._guard.trouble(service_id)) is not None:
                reason = f"allocation failed: {trouble.error}"
                grants = [Explain(task, reason) for task in tasks]
            else:
                grants = [self._release(view, task) for task in tasks]
        for trouble in (self._guard.trouble(service_id), self._guard.trouble(key)):
            if trouble is not None:
                self._agenda.add_at(service_id, trouble.retry_at)
        return grants

    def _new_tasks(self, view: View, service_id: ServiceId) -> list[Task]:
        """The service's tasks that are still NEW; the others are forgotten."""
        found = [view.lookup(Task, id) for id in self._new.pop(service_id, ())]
        tasks = [task for task in found if task is not None and _is_new(task)]
        if tasks:
            self._new[service_id] = {task.id: None for task in tasks}
        return tasks

    def _release(self, view: View, task: Task) -> Grant:
        spec = _spec_of(view, task)
        match attachments_for(spec, lambda network_id: view.lookup(Network, network_id)):
            case Attached(attachments):
                return Release(task, attachments)
            case NotAttached(reason):
                return Explain(task, reason)

    # -- writing -----------------------------------------------------------------------------------------------

    async def _commit(self, grants: list[Grant]) -> None:
        """Write the grants, each a transaction of its own, in as few raft entries as possible."""
        if not grants:
            return
        now = timestamp(self._clock.now_ns())

        def write(tx: Transaction, grant: Grant) -> None:
            apply(tx, grant, now)

        try:
            results = await self._term.update_each(contained(write), grants)
        except NotLeader:
            raise
        except Unavailable as error:
            results = [error] * len(grants)
        for grant, result in zip(grants, results, strict=True):
            if isinstance(result, NotLeader):
                raise result
            if isinstance(result, SkepError):
                log.warning("allocation not written, trying again", reason=str(result))
                delay_s = RETRY_S * self._random.uniform(0.5, 1.0)
                self._agenda.add_at(service_of(grant), self._clock.monotonic() + delay_s)


def _is_new(task: Task) -> bool:
    return task.status.state is TaskState.NEW and task.is_wanted


def _spec_of(view: View, task: Task) -> ServiceSpec:
    """The spec that the task was made from; the task's own template when that is no longer kept."""
    if task.spec_version is not None:
        version = view.lookup(SpecVersion, spec_version_id(task.service_id, task.spec_version))
        if version is not None:
            return version.spec
    return ServiceSpec(task_template=task.spec)

"""State of the loop for certificates: when the next step is due."""

from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Final

from skep.aio.clock import Clock
from skep.manager.acme.own_certificates import secrets_of_hosts
from skep.manager.acme.records import ACCOUNT_ID, account_in, locked_names, record_id, records_in
from skep.manager.acme.steps import PUBLISH_S, Step, WaitUntil, Wanted, next_step
from skep.manager.control_loops.failures import Failures
from skep.manager.control_loops.work_queue import WorkQueue
from skep.manager.services.routes import claimant_of, exposed, runs_a_proxy
from skep.model.door.claims import settled
from skep.model.door.settings import is_door
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.times import SECOND_NS
from skep.store.interface import Commit, Created, Deleted, Updated, View
from skep.store.kinds import Payload

WATCHED = (Service, Payload, Task, Node)
STEP: Final = "step"
"""The only key: one step follows the other."""
GATHER_S = 1.0
"""Seconds from a change of a service until the names are read.  A deploy changes many services within a second."""
LONGEST_WAIT_S = 3600.0
"""Longest wait in seconds.  The wall clock decides about renewals, and it may be set meanwhile."""

NO_DOOR: Final = "there is no front door. Create it with skep door up"
WantedNames = Callable[[View], Wanted]
"""Returns the host names of services that need a certificate."""


def names_of_routes(view: View) -> Wanted:
    """Return the hosts of HTTP routes with automatic certificates."""
    claimants = [claimant_of(one) for one in exposed(view)]
    stacks_by_id = {one.id: one.stack for one in claimants}
    own = secrets_of_hosts(claimants)
    stacks: dict[str, str] = {}
    for id, routes in settled(claimants).accepted.items():  # the oldest come first
        for route in routes:
            if route.options.tls in ("", "auto") and route.host not in own:
                stacks.setdefault(route.host, stacks_by_id[id])
    return Wanted(stacks, _why_unserved(view) if stacks else "")


def _why_unserved(view: View) -> str:
    """Return why no proxy serves challenges, with the next step, or an empty text."""
    doors = [one for one in view.find(Service) if is_door(one.spec.labels)]
    if runs_a_proxy(view, [one.id for one in doors]):
        return ""
    return f"no proxy of the front door runs. Run skep explain {doors[0].spec.name}" if doors else NO_DOOR


def _serves(task: Task) -> bool:
    return task.is_wanted and task.status.state is TaskState.RUNNING


class CertificatesState:
    """Decides about the next step."""

    def __init__(
        self,
        view: Callable[[], View],
        clock: Clock,
        random: Random,
        wanted: WantedNames = names_of_routes,
        publish_s: float = PUBLISH_S,
    ) -> None:
        self._view = view
        self._clock = clock
        self._wanted = wanted
        self._publish_s = publish_s
        self.queue: WorkQueue[str] = WorkQueue(clock)
        self.failures = Failures(clock, random)
        self.look_at: dict[str, int] = {}
        """Unix time of the next look at an order, by name."""

    def start(self, snapshot: View) -> Iterator[None]:
        """Queue the first step."""
        self.queue.add((STEP,))
        yield

    def on_commit(self, commit: Commit) -> None:
        """Queue a step if the account, a renewal, a service's names or the proxies of the door changed."""
        for event in commit.events:
            match event:
                case Created(Payload(id=id)) | Updated(_, Payload(id=id)) | Deleted(Payload(id=id)):
                    if id == ACCOUNT_ID or id.startswith(record_id("")):
                        self.queue.add((STEP,))
                case Updated(Service() as old, Service() as new) if old.spec.labels == new.spec.labels and (
                    old.removed_at == new.removed_at
                ):
                    continue
                case Updated(Task() as was, Task() as task):
                    if _serves(was) != _serves(task) and self._is_of_door(task):
                        self.queue.add((STEP,))
                case Updated(Node() as before, Node() as node):
                    if before.status.state is not node.status.state:
                        self.queue.add((STEP,))
                case Created(Service()) | Updated(_, Service()) | Deleted(Service()):
                    self.queue.add_at(STEP, self._clock.monotonic() + GATHER_S)

    def due(self) -> Step | None:
        """Return the step that is due now, or None after queueing the next one."""
        view, now_ns = self._view(), self._clock.now_ns()
        account = account_in(view)
        if account is None:
            return None
        locked = locked_names(view)  # their orders cannot be stored
        records = {name: one for name, one in records_in(view).items() if name not in locked}
        self._forget_looks(records)
        wanted = self._wanted(view)
        stacks = {name: stack for name, stack in wanted.stacks.items() if name not in locked}
        wanted = Wanted(stacks, wanted.problem)
        if view.unreadable(Service):  # such a service may have any name without a service
            records = {name: one for name, one in records.items() if name in stacks}
        step = next_step(account, wanted, records, now_ns, self.look_at, self._publish_s)
        if not isinstance(step, WaitUntil):
            return step
        wait_s = (step.at_ns - now_ns) / SECOND_NS if step.at_ns is not None else LONGEST_WAIT_S
        self.queue.add_at(STEP, self._clock.monotonic() + min(wait_s, LONGEST_WAIT_S))
        return None

    def _is_of_door(self, task: Task) -> bool:
        service = self._view().lookup(Service, task.service_id)
        return service is not None and is_door(service.spec.labels)

    def _forget_looks(self, names: Iterable[str]) -> None:
        known = set(names)
        self.look_at = {name: at_ns for name, at_ns in self.look_at.items() if name in known}

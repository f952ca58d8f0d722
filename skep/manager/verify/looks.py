"""One look at a copied state: all rules on all objects, with pauses.

Several looks make a check (``loop``).  Most violations in a single look are states in transit.
"""

from collections.abc import Iterator, Mapping, Sequence

from skep.aio.time_slices import STEP, SlicedWork
from skep.manager.control_loops.failures import isolated
from skep.manager.services.disruption_budget import required
from skep.manager.services.freezes import held_by, stack_of_service
from skep.manager.verify import objects, tasks
from skep.manager.verify.allocations import Holders, add_attached, mixed_networks, unreachable
from skep.manager.verify.rules import InvariantViolation, ViolationKey
from skep.model.network import Network
from skep.model.node import Node, NodeState
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.volume import Volume
from skep.store.interface import Object, View
from skep.store.kinds import SpecVersion

FOUND_MAX = 1000
"""Violations of a look that are kept.  So many have one cause, and more would only need memory."""


class StateLook:
    """The violations that one state shows."""

    def __init__(self, view: View, before: Mapping[TaskId, Task]) -> None:
        """Look at ``view``, which does not change meanwhile.

        Args:
            before: Tasks at an earlier time, whose states can only have become later ones.
        """
        self._view = view
        self._before = before
        self._is_kept: dict[ServiceId, bool] = {}
        """Whether something keeps a service's tasks on nodes that no longer fit them."""
        self._down: frozenset[NodeId] = frozenset()
        self._holders = Holders()
        self._networks: dict[str, Network] = {one.id: one for one in view.find(Network)}
        self._users: dict[str, list[Task]] = {}
        """Running tasks by the cluster volume that they use."""
        self._found: dict[ViolationKey, InvariantViolation] = {}
        self.tasks: dict[TaskId, Task] = {}
        """The latest state of each task, for the next look."""

    @property
    def found(self) -> Sequence[InvariantViolation]:
        """The violations, each once."""
        return list(self._found.values())

    def steps(self) -> SlicedWork[None]:
        """Apply all rules."""
        nodes = self._view.find(Node)
        self._down = frozenset(one.id for one in nodes if one.status.state is NodeState.DOWN)
        yield
        yield from self._services()
        for node in nodes:
            here = self._view.find(Task, node_id=node.id)
            self._note(node.id, tasks.node_violations(node, here, self._is_kept, self._view))
            self._holders.add(node)
            yield
        yield from self._tasks()
        for volume in self._view.find(Volume):
            users = self._users.get(volume.id, ())
            self._note(volume.id, tasks.shared_volumes(volume, users))
            yield
        yield from self._stored_only()
        self._note("networks", mixed_networks(self._networks))
        yield
        self._note("addresses", self._holders.violations())

    def _services(self) -> Iterator[None]:
        view, limit, is_whole = self._view, objects.history_limit_of(self._view), self._is_whole()
        for service in view.find(Service):
            self._is_kept[service.id] = _keeps_unfit(service, view)
            own = view.find(Task, service_id=service.id)
            self._note(service.id, self._of_slots(service, own))
            yield
            self._note(service.id, self._of_service(service, own))
            self._holders.add(service)
            yield
            if is_whole:
                self._note(service.id, objects.leftover_tasks(service, own, limit, view, self._down))
                yield

    def _of_slots(self, service: Service, own: Sequence[Task]) -> Iterator[InvariantViolation]:
        for slot in tasks.grouped_by_slot(own):
            yield from tasks.crowded_slot(slot, service, self._view)

    def _of_service(self, service: Service, own: Sequence[Task]) -> Iterator[InvariantViolation]:
        if service.removed_at is None:
            yield from tasks.shared_name(service, self._view)
            yield from objects.missing_files(service, own, self._view)
        if service.job_status is not None:
            current = service.job_status.job_iteration
            yield from tasks.crowded_job(service, (one for one in own if one.job_iteration == current))

    def _tasks(self) -> Iterator[None]:
        for number, task in enumerate(self._view.find(Task), 1):
            self._note(task.id, self._of_task(task))
            if number % STEP == 0:
                yield

    def _of_task(self, task: Task) -> Iterator[InvariantViolation]:
        self._holders.add(task)
        add_attached(task, self._networks)
        if task.status.state is TaskState.RUNNING and task.node_id not in self._down:
            for one in task.volumes:
                self._users.setdefault(one.id, []).append(task)
        yield from unreachable(task, self._view)
        before = self._before.get(task.id, task)
        self.tasks[task.id] = task
        for violation in tasks.went_back(before, task) if before is not task else ():
            self.tasks[task.id] = before  # so that the next look finds it again
            yield violation

    def _stored_only(self) -> Iterator[None]:
        """Check records of which no object at work is a part."""
        if not self._is_whole():
            return  # an object that cannot be read may own them
        view = self._view
        for number, task in enumerate(view.find(Task), 1):
            self._note(task.id, objects.ownerless_task(task, view))
            if number % STEP == 0:
                yield
        for version in view.find(SpecVersion):
            self._note(version.id, objects.unused_version(version, view))
            yield
        self._note("others", objects.other_leftovers(view))

    def _is_whole(self) -> bool:
        kinds: tuple[type[Object], ...] = (Service, Task, Node, SpecVersion)
        return not any(self._view.unreadable(kind) or self._view.damaged(kind) for kind in kinds)

    def _note(self, id: str, rule: Iterator[InvariantViolation]) -> None:
        with isolated("invariant", id):
            for one in rule:
                if len(self._found) < FOUND_MAX:
                    self._found.setdefault(one.key, one)


def _keeps_unfit(service: Service, view: View) -> bool:
    """Return whether tasks of ``service`` may stay on nodes that do not fit them: a freeze, a budget or an end."""
    return (
        service.removed_at is not None
        or service.job_status is not None
        or required(service) is not None
        or bool(held_by(view, stack_of_service(service)))
    )

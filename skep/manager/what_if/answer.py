"""The answer to ``skep what-if``: how services, nodes and free resources differ after a supposed change."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

from msgspec.structs import replace

from skep.manager.control.tasks import known_status
from skep.manager.diagnosis.departures import split_off_replacements
from skep.manager.diagnosis.reasons import SlotId, TaskProblem, slot_of
from skep.manager.diagnosis.service_problems import problems_of
from skep.manager.orchestrator.global_services import is_eligible, takes_new_tasks
from skep.manager.orchestrator.replacement.disruption import FROZEN_S_MAX
from skep.manager.services.disruption_budget import required
from skep.manager.what_if.course import Course, runs
from skep.manager.what_if.rehearsal import SUPPOSED, Rehearsal
from skep.manager.what_if.supposed_nodes import is_in_loop
from skep.model.node import Node, takes_tasks
from skep.model.options.slot_volumes import local_volumes, names_there, slot_volumes_of
from skep.model.service import Service, UpdateState
from skep.model.task import Task
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId, ServiceId
from skep.store.interface import View
from skep.store.kinds import as_run

SETTLED_S = 3600.0
"""Supposed seconds after which a rehearsal ends.  Replacement is frozen for at most ten minutes, and a drain within a
disruption budget moves a task every few seconds.
"""

_SUPPOSED_TASK = re.compile(rf"\btask {SUPPOSED}\w+")
_FAILED_UPDATE = (
    UpdateState.PAUSED,
    UpdateState.ROLLBACK_STARTED,
    UpdateState.ROLLBACK_PAUSED,
    UpdateState.ROLLBACK_COMPLETED,
)


class MovedTasks(ApiObject):
    """Tasks of a service that run on another node afterwards."""

    tasks: int = always(0)
    source: str = always("")
    """Host name of the node before, or empty for new tasks."""
    target: str = always("")
    """Host name of the node afterwards, or empty for tasks without a successor."""


class MissingTasks(ApiObject):
    """Tasks of a service that do not run afterwards, for one reason (``diagnosis.reasons``)."""

    tasks: int = always(0)
    kind: str = always("")
    reason: str = always("")


class ServiceEffect(ApiObject):
    """Effect on one service."""

    id: ServiceId
    name: str = always("")
    desired: int = always(0)
    """Number of tasks that it should have, afterwards."""
    before: int = always(0)
    """Available tasks before the change."""
    lowest: int = always(0)
    """Smallest number of available tasks meanwhile."""
    after: int = always(0)
    minimum: int | None = None
    """Number of tasks that must stay available (``skep.min-available``)."""
    seconds: float = always(0.0)
    """Estimated seconds until the last of its tasks runs that run again or elsewhere."""
    moves: tuple[MovedTasks, ...] = always(())
    missing: tuple[MissingTasks, ...] = always(())
    left_behind: tuple[str, ...] = ()
    """Local volumes, as in the spec, whose data stays on the nodes that tasks move away from."""

    failed_update: str = ""
    """Reason why the update of the service fails.  Empty if it does not.  Its old tasks run, so none is missing."""
    staying: int = 0
    """Number of tasks that should leave their node, and run there because no other node takes their replacements."""
    why_staying: str = ""

    @property
    def is_below_minimum(self) -> bool:
        """Whether fewer tasks than its minimum are available, at some time or in the end."""
        return self.minimum is not None and self.lowest < self.minimum


class NodeEffect(ApiObject):
    """Effect on one node."""

    id: NodeId
    hostname: str = always("")
    before: int = always(0)
    """Wanted tasks on it before the change."""
    after: int = always(0)
    takes_tasks: bool = always(True)
    free_nano_cpus: int = always(0)
    free_memory_bytes: int = always(0)


class FreeCapacity(ApiObject):
    """Resources that the nodes which take tasks have left for reservations."""

    nodes: int = always(0)
    free_nano_cpus: int = always(0)
    free_memory_bytes: int = always(0)


class SupposedOutcome(ApiObject):
    """Response of ``/skep/what-if``."""

    seconds: float = always(0.0)
    """Estimated seconds until nothing changes."""
    services: tuple[ServiceEffect, ...] = always(())
    """Services that differ, or whose tasks move, by name.  Hidden services are only counted."""
    other_services: int = always(0)
    """Number of further services that differ, in stacks that the user cannot see."""
    other_missing: int = always(0)
    """Number of their tasks that do not run afterwards."""
    nodes: tuple[NodeEffect, ...] = always(())
    """Nodes that changed or whose tasks did, by host name."""
    capacity_before: FreeCapacity = always(FreeCapacity())
    capacity_after: FreeCapacity = always(FreeCapacity())
    notes: tuple[str, ...] = always(())


class Question:
    """One question, and what its answer needs from the state before the change."""

    def __init__(self, rehearsal: Rehearsal, is_visible: Callable[[Service], bool]) -> None:
        self.rehearsal = rehearsal
        self._is_visible = is_visible
        self._view = rehearsal.copy.view
        self.course = Course(self._view, rehearsal.clock.monotonic)
        self.notes: list[str] = []
        self.answer = SupposedOutcome()
        self._before = FreeCapacity()
        self._services: dict[ServiceId, Service] = {}

    def begin(self) -> Iterator[None]:
        """Load the copy.  The supposed change follows, and then ``settle``."""
        yield from self.rehearsal.start()
        self._before = self._capacity()
        self._services = {one.id: one for one in self._view().find(Service)}
        self.rehearsal.copy.committed.append(self.course.on_commit)
        yield

    def settle(self, *, has_leader: bool = True) -> Iterator[None]:
        """Let everything happen that follows the change, and compose ``answer``.

        Args:
            has_leader: Whether the managers have a quorum.  Otherwise nothing follows.
        """
        if has_leader:
            yield from self.rehearsal.settle(SETTLED_S)
        if self.course.has_frozen:
            self.notes.append(
                "So many nodes are down at once that the replacement of their tasks is frozen: until half of them are "
                f"back, `skep cluster resume`, or {FROZEN_S_MAX / 60:g} minutes have passed."
            )
        effects: list[ServiceEffect] = []
        hidden = missing = 0
        for id in sorted(self.course.services):
            service = self._view().lookup(Service, id)
            if service is None or service.removed_at is not None:
                continue
            effect = self._effect(service)
            yield
            if not self._differs(service, effect):
                continue
            if self._is_visible(service):
                effects.append(effect)
            elif effect.missing or effect.moves or effect.staying:
                hidden, missing = hidden + 1, missing + sum(one.tasks for one in effect.missing)
        self.answer = SupposedOutcome(
            seconds=round(max(self.course.last_at.values(), default=0.0), 1),
            services=tuple(sorted(effects, key=lambda one: one.name)),
            other_services=hidden,
            other_missing=missing,
            nodes=tuple(self._nodes()),
            capacity_before=self._before,
            capacity_after=self._capacity(),
            notes=tuple(self.notes),
        )

    def _effect(self, service: Service) -> ServiceEffect:
        view, course = self._view(), self.course
        tasks = view.find(Task, service_id=service.id)
        after = sum(runs(task, view.lookup(Node, task.node_id)) for task in tasks)
        before = after - course.changes[service.id]
        nodes = {node.id: node for node in view.find(Node)}
        desired = _desired(view, service, tasks)
        # Tasks of nodes that are down show the last state that their node reported.
        known = [replace(task, status=known_status(view, task)) if task.is_active else task for task in tasks]
        found = problems_of(
            as_run(view, service), known, nodes, wanted=desired, now_ns=self.rehearsal.clock.now_ns()
        )
        problems, why_staying = split_off_replacements(found, service, known, nodes)
        moves = _moves(tasks, view, course)
        return ServiceEffect(
            id=service.id,
            name=service.spec.name,
            desired=desired,
            before=before,
            lowest=before + min(course.lowest[service.id], 0),
            after=after,
            minimum=required(service),
            seconds=round(course.last_at.get(service.id, 0.0), 1),
            moves=moves,
            missing=_missing(problems),
            left_behind=_left_behind(service, tasks, view, course)
            if any(one.source and one.target for one in moves)
            else (),
            failed_update=self._failure_of_update(service),
            staying=len(found) - len(problems),
            why_staying=why_staying,
        )

    def _differs(self, service: Service, effect: ServiceEffect) -> bool:
        """Return whether the change concerns the service.  What does not run before either has another cause."""
        old = self._services.get(service.id)
        is_same = old is not None and old.spec_version == service.spec_version and old.spec == service.spec
        counts = {effect.before, effect.lowest, effect.after}
        return not is_same or len(counts) > 1 or bool(effect.moves or effect.failed_update or effect.staying)

    def _failure_of_update(self, service: Service) -> str:
        """Return why an update fails that was not failing before the change, or an empty text."""
        status, old = service.update_status, self._services.get(service.id)
        before = old.update_status if old is not None else None
        if status is None or status == before or status.state not in _FAILED_UPDATE:
            return ""
        # Tasks of the copy have ids that nobody can look up.
        return _SUPPOSED_TASK.sub("a new task", status.message.removeprefix("rollback completed: "))

    def _nodes(self) -> Iterator[NodeEffect]:
        view, course = self._view(), self.course
        accounts = self.rehearsal.accounting.accounts
        found = (view.lookup(Node, id) for id in course.nodes)
        for node in sorted(
            (one for one in found if one is not None), key=lambda one: (_hostname(one), one.id)
        ):
            now = view.find(Task, node_id=node.id)
            was = (course.before.get(one.id, one) for one in now)
            before = sum(one.is_active and one.node_id == node.id for one in was if one is not None)
            account = accounts.get(node.id)
            yield NodeEffect(
                id=node.id,
                hostname=_hostname(node),
                before=before,
                after=sum(task.is_active for task in now),
                takes_tasks=takes_tasks(node),
                free_nano_cpus=account.free_nano_cpus if account is not None else 0,
                free_memory_bytes=account.free_memory_bytes if account is not None else 0,
            )

    def _capacity(self) -> FreeCapacity:
        accounts = [one for one in self.rehearsal.accounting.accounts.values() if takes_tasks(one.node)]
        return FreeCapacity(
            nodes=len(accounts),
            free_nano_cpus=sum(max(one.free_nano_cpus, 0) for one in accounts),
            free_memory_bytes=sum(max(one.free_memory_bytes, 0) for one in accounts),
        )


def _hostname(node: Node | None) -> str:
    return "" if node is None else node.shown_name


def _desired(view: View, service: Service, tasks: Sequence[Task]) -> int:
    """Return how many tasks of the service should run."""
    match as_run(view, service).spec.mode.name:
        case "replicated":
            return service.spec.replicas
        case "global":
            present = {task.node_id for task in tasks if task.is_active}
            return sum(
                is_eligible(node, service) and (takes_new_tasks(node) or node.id in present)
                for node in view.find(Node)
            )
    return sum(task.is_active for task in tasks)


def _moves(tasks: Sequence[Task], view: View, course: Course) -> tuple[MovedTasks, ...]:
    """Return from which to which nodes the service's slots move, the largest numbers first."""
    sources: dict[SlotId, list[NodeId]] = defaultdict(list)
    targets: dict[SlotId, list[NodeId]] = defaultdict(list)
    for task in tasks:
        old = course.before.get(task.id, task)
        if old is not None and old.node_id and old.is_active:
            sources[slot_of(old)].append(old.node_id)
        # A task in a crash loop does not run, but has its node.
        if runs(task, view.lookup(Node, task.node_id)) or (task.is_active and is_in_loop(task)):
            targets[slot_of(task)].append(task.node_id)
    moves = Counter[tuple[str, str]]()
    for slot in sources.keys() | targets.keys():
        # An old task may stay, for example during a staged update.  It does not move, and its successor is new.
        left = sorted((Counter(sources[slot]) - Counter(targets[slot])).elements())
        begun = sorted((Counter(targets[slot]) - Counter(sources[slot])).elements())
        moves.update(zip_longest(left, begun, fillvalue=""))
    named = [
        MovedTasks(tasks=count, source=_named(view, source), target=_named(view, target))
        for (source, target), count in moves.items()
    ]
    return tuple(sorted(named, key=lambda one: (-one.tasks, one.source, one.target)))


def _left_behind(service: Service, tasks: Sequence[Task], view: View, course: Course) -> tuple[str, ...]:
    """Return the service's local volumes on the nodes that its tasks leave, by the names that they have there."""
    names = local_volumes(service.spec.task_template)
    found: set[str] = set()
    for task in tasks if names else ():
        old = course.before.get(task.id)
        node = view.lookup(Node, old.node_id) if old is not None and old.is_active else None
        if old is not None and node is not None and not runs(task, node):
            found.update(names_there(names, slot_volumes_of(node), {(service.spec.name, old.shown_slot)}))
    return tuple(sorted(found)) or names


def _named(view: View, id: str) -> str:
    return (_hostname(view.lookup(Node, id)) or id) if id else ""


def _missing(problems: Iterable[TaskProblem]) -> tuple[MissingTasks, ...]:
    """Count the slots that do not run by reason, the most important reason first."""
    counts = Counter((one.kind, one.reason) for one in problems)
    return tuple(
        MissingTasks(tasks=count, kind=kind, reason=reason) for (kind, reason), count in counts.items()
    )

"""The scheduler's loop: keeps the accounting, and gives pending tasks their nodes.

Tasks of one service and version ask for the same and are decided together as a *group*; a global service's task has
its node already and is a group of its own.  A group that was refused is looked at again when anything changes
that could help: a node, or a task that ended.
"""

import asyncio
from collections.abc import Iterable
from itertools import islice
from random import Random
from typing import NewType

import structlog
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.agenda import Agenda
from skep.manager.follow import State, follow
from skep.manager.guard import Guard, write_each
from skep.manager.scheduler.accounting import Accounting, holds_resources
from skep.manager.scheduler.placement import Assignment, Placed, Refusal, confirm, place
from skep.manager.scheduler.requirements import host_ports, overlays_of, planes_of, requirements_of
from skep.model.ids import IdSource, NodeId, TaskId
from skep.model.network import Network
from skep.model.node import Availability, Node, NodeState
from skep.model.planes import PLANE_OPTION, plane_of, plane_of_node
from skep.model.service import Service, ServiceSpec
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.times import Timestamp, timestamp
from skep.store.interface import Commit, Created, Deleted, Transaction, Updated, View
from skep.store.kinds import spec_of

log = structlog.get_logger()

Group = NewType("Group", str)
"""Tasks decided together: ``<service>/<version>``, or a single task's id."""

BATCH = 250
"""Tasks decided in one go; about 10 ms on slow machines."""
RETRY_S = 0.5
"""Until the next attempt when the store did not take a decision (jittered)."""


class Scheduler:
    """Gives every pending task a node."""

    def __init__(self, term: State, clock: Clock, new_id: IdSource, random: Random) -> None:
        self._term = term
        self._clock = clock
        self._random = random
        self._reset()

    async def run(self) -> None:
        """Assign until cancelled.  Runs on the leader only."""
        kinds = (Service, Task, Node)
        await follow(self._term, kinds, start=self._start, note=self._note, work=self._work)

    def _reset(self) -> None:
        self._agenda: Agenda[Group] = Agenda(self._clock)
        self._guard = Guard(self._clock, self._random)
        self._books_guard = Guard(self._clock, self._random)
        self._accounting = Accounting()
        self._pending: dict[Group, dict[TaskId, None]] = {}
        self._group_of: dict[TaskId, Group] = {}
        self._refused: set[Group] = set()
        self._deciding: set[TaskId] = set()
        """Tasks whose decision is being written: they hold their place whatever older news says of them."""

    # -- keeping up with the store ---------------------------------------------------------------------------------

    def _start(self, snapshot: View) -> None:
        self._reset()
        for node in snapshot.find(Node):
            self._accounting.set_node(node)
        for task in snapshot.find(Task):
            self._look_at(task.id)

    def _note(self, commit: Commit) -> None:
        has_room = False
        for event in commit.events:
            match event:
                case Created(Node() as node) | Updated(_, Node() as node) | Deleted(Node() as node):
                    self._look_at_node(node.id)
                    has_room = True
                case Deleted(Service() as service):
                    self._accounting.forget_service(service.id)
                case Updated(Task() as old, Task() as task):
                    if _has_failed(old, task):
                        self._accounting.note_failure(task, self._clock.monotonic())
                    has_room |= self._look_at(task.id)
                case Created(Task() as task) | Deleted(Task() as task):
                    has_room |= self._look_at(task.id)
        if has_room and self._refused:
            self._agenda.add(sorted(self._refused))
            self._refused.clear()

    def _look_at_node(self, id: NodeId) -> None:
        node = self._term.view().lookup(Node, id)
        if node is None:
            self._accounting.remove_node(id)
        else:
            self._accounting.set_node(node)

    def _look_at(self, id: TaskId) -> bool:
        """Take the present state of a task into the books; whether it gave something back."""
        has_room = False
        if id not in self._deciding:
            with self._books_guard.guarded(id):
                has_room = self._booked(id)
        return has_room

    def _booked(self, id: TaskId) -> bool:
        task = self._term.view().lookup(Task, id)
        if task is not None and holds_resources(task):
            self._leave(id)
            self._accounting.add(task, host_ports(self._spec_of(task)))
            return not task.is_wanted
        has_room = self._accounting.remove(id)
        if task is not None and _is_pending(task):
            self._enter(task)
        else:
            self._leave(id)
        return has_room

    def _enter(self, task: Task) -> None:
        group = _group_of(task)
        if self._group_of.get(task.id) == group:
            return
        self._leave(task.id)
        self._group_of[task.id] = group
        self._pending.setdefault(group, {})[task.id] = None
        self._agenda.add((group,))

    def _leave(self, id: TaskId) -> None:
        group = self._group_of.pop(id, None)
        if group is None:
            return
        del self._pending[group][id]
        if not self._pending[group]:
            del self._pending[group]
            self._refused.discard(group)
            self._guard.forget(group)

    def _spec_of(self, task: Task) -> ServiceSpec | None:
        return spec_of(self._term.view(), task)

    # -- deciding ------------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            decided = Placed()
            for group in await self._agenda.take(BATCH):
                room = BATCH - len(decided.assignments)
                if room <= 0:
                    self._agenda.add((group,))
                    continue
                decided = _together(decided, self._decided(group, room))
            await self._commit([*decided.assignments, *decided.refusals])

    def _decided(self, group: Group, limit: int) -> Placed:
        """Decide up to ``limit`` tasks of the group; the rest goes back on the agenda."""
        placed = Placed()
        with self._guard.guarded(group):
            placed = self._placed(group, limit)
        if (trouble := self._guard.trouble(group)) is not None:
            self._agenda.add_at(group, trouble.retry_at)
            tasks = self._tasks_of(group)
            for task in tasks:
                self._accounting.remove(task.id)
            return Placed(refusals=_refusals(tasks, f"scheduling failed: {trouble.error}"))
        if placed.refusals:
            self._refused.add(group)
        elif len(self._pending.get(group, ())) > limit:
            self._agenda.add((group,))
        return placed

    def _placed(self, group: Group, limit: int) -> Placed:
        tasks = self._tasks_of(group, limit)
        if not tasks:
            return Placed()
        view = self._term.view()
        planes = planes_of(tasks[0], lambda network_id: view.lookup(Network, network_id))
        wish = requirements_of(tasks[0], self._spec_of(tasks[0]), planes)
        if tasks[0].node_id:
            match confirm(tasks[0], wish, self._accounting):
                case Assignment() as assignment:
                    return Placed(assignments=(assignment,))
                case Refusal() as refusal:
                    return Placed(refusals=(refusal,))
        placed = place(tasks, wish, self._accounting, now=self._clock.monotonic(), limit=limit)
        if placed.refusals:
            # What holds for one of them holds for all that ask for the same.
            chosen = {assignment.task.id for assignment in placed.assignments}
            refused = [task for task in self._tasks_of(group) if task.id not in chosen]
            placed = replace(placed, refusals=_refusals(refused, placed.refusals[0].reason))
        return placed

    def _tasks_of(self, group: Group, limit: int | None = None) -> list[Task]:
        """The group's pending tasks, those that wait longest first."""
        view = self._term.view()
        ids = islice(self._pending.get(group, ()), limit)
        found = (view.lookup(Task, id) for id in ids if id not in self._deciding)
        return [task for task in found if task is not None and _is_pending(task)]

    # -- writing -------------------------------------------------------------------------------------------------------

    async def _commit(self, decisions: list[Assignment | Refusal]) -> None:
        """Write the decisions, each a transaction of its own, in as few raft entries as possible."""
        decisions = [one for one in decisions if not _is_known(one)]
        if not decisions:
            return
        now = timestamp(self._clock.now_ns())

        def write(tx: Transaction, decision: Assignment | Refusal) -> None:
            _write(tx, decision, now)

        ids = [decision.task.id for decision in decisions]
        self._deciding.update(ids)
        try:
            results = await write_each(self._term, write, decisions)
        finally:
            self._deciding.difference_update(ids)
        failed: list[SkepError] = []
        for decision, result in zip(decisions, results, strict=True):
            # Whatever the outcome, the store shows it now; a decision that it does not show holds no place.
            id = decision.task.id
            self._look_at(id)
            if isinstance(result, SkepError):
                failed.append(result)
                self._retry(id)
            elif isinstance(decision, Assignment) and (group := self._group_of.get(id)) is not None:
                self._agenda.add((group,))  # its node went away at the same moment
        if failed:
            log.warning("decisions not written, trying again", decisions=len(failed), reason=str(failed[0]))
        await asyncio.sleep(0)

    def _retry(self, id: TaskId) -> None:
        group = self._group_of.get(id)
        if group is not None:
            delay_s = RETRY_S * self._random.uniform(0.5, 1.0)
            self._agenda.add_at(group, self._clock.monotonic() + delay_s)


def _write(tx: Transaction, decision: Assignment | Refusal, now: Timestamp) -> None:
    """Write a decision, unless its task or its node changed meanwhile: then a new one is due."""
    task = tx.lookup(Task, decision.task.id)
    if task is None or not _is_pending(task):
        return
    match decision:
        case Refusal(_, reason):
            if task.status.err != reason:
                tx.put(replace(task, status=replace(task.status, err=reason, timestamp=now)))
        case Assignment():
            if not _is_available(tx, decision.node_id) or not _settle_planes(tx, task, decision.node_id):
                return
            status = TaskStatus(timestamp=now, state=TaskState.ASSIGNED, message=decision.message)
            tx.put(
                replace(
                    task,
                    node_id=decision.node_id,
                    generic_resources=decision.generic_resources,
                    status=status,
                )
            )


def _settle_planes(tx: Transaction, task: Task, node_id: NodeId) -> bool:
    """Overlay networks that belong to no data plane yet take the node's; False: one belongs to the other."""
    node, overlays = tx.lookup(Node, node_id), list(overlays_of(task))
    if node is None or not overlays:
        return True
    plane = plane_of_node(node)
    networks = [tx.rely_on(Network, id) for id in overlays]
    if any(network is not None and plane_of(network) not in ("", plane) for network in networks):
        return False
    for network in networks:
        if network is not None and PLANE_OPTION not in network.driver_state.options:
            options = {**network.driver_state.options, PLANE_OPTION: plane}
            tx.put(replace(network, driver_state=replace(network.driver_state, options=options)))
    return True


def _is_available(tx: Transaction, node_id: NodeId) -> bool:
    node = tx.lookup(Node, node_id)
    return (
        node is not None
        and node.status.state is NodeState.READY
        and node.spec.availability is Availability.ACTIVE
    )


def _is_pending(task: Task) -> bool:
    return task.status.state is TaskState.PENDING and task.is_wanted


def _is_known(decision: Assignment | Refusal) -> bool:
    """Whether the task already says that it was refused, and why."""
    return isinstance(decision, Refusal) and decision.task.status.err == decision.reason


def _has_failed(old: Task, new: Task) -> bool:
    failed = (TaskState.FAILED, TaskState.REJECTED)
    return new.status.state in failed and old.status.state not in failed and bool(new.node_id)


def _group_of(task: Task) -> Group:
    if task.node_id or task.spec_version is None:
        return Group(task.id)
    return Group(f"{task.service_id}/{task.spec_version.index}")


def _refusals(tasks: Iterable[Task], reason: str) -> tuple[Refusal, ...]:
    return tuple(Refusal(task, reason) for task in tasks)


def _together(first: Placed, second: Placed) -> Placed:
    return Placed(
        assignments=first.assignments + second.assignments, refusals=first.refusals + second.refusals
    )

"""State of the scheduler: the accounting of the nodes, pending tasks in groups, and the decisions about due groups.

A decision is a generator, because it may take longer than a time slice.  ``loop`` writes what was decided before it
pauses: commits about tasks that are decided but not written would release their reservations.
"""

import math
from collections.abc import Collection, Generator, Iterator, Sequence
from itertools import filterfalse, islice
from random import Random
from typing import TypeAlias, TypeVar

from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.aio.time_slices import SlicedWork, pausing
from skep.errors import SkepError
from skep.manager.control_loops.failures import Failures
from skep.manager.control_loops.informer import batches_of
from skep.manager.scheduler.decision_writer import Decision, is_pending, shows
from skep.manager.scheduler.dependencies import FoundWaits, WaitReason, Waits
from skep.manager.scheduler.explaining.pending_reasons import Texts, Why
from skep.manager.scheduler.group_queue import GroupQueue
from skep.manager.scheduler.groups import Group, Groups, group_of, is_of_many, returns
from skep.manager.scheduler.nodes.accounting import Accounting, HoldingsCache, holds_resources
from skep.manager.scheduler.nodes.candidates import shape_of
from skep.manager.scheduler.nodes.requirements import Requirements, RequirementsCache
from skep.manager.scheduler.nodes.spread import CachedSpreads
from skep.manager.scheduler.placement import Assignment, Placed, PlacementRefused, placing, placing_slots
from skep.manager.scheduler.preemption.preemption import Preempt
from skep.manager.scheduler.preemption.preemptor import Preemptor
from skep.manager.scheduler.returning import Returning, decides_otherwise
from skep.manager.scheduler.staying import confirmed, staying
from skep.model.needs import cluster_mounts, sources_of
from skep.model.node import Node, differ_in_load_alone
from skep.model.node_reports.node_refusals import NO_NODE
from skep.model.options.dependencies import WAITS_FOR
from skep.model.options.slot_volumes import SlotName, differ_in_slots_alone, local_volumes
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.volume import Volume
from skep.store.interface import Commit, Created, Deleted, LoopStore, Updated, View
from skep.store.kinds import UNKNOWN_SPEC, has_unknown_service, has_unknown_spec

BATCH = 250
"""Tasks decided in one pass, which takes about 10 ms on slow machines."""
T = TypeVar("T")

Firsts: TypeAlias = dict[Requirements, list[Task]]
"""Single tasks of services without any other task, by requirements.  They are assigned together."""

IF_DUE, WRITTEN = False, True
"""Pauses of a decision: if the time slice is over, or in any case after a write of the decisions so far."""
Deciding: TypeAlias = Generator[bool, None, T]
"""A decision that pauses, and returns its result."""


class SchedulerState:
    """Accounting of the nodes, and pending tasks in groups."""

    def __init__(self, term: LoopStore, clock: Clock, random: Random, *, is_confirmed: bool = False) -> None:
        """``is_confirmed``: whether the stored states of tasks are true.  A new leader waits for reports."""
        self._term, self._is_confirmed = term, is_confirmed
        self._view = term.view
        self._clock = clock
        self._random = random
        self._reset()

    def _reset(self) -> None:
        self.failures = Failures(self._clock, self._random)
        self._accounting_failures = Failures(self._clock, self._random)
        self.accounting = Accounting()
        self._choices = CachedSpreads(self.accounting)
        self._usages = HoldingsCache()
        self.preemptor = Preemptor(self.accounting, self._view, self._clock.monotonic)
        self._priorities = self.preemptor.priorities
        self.queue = GroupQueue(self._clock, lambda group: self._priorities.of_group(group, self._view()))
        self.groups = Groups()
        self.texts = Texts(self._term, self._clock, self.groups, self.accounting, self._accounting_failures)
        self._waits = Waits(-math.inf if self._is_confirmed else self._clock.monotonic())
        self._requirements = RequirementsCache()
        self._returning = Returning(self.accounting)
        self._away: dict[TaskId, str] = {}
        """Reason why pending tasks, in common groups, may run elsewhere than on the node with their slot's volumes."""
        self._assignments: list[Assignment] = []
        self._preemptions: list[Preempt] = []
        """Decisions whose write has not begun."""
        self._deciding: set[TaskId] = set()
        """Tasks whose decision is being written.  Commits about them are ignored, so they keep their reservation."""

    # -- keeping up with the store ---------------------------------------------------------------------------------

    def start(self, _snapshot: View) -> Iterator[None]:
        """Load the current objects, with pauses."""
        self._reset()
        for swarm in self._view().find(Swarm):
            self.preemptor.set_cluster(swarm)
        for volume in self._view().find(Volume):
            self.accounting.update_volume(volume.id, volume)
        for services in batches_of(self._view, Service):  # before tasks are queued
            for service in services:
                self._priorities.set(service)
                self.accounting.affinities.set(service)
            yield
        for nodes in batches_of(self._view, Node):
            for node in nodes:  # before tasks need it
                self._returning.volumes.set_node(node)
            yield
        for tasks in batches_of(self._view, Task):
            self._enter_tasks(tasks)
            yield
        for node_id in self._view().ids(Node):
            self._update_node(NodeId(node_id))
            yield

    def _enter_tasks(self, tasks: Sequence[Task]) -> None:
        view = self._view()
        with self._accounting_failures.caught("tasks"):
            for task in tasks:
                self._update_accounting(task.id, task, view)
            return
        for task in tasks:  # one task raised: handle each separately, so that only that one fails
            self._update_task(task.id)

    def on_commit(self, commit: Commit) -> None:
        """Update the accounting and the groups, and queue the groups for which the commit could help."""
        may_help, groups = False, set[Group]()
        self.queue.add_times(self._waits.record(commit, self._clock.monotonic()))
        for event in commit.events:
            if isinstance(event, Updated):
                if isinstance(event.new, Task):
                    assert isinstance(event.old, Task)
                    may_help |= self._on_task_update(event.old, event.new, groups)
                elif isinstance(event.new, Node):
                    assert isinstance(event.old, Node)
                    slots = self._update_node(event.new.id)
                    if differ_in_slots_alone(event.old, event.new):
                        groups |= self.groups.of_slots(slots, self._view())
                    else:
                        may_help |= not differ_in_load_alone(event.old, event.new)
                elif isinstance(event.new, Volume):
                    groups |= self._update_volume(event.new)
                elif isinstance(event.new, Service):
                    assert isinstance(event.old, Service)
                    may_help |= decides_otherwise(event.old, event.new)
                    may_help |= self._priorities.set(event.new)
                    may_help |= self.accounting.affinities.set(event.new)
                elif isinstance(event.new, Swarm):
                    may_help |= self.preemptor.set_cluster(event.new)
                continue
            match event.object:
                case Task() as task if isinstance(event, Created) and is_pending(task) and not task.node_id:
                    self._enqueue(task)
                case Task() as task:
                    may_help |= self._update_task(task.id)
                case Node() as node:
                    self._update_node(node.id)
                    may_help = True
                case Volume() as volume:
                    groups |= self._update_volume(volume)
                case Service() as service if isinstance(event, Deleted):
                    self.accounting.forget_service(service.id)
                    self._priorities.forget(service.id)
                    may_help |= self.accounting.affinities.forget(service.id)
                case Service() as service:
                    self._priorities.set(service)
                    may_help |= self.accounting.affinities.set(service)
                    groups |= self.groups.of_service(service.id, self._view())  # if it was unreadable
        if self.queue.has_refused and (may_help or groups):
            self.queue.retry(self._priorities.of_successors(commit), None if may_help else groups)

    def _on_task_update(self, old: Task, task: Task, groups: set[Group]) -> bool:
        """Handle a changed task.  Returns whether it released something.  Adds its group to ``groups`` if it starts."""
        if self._is_accounted(old, task):
            return False
        if task.desired_state is not old.desired_state and task.id in self.groups.of:
            groups.add(self.groups.of[task.id])  # others may stop for it now, and did not for a prepared task
        if task.has_failed and not old.has_failed and task.node_id:
            self.accounting.record_failure(task, self._clock.monotonic())
        return self._update_task(task.id) or task.spec is not old.spec

    def _is_accounted(self, old: Task, task: Task) -> bool:
        """Return whether the accounting includes the change already: most commits are reports of running tasks."""
        return (
            task.id not in self.groups.of
            and task.desired_state is old.desired_state
            and task.spec is old.spec
            and task.preemption == old.preemption
            and holds_resources(task)
            and self.accounting.node_of(task.id) == task.node_id
        )

    def _update_node(self, id: NodeId) -> Collection[SlotName]:
        """Update a node from the store.  Returns the slots whose volumes it reports differently."""
        node = self._view().lookup(Node, id)
        if node is None:
            self.accounting.remove_node(id)
            self._returning.volumes.remove_node(id)
            return ()
        self.accounting.set_node(node)
        return self._returning.volumes.set_node(node)

    def _update_volume(self, volume: Volume) -> set[Group]:
        """Update a volume from the store.  Returns the groups that the change may concern."""
        if self.accounting.update_volume(volume.id, self._view().lookup(Volume, volume.id)):
            return set(self.groups.with_volumes)  # a node at its volume limit may have room for another
        return self.groups.mounting(sources_of(volume))

    def _update_task(self, id: TaskId) -> bool:
        """Account for the current state of a task.  Returns whether it released something."""
        may_help = False
        if id not in self._deciding:
            view = self._view()
            with self._accounting_failures.caught(id):
                may_help = self._update_accounting(id, view.lookup(Task, id), view)
        return may_help

    def _update_accounting(self, id: TaskId, task: Task | None, view: View) -> bool:
        if task is not None and holds_resources(task):
            self._dequeue(id)
            usage = self._usages.of(task, view)
            self.accounting.reserve(id, task.node_id, usage)
            if task.preemption is not None:
                self.preemptor.add_victim(id)
            return not usage.is_active
        self.preemptor.remove_victim(id)
        may_help = self.accounting.remove(id)
        if task is not None and is_pending(task):
            self._enqueue(task)
        else:
            self._dequeue(id)
        return may_help

    def _enqueue(self, task: Task) -> None:
        if task.id in self._away:  # decided already
            return
        group = group_of(task)
        with self._accounting_failures.caught(task.id):
            if self._returning.has_home(task, self._view()):
                group = task.id
        if (before := self.groups.of.get(task.id)) == group:
            return
        if before is not None:
            self._dequeue(task.id)
        self._enter_group(task, group)

    def _enter_group(self, task: Task, group: Group) -> None:
        self.groups.enter(task.id, group, [mount.source for mount in cluster_mounts(task.spec)])
        self.queue.add((group,))

    def _dequeue(self, id: TaskId) -> None:
        self._away.pop(id, None)
        group = self.groups.leave(id)
        if group is None:
            return
        self.queue.discard_refused(group)
        self.texts.forget(group)
        self._waits.forget(group)
        self.failures.clear(group)
        if self.preemptor.release(group):
            self.queue.retry()

    # -- deciding ------------------------------------------------------------------------------------------------------

    def decide(self, due: Sequence[Group]) -> Deciding[None]:
        """Decide the groups taken from the queue, and put the surplus back."""
        now = self._clock.monotonic()
        groups = yield from self._without_waiting(due)
        remaining = BATCH
        for level in self._levels(groups):
            if remaining <= 0:
                self.queue.put_back(level)
                continue
            firsts, others = self._partition(level, now)
            for shape, tasks in firsts.items():
                in_time = set(self.queue.in_time([group_of(task) for task in tasks]))
                if in_time:
                    tasks = [task for task in tasks if group_of(task) in in_time]
                    yield from self._place_first_tasks(shape, tasks, now)
                    yield IF_DUE
            remaining -= len(level) - len(others)
            for group in others:
                if remaining <= 0:
                    self.queue.put_back((group,))
                elif self.queue.in_time((group,)):
                    remaining -= (yield from self._decide_group(group, remaining, now)) or 1
                    yield IF_DUE

    def _levels(self, groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
        """Yield the groups of each priority, the highest first, and of these first the tasks that are bound to a node.

        Otherwise a slot that waited longer could take the node of a slot that is updated, away from its data.
        """
        for level in self._priorities.levels(groups, self._view()):
            for chosen in (filterfalse(is_of_many, level), filter(is_of_many, level)):
                if some := list(chosen):
                    yield some

    def _without_waiting(self, groups: Sequence[Group]) -> Deciding[list[Group]]:
        """Return the groups that need not wait for another service, or for an unreadable object.

        Without its spec a task would go to any node, with nothing reserved.  Without its service's labels it would
        leave its data, or start before its dependencies.
        """
        ready: list[Group] = []
        view, now, found = self._view(), self._clock.monotonic(), FoundWaits()
        revision = view.revision
        for group in groups:
            yield IF_DUE
            if self._view().revision != revision:
                view, now, found = self._view(), self._clock.monotonic(), FoundWaits()
                revision = view.revision
            waiting, tasks = None, self._tasks_of(group, 1)
            if tasks and (has_unknown_spec(view, tasks[0]) or has_unknown_service(view, tasks[0])):
                self.queue.set_aside(group)
                self.texts.set(group, Why(UNKNOWN_SPEC))
                continue
            key = f"dependencies of {group}"
            with self._accounting_failures.caught(key):
                waiting = self._waits.of(group, tasks[0], view, now, found) if tasks else None
            if (failure := self._accounting_failures.of(key)) is not None:
                # Unknown: a task that starts too late does less harm than a task that does not wait.
                waiting = WaitReason(f"{WAITS_FOR}a decision: {failure.error}", until=failure.retry_at)
            if waiting is None:
                ready.append(group)
                continue
            self.preemptor.release(group)
            self.texts.set(group, Why(waiting.reason))
            if waiting.until is not None:
                self.queue.add_at(group, waiting.until)
        return ready

    def _partition(self, groups: Sequence[Group], now: float) -> tuple[Firsts, Sequence[Group]]:
        """Return single tasks that may be assigned together, and the groups that must be decided separately."""
        firsts: Firsts = {}
        others: list[Group] = []
        view = self._view()
        last_requirements: Requirements | None = None
        together: list[Task] | None = None
        with self._accounting_failures.caught("single tasks"):
            for group in groups:
                task = self._single(group, view)
                if task is None or task.node_id or returns(task, group) or self._may_return(task, view):
                    others.append(group)
                    continue
                if self.preemptor.may_preempt(task):
                    others.append(group)
                    continue
                requirements = self._requirements_of(task, view)
                if requirements is not last_requirements:  # equal tasks often follow each other
                    last_requirements, together = requirements, None
                    if self._choices.is_first(requirements, now):
                        together = firsts.setdefault(shape_of(requirements), [])
                if together is not None:
                    together.append(task)
                else:
                    others.append(group)
            return firsts, others
        return {}, groups  # one task raised: decide each separately, so that only that one fails

    def _decide_group(self, group: Group, limit: int, now: float) -> Deciding[int]:
        """Decide up to ``limit`` tasks of the group and queue the rest again.  Returns the number of assigned tasks."""
        placed = Placed()
        claims = self.preemptor.claims(group)
        self.preemptor.release(group)
        self.queue.add(self.preemptor.release_below(group))
        with self.failures.caught(group):
            placed = yield from self._place_group(group, limit, now)
        if (failure := self.failures.of(group)) is not None:
            self.queue.add_at(group, failure.retry_at)
            for id in self.groups.ids(group):
                self.accounting.remove(id)
            self.texts.set(group, Why(f"scheduling failed: {failure.error}"))
        elif placed.refusals:
            self.queue.set_aside(group)
        elif self.groups.count(group) > limit:
            self.queue.add((group,))
        self._assignments += placed.assignments
        if placed.refusals:
            yield from self._refuse(group, placed)
        if claims - self.preemptor.claims(group):
            self.queue.retry()
        return len(placed.assignments)

    def _refuse(self, group: Group, placed: Placed) -> Deciding[None]:
        """Handle refused tasks of a group, and so all that are left.  Preempt others for them if allowed."""
        task, reason = placed.refusals[0].task, placed.refusals[0].reason
        why = Why(reason or NO_NODE)
        with self._accounting_failures.caught(f"room for {group}"):
            requirements = self._requirements_of(task, self._view())
            if not reason:
                why = Why(requirements=requirements)
            elif returns(task, group):
                requirements = replace(requirements, needs_disk=False)  # as ``Returning.decide`` does
            chosen = {one.task.id for one in placed.assignments}
            tasks = [one for one in self._tasks_of(group, BATCH + len(chosen)) if one.id not in chosen]
            if tasks and self.preemptor.may_preempt(task):
                yield from self._preempt_for(group, tasks, requirements, why)
        self.texts.set(group, why)

    def _preempt_for(
        self, group: Group, tasks: Sequence[Task], requirements: Requirements, why: Why
    ) -> Deciding[None]:
        """Choose nodes for refused tasks, and the tasks to preempt there."""
        work = self.preemptor.nominating(group, tasks, requirements, self._may_go_to(tasks[0], group))
        nominations = yield from self._in_slices(work, tasks)
        why.words.update((one.task.id, self.preemptor.words(one)) for one in nominations)
        self._preemptions += filter(None, map(self.preemptor.preemption, nominations))
        if len(nominations) < len(tasks) and (at := self.preemptor.more_at()) is not None:
            self.queue.add_at(group, at)
        if self._preemptions:
            yield WRITTEN  # so that other decisions do not choose the same victims

    def _may_go_to(self, task: Task, group: Group) -> Sequence[NodeId]:
        """Return the nodes on which tasks may be preempted."""
        if task.node_id:
            return (task.node_id,)
        if returns(task, group):
            return self._returning.nodes(task, self._view())
        return list(self.accounting.accounts)

    def _in_slices(self, work: SlicedWork[T], tasks: Sequence[Task]) -> Deciding[T]:
        """Run the decision about ``tasks``, after a write of the earlier decisions if it has to pause.

        Commits about tasks that are decided but not written would release their reservations.
        """
        try:
            next(work)
        except StopIteration as end:
            at_once: T = end.value
            return at_once
        # The tasks may be refused.  Changes that free resources meanwhile make them due again.
        for group in {self.groups.of.get(task.id): None for task in tasks}:
            if group is not None:
                self.queue.set_aside(group)
        ids = [task.id for task in tasks]
        self._deciding.update(ids)
        decided: T | None = None
        try:
            yield WRITTEN
            decided = yield from pausing(work, IF_DUE)
            return decided
        finally:
            self._deciding.difference_update(ids)
            for id in ids:  # decided tasks are written next, and checked then
                if decided is None or self.accounting.node_of(id) is None:
                    self._update_task(id)

    def _place_group(self, group: Group, limit: int, now: float) -> Deciding[Placed]:
        tasks = self._tasks_of(group, limit)
        if not tasks:
            return Placed()
        requirements = self._requirements_of(tasks[0], self._view())
        if tasks[0].node_id:
            return confirmed(tasks[0], requirements, self.accounting, self._view())
        if returns(tasks[0], group):
            return self._return(tasks[0], requirements)
        returned: Sequence[Assignment] = ()
        if self._away or local_volumes(tasks[0].spec):
            tasks, returned = self._returned(tasks, requirements)
        is_last = self.groups.count(group) <= limit
        work = placing_slots(
            tasks, requirements, self._choices, self._view(), now=now, limit=limit, is_last=is_last
        )
        placed = yield from self._in_slices(work, [*tasks, *(one.task for one in returned)])
        placed = staying(placed, requirements, self.accounting, self._view())
        if self._away or returned:
            placed = replace(placed, assignments=(*returned, *map(self._with_note, placed.assignments)))
        return placed

    def _may_return(self, task: Task, view: View) -> bool:
        """Return whether the slot of a task in a common group may have data on a node."""
        return task.id in self._away or self._returning.has_home(task, view)

    def _return(self, task: Task, requirements: Requirements) -> Placed:
        """Assign the task to the node with its slot's volumes, wait for that node, or move it to the common group."""
        match self._returning.decide(task, requirements, self._view()):
            case Assignment() as assignment:
                return Placed(assignments=(assignment,))
            case PlacementRefused() as refusal:
                return Placed(refusals=(refusal,))
            case str() as why:
                self._dequeue(task.id)
                self._enter_group(task, group_of(task))
                self._away[task.id] = why
        return Placed()

    def _returned(
        self, tasks: Sequence[Task], requirements: Requirements
    ) -> tuple[list[Task], Sequence[Assignment]]:
        """Return ``tasks`` without the ones that return to their data or wait for it, and the assignments of these."""
        left: list[Task] = []
        assignments: list[Assignment] = []
        for task in tasks:
            if not self._may_return(task, self._view()):
                left.append(task)
                continue
            if task.id not in self._away:
                # Its slot has data, or its service another affinity, since it was queued.
                self._enqueue(task)
                continue
            match self._returning.decide(task, requirements, self._view()):
                case Assignment() as assignment:
                    assignments.append(assignment)
                case PlacementRefused():
                    self._dequeue(task.id)
                    self._enter_group(task, task.id)
                case str() as why:
                    self._away[task.id] = why
                    left.append(task)
        return left, assignments

    def _with_note(self, assignment: Assignment) -> Assignment:
        """Add the reason why the task's data is elsewhere."""
        why = self._away.get(assignment.task.id)
        return replace(assignment, message=f"{assignment.message}; {why}") if why else assignment

    def _place_first_tasks(self, shape: Requirements, tasks: Sequence[Task], now: float) -> Deciding[None]:
        """Assign single tasks, with equal requirements, of services without any other task."""
        placed: Placed | None = None
        with self._accounting_failures.caught("first tasks"):
            work = placing(tasks, shape, self._choices, now=now, limit=len(tasks), is_last=False)
            placed = yield from self._in_slices(work, tasks)
            placed = staying(placed, shape, self.accounting, self._view())
        if placed is None:
            # A task or node raised: decide each separately, so that only that one fails.
            for task in tasks:
                yield from self._decide_group(group_of(task), 1, now)
            return
        self._assignments += placed.assignments
        why = Why(requirements=shape)
        for refusal in placed.refusals:
            self.queue.set_aside(group_of(refusal.task))
            self.texts.set(group_of(refusal.task), why)

    def _requirements_of(self, task: Task, view: View) -> Requirements:
        return self._requirements.of(task, view, self.accounting.affinities.of(task.service_id))

    def _tasks_of(self, group: Group, limit: int | None = None) -> list[Task]:
        """Return the group's pending tasks, longest waiting first."""
        view = self._view()
        tasks = (self._pending_task(id, view) for id in islice(self.groups.ids(group), limit))
        return [task for task in tasks if task is not None]

    def _pending_task(self, id: TaskId, view: View) -> Task | None:
        """Return the task if it waits for a decision, or None."""
        if id not in self.groups.of or id in self._deciding:
            return None
        task = view.lookup(Task, id)
        return task if task is not None and is_pending(task) else None

    def _single(self, group: Group, view: View) -> Task | None:
        """Return the task of a group with a single pending task, or None."""
        ids = self.groups.ids(group)
        return self._pending_task(next(iter(ids)), view) if len(ids) == 1 else None

    # -- writing -------------------------------------------------------------------------------------------------------

    def take_decisions(self) -> list[Decision]:
        """Return the decisions whose write has not begun.  Commits about their tasks are ignored until its end."""
        decisions: list[Decision] = [*self._assignments, *self._preemptions]
        self._assignments, self._preemptions = [], []
        self._deciding.update(decision.task.id for decision in decisions)
        return decisions

    def on_results(self, decisions: Sequence[Decision], results: Sequence[SkepError | None]) -> None:
        """Account for the results of a write, and queue the groups of tasks that were not assigned by it."""
        self._deciding.difference_update(decision.task.id for decision in decisions)
        outcomes: list[tuple[str, SkepError | None]] = []
        view, may_help, new = self._view(), False, set[ServiceId]()
        for decision, result in zip(decisions, results, strict=True):
            id = decision.task.id
            for victim in decision.victims if isinstance(decision, Preempt) else ():
                self._update_task(victim)
            if isinstance(decision, Assignment) and shows(view, decision):
                self._dequeue(id)
                new.add(decision.task.service_id)
                continue
            # A decision that was not written has no reservation.  Others may have been refused because of it.
            may_help |= self._update_task(id)
            if (group := self.groups.of.get(id)) is None:
                continue
            outcomes.append((group, result))
            if result is None and isinstance(decision, Assignment):
                self.queue.add((group,))  # its node was removed at the same moment
        self.failures.requeue_failed(self.queue, "decisions", outcomes)
        if may_help:
            self.queue.retry()
        elif self.queue.has_refused and (followers := self.accounting.affinities.followers(new)):
            refused = self.queue.refused
            self.queue.retry(only={one for one in refused if (self._service_of(one, view)) in followers})

    def _service_of(self, group: Group, view: View) -> str:
        id, is_common, _ = group.partition("/")
        return id if is_common or (task := view.lookup(Task, TaskId(id))) is None else task.service_id

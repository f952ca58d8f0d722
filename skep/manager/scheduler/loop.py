"""The scheduler's loop: updates the accounting and assigns pending tasks to nodes, higher priorities first.

Tasks of one service and version have the same requirements and are decided together as a *group*.  A global service's
task has its node already and is a group of its own.  So is a task that returns to the node with its slot's volumes,
while that node can run it or is worth waiting for.  A refused group is decided again when a change could help: a node
event, or the end of a task.  Its tasks show the reason a moment later (``pending_reasons``).  A group that waits for
another service (``dependencies``) is decided again when that service changes.  If the cluster allows it, tasks with a
lower priority are preempted for a refused group (``preemption``).
"""

import asyncio
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from random import Random
from typing import TypeAlias, TypeVar

from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.aio.time_slices import SlicedWork, TimeSlices, result_in_slices, run_in_slices
from skep.errors import SkepError
from skep.manager.failures import Failures
from skep.manager.informer import batches_of, run_informer
from skep.manager.scheduler.accounting import Accounting, Usages, holds_resources
from skep.manager.scheduler.candidates import shape_of
from skep.manager.scheduler.decision_writer import Decision, is_pending, shows, write_decisions
from skep.manager.scheduler.dependencies import FoundWaits, Waiting, Waits
from skep.manager.scheduler.group_queue import GroupQueue
from skep.manager.scheduler.groups import Group, Groups, group_of, returns
from skep.manager.scheduler.pending_reasons import Texts, Why
from skep.manager.scheduler.placement import Assignment, Placed, Refusal, leaving, placing
from skep.manager.scheduler.preemption import Preempt
from skep.manager.scheduler.preemptor import Preemptor
from skep.manager.scheduler.requirements import Requirements, RequirementsCache
from skep.manager.scheduler.returning import Returning
from skep.manager.scheduler.spread import Choices
from skep.manager.scheduler.staying import confirmed, staying
from skep.model.dependencies import WAITS_FOR
from skep.model.ids import IdSource, NodeId, TaskId
from skep.model.labels import volume_affinity
from skep.model.needs import cluster_mounts, sources_of
from skep.model.node import Node, differ_in_load_alone
from skep.model.node_refusals import NO_NODE
from skep.model.service import Service
from skep.model.slot_volumes import SlotName, differ_in_slots_alone
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.times import timestamp
from skep.model.volume import Volume
from skep.store.interface import Commit, Created, Deleted, LoopStore, Updated, View
from skep.store.kinds import UNKNOWN_SPEC, has_unknown_service, has_unknown_spec

BATCH = 250
"""Tasks decided in one pass, which takes about 10 ms on slow machines."""
T = TypeVar("T")

Firsts: TypeAlias = dict[Requirements, list[Task]]
"""Single tasks of services without any other task, by requirements.  They are assigned together."""


class Scheduler:
    """Assigns every pending task to a node."""

    def __init__(self, term: LoopStore, clock: Clock, new_id: IdSource, random: Random) -> None:
        self._term = term
        self._clock = clock
        self._random = random
        self._reset()

    async def run(self) -> None:
        """Assign until cancelled.  Runs on the leader only."""
        kinds = (Service, Task, Node, Volume, Swarm)
        await run_informer(
            self._term, kinds, on_snapshot=self._on_snapshot, on_commit=self._on_commit, work=self._work
        )

    def _reset(self) -> None:
        self._failures = Failures(self._clock, self._random)
        self._accounting_failures = Failures(self._clock, self._random)
        self._loading: Iterator[None] = iter(())
        self._accounting = Accounting()
        self._choices = Choices(self._accounting)
        self._usages = Usages()
        self._preemptor = Preemptor(self._accounting, self._term.view, self._clock.monotonic)
        self._priorities = self._preemptor.priorities
        self._queue = GroupQueue(
            self._clock, lambda group: self._priorities.of_group(group, self._term.view())
        )
        self._groups = Groups()
        self._texts = Texts(
            self._term, self._clock, self._groups, self._accounting, self._accounting_failures
        )
        self._waits = Waits(self._clock.monotonic())
        self._requirements = RequirementsCache()
        self._returning = Returning(self._accounting)
        self._away: dict[TaskId, str] = {}
        """Why pending tasks, in common groups, may run elsewhere than on the node with their slot's volumes."""
        self._assignments: list[Assignment] = []
        self._preemptions: list[Preempt] = []
        """Decisions whose write has not begun."""
        self._deciding: set[TaskId] = set()
        """Tasks whose decision is being written.  Commits about them are ignored, so they keep their reservation."""

    # -- keeping up with the store ---------------------------------------------------------------------------------

    def _on_snapshot(self, _snapshot: View) -> None:
        self._reset()
        self._loading = self._load()

    def _load(self) -> Iterator[None]:
        """Load the current objects, with pauses."""
        for swarm in self._term.view().find(Swarm):
            self._preemptor.set_cluster(swarm)
        for volume in self._term.view().find(Volume):
            self._accounting.update_volume(volume.id, volume)
        for services in batches_of(self._term.view, Service):  # before tasks are queued
            for service in services:
                self._priorities.set(service)
            yield
        for nodes in batches_of(self._term.view, Node):
            for node in nodes:  # before tasks need it
                self._returning.volumes.set_node(node)
            yield
        for tasks in batches_of(self._term.view, Task):
            self._enter_tasks(tasks)
            yield
        for node_id in self._term.view().ids(Node):
            self._update_node(NodeId(node_id))
            yield

    def _enter_tasks(self, tasks: Sequence[Task]) -> None:
        view = self._term.view()
        with self._accounting_failures.caught("tasks"):
            for task in tasks:
                self._update_accounting(task.id, task, view)
            return
        for task in tasks:  # one task raised: handle each separately, so that only that one fails
            self._update_task(task.id)

    def _on_commit(self, commit: Commit) -> None:
        may_help, volume_groups = False, set[Group]()
        self._queue.add_times(self._waits.record(commit, self._clock.monotonic()))
        for event in commit.events:
            if isinstance(event, Updated):
                if isinstance(event.new, Task):
                    assert isinstance(event.old, Task)
                    may_help |= self._on_task_update(event.old, event.new)
                elif isinstance(event.new, Node):
                    assert isinstance(event.old, Node)
                    slots = self._update_node(event.new.id)
                    if differ_in_slots_alone(event.old, event.new):
                        volume_groups |= self._groups.of_slots(slots, self._term.view())
                    else:
                        may_help |= not differ_in_load_alone(event.old, event.new)
                elif isinstance(event.new, Volume):
                    volume_groups |= self._update_volume(event.new)
                elif isinstance(event.new, Service):
                    assert isinstance(event.old, Service)
                    before, after = event.old.spec.labels, event.new.spec.labels
                    may_help |= volume_affinity(before) is not volume_affinity(after)
                    may_help |= self._priorities.set(event.new)
                elif isinstance(event.new, Swarm):
                    may_help |= self._preemptor.set_cluster(event.new)
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
                    volume_groups |= self._update_volume(volume)
                case Service() as service if isinstance(event, Deleted):
                    self._accounting.forget_service(service.id)
                    self._priorities.forget(service.id)
                case Service() as service:
                    self._priorities.set(service)
        if self._queue.has_refused and (may_help or volume_groups):
            self._queue.retry(self._priorities.of_successors(commit), None if may_help else volume_groups)

    def _on_task_update(self, old: Task, task: Task) -> bool:
        """Handle a changed task.  Returns whether it released something."""
        if self._is_accounted(old, task):
            return False
        if task.has_failed and not old.has_failed and task.node_id:
            self._accounting.record_failure(task, self._clock.monotonic())
        return self._update_task(task.id) or task.spec is not old.spec

    def _is_accounted(self, old: Task, task: Task) -> bool:
        """Whether the accounting includes the change already: most commits are reports of running tasks."""
        return (
            task.id not in self._groups.of
            and task.desired_state is old.desired_state
            and task.spec is old.spec
            and task.preemption == old.preemption
            and holds_resources(task)
            and self._accounting.node_of(task.id) == task.node_id
        )

    def _update_node(self, id: NodeId) -> Collection[SlotName]:
        """Update a node from the store.  Returns the slots whose volumes it reports differently."""
        node = self._term.view().lookup(Node, id)
        if node is None:
            self._accounting.remove_node(id)
            self._returning.volumes.remove_node(id)
            return ()
        self._accounting.set_node(node)
        return self._returning.volumes.set_node(node)

    def _update_volume(self, volume: Volume) -> set[Group]:
        """Update a volume from the store.  Returns the groups that the change may concern."""
        if self._accounting.update_volume(volume.id, self._term.view().lookup(Volume, volume.id)):
            return set(self._groups.with_volumes)  # a node at its volume limit may have room for another
        return self._groups.mounting(sources_of(volume))

    def _update_task(self, id: TaskId) -> bool:
        """Account for the current state of a task.  Returns whether it released something."""
        may_help = False
        if id not in self._deciding:
            view = self._term.view()
            with self._accounting_failures.caught(id):
                may_help = self._update_accounting(id, view.lookup(Task, id), view)
        return may_help

    def _update_accounting(self, id: TaskId, task: Task | None, view: View) -> bool:
        if task is not None and holds_resources(task):
            self._dequeue(id)
            usage = self._usages.of(task, view)
            self._accounting.reserve(id, task.node_id, usage)
            if task.preemption is not None:
                self._preemptor.add_victim(id)
            return not usage.is_active
        self._preemptor.remove_victim(id)
        may_help = self._accounting.remove(id)
        if task is not None and is_pending(task):
            self._enqueue(task)
        else:
            self._dequeue(id)
        return may_help

    def _enqueue(self, task: Task) -> None:
        before = self._groups.of.get(task.id)
        if task.id in self._away:  # decided already
            return
        group = group_of(task)
        with self._accounting_failures.caught(task.id):
            if self._returning.has_home(task, self._term.view()):
                group = task.id
        if before == group:
            return
        if before is not None:
            self._dequeue(task.id)
        self._enter_group(task, group)

    def _enter_group(self, task: Task, group: Group) -> None:
        self._groups.enter(task.id, group, [mount.source for mount in cluster_mounts(task.spec)])
        self._queue.add((group,))

    def _dequeue(self, id: TaskId) -> None:
        self._away.pop(id, None)
        group = self._groups.leave(id)
        if group is None:
            return
        self._queue.discard_refused(group)
        self._texts.forget(group)
        self._waits.forget(group)
        self._failures.clear(group)
        if self._preemptor.release(group):
            self._queue.retry()

    # -- deciding ------------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        await run_in_slices(self._loading, self._clock)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._texts.run(self._queue), name="texts")
            while True:
                due = await self._queue.take(BATCH)
                self._texts.hold()
                await self._decide(due)
                await self._flush()
                self._texts.release()
                await asyncio.sleep(0)  # however little there was to write

    async def _decide(self, due: Sequence[Group]) -> None:
        """Decide the groups taken from the queue, and put the surplus back."""
        now = self._clock.monotonic()
        slices = TimeSlices(self._clock)
        groups = await self._without_waiting(due, slices)
        await self._pause(slices)
        remaining = BATCH
        for level in self._priorities.levels(groups, self._term.view()):
            if remaining <= 0:
                self._queue.put_back(level)
                continue
            firsts, others = self._partition(level, now)
            for shape, tasks in firsts.items():
                in_time = set(self._queue.in_time([group_of(task) for task in tasks]))
                if in_time:
                    tasks = [task for task in tasks if group_of(task) in in_time]
                    await self._place_first_tasks(shape, tasks, now)
                    await self._pause(slices)
            remaining -= len(level) - len(others)
            for group in others:
                if remaining <= 0:
                    self._queue.put_back((group,))
                elif self._queue.in_time((group,)):
                    remaining -= await self._decide_group(group, remaining, now) or 1
                    await self._pause(slices)

    async def _pause(self, slices: TimeSlices) -> None:
        """Let other coroutines run if the slice is over.  Decisions are written first: see ``_in_slices``."""
        if slices.is_over:
            await self._flush()
            await slices.yield_if_due()

    async def _without_waiting(self, groups: Sequence[Group], slices: TimeSlices) -> list[Group]:
        """Return the groups that need not wait for another service, or for an unreadable object.

        Without its spec a task would go to any node, with nothing reserved.  Without its service's labels it would
        leave its data, or start before its dependencies.
        """
        ready: list[Group] = []
        view, now, found = self._term.view(), self._clock.monotonic(), FoundWaits()
        for group in groups:
            if slices.is_over:
                await self._pause(slices)
                view, now, found = self._term.view(), self._clock.monotonic(), FoundWaits()
            waiting, tasks = None, self._tasks_of(group, 1)
            if tasks and (has_unknown_spec(view, tasks[0]) or has_unknown_service(view, tasks[0])):
                self._queue.set_aside(group)
                self._texts.set(group, Why(UNKNOWN_SPEC))
                continue
            key = f"dependencies of {group}"
            with self._accounting_failures.caught(key):
                waiting = self._waits.of(group, tasks[0], view, now, found) if tasks else None
            if (failure := self._accounting_failures.of(key)) is not None:
                # Unknown: a task that starts too late does less harm than a task that does not wait.
                waiting = Waiting(f"{WAITS_FOR}a decision: {failure.error}", until=failure.retry_at)
            if waiting is None:
                ready.append(group)
                continue
            self._preemptor.release(group)
            self._texts.set(group, Why(waiting.reason))
            if waiting.until is not None:
                self._queue.add_at(group, waiting.until)
        return ready

    def _partition(self, groups: Sequence[Group], now: float) -> tuple[Firsts, Sequence[Group]]:
        """Return single tasks that may be assigned together, and the groups that must be decided separately."""
        firsts: Firsts = {}
        others: list[Group] = []
        view = self._term.view()
        last_requirements: Requirements | None = None
        together: list[Task] | None = None
        with self._accounting_failures.caught("single tasks"):
            for group in groups:
                task = self._single(group, view)
                if task is None or task.node_id or returns(task, group) or task.id in self._away:
                    others.append(group)
                    continue
                if self._preemptor.may_preempt(task):
                    others.append(group)
                    continue
                requirements = self._requirements.of(task, view)
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

    async def _decide_group(self, group: Group, limit: int, now: float) -> int:
        """Decide up to ``limit`` tasks of the group and queue the rest again.  Returns the number of assigned tasks."""
        placed = Placed()
        claims = self._preemptor.claims(group)
        self._preemptor.release(group)
        self._queue.add(self._preemptor.release_below(group))
        with self._failures.caught(group):
            placed = await self._place_group(group, limit, now)
        if (failure := self._failures.of(group)) is not None:
            self._queue.add_at(group, failure.retry_at)
            for id in self._groups.ids(group):
                self._accounting.remove(id)
            self._texts.set(group, Why(f"scheduling failed: {failure.error}"))
        elif placed.refusals:
            self._queue.set_aside(group)
        elif self._groups.count(group) > limit:
            self._queue.add((group,))
        self._assignments += placed.assignments
        if placed.refusals:
            await self._refuse(group, placed)
        if claims - self._preemptor.claims(group):
            self._queue.retry()
        return len(placed.assignments)

    async def _refuse(self, group: Group, placed: Placed) -> None:
        """Handle refused tasks of a group, and so all that are left.  Preempt others for them if allowed."""
        task, reason = placed.refusals[0].task, placed.refusals[0].reason
        why = Why(reason or NO_NODE)
        with self._accounting_failures.caught(f"room for {group}"):
            requirements = self._requirements.of(task, self._term.view())
            if not reason:
                why = Why(requirements=requirements)
            chosen = {one.task.id for one in placed.assignments}
            tasks = [one for one in self._tasks_of(group, BATCH + len(chosen)) if one.id not in chosen]
            if tasks and self._preemptor.may_preempt(task):
                await self._preempt_for(group, tasks, requirements, why)
        self._texts.set(group, why)

    async def _preempt_for(
        self, group: Group, tasks: Sequence[Task], requirements: Requirements, why: Why
    ) -> None:
        """Choose nodes for refused tasks, and the tasks to preempt there."""
        work = self._preemptor.nominating(group, tasks, requirements, self._may_go_to(tasks[0], group))
        nominations = await self._in_slices(work, tasks)
        why.words.update((one.task.id, self._preemptor.words(one)) for one in nominations)
        self._preemptions += filter(None, map(self._preemptor.preemption, nominations))
        if len(nominations) < len(tasks) and (at := self._preemptor.more_at()) is not None:
            self._queue.add_at(group, at)
        if self._preemptions:
            await self._flush()  # so that other decisions do not choose the same victims

    def _may_go_to(self, task: Task, group: Group) -> Sequence[NodeId]:
        """Return the nodes on which tasks may be preempted."""
        if task.node_id:
            return (task.node_id,)
        if returns(task, group):
            return self._returning.nodes(task, self._term.view())
        return list(self._accounting.accounts)

    async def _in_slices(self, work: SlicedWork[T], tasks: Sequence[Task]) -> T:
        """Run the decision about ``tasks``, and write earlier decisions before it pauses.

        Commits about tasks that are decided but not written would release their reservations.
        """
        try:
            next(work)
        except StopIteration as end:
            at_once: T = end.value
            return at_once
        # The tasks may be refused.  Changes that free resources meanwhile make them due again.
        for group in {self._groups.of.get(task.id): None for task in tasks}:
            if group is not None:
                self._queue.set_aside(group)
        ids = [task.id for task in tasks]
        self._deciding.update(ids)
        decided: T | None = None
        try:
            await self._flush()
            await asyncio.sleep(0)  # the first step was not in a slice
            decided = await result_in_slices(work, self._clock)
            return decided
        finally:
            self._deciding.difference_update(ids)
            for id in ids:  # decided tasks are written next, and checked then
                if decided is None or self._accounting.node_of(id) is None:
                    self._update_task(id)

    async def _place_group(self, group: Group, limit: int, now: float) -> Placed:
        tasks = self._tasks_of(group, limit)
        if not tasks:
            return Placed()
        requirements = self._requirements.of(tasks[0], self._term.view())
        if tasks[0].node_id:
            return confirmed(tasks[0], requirements, self._accounting, self._term.view())
        if returns(tasks[0], group):
            return self._return(tasks[0], requirements)
        returned: Sequence[Assignment] = ()
        if self._away:
            tasks, returned = self._returned(tasks, requirements)
        is_last = self._groups.count(group) <= limit
        # A service without any assigned task, the usual case, has nothing in its slots.
        leaving_by_node = (
            leaving(tasks, self._term.view()) if self._accounting.copies(requirements.service_id) else {}
        )
        work = placing(
            tasks, requirements, self._choices, now=now, limit=limit, is_last=is_last, leaving=leaving_by_node
        )
        placed = await self._in_slices(work, [*tasks, *(one.task for one in returned)])
        placed = staying(placed, requirements, self._accounting, self._term.view())
        if self._away or returned:
            placed = replace(placed, assignments=(*returned, *map(self._with_note, placed.assignments)))
        return placed

    def _return(self, task: Task, requirements: Requirements) -> Placed:
        """Assign the task to the node with its slot's volumes, wait for that node, or move it to the common group."""
        match self._returning.decide(task, requirements, self._term.view()):
            case Assignment() as assignment:
                return Placed(assignments=(assignment,))
            case Refusal() as refusal:
                return Placed(refusals=(refusal,))
            case str() as why:
                self._dequeue(task.id)
                self._enter_group(task, group_of(task))
                self._away[task.id] = why
        return Placed()

    def _returned(
        self, tasks: Sequence[Task], requirements: Requirements
    ) -> tuple[list[Task], Sequence[Assignment]]:
        """Return ``tasks`` without those whose original node can run them after all, and the assignments of these."""
        left: list[Task] = []
        assignments: list[Assignment] = []
        for task in tasks:
            if task.id not in self._away:
                left.append(task)
                continue
            match self._returning.decide(task, requirements, self._term.view()):
                case Assignment() as assignment:
                    assignments.append(assignment)
                case Refusal():
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

    async def _place_first_tasks(self, shape: Requirements, tasks: Sequence[Task], now: float) -> None:
        """Assign single tasks, with equal requirements, of services without any other task."""
        placed: Placed | None = None
        with self._accounting_failures.caught("first tasks"):
            work = placing(tasks, shape, self._choices, now=now, limit=len(tasks), is_last=False)
            placed = await self._in_slices(work, tasks)
            placed = staying(placed, shape, self._accounting, self._term.view())
        if placed is None:
            # A task or node raised: decide each separately, so that only that one fails.
            for task in tasks:
                await self._decide_group(group_of(task), 1, now)
            return
        self._assignments += placed.assignments
        why = Why(requirements=shape)
        for refusal in placed.refusals:
            self._queue.set_aside(group_of(refusal.task))
            self._texts.set(group_of(refusal.task), why)

    def _tasks_of(self, group: Group, limit: int | None = None) -> list[Task]:
        """Return the group's pending tasks, longest waiting first."""
        view = self._term.view()
        tasks = (self._pending_task(id, view) for id in islice(self._groups.ids(group), limit))
        return [task for task in tasks if task is not None]

    def _pending_task(self, id: TaskId, view: View) -> Task | None:
        """Return the task if it waits for a decision, or None."""
        if id not in self._groups.of or id in self._deciding:
            return None
        task = view.lookup(Task, id)
        return task if task is not None and is_pending(task) else None

    def _single(self, group: Group, view: View) -> Task | None:
        """Return the task of a group with a single pending task, or None."""
        ids = self._groups.ids(group)
        return self._pending_task(next(iter(ids)), view) if len(ids) == 1 else None

    # -- writing -------------------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        """Write the decisions, many in one transaction."""
        decisions: list[Decision] = [*self._assignments, *self._preemptions]
        self._assignments, self._preemptions = [], []
        if not decisions:
            return
        ids = [decision.task.id for decision in decisions]
        self._deciding.update(ids)
        try:
            results = await write_decisions(self._term, decisions, timestamp(self._clock.now_ns()))
        finally:
            self._deciding.difference_update(ids)
        outcomes: list[tuple[str, SkepError | None]] = []
        view, may_help = self._term.view(), False
        for decision, result in zip(decisions, results, strict=True):
            id = decision.task.id
            for victim in decision.victims if isinstance(decision, Preempt) else ():
                self._update_task(victim)
            if isinstance(decision, Assignment) and shows(view, decision):
                self._dequeue(id)
                continue
            # A decision that was not written has no reservation.  Others may have been refused because of it.
            may_help |= self._update_task(id)
            group = self._groups.of.get(id)
            if group is None:
                continue
            outcomes.append((group, result))
            if result is None and isinstance(decision, Assignment):
                self._queue.add((group,))  # its node was removed at the same moment
        self._failures.requeue_failed(self._queue, "decisions", outcomes)
        if may_help:
            self._queue.retry()

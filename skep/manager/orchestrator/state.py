"""State of the orchestrator: which services and slots are due, and the changes of a service (``convergence``)."""

from collections.abc import Iterator, Mapping, Sequence, Set
from math import inf
from random import Random

from skep.aio.clock import Clock
from skep.aio.time_slices import SlicedWork
from skep.errors import SkepError, Unavailable
from skep.manager.control_loops.failures import Failures
from skep.manager.control_loops.informer import batches_of
from skep.manager.control_loops.loop_driver import Decision, Recheck
from skep.manager.control_loops.work_queue import WorkQueue
from skep.manager.nodes.heartbeats import configured_grace_s
from skep.manager.orchestrator.changes import (
    Cause,
    Change,
    ReplaceTask,
    RetireTask,
    Step,
    decided_for,
    fallback_for,
)
from skep.manager.orchestrator.convergence import deciding_all, deciding_some
from skep.manager.orchestrator.decision_inputs import Situation, is_down_only
from skep.manager.orchestrator.due_slots import DueSlots, SlotKey, slot_key
from skep.manager.orchestrator.observed_times import ObservedTimes, is_waiting
from skep.manager.orchestrator.replacement.disconnection import policy_on, replaced_at
from skep.manager.orchestrator.replacement.disruption_mode import DisruptionMode
from skep.manager.orchestrator.replacement.enforcement import is_drained, overcommitted, violates_constraints
from skep.manager.orchestrator.replacement.staging import RequestCounts
from skep.manager.orchestrator.replacement.step_queries import StepQueries
from skep.manager.orchestrator.replicated import retire_all
from skep.manager.orchestrator.slots import is_unknown, is_unusable
from skep.manager.orchestrator.unwritten_changes import Refusals, UnwrittenChanges
from skep.manager.queries.board import Ask, ask_nothing
from skep.manager.services.freezes import held_by, stack_of_service
from skep.model.node import Node, is_lost
from skep.model.options.dependencies import DEPENDS_ON, dependencies_of
from skep.model.options.labels import JOB_TTL, priority_of
from skep.model.options.slot_volumes import has_other_properties
from skep.model.service import UNDER_WAY, Service
from skep.model.staging.updates import TaskRequests
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, TaskId, VolumeId
from skep.model.volume import Volume
from skep.store.interface import Commit, Created, Deleted, LoopStore, Updated, View
from skep.store.kinds import (
    SpecVersion,
    as_run,
    has_unreadable_run,
    has_unreadable_spec,
    has_unreadable_status,
    spec_of,
    with_readable_specs,
)

THROTTLE_S_PER_TASK = 25e-6
"""Three times the cost of one task in a decision."""
THROTTLE_S_MIN, THROTTLE_S_MAX = 0.01, 0.25
"""Throttling below the minimum is skipped, and above the maximum it is cut."""


class OrchestratorState:
    """Services that are due, and what decisions remember of earlier commits."""

    def __init__(self, term: LoopStore, clock: Clock, random: Random, ask: Ask = ask_nothing) -> None:
        self._view = term.view
        self._clock = clock
        self.queue: WorkQueue[ServiceId] = WorkQueue(clock, self._priority_of)
        self.failures = Failures(clock, random)
        self._due = DueSlots()
        self._refusals = Refusals(self.failures, clock)
        self.unwritten = UnwrittenChanges()
        self.disruption = DisruptionMode(term, clock, self._requeue_all)
        self.seen = ObservedTimes(clock.monotonic())
        self.global_services: set[ServiceId] = set()
        self._overcommitted: dict[NodeId, frozenset[TaskId]] = {}
        self._sound_nodes: dict[NodeId, bool] = {}
        self.measured = RequestCounts()
        self.queries = StepQueries(term.view, clock, random, ask, self._note_verdict)
        self._throttled_until: dict[ServiceId, float] = {}
        """Time at which the throttling of each large service ends."""

    def start(self, snapshot: View) -> Iterator[None]:
        """Queue every service, with pauses.  Commits in between are loaded with their newest state too."""
        self.seen = ObservedTimes(self._clock.monotonic())
        self._due.clear()
        self.unwritten.clear()
        self._overcommitted.clear()
        self._sound_nodes.clear()
        self.disruption.start(snapshot)
        self.global_services.clear()
        self.measured.start(())
        self.queries.start(())
        yield
        for services in batches_of(self._view, Service):
            self.global_services.update(service.id for service in services if _is_global(service))
            self.measured.add(services)
            self.queries.add(services)
            self.queue.add(service.id for service in services)
            yield

    def queue_left_over(self) -> Iterator[None]:
        """Queue the services of tasks whose service no longer exists."""
        known = set(self._view().ids(Service))
        left_over: set[str] = set()
        for tasks in batches_of(self._view, Task):
            left_over.update({task.service_id for task in tasks} - known)
            yield
        self.queue.add(ServiceId(id) for id in sorted(left_over) if id)

    # -- what a commit concerns --------------------------------------------------------------------------------

    def on_commit(self, commit: Commit) -> None:
        """Queue the services whose decision may change, and note their due slots."""
        self.seen.record(commit, self._clock.monotonic())
        self.measured.note(commit)
        self.queries.note(commit)
        self.disruption.note(commit)  # first: a disruption must be known before the decisions it would cause
        for service_id, slot in self._affected(commit):
            if slot is None:
                self._due.add_all(service_id)
            else:
                self._due.add(service_id, slot)
            self.queue.add((service_id,))

    def _affected(self, commit: Commit) -> Iterator[tuple[ServiceId, SlotKey | None]]:
        """Yield the services and slots whose decision may change with ``commit``.  None means all slots."""
        for event in commit.events:
            match event:
                case Updated(Service() as old_service, Service() as new_service):
                    yield from self._no_longer_required(old_service, new_service)
                case Updated(Swarm() as old_swarm, Swarm() as new_swarm) if _holds_others(
                    old_swarm, new_swarm
                ):
                    yield from ((service.id, None) for service in self._view().find(Service))
            match event:
                case Created(Service() as service) | Updated(_, Service() as service):
                    if _is_global(service):
                        self.global_services.add(service.id)
                    yield service.id, None
                case Deleted(Service() as service):
                    self.global_services.discard(service.id)
                    self._throttled_until.pop(service.id, None)
                    self.failures.clear(service.id)
                    self._refusals.forget(service.id)
                    yield service.id, None
                case Created(Task() as task) | Deleted(Task() as task):
                    if task.service_id:
                        yield task.service_id, self._slot_of_event(task)
                case Updated(Task() as old, Task() as new):
                    if new.service_id and (
                        _is_relevant(old, new)
                        or self._is_on_unusable_node(old, new)
                        or self._holds_place_of_update(old, new)
                        or self._is_refused_otherwise(old, new)
                    ):
                        yield new.service_id, self._slot_of_event(new)
                case Created(Node() as node):
                    self._sound_nodes.pop(node.id, None)
                    yield from ((id, node.id) for id in sorted(self.global_services))
                case Deleted(Node() as node):
                    self._overcommitted.pop(node.id, None)
                    yield from self._slots_of_node(node)
                case Updated(Volume() as was, Volume() as volume) if is_drained(was) != is_drained(volume):
                    yield from self._slots_with(volume.id)
                case Updated(Node() as before, Node() as after):
                    if before.spec != after.spec or has_other_properties(before, after):
                        self._overcommitted.pop(after.id, None)
                        yield from self._slots_of_node(after)
                    elif _affects_tasks(before, after):
                        yield from self._slots_of_node(after)

    def _no_longer_required(self, old: Service, new: Service) -> Iterator[tuple[ServiceId, None]]:
        """Yield services that only ``old`` depended on: a job with a time to live may have been kept for it."""
        before = dependencies_of(old.spec.labels) if DEPENDS_ON in old.spec.labels else ()
        after = dependencies_of(new.spec.labels) if new.removed_at is None else ()
        for name in sorted(
            {one.service for one in before} - {one.service for one in after if one.is_required}
        ):
            yield from ((service.id, None) for service in self._view().find(Service, name=name))

    def _slot_of_event(self, task: Task) -> SlotKey | None:
        """Return the slot that an event of the task makes due, or None for all slots of its service.

        A replicated job counts its runs, and the end of the last task starts a job's time to live.
        """
        service = self._view().lookup(Service, task.service_id) if task.job_iteration is not None else None
        if service is not None and (service.spec.mode.global_job is None or JOB_TTL in service.spec.labels):
            return None
        return slot_key(task) or None

    def _slots_with(self, id: VolumeId) -> Iterator[tuple[ServiceId, SlotKey]]:
        """Yield the slots with a task that uses a cluster volume."""
        for task in self._view().find(Task):
            if task.service_id and any(one.id == id for one in task.volumes):
                yield task.service_id, slot_key(task)

    def _holds_place_of_update(self, old: Task, new: Task) -> bool:
        """Return whether an outdated task was assigned, which its update may retire for a new task on that node."""
        if old.node_id or not new.node_id:
            return False
        service = self._view().lookup(Service, new.service_id)
        return service is not None and new.spec_version != service.spec_version

    def _is_refused_otherwise(self, old: Task, new: Task) -> bool:
        """Return whether nodes refuse the task for other reasons, which may fail the service's update early."""
        if old.status.err == new.status.err or not _is_refused(new):
            return False
        service = self._view().lookup(Service, new.service_id)
        status = service.update_status if service is not None else None
        return status is not None and status.state in UNDER_WAY

    def _is_on_unusable_node(self, old: Task, new: Task) -> bool:
        """Return whether the task was just assigned to a node that became unusable at the same moment."""
        if old.node_id == new.node_id:
            return False
        node = self._view().lookup(Node, new.node_id)
        return node is None or is_unusable(node) or violates_constraints(new, node)

    def _slots_of_node(self, node: Node) -> Iterator[tuple[ServiceId, SlotKey]]:
        """Yield the slots of a changed or deleted node: its tasks' slots, and a slot of each global service."""
        self._sound_nodes.pop(node.id, None)
        yield from ((id, node.id) for id in sorted(self.global_services))
        for task in self._view().find(Task, node_id=node.id):
            if task.service_id:
                yield task.service_id, slot_key(task)

    def _priority_of(self, id: ServiceId) -> int:
        service = self._view().lookup(Service, id)
        return priority_of(service.spec.labels) if service is not None else 0

    def note_requests(self, requests: Mapping[TaskId, TaskRequests]) -> None:
        """Decide about the services with bounds for requests to their new tasks."""
        self.measured.requests = requests
        for id in sorted(self.measured.services):
            self._due.add_all(id)
            self.queue.add((id,))

    def _note_verdict(self, id: ServiceId) -> None:
        """Decide about a service whose update has a query."""
        self._due.add_all(id)
        self.queue.add((id,))

    def _requeue_all(self) -> None:
        """Make all slots due, at the end of a freeze, which began with more than half of the nodes down."""
        self._due.clear()
        self.queue.add(service.id for service in self._view().find(Service))

    # -- decisions -----------------------------------------------------------------------------------------------

    def must_wait(self, id: ServiceId) -> bool:
        """Return whether a due service is decided later: its last decision is not written yet, or it is throttled."""
        return self.unwritten.defers(id, self._view().lookup(Service, id)) or self.is_throttled(id)

    def is_throttled(self, service_id: ServiceId) -> bool:
        """Return whether a large service was decided completely a moment ago.  If so, it is queued for later."""
        until = self._throttled_until.get(service_id)
        if until is None or self._due.is_partial(service_id):
            return False
        if until > self._clock.monotonic():
            self.queue.add_at(service_id, until)
            return True
        del self._throttled_until[service_id]
        return False

    def decide(self, id: ServiceId) -> Decision[Change]:
        """Decide about one service.  The changes that may be written now are ``unwritten`` afterwards."""
        service, is_decided = self._view().lookup(Service, id), False
        try:
            steps = yield from self._steps(id)
            changes = [step for step in steps if not isinstance(step, Recheck)]
            admitted, retry_at = self._refusals.admitted(id, changes)
            is_decided = True
        finally:
            if not is_decided:
                self._due.add_all(id)
        yield from (step for step in steps if isinstance(step, Recheck))
        if retry_at is not None:
            yield Recheck(retry_at)
        self.unwritten.add(id, service, admitted)

    def next_writes(self, limit: int) -> list[tuple[ServiceId, Change]]:
        """Return up to ``limit`` changes to write now, and queue the services that waited for them."""
        changes, due = self.unwritten.take(limit)
        self.queue.add(due)
        return [(id, change) for id, change in changes if not self.is_held(id, change)]

    def _steps(self, service_id: ServiceId) -> SlicedWork[Sequence[Step]]:
        """Decide about one service.  Returns nothing if the inputs changed meanwhile."""
        view = self._view()
        service = view.lookup(Service, service_id)
        if service is None:
            is_unreadable = service_id in view.unreadable(Service)
            return () if is_unreadable else retire_all(view.find(Task, service_id=service_id))
        if has_unreadable_run(view, service_id):
            return ()  # all its tasks would be stopped as tasks of another run
        some = self._due.begin(service)
        run = as_run(view, service)
        situation = self._situation(view, run, some[1] if some is not None else None)
        steps: Sequence[Step] | None
        if some is not None:
            steps, settled = (yield from deciding_some(situation, some[1], some[0])), None
        else:
            self._throttle(service_id, len(situation.tasks))
            steps, settled = yield from deciding_all(situation)
        # Each change checks for tasks that changed meanwhile.  A freeze or a new spec would affect all of them.
        is_same = (
            self._view().lookup(Service, service_id) is service
            and situation.is_frozen == self.disruption.is_frozen
            and situation.replaces_from == self.disruption.replaces_from
            and situation.keeps_unfit == bool(held_by(self._view(), stack_of_service(run)))
        )
        if not is_same:
            self._throttled_until.pop(service_id, None)
        if not is_same or steps is None:
            self._due.add_all(service_id)
            self.queue.add((service_id,))
            return ()
        if some is None:
            self._due.end(service, None if view.unreadable(SpecVersion) else settled)
        elif steps:
            self._due.put_back(service_id, some[1])
        return [decided_for(run, step) for step in steps]

    def _throttle(self, service_id: ServiceId, tasks: int) -> None:
        """Set the earliest time at which the whole service is decided again."""
        if (rest := throttle_s(tasks)) > 0:
            self._throttled_until[service_id] = self._clock.monotonic() + rest

    def _situation(self, view: View, run: Service, due: Set[SlotKey] | None) -> Situation:
        """Return the situation of a service, limited to the ``due`` slots unless that is None."""
        if due is None:
            tasks = view.find(Task, service_id=run.id)
        else:
            tasks = [task for key in due for task in view.find(Task, slot=f"{run.id}/{key}")]
        nodes = sorted(key for key in due or () if isinstance(key, str))
        return Situation(
            service=run,
            tasks=with_readable_specs(view, run, tuple(tasks)),
            # A view is valid until the next pause, and the decision pauses.
            nodes=lambda: self._nodes(nodes if due is not None else None),
            node=lambda node_id: self._view().lookup(Node, node_id),
            overcommitted=self._overcommitted_on,
            spec_of=lambda task: spec_of(self._view(), task),
            is_unknown=lambda task: has_unreadable_spec(self._view(), task),
            has_unknown_status=lambda task: has_unreadable_status(self._view(), task),
            is_drained=lambda volume: is_drained(self._view().lookup(Volume, VolumeId(volume))),
            volume=lambda volume_id: self._view().lookup(Volume, volume_id),
            seen=self.seen,
            now=self._clock.monotonic(),
            now_ns=self._clock.now_ns(),
            is_frozen=self.disruption.is_frozen,
            replaces_from=self.disruption.replaces_from,
            keeps_unfit=bool(held_by(view, stack_of_service(run))),
            silence_s=configured_grace_s(view),
            sound_nodes=self._sound_nodes,
            requests=self.measured.requests_of(run, tasks),
            query=self.queries.verdict(run.id),
        )

    def _nodes(self, ids: Sequence[str] | None) -> tuple[Node, ...]:
        """Return the existing nodes with these ids, or all nodes if ``ids`` is None."""
        view = self._view()
        if ids is None:
            return tuple(view.find(Node))
        return tuple(node for id in ids if (node := view.lookup(Node, id)) is not None)

    def _overcommitted_on(self, node_id: NodeId) -> frozenset[TaskId]:
        """Return the tasks that exceed the node's resources, cached until the node changes.

        The scheduler never assigns more than the node has, so new tasks cannot change the result.
        """
        if node_id not in self._overcommitted:
            view = self._view()
            node = view.lookup(Node, node_id)
            tasks = view.find(Task, node_id=node_id)
            self._overcommitted[node_id] = overcommitted(node, tasks) if node else frozenset()
        return self._overcommitted[node_id]

    # -- writes --------------------------------------------------------------------------------------------------

    def is_held(self, service_id: ServiceId, change: Change) -> bool:
        """Return whether ``change`` is decided again later, because its task may still return with its node.

        Since the decision a disruption may have begun, or the node may have been back for a while.
        """
        if not isinstance(change, ReplaceTask | RetireTask) or change.cause is not Cause.NODE_IS_LOST:
            return False
        if self.disruption.is_frozen:
            return True  # its end queues all services
        until = max(self.disruption.replaces_from, self._replaced_at(service_id, change.task))
        if until <= self._clock.monotonic():
            return False
        if until < inf:
            self.queue.add_at(service_id, until)
        return True

    def _replaced_at(self, service_id: ServiceId, task: Task) -> float:
        """Return until when a task on a node that is down keeps its slot, by the policy of its service."""
        view = self._view()
        service, node = view.lookup(Service, service_id), view.lookup(Node, task.node_id)
        if service is None or node is None or not is_down_only(node):
            return -inf
        return replaced_at(policy_on(node, service), task, self.seen.down(node))

    def on_results(
        self, changes: Sequence[tuple[ServiceId, Change]], results: Sequence[object]
    ) -> list[tuple[ServiceId, Change]]:
        """Queue the services whose changes were not written.  Returns changes to write in place of refused ones."""
        others: list[tuple[ServiceId, Change]] = []
        for (id, change), result in zip(changes, results, strict=True):
            retry_at = self._refusals.note(id, change, result)
            if retry_at is not None:
                self.queue.add_at(id, retry_at)
            if isinstance(result, SkepError) and not isinstance(result, Unavailable):
                other = fallback_for(change, result)
                others += [(id, other)] if other is not None else []
        return others

    def error_of(self, id: ServiceId) -> str | None:
        """Return why the service's decision failed, or why one of its changes was refused."""
        failure = self.failures.of(id)
        return failure.error if failure is not None else self._refusals.error(id)


def throttle_s(tasks: int) -> float:
    """Return the minimum seconds until a service with so many tasks is decided again.

    A decision about thousands of tasks takes tens of milliseconds.  One decision handles everything that their nodes
    report meanwhile.
    """
    delay_s = tasks * THROTTLE_S_PER_TASK
    return min(delay_s, THROTTLE_S_MAX) if delay_s >= THROTTLE_S_MIN else 0.0


def _affects_tasks(before: Node, after: Node) -> bool:
    """Return whether a change of a node's status can change a decision about its tasks."""
    is_same = before.status.addr == after.status.addr and is_unknown(before) == is_unknown(after)
    return not is_same or is_unusable(before) != is_unusable(after) or is_lost(before) != is_lost(after)


def _holds_others(old: Swarm, new: Swarm) -> bool:
    """Return whether a change freeze or a maintenance window has changed."""
    return (old.change_freezes, old.window, old.stack_windows) != (
        new.change_freezes,
        new.window,
        new.stack_windows,
    )


def _is_global(service: Service) -> bool:
    return service.spec.mode.name in ("global", "global-job")


def _is_relevant(old: Task, new: Task) -> bool:
    """Return whether a change of a task can change a decision.  The agent's steps between ASSIGNED and RUNNING cannot.

    Exceptions are a task that is refused an address or a node (its update may retire the tasks that hold it), a task
    that no longer waits for another service (its progress deadline starts), a preempted or moving task, and a task that
    is prepared while its predecessor runs (the decision waits until it is ready).
    """
    if old.desired_state != new.desired_state or (_is_refused(new) and not _is_refused(old)):
        return True
    if (is_waiting(old) and not is_waiting(new)) or old.preemption != new.preemption:
        return True
    if old.relocation != new.relocation:
        return True
    prepares = new.desired_state is TaskState.READY
    first_state = TaskState.READY if prepares else TaskState.RUNNING
    return old.status.state != new.status.state and new.status.state >= first_state


def _is_refused(task: Task) -> bool:
    return task.status.state < TaskState.ASSIGNED and bool(task.status.err) and not is_waiting(task)

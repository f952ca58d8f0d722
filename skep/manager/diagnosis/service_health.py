"""Whether a service is in its desired state.

This is the only place that decides it.  ``GET /services``, ``skep status``, ``skep top``, ``skep stack``, ``skep
explain``, the dashboard and the metrics show its result, so they cannot disagree.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from typing import NamedTuple, TypeVar

from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.aio.time_slices import TimeSlices
from skep.manager.autoscaling.decision import AT_ZERO
from skep.manager.control.tasks import known_status, with_damage
from skep.manager.diagnosis.explanations import IS_STOPPED, NO_NODE, ServiceExplanation, explain_service
from skep.manager.diagnosis.reasons import SlotId, hostname, is_stable, slot_of
from skep.manager.orchestrator.global_services import is_eligible, takes_new_tasks
from skep.manager.orchestrator.slots import DoneSlots
from skep.manager.services.job_listing import schedule_words
from skep.manager.services.job_runs import can_begin, is_left_out
from skep.manager.services.routes import door_network
from skep.model.node import Node
from skep.model.node_reports.node_refusals import NodeRefusal, node_refusals_in
from skep.model.options.affinity import ANTI_AFFINITY, affinities_of
from skep.model.options.autoscaling import is_at_zero
from skep.model.options.labels import is_stopped
from skep.model.service import PAUSED, UNDER_WAY, Service, ServiceHealth, ServiceStatus, UpdateStatus
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.model.values.stacks import STACK_LABEL
from skep.store.interface import View
from skep.store.kinds import as_run

EXPLAINED_MAX = 2_000
"""Largest number of tasks in one explanation, which takes a few microseconds for each of them."""
_BATCH = 5_000
"""Number of objects counted between two pauses for the event loop."""

T = TypeVar("T")


class _Slots(NamedTuple):
    """Slots with an active task.  In ``settled`` slots each of them runs, and not in a crash loop."""

    settled: Collection[SlotId]
    others: Collection[SlotId]


async def status_with_health(view: View, service: Service, now_ns: int, clock: Clock) -> ServiceStatus:
    """Return the counts and the health of ``service``.  Yields to the event loop between tasks.

    Args:
        view: A state of the store, which may be an earlier one.
        now_ns: Unix time of ``view``.
    """
    status = await service_status(view, service)
    return replace(status, health=await _health(view, service, status, now_ns, clock))


async def _health(
    view: View, service: Service, status: ServiceStatus, now_ns: int, clock: Clock
) -> ServiceHealth:
    slots = await _slots(view, service, now_ns, clock)
    update = (service.update_status or UpdateStatus()).state
    is_settled = not slots.others and len(slots.settled) == status.running_tasks == status.desired_tasks
    if service.job_status is None and is_settled and update not in PAUSED and update not in UNDER_WAY:
        # An explanation would find the same, at ten times the cost.
        if is_at_zero(service.spec):
            return ServiceHealth(reason=AT_ZERO)
        if is_stopped(service.spec.labels):
            return ServiceHealth(reason=IS_STOPPED)
        is_lacking = service.spec.mode.global_ is not None and not status.desired_tasks
        return ServiceHealth(reason=NO_NODE if is_lacking else "")
    return _explanation(view, service, status, slots, now_ns, lambda _: True).health


async def explanation_of(
    view: View,
    service: Service,
    status: ServiceStatus,
    now_ns: int,
    clock: Clock,
    *,
    is_new: Callable[[Task], bool] = lambda _: True,
) -> ServiceExplanation:
    """Return the explanation of ``service``, which has its health.

    Of a large service only tasks in slots that are not settled are explained.  ``is_new`` returns whether a task
    matches the current spec.
    """
    slots = await _slots(view, service, now_ns, clock)
    return _explanation(view, service, status, slots, now_ns, is_new)


def _explanation(
    view: View,
    service: Service,
    status: ServiceStatus,
    slots: _Slots,
    now_ns: int,
    is_new: Callable[[Task], bool],
) -> ServiceExplanation:
    tasks = view.find(Task, service_id=service.id)
    is_long = len(tasks) > EXPLAINED_MAX
    if is_long:
        tasks = [task for task in tasks if slot_of(task) not in slots.settled][:EXPLAINED_MAX]
    known = [replace(task, status=known_status(view, task)) if task.is_active else task for task in tasks]
    run = as_run(view, service)
    explanation = explain_service(
        run,
        [with_damage(view, task) for task in known],
        running=status.running_tasks,
        active=len(slots.settled) + len(slots.others),
        left_out=len(slots.settled) if is_long else 0,
        wanted=status.desired_tasks,
        done=status.completed_tasks if service.job_status is None else 0,
        nodes=_nodes_of(view, tasks),
        now_ns=now_ns,
        is_new=is_new,
        can_begin=lambda: can_begin(view, run, now_ns),
    )
    explanation = _with_neighbors(explanation, service, view)
    # A run keeps the labels with which it began, but its schedule has the present ones.
    explanation = replace(explanation, schedule=schedule_words(service))
    if explanation.reason == AT_ZERO:
        waking = (
            ", the next request at the front door starts a task"
            if door_network(view) is not None
            else ", and no request can start a task, because there is no front door. Create it with skep door up"
        )
        return replace(explanation, summary=explanation.summary + waking)
    if not is_stopped(service.spec.labels):
        return explanation
    return replace(explanation, summary=explanation.summary + _left_on_lost_nodes(view, tasks))


def _with_neighbors(explanation: ServiceExplanation, service: Service, view: View) -> ServiceExplanation:
    """Add what other services contribute to an affinity that no node meets: they are missing, have no tasks, or have a
    label that keeps this service's tasks away.
    """
    reason = explanation.reason
    refusals = node_refusals_in(reason)
    found: list[str] = []
    if NodeRefusal.AFFINITY in refusals:
        for term in affinities_of(service.spec.labels).near:
            there = view.find(Service, name=term.key)
            if not there:
                found.append(f"service {term.service} does not exist")
            elif not any(
                task.is_active and task.node_id
                for one in there
                for task in view.find(Task, service_id=one.id)
            ):
                found.append(f"service {term.service} has no task on a node")
    if NodeRefusal.ANTI_AFFINITY in refusals:
        key = service.spec.name.lower()
        found += [
            f"the label {ANTI_AFFINITY} of {_named(one, service)} keeps it apart"
            for one in view.find(Service)
            if one.id != service.id and any(term.key == key for term in affinities_of(one.spec.labels).apart)
        ]
    if not found:
        return explanation
    named = "; ".join((reason, *dict.fromkeys(found)))
    return replace(explanation, reason=named, summary=explanation.summary.replace(reason, named, 1))


def _named(other: Service, service: Service) -> str:
    """Return the name of another service.  Readers of a reason may not see services of other stacks."""
    own = service.spec.labels.get(STACK_LABEL)
    is_seen = own is None or own == other.spec.labels.get(STACK_LABEL)
    return other.spec.name if is_seen else "services of other stacks"


def _left_on_lost_nodes(view: View, tasks: Iterable[Task]) -> str:
    """Return a clause about tasks of a stopped service that nobody knows to have ended, or an empty text."""
    left = [task for task in tasks if known_status(view, task).state is TaskState.UNKNOWN]
    names = sorted({hostname(view.lookup(Node, task.node_id), task) for task in left})
    is_ = "is" if len(names) == 1 else "are"
    return f"; {len(left)} may still run on {', '.join(names)}, which {is_} down" if left else ""


async def _slots(view: View, service: Service, now_ns: int, clock: Clock) -> _Slots:
    settled: set[SlotId] = set()
    others: set[SlotId] = set()
    slices = TimeSlices(clock)
    for task in view.find(Task, service_id=service.id):
        if task.is_active:
            runs = known_status(view, task).state is TaskState.RUNNING and is_stable(task, now_ns)
            (settled if runs else others).add(slot_of(task))
        await slices.yield_if_due()
    return _Slots(settled - others, others)


def _nodes_of(view: View, tasks: Sequence[Task]) -> dict[NodeId, Node]:
    """Return the nodes that a reason may name: all nodes if a task waits for one, else the nodes of the tasks."""
    if any(task.status.state is TaskState.PENDING and task.status.err for task in tasks):
        return {node.id: node for node in view.find(Node)}
    found = (view.lookup(Node, id) for id in {task.node_id for task in tasks})
    return {node.id: node for node in found if node is not None}


async def service_status(view: View, service: Service) -> ServiceStatus:
    """Return how many tasks of ``service`` run, are wanted, and are done.  Yields to the event loop between batches.

    A slot of a one-shot service is done if its youngest task is.

    For a global service, the desired number is the number of its eligible nodes.  SwarmKit counts the service's tasks
    instead, so it misses tasks that wait for their restart, and counts slots twice during an update.

    Source: swarmkit, manager/controlapi/service.go (ListServiceStatuses).
    """
    iteration = service.job_status.job_iteration if service.job_status is not None else None
    running = wanted = completed = 0
    node_ids: set[NodeId] = set()
    run, of_job = as_run(view, service), defaultdict[NodeId, list[Task]](list)
    mode, total = run.spec.mode, 0
    slots, is_one_shot = DoneSlots(), service.spec.task_template.ends_on_success
    async for task in _in_turns(view.find(Task, service_id=service.id)):
        if iteration is not None and task.job_iteration != iteration:
            continue
        state = known_status(view, task).state
        if is_one_shot:
            slots.add(task)
        running += state is TaskState.RUNNING
        completed += state is TaskState.COMPLETE
        if task.is_wanted:
            node_ids.add(task.node_id)
            wanted += state is not TaskState.COMPLETE  # a completed task belongs to a global job
        if mode.global_job is not None:
            of_job[task.node_id].append(task)
    done = {slot for _, slot in slots.done()} if iteration is None else ()
    if mode.replicated is not None:
        wanted, completed = service.spec.replicas, len(done)
    elif mode.replicated_job is not None:
        is_idle = service.job_status is not None and service.job_status.awaits_first_run
        wanted = 0 if is_idle else mode.replicated_job.max_concurrent or 0
        total = mode.replicated_job.total_completions or 0
    elif mode.global_job is not None:
        total = sum(not is_left_out(run, slot) for slot in of_job.values())
    elif mode.global_ is not None:
        wanted = completed = 0
        async for node in _in_turns(view.find(Node)):
            is_eligible_node = takes_new_tasks(node) or node.id in node_ids
            if is_eligible_node and is_eligible(node, service):
                wanted += 1
                completed += node.id in done
    return ServiceStatus(
        running_tasks=running,
        desired_tasks=wanted,
        completed_tasks=completed,
        total_tasks=total,
    )


async def _in_turns(objects: Sequence[T]) -> AsyncIterator[T]:
    """Yield the objects one after the other, with pauses for the event loop."""
    for start in range(0, len(objects), _BATCH):
        for object in objects[start : start + _BATCH]:
            yield object
        await asyncio.sleep(0)

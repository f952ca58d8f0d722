"""The reason why a task or a service is not in its desired state, as one sentence that Skep shows everywhere.

If something blocks a task now, such as a missing node or another service, that is the reason.  Otherwise it is the last
failure in the task's slot, even while a new attempt is being prepared or started.  Counts and countdowns are separate
fields, so that the reason does not change between two attempts.  In a crash loop, it stays until a task has run long
enough to end the loop.

A container that Skep itself killed shows why: the failed health check or the memory limit, not the signal.  Pure.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from typing import Final, TypeAlias

from msgspec.structs import replace

from skep.manager.diagnosis.unmet_needs import fits_no_node, unknown_names, with_needs
from skep.manager.orchestrator.observed_times import STABLE_S
from skep.model.history import masked_text
from skep.model.node import Availability, Node, NodeState
from skep.model.node_reports.conditions import disk_pressure
from skep.model.node_reports.node_refusals import NodeRefusal, node_refusals_in
from skep.model.options.constraints import is_satisfied
from skep.model.options.dependencies import WAITS_FOR, is_wait
from skep.model.service import Service, ServiceSpec
from skep.model.task import Restart, Task, TaskState
from skep.model.task_end import (
    FAILED_CHECK,
    EndCause,
    TaskEnd,
    check_result,
    on_one_line,
    signal_of,
    words_of,
)
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.times import SECOND_NS, ZERO_TIME, Timestamp, unix_ns

_NEVER_STARTED: Final = "starting container failed"
_CONTAINER_GONE: Final = "No such container"
_UNHEALTHY: Final = "dockerexec: unhealthy container"
_NON_ZERO: Final = "task: non-zero exit"
_CODE: Final = re.compile(rf"{_NON_ZERO} \(([0-9]{{1,3}})\)")
_RUNTIME_WORDS: Final = re.compile(r"^.*unable to start container process: |: unknown$", re.DOTALL)
"""Words that runc adds before and after the actual error."""
_BUNDLE_ROOT: Final = re.compile(r"/\S*/bundles/[0-9a-f]{64}/rootfs(?=/)")
"""Path of a container's root on its node.  It differs from one attempt to the next."""
_COMMAND_CHARACTERS_MAX: Final = 100
"""Characters of a health check's command in a reason."""
_NODES_MAX: Final = 3
"""Nodes that a reason names.  It should fit a line."""
LOOP_FROM: Final = 2
"""Number of consecutive failures from which on texts speak of a crash loop."""


SlotId: TypeAlias = tuple[int, NodeId]
"""A slot of a service: its number, or the node of a global service's task."""


class CauseKind(Enum):
    """Cause that keeps a service from its desired state."""

    UNHEALTHY = "unhealthy"
    OUT_OF_MEMORY = "out-of-memory"
    EXIT = "exit"
    SIGNAL = "signal"
    COMPLETED = "completed"
    """The process ends repeatedly with code 0."""
    START_FAILED = "start-failed"
    REJECTED = "rejected"
    """The node cannot prepare the task's image, mounts or networks."""
    NO_NODE = "no-node"
    TOO_LARGE = "too-large"
    """No node of the cluster is as large as the task needs, or has its plugins."""
    NOT_ALLOCATED = "not-allocated"
    """A network has no address left for the task, or another service has its port."""
    NO_ADDRESS = "no-address"
    """The network has no address left, and no task on it is stopping."""
    NODE_LOST = "node-lost"
    """The node is down."""
    WAITING = "waiting"
    """The task waits for another service or a cluster volume."""
    DEPENDENCY = "dependency"
    """The task waits for a service that does not exist, is stopped, or was given up."""
    PROGRESSING = "progressing"
    """The task is starting, and nothing has failed."""

    @property
    def is_failure(self) -> bool:
        """Whether a task failed, so that waiting alone may not help."""
        return self.weight == 0

    @property
    def weight(self) -> int:
        """Rank of the cause.  The lowest is shown first."""
        return _WEIGHTS.get(self, 0)


_WEIGHTS: Final[Mapping[CauseKind, int]] = {
    CauseKind.TOO_LARGE: 1,
    CauseKind.NO_NODE: 1,
    CauseKind.NOT_ALLOCATED: 1,
    CauseKind.NO_ADDRESS: 1,
    CauseKind.NODE_LOST: 2,
    CauseKind.WAITING: 3,
    CauseKind.DEPENDENCY: 3,
    CauseKind.PROGRESSING: 4,
}


class TaskProblem(ApiObject):
    """Reason why one task is not in its desired state.

    ``failures`` counts the failures in a row in the task's slot.  ``since`` is the first of them, or when the task
    entered its state, and ``at`` is the last one.  ``next_attempt`` is empty without a scheduled attempt.  ``end``
    belongs to the failed task and has its last lines.
    """

    kind: str = always(CauseKind.PROGRESSING.value)
    weight: int = always(0)
    """``CauseKind.weight``: 0 for failures, higher for causes that may resolve by themselves."""
    reason: str = always("")
    task_id: TaskId = TaskId("")
    pending_task_id: TaskId = TaskId("")
    """The task that does not run, if ``task_id`` is a failed task before it.  Empty while there is no
    further attempt.
    """
    name: str = ""
    node: str = ""
    """Host name of the node of the last failure."""
    failures: int = always(0)
    since: Timestamp = always(ZERO_TIME)
    at: Timestamp = ZERO_TIME
    next_attempt: Timestamp = Timestamp("")
    exit_code: int | None = None
    is_given_up: bool = always(False)
    end: TaskEnd | None = None

    @property
    def rank(self) -> tuple[int, int, str]:
        """Sort key.  Failures come first, the oldest at the top, then tasks that are only starting."""
        return self.weight, unix_ns(self.since), self.name

    @property
    def restart_summary(self) -> str:
        """Number of failures, and time of the next attempt in UTC.  Empty if it did not fail."""
        parts = []
        if self.failures >= LOOP_FROM:
            since = f" since {self.since[11:19]} UTC" if self.since != ZERO_TIME else ""
            where = f", the last on {self.node}" if self.node else ""
            course = "gave up after" if self.is_given_up else "crash loop,"
            parts.append(f"{course} {self.failures} failures in a row{since}{where}")
        elif self.is_given_up:
            parts.append("not restarted, by its restart policy")
        if self.next_attempt:
            parts.append(f"next attempt at {self.next_attempt[11:19]} UTC")
        return "; ".join(parts)


# -- tasks -----------------------------------------------------------------------------------------------------------


def problem_of(
    task: Task,
    slot: Iterable[Task],
    nodes: Mapping[NodeId, Node],
    name: str = "",
    spec: ServiceSpec | None = None,
) -> TaskProblem:
    """Return why the active ``task`` does not run.

    Args:
        slot: Tasks of the same slot in any order, with or without ``task``.
        nodes: Known nodes.  If these are all nodes of the cluster, the reason may name the largest.
        spec: Spec of the task's service, which has host-mode ports and affinities.
    """
    slot = tuple(slot)
    kind, words = _present(task, slot, nodes, spec)
    last = last_failure(task, slot) if kind is CauseKind.PROGRESSING else None
    restart = task.restart or Restart()
    is_held = task.desired_state is TaskState.READY and restart.delay > 0
    next_attempt = restart.not_before if is_held else Timestamp("")
    if last is not None:
        found = problem_of_end(last, nodes, name)
        since = restart.since or last.status.timestamp
        failures = max(restart.failures, 1)
        return replace(
            found,
            pending_task_id=task.id,
            failures=failures,
            since=since,
            next_attempt=next_attempt,
            is_given_up=False,
        )
    if kind is CauseKind.PROGRESSING and restart.failures:
        kind, words = CauseKind.EXIT, "earlier tasks failed, and none of them is kept"
    return TaskProblem(
        kind=kind.value,
        weight=kind.weight,
        reason=words,
        task_id=task.id,
        pending_task_id=task.id,
        name=name,
        failures=restart.failures if kind is CauseKind.EXIT else 0,
        since=task.status.timestamp,
        next_attempt=next_attempt,
    )


def progress_of(
    task: Task, slot: Iterable[Task], nodes: Mapping[NodeId, Node], spec: ServiceSpec | None = None
) -> str:
    """Return what blocks the active ``task`` now, or how far its start has come, whatever failed before it."""
    return _present(task, tuple(slot), nodes, spec)[1]


def without_past_attempt(problem: TaskProblem, now_ns: int) -> TaskProblem:
    """Return ``problem`` without a next attempt whose time is past.  Without a leader, there is no such attempt."""
    is_past = bool(problem.next_attempt) and unix_ns(problem.next_attempt) < now_ns
    return replace(problem, next_attempt=Timestamp("")) if is_past else problem


def loop_ends_ns(task: Task, now_ns: int) -> int | None:
    """Return when the running ``task`` ends its slot's crash loop, as Unix time, or None if it is in none.

    This is the orchestrator's rule: a task that ran for ``STABLE_S`` is not part of a crash loop.  The start is a time
    of the node's clock.  If the two clocks differ by more than ``STABLE_S``, the task counts as stable at once.
    """
    restart = task.restart
    if task.status.state is not TaskState.RUNNING or restart is None or restart.failures < LOOP_FROM:
        return None
    stable_ns = int(STABLE_S * SECOND_NS)
    started_ns = unix_ns(task.status.timestamp)
    return started_ns + stable_ns if abs(now_ns - started_ns) < stable_ns else None


def is_stable(task: Task, now_ns: int) -> bool:
    """Return whether nothing is known against a running task: it is not failing, and in no crash loop."""
    return not task.is_failing and loop_ends_ns(task, now_ns) is None


def last_failure(task: Task, slot: Iterable[Task]) -> Task | None:
    """Return the failed task that ``task`` replaces, or None if it replaces none or the failed task was deleted.

    A task that was stopped, moved, or lost with its node did not fail, and does not hide an earlier failure.  The same
    holds for a running task, which ``task`` replaces on another node.  Once such a task ran for ``STABLE_S``, no
    failures in a row are counted, and an earlier failure is not the reason.
    """
    before = [
        one
        for one in slot
        if one.id != task.id
        and (one.status.state.is_terminal or one.status.state is TaskState.RUNNING)
        and one.created_at <= task.created_at
        and one.job_iteration == task.job_iteration
    ]
    in_a_row = task.restart.failures if task.restart is not None else 0
    for one in sorted(before, key=lambda one: (one.created_at, one.id), reverse=True):
        if one.spec_version != task.spec_version and one.spec != task.spec:
            return None
        if one.ended_by_itself:
            return one
        if not in_a_row:
            return None
    return None


def problem_of_end(task: Task, nodes: Mapping[NodeId, Node], name: str) -> TaskProblem:
    """Return the problem of a failed task that has no successor yet."""
    kind, words = failure_of(task)
    node = nodes.get(task.node_id)
    restart = task.restart or Restart()
    return TaskProblem(
        kind=kind.value,
        weight=kind.weight,
        reason=words,
        task_id=task.id,
        name=name,
        node=node.description.hostname if node is not None else "",
        failures=restart.failures + 1,
        since=restart.since or task.status.timestamp,
        at=task.status.timestamp,
        exit_code=exit_code(task),
        is_given_up=not task.is_wanted,
        end=task.status.end,
    )


def _present(
    task: Task, slot: Sequence[Task], nodes: Mapping[NodeId, Node], spec: ServiceSpec | None
) -> tuple[CauseKind, str]:
    """Return what currently blocks an active task, or how far its start has come."""
    status = task.status
    where = hostname(nodes.get(task.node_id), task)
    match status.state:
        case TaskState.NEW | TaskState.PENDING if status.err.startswith(WAITS_FOR):
            return CauseKind.WAITING if is_wait(status.err) else CauseKind.DEPENDENCY, f"it {status.err}"
        case TaskState.PENDING if status.err and _gets_port_from(task, slot):
            return CauseKind.PROGRESSING, "it starts when the task before it has stopped, which has its port"
        case TaskState.PENDING if status.err:
            return _no_node(task, nodes, spec)
        case TaskState.NEW if status.err:
            return CauseKind.NOT_ALLOCATED, status.err
        case TaskState.NEW:
            return CauseKind.PROGRESSING, "it waits for its networks and ports"
        case TaskState.PENDING:
            return CauseKind.PROGRESSING, "it waits for a node"
        case TaskState.ASSIGNED if _is_down(nodes.get(task.node_id)):
            return CauseKind.NODE_LOST, status.err or f"{where} is down"
        case TaskState.ASSIGNED:
            return CauseKind.PROGRESSING, f"{where} has not received it yet"
        case TaskState.ACCEPTED | TaskState.PREPARING:
            kind = CauseKind.WAITING if status.err else CauseKind.PROGRESSING
            return kind, f"{where} prepares it: image, mounts and networks{because(status.err)}"
        case TaskState.READY:
            if task.desired_state is not TaskState.READY:
                return CauseKind.PROGRESSING, f"{where} starts it"
            return CauseKind.PROGRESSING, f"{where} has prepared it; {_turn(task, slot, nodes)}"
        case TaskState.STARTING:
            return CauseKind.PROGRESSING, f"{where} {_starting(task)}{because(status.err)}"
        case TaskState.UNKNOWN:
            return CauseKind.NODE_LOST, status.err or f"{where} is down"
        case TaskState.RUNNING if task.is_failing:
            kind, words = failure_of(task)
            return kind, f"{words}; {where} stops it"
        case TaskState.RUNNING:
            return CauseKind.PROGRESSING, f"it runs on {where}"
        case _:
            return failure_of(task)


def _is_down(node: Node | None) -> bool:
    return node is not None and node.status.state is NodeState.DOWN


def _gets_port_from(task: Task, slot: Iterable[Task]) -> bool:
    """Return whether the scheduler refused nodes because of a host-mode port, and the task before it is stopping."""
    return NodeRefusal.HOST_PORT in node_refusals_in(task.status.err) and any(
        one.id != task.id and not one.status.state.is_terminal and not one.is_wanted for one in slot
    )


def _turn(task: Task, slot: Iterable[Task], nodes: Mapping[NodeId, Node]) -> str:
    """Return the reason why a prepared task does not start yet."""
    before = [one for one in slot if one.id != task.id and not one.status.state.is_terminal]
    if any(not _is_down(nodes.get(one.node_id)) for one in before):
        return "it starts when the task before it has stopped"
    if before:
        # A lost node reports no stop.  The orchestrator waits for none, or until the node stops its tasks itself.
        last = max(before, key=lambda one: (one.created_at, one.id))
        return f"it replaces the task on {hostname(nodes.get(last.node_id), last)}, which is down"
    ended = max(
        (one for one in slot if one.id != task.id), key=lambda one: (one.created_at, one.id), default=None
    )
    if ended is not None and ended.status.state is TaskState.ORPHANED:
        return "it replaces a task whose node was removed"
    return "it waits for its turn to start"


def _starting(task: Task) -> str:
    """Return a sentence about a task that is starting.  Only its node knows whether the image has a health check."""
    container = task.spec.container_spec
    check = container.healthcheck if container is not None else None
    if failure := masked_text(task.status.message.partition(FAILED_CHECK)[2]):
        is_stopping = failure.startswith(f"{EndCause.UNHEALTHY.value}: ")
        return f"{'stops it' if is_stopping else 'waits for it to become healthy'}: {failure}"
    if check is None or not check.test:
        return "starts it, or waits for the health check of its image"
    return "starts it" if check.test[0] == "NONE" else "waits for it to become healthy"


def failure_of(task: Task) -> tuple[CauseKind, str]:
    """Return why a task ended by itself, as a sentence."""
    status, end = task.status, task.status.end
    cause, code = end.cause if end is not None else "", exit_code(task)
    if status.state is TaskState.REJECTED:
        return CauseKind.REJECTED, masked_text(status.err) or "it could not be prepared"
    if status.state is TaskState.COMPLETE:
        return (
            CauseKind.COMPLETED,
            "its process ended with code 0; a service needs a command that keeps running",
        )
    if cause == EndCause.UNHEALTHY.value or _UNHEALTHY in status.err:
        return CauseKind.UNHEALTHY, _unhealthy(task, end or TaskEnd())
    if cause == EndCause.OUT_OF_MEMORY.value:
        resources = task.spec.resources
        limit = resources.limits.memory_bytes if resources is not None and resources.limits is not None else 0
        return CauseKind.OUT_OF_MEMORY, "out of memory" + (f": its limit is {_size(limit)}" if limit else "")
    if status.err.startswith(_NEVER_STARTED):
        error = _RUNTIME_WORDS.sub("", status.err.removeprefix(_NEVER_STARTED).removeprefix(": "))
        error = _BUNDLE_ROOT.sub("", error)
        return CauseKind.START_FAILED, f"its process could not be started{because(masked_text(error))}"
    if code is None or status.err.startswith(_CONTAINER_GONE):
        error = masked_text(status.err)
        gone = f"its container was gone before it ended{because(error)}"
        if status.err.startswith(_NON_ZERO):
            return CauseKind.EXIT, error
        return CauseKind.START_FAILED, gone if code is not None else error or "it failed"
    if cause in (EndCause.NODE_RESTARTED.value, EndCause.MONITOR_LOST.value):
        return CauseKind.EXIT, words_of(end or TaskEnd())
    name = signal_of(code)
    words = f"exit {code}" + (f" ({name})" if name else "")
    return (
        CauseKind.SIGNAL if name else CauseKind.EXIT,
        f"{words}{because(_detail(status.err))}{_last_line(end)}",
    )


def exit_code(task: Task) -> int | None:
    """Return the exit code of an ended process, or None without one.

    It comes from the task's error if the task has no container.
    """
    container = task.status.container_status
    if task.status.state not in (TaskState.COMPLETE, TaskState.FAILED, TaskState.SHUTDOWN):
        return None
    if container is not None and container.container_id:
        return container.exit_code
    return int(found[1]) if (found := _CODE.match(task.status.err)) is not None else None


def hostname(node: Node | None, task: Task) -> str:
    """Return the host name of the node of ``task``."""
    if node is None:
        return f"node {task.node_id}" if task.node_id else "no node"
    return node.description.hostname or f"node {node.id}"


def because(error: str) -> str:
    """Return ``error`` after a colon, or an empty text without an error."""
    return f": {error}" if error else ""


def _detail(err: str) -> str:
    """Return the part of an error after the exit code."""
    return masked_text(err.partition("): ")[2]) if err.startswith(_NON_ZERO) else masked_text(err)


def _last_line(end: TaskEnd | None) -> str:
    lines = end.lines if end is not None else ()
    said = next((text for line in reversed(lines) if (text := on_one_line(line.text))), "")
    return f', last line "{masked_text(said)}"' if said else ""


def _unhealthy(task: Task, end: TaskEnd) -> str:
    """Return a text like ``unhealthy: its health check "curl localhost" failed 3 times in a row, last: exit
    7, ...``.
    """
    container = task.spec.container_spec
    check = container.healthcheck if container is not None else None
    command = end.health_command or (" ".join(check.test[1:]) if check is not None else "")
    named = f' "{_short(masked_text(command))}"' if command else ""
    number = end.health_failures
    times = f" {number} times in a row" if number > 1 else ""
    output = masked_text(on_one_line(end.health_output))
    if end.health_exit_code is not None:
        last = f", last: {check_result(end.health_exit_code, output)}"
    else:
        output = _RUNTIME_WORDS.sub("", output)
        last = f", last: {output}" if output else ""
    return f"unhealthy: its health check{named} failed{times}{last}"


def _short(text: str) -> str:
    text = on_one_line(text)
    return text if len(text) <= _COMMAND_CHARACTERS_MAX else f"{text[: _COMMAND_CHARACTERS_MAX - 1]}…"


def _size(size: int) -> str:
    return f"{size / (1 << 20):g} MiB" if size % (1 << 20) == 0 else f"{size / (1 << 20):.1f} MiB"


def _no_node(task: Task, nodes: Mapping[NodeId, Node], spec: ServiceSpec | None) -> tuple[CauseKind, str]:
    """Return why no node takes a pending task, with the task's needs.  The scheduler's text only counts nodes."""
    if largest := fits_no_node(task, nodes.values(), spec):
        return CauseKind.TOO_LARGE, largest
    known = nodes.values()
    further = unknown_names(task, spec, known), _unavailable(task, known), _full(task, known)
    return CauseKind.NO_NODE, with_needs(task, spec, *further)


def _unavailable(task: Task, nodes: Collection[Node]) -> str:
    """Return the nodes that meet the constraints of ``task`` if none of them is available, or an empty text."""
    constraints = task.spec.placement.constraints if task.spec.placement is not None else ()
    if not constraints or NodeRefusal.NOT_READY not in node_refusals_in(task.status.err):
        return ""
    fitting = [node for node in nodes if is_satisfied(constraints, node)]
    if not fitting or any(not _state(node) for node in fitting):
        return ""
    named = [f"{node.shown_name} is {_state(node)}" for node in fitting[:_NODES_MAX]]
    more = f" and {len(fitting) - _NODES_MAX} more" if len(fitting) > _NODES_MAX else ""
    return f"no node that meets this is available: {', '.join(named)}{more}"


def _full(task: Task, nodes: Collection[Node]) -> str:
    """Return the nodes whose disk is too full for ``task``, or an empty text if another reason keeps it away."""
    if NodeRefusal.DISK not in node_refusals_in(task.status.err):
        return ""
    constraints = task.spec.placement.constraints if task.spec.placement is not None else ()
    names = sorted(
        node.shown_name
        for node in nodes
        if disk_pressure(node.description) and not _state(node) and is_satisfied(constraints, node)
    )
    if not names:
        return ""
    more = f" and {len(names) - _NODES_MAX} more" if len(names) > _NODES_MAX else ""
    return f"free disk space or inodes on {', '.join(names[:_NODES_MAX])}{more}"


def _state(node: Node) -> str:
    """Return why a node takes no new tasks, or an empty text if it takes some."""
    if node.status.state is not NodeState.READY:
        return str(node.status.state.value)
    return {Availability.PAUSE: "paused", Availability.DRAIN: "drained"}.get(node.spec.availability, "")


def slot_of(task: Task) -> SlotId:
    """Return the slot of a task.  For a global service's task, the node is the slot."""
    return task.slot, NodeId("") if task.slot else task.node_id


def name_of(task: Task, service: Service, nodes: Mapping[NodeId, Node]) -> str:
    """Return the task's name as in ``docker service ps``, or an empty text for a global task on an unknown node."""
    node = nodes.get(task.node_id)
    place = task.place(node.description.hostname if node is not None else "")
    return f"{service.spec.name}.{place}" if place else ""

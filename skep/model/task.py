"""Tasks: the life cycle of one container, from its spec to its last status report."""

from collections.abc import Mapping
from enum import Enum
from typing import Final

import msgspec

from skep.model.network import Network
from skep.model.service import (
    EndpointVirtualIP,
    GenericResource,
    PortConfig,
    RestartCondition,
    TaskSpec,
)
from skep.model.task_end import INTERRUPTIONS, TaskEnd
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.meta import Version
from skep.model.values.times import ZERO_TIME, Timestamp, unix_ns


class TaskState(Enum):
    """The states of a task.  They are ordered and only grow; of two reports the larger is the newer.

    The value is the API's name, ``number`` is SwarmKit's, with its gaps.

    Source: swarmkit, api/types.proto (TaskState).
    """

    number: int
    is_terminal: bool
    """Whether a task in this state has ended."""

    NEW = "new"
    PENDING = "pending"
    ASSIGNED = "assigned"
    ACCEPTED = "accepted"
    PREPARING = "preparing"
    READY = "ready"
    STARTING = "starting"
    RUNNING = "running"
    COMPLETE = "complete"
    SHUTDOWN = "shutdown"
    FAILED = "failed"
    REJECTED = "rejected"
    REMOVE = "remove"
    ORPHANED = "orphaned"
    UNKNOWN = "unknown"
    """In API responses only: the task's node does not respond.  Never stored nor reported; less than all others."""

    # All four are defined, because `functools.total_ordering` takes three times as long and loops compare all tasks.
    def __lt__(self, other: "TaskState") -> bool:
        return self.number < other.number

    def __le__(self, other: "TaskState") -> bool:
        return self.number <= other.number

    def __gt__(self, other: "TaskState") -> bool:
        return self.number > other.number

    def __ge__(self, other: "TaskState") -> bool:
        return self.number >= other.number

    @classmethod
    def from_number(cls, number: int) -> "TaskState":
        """Return the state with SwarmKit's ``number``.  Raises: ValueError: the number is unknown."""
        try:
            return _BY_NUMBER[number]
        except KeyError:
            raise ValueError(f"unknown task state {number}") from None


# Numbers of SwarmKit's TaskState, api/types.proto.
_RUNNING = 512
_COMPLETE = 576
_NUMBERS = (0, 64, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 800, 832, -1)
for _state, _number in zip(TaskState, _NUMBERS, strict=True):
    _state.number = _number
    _state.is_terminal = _number > _RUNNING
ENDED_BY_ITSELF = (TaskState.COMPLETE, TaskState.FAILED, TaskState.REJECTED)
"""States in which a node reports the end of a task that nothing had stopped.  See ``Task.ended_by_itself``."""
_BY_NUMBER = {state.number: state for state in TaskState if state is not TaskState.UNKNOWN}


class ContainerStatus(ApiObject):
    """A container's status.  ``pid`` is 0 if it does not run.  ``exit_code`` is valid once the task has ended."""

    container_id: str = msgspec.field(name="ContainerID", default="")
    pid: int = always(0)
    exit_code: int = always(0)


class PortStatus(ApiObject):
    """Host-mode ports that the node has opened."""

    ports: tuple[PortConfig, ...] = ()


class TaskStatus(ApiObject):
    """The observed state, reported by the task's node.  Written by its session's owner (before that by the leader)."""

    timestamp: Timestamp = always(ZERO_TIME)
    state: TaskState = always(TaskState.NEW)
    message: str = ""
    err: str = ""
    container_status: ContainerStatus | None = None
    port_status: PortStatus = always(PortStatus())
    end: TaskEnd | None = None
    """Reason of the end.  Not in Docker's API.  None from docker nodes and nodes of earlier versions."""


class NetworkAttachment(ApiObject):
    """The attachment of a task (or node) to one network.  ``addresses``: ``ip/prefix length``."""

    network: Network | None = None
    addresses: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


class VolumeAttachment(ApiObject):
    """A CSI volume of a task.  Passed on to docker nodes; skep nodes ignore it."""

    id: str = ""
    source: str = ""
    target: str = ""


class StopCause(Enum):
    """Reason why the leader retired a task because of its node."""

    NODE_DOWN = "node-down"
    NODE_REMOVED = "node-removed"
    NODE_DRAINED = "node-drained"
    NODE_UNFIT = "node-unfit"
    REBALANCED = "rebalanced"

    def words(self, node: str) -> str:
        """Return the reason in words.  ``node``: host name of the task's node, or ``node ID``."""
        return _STOP_WORDS[self].format(node=node.removeprefix("node "))


_STOP_WORDS: Final = {
    StopCause.NODE_DOWN: "its node {node} was down",
    StopCause.NODE_REMOVED: "its node was removed",
    StopCause.NODE_DRAINED: "its node {node} was drained",
    StopCause.NODE_UNFIT: "its node {node} no longer met its constraints",
    StopCause.REBALANCED: "it moved from {node} for an even spread",
}


class Restart(ApiObject):
    """The restarts in a slot before a task: all data for restart decisions, even if earlier tasks are removed.

    Args:
        failures: number of failures in a row before this task.
        delay: nanoseconds from the task's creation until it may start.
        not_before: end of the delay by the leader's clock, for display only.
        is_due: the task was retired because of its node while its policy allowed a successor, so the slot is not given
            up.
        was_stopped: the leader retired the task before it had ended.  This is the cause of its end, whatever state its
            node reports, as the stop itself can fail.
        was_surplus: the leader retired the task while an older task of the slot ran on, such as the replacement of a
            drain that was undone, or an attempt of an update that was rolled back.
        stop_cause: a ``StopCause`` if the leader retired the task because of its node, for display only.
        since: time of the first of the failures in a row by its node's clock, for display only.
    """

    failures: int = always(0)
    delay: int = 0
    not_before: Timestamp = always(ZERO_TIME)
    is_due: bool = False
    was_stopped: bool = False
    was_surplus: bool = False
    stop_cause: str = ""
    since: Timestamp | None = None


class Preemption(ApiObject):
    """The task of a higher priority for which a task is stopped.

    ``service`` and ``priority``: their values at that time, for display.
    """

    task_id: TaskId
    service: str = always("")
    priority: int = always(0)

    @property
    def words(self) -> str:
        """Return a text such as ``preempted by a task of web, priority 10``."""
        return f"preempted by a task of {self.service}, priority {self.priority}"


class Relocation(ApiObject):
    """A move of a running task to another node, for an even spread (``manager.rebalance``).

    ``at``: time of the decision, for its timeout and for display.
    """

    target: NodeId
    at: Timestamp = always(ZERO_TIME)


class Task(ApiObject):
    """One task.

    The owner of the node's session writes ``status``, and the leader all other fields.  ``spec`` is not stored with the
    task: the replica fills it from the service's spec at ``spec_version``.
    """

    id: TaskId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    labels: Mapping[str, str] = always({})
    spec: TaskSpec = always(TaskSpec())
    service_id: ServiceId = ServiceId("")
    slot: int = 0
    node_id: NodeId = NodeId("")
    status: TaskStatus = always(TaskStatus())
    desired_state: TaskState = always(TaskState.NEW)
    networks_attachments: tuple[NetworkAttachment, ...] = ()
    generic_resources: tuple[GenericResource, ...] = ()
    job_iteration: Version | None = None
    volumes: tuple[VolumeAttachment, ...] = always(())
    spec_version: Version | None = None
    restart: Restart | None = None
    """Not in Docker's API."""
    preemption: Preemption | None = None
    """Set by the scheduler, so that the orchestrator stops the task.  Not in Docker's API."""
    relocation: Relocation | None = None
    """Set by the leader's rebalancing, so that the orchestrator starts a successor on the target.  Not in Docker's API.
    """
    placement_record: str = ""
    """Reason for the scheduler's choice of the node, at the time of the decision.  Not in Docker's API."""

    @property
    def shown_slot(self) -> int:
        """Return the slot number for clients and nodes, in which a job's slots begin at 0.

        In the store they begin at 1, as 0 means "no slot" there.
        """
        return self.slot - 1 if self.slot and self.job_iteration is not None else self.slot

    def place(self, node: str) -> str:
        """Return what distinguishes the task from others of its service: its slot, or ``node`` without a slot."""
        return str(self.shown_slot) if self.slot else node

    @property
    def template_slot(self) -> str:
        """Return the value of ``{{.Task.Slot}}``: the slot, or the node's id without a slot and for slot 0 of a job."""
        return str(self.shown_slot or self.node_id)

    def container_name(self, service: str) -> str:
        """Return the name of the task's container, ``service.slot.task``.  ``service``: the service's name.

        Source: swarmkit, api/naming/naming.go.
        """
        return f"{service}.{self.template_slot}.{self.id}"

    @property
    def spec_index(self) -> int:
        """Return the index of the spec version that it was created from, or 0 if that is unknown."""
        return self.spec_version.index if self.spec_version is not None else 0

    @property
    def is_wanted(self) -> bool:
        """Return whether the task is desired to run, or a job's task to complete.  It may have ended already."""
        return (
            self.desired_state.number <= _COMPLETE
        )  # called for every task by every loop: avoids a call of `__le__`

    @property
    def ended_by_itself(self) -> bool:
        """Return whether the task ended without being stopped: only such ends count as attempts and failures.

        False for a task that was moved, drained, preempted, evicted, rotated or scaled down, that lost its node, or
        that ended because its node restarted.
        """
        return self._ended_unstopped and not self._was_interrupted

    @property
    def has_failed(self) -> bool:
        """Return whether it ended by itself without having completed."""
        return self.ended_by_itself and self.status.state is not TaskState.COMPLETE

    @property
    def ended_in_failure(self) -> bool:
        """Return whether it failed, or was running when its node restarted.

        With restart condition ``none`` both end the slot, but only a failure counts as an attempt.
        """
        was_running = self.status.state is TaskState.FAILED and self._was_interrupted
        return self.has_failed or (was_running and self._ended_unstopped)

    @property
    def stop_cause(self) -> StopCause | None:
        """Why the leader retired the task because of its node.  None for other tasks, and for an unknown cause."""
        word = self.restart.stop_cause if self.restart is not None else ""
        removed = StopCause.NODE_REMOVED if self.status.state is TaskState.ORPHANED else None
        return next((cause for cause in StopCause if cause.value == word), removed)

    @property
    def _ended_unstopped(self) -> bool:
        """Return whether its node reported its end before the leader had retired it."""
        was_stopped = self.restart is not None and self.restart.was_stopped
        return self.status.state in ENDED_BY_ITSELF and not was_stopped

    @property
    def _was_interrupted(self) -> bool:
        """Return whether its end has a cause that does not count as a failure of the task."""
        return self.status.end is not None and self.status.end.cause in INTERRUPTIONS

    @property
    def was_surplus(self) -> bool:
        """Return whether an older task of its slot ran on when it was retired, and it has not done its work.

        Its end does not end the slot.
        """
        return self.restart is not None and self.restart.was_surplus and not self.is_done

    @property
    def is_done(self) -> bool:
        """Return whether a task of a job or one-shot service ended with exit code 0, and so is not started again."""
        return self.status.state is TaskState.COMPLETE and (
            self.job_iteration is not None or self.spec.ends_on_success
        )

    @property
    def is_failing(self) -> bool:
        """Return whether its node stops it, because it became unhealthy while it ran.  It may take its grace period."""
        return self.status.state is TaskState.RUNNING and self.status.end is not None

    @property
    def was_stopped_for_good(self) -> bool:
        """Return whether it was retired before it had done its work, and nothing takes its place.

        A stopping task may still end with exit code 0.
        """
        is_retired = self.desired_state is TaskState.SHUTDOWN and not self.was_surplus
        return is_retired and self.is_never_restarted and not self.is_done

    @property
    def is_serving(self) -> bool:
        """Return whether the task gets connections: it is wanted, runs, and is not failing."""
        return self.is_wanted and self.status.state is TaskState.RUNNING and not self.is_failing

    @property
    def is_assigned(self) -> bool:
        """Return whether the task is assigned to a node and its agent has not reported its end."""
        return TaskState.ASSIGNED <= self.status.state <= TaskState.RUNNING

    @property
    def is_stopping(self) -> bool:
        """Return whether the task is retired and its agent has not reported its end."""
        return not self.is_wanted and self.is_assigned

    @property
    def is_never_restarted(self) -> bool:
        """Return whether its restart condition ``none`` starts no other task, however it ends."""
        policy = self.spec.restart_policy
        return policy is not None and policy.condition is RestartCondition.NONE

    @property
    def is_active(self) -> bool:
        """Return whether the task is desired to run and has not ended."""
        return self.is_wanted and not self.status.state.is_terminal


class Trust(msgspec.Struct, frozen=True):
    """Actions that a node takes for a task with its own rights, because an administrator specified or allows them."""

    logs: bool = False
    """Whether its logs may be sent to addresses of the machine and of other nodes, and to the machine's own log."""
    logins: bool = False
    """Whether its image may be pulled with the credentials of the node's helper programs."""


class AssignedTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task as sent to its node: the task, and the properties of its service that it needs.

    Made by ``wire`` on the node, by the dispatcher on a manager; never stored.
    """

    task: Task
    service_name: str = ""
    service_labels: Mapping[str, str] = {}
    ports: tuple[PortConfig, ...] = ()
    """Every published port of the service, ingress and host mode."""
    virtual_ips: tuple[EndpointVirtualIP, ...] = ()
    """The service's address on each overlay network.  Empty with DNS round robin."""
    trust: Trust = Trust()

    @property
    def name(self) -> str:
        """Return the container's name, ``service.slot.task``, with the node id as slot for global services.

        Source: swarmkit, api/naming/naming.go.
        """
        task = self.task
        return f"{self.service_name}.{task.slot or task.node_id}.{task.id}"


def state_age(task: Task) -> tuple[int, TaskId]:
    """Return a sort key that orders tasks by the time of their states, oldest first.

    RFC 3339 timestamps do not compare as text: ``01.1Z`` would come after ``01.12Z``.
    """
    return unix_ns(task.status.timestamp), task.id

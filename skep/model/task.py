"""Tasks: one container's life from the first wish to the last report."""

from collections.abc import Mapping
from enum import Enum

import msgspec

from skep.model.encoding import ApiObject, always
from skep.model.ids import NodeId, ServiceId, TaskId
from skep.model.meta import Version
from skep.model.network import Network
from skep.model.service import EndpointVirtualIP, GenericResource, PortConfig, TaskSpec
from skep.model.times import ZERO_TIME, Timestamp


class TaskState(Enum):
    """How far a task has come.  States are ordered and only grow; of two reports the larger is the newer.

    The value is the API's word, ``number`` is SwarmKit's, with its gaps.

    Source: swarmkit, api/types.proto (TaskState).
    """

    number: int
    is_terminal: bool
    """Whether a task in this state has ended and will never run again."""

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
    """In answers only: its node is not heard any more.  Neither stored nor reported; it lies before all others."""

    # Each by itself: loops over all tasks compare states, and `functools.total_ordering` takes three times as long.
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
        """The state with SwarmKit's ``number``.  Raises ValueError for an unknown one."""
        try:
            return _BY_NUMBER[number]
        except KeyError:
            raise ValueError(f"unknown task state {number}") from None


_RUNNING = 512
_COMPLETE = 576
_NUMBERS = (0, 64, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 800, 832, -1)
for _state, _number in zip(TaskState, _NUMBERS, strict=True):
    _state.number = _number
    _state.is_terminal = _number > _RUNNING
_BY_NUMBER = {state.number: state for state in TaskState if state is not TaskState.UNKNOWN}


class ContainerStatus(ApiObject):
    container_id: str = msgspec.field(name="ContainerID", default="")
    pid: int = always(0)
    exit_code: int = always(0)


class PortStatus(ApiObject):
    """Host-mode ports as the node really opened them."""

    ports: tuple[PortConfig, ...] = ()


class TaskStatus(ApiObject):
    """What the task's node observed.  Written by the owner of its session (before that: by the leader)."""

    timestamp: Timestamp = always(ZERO_TIME)
    state: TaskState = always(TaskState.NEW)
    message: str = ""
    err: str = ""
    container_status: ContainerStatus | None = None
    port_status: PortStatus = always(PortStatus())


class NetworkAttachment(ApiObject):
    """A task's (or node's) place on one network.  ``addresses``: ``ip/prefix length``."""

    network: Network | None = None
    addresses: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


class VolumeAttachment(ApiObject):
    id: str = ""
    source: str = ""
    target: str = ""


class Restart(ApiObject):
    """What a task follows in its slot: all that restarts are decided by, whatever is kept of the tasks before it.

    ``failures``: how many before it failed in a row; ``delay``: from its creation until it may start, in nanoseconds;
    ``not_before``: the end of that by the clock of the leader, for people to read.
    """

    failures: int = always(0)
    delay: int = 0
    not_before: Timestamp = always(ZERO_TIME)


class Task(ApiObject):
    """One task.

    Writers: leader: everything but ``status``; owner of the node's session: ``status``.
    ``spec`` is not stored with the task: the replica fills it from the service's spec at ``spec_version``.
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
    """Not in Docker's answers."""

    @property
    def shown_slot(self) -> int:
        """The slot as clients and nodes know it: those of a job count from 0, and count from 1 in the store.

        There 0 means "none", so that a slot always has a key of its own.
        """
        return self.slot - 1 if self.slot and self.job_iteration is not None else self.slot

    @property
    def is_wanted(self) -> bool:
        """Whether the task is meant to run (a job's: to its end); it may have ended all the same."""
        return self.desired_state.number <= _COMPLETE  # every loop asks for every task: no call of `__le__`

    @property
    def is_active(self) -> bool:
        """Whether the task is still wanted and has not ended."""
        return self.is_wanted and not self.status.state.is_terminal


class AssignedTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task as its node sees it: the task and what it needs to know of its service.

    Made by ``wire`` on the node, by the dispatcher on a manager; never stored.
    """

    task: Task
    service_name: str = ""
    service_labels: Mapping[str, str] = {}
    ports: tuple[PortConfig, ...] = ()
    """Every published port of the service, ingress and host mode."""
    virtual_ips: tuple[EndpointVirtualIP, ...] = ()
    """The service's address on each overlay network; none with DNS round robin."""

    @property
    def name(self) -> str:
        """The container's name: ``service.slot.task``; a global service's tasks have the node id as slot.

        Source: swarmkit, api/naming/naming.go.
        """
        task = self.task
        return f"{self.service_name}.{task.slot or task.node_id}.{task.id}"

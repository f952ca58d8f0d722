"""Inputs of a decision about one service."""

from collections.abc import Callable
from math import inf

import msgspec
from msgspec.structs import replace

from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.replacement.disconnection import policy_on, replaced_at
from skep.manager.orchestrator.replacement.enforcement import violates_constraints
from skep.manager.orchestrator.slots import is_unusable
from skep.manager.services.disruption_budget import keeps_all, required, rollout_config
from skep.model.node import Availability, Node, NodeState, is_lost, takes_tasks
from skep.model.options.labels import OnDisconnect, drains_now
from skep.model.options.overlap import why_stop_first
from skep.model.options.schedules import max_attempts_of
from skep.model.service import (
    Service,
    ServiceSpec,
    UpdateConfig,
)
from skep.model.staging.updates import QueryVerdict, TaskRequests
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, TaskId, VolumeId
from skep.model.values.times import unix_ns
from skep.model.volume import Volume


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """The inputs of a decision: a service, its tasks and nodes, and the times at which this leader observed events."""

    service: Service
    tasks: tuple[Task, ...]
    nodes: Callable[[], tuple[Node, ...]]
    """All nodes of the cluster, in order of id.  Only global services, and tasks that no node takes, need them."""
    node: Callable[[NodeId], Node | None]
    spec_of: Callable[[Task], ServiceSpec | None]
    """Returns the service spec from which a task was created, or None if that spec was deleted."""
    is_unknown: Callable[[Task], bool]
    """Returns whether the spec from which a task was created exists but is unreadable."""
    has_unknown_status: Callable[[Task], bool]
    """Returns whether a task's status is unreadable, so that the task may be further than it shows."""
    overcommitted: Callable[[NodeId], frozenset[TaskId]]
    """Returns the tasks that exceed a node's resources."""
    seen: ObservedTimes
    now: float
    """Seconds on the clock of ``seen``."""
    now_ns: int = 0
    """Nanoseconds since 1970 by the leader's clock.  Only for due times and their deadlines."""
    is_drained: Callable[[str], bool] = lambda _: False
    """Whether the cluster volume with this id is drained."""
    volume: Callable[[VolumeId], Volume | None] = lambda _: None
    is_frozen: bool = False
    """Whether tasks of down nodes keep their slots (``disruption_mode``)."""
    replaces_from: float = -inf
    """Time until which tasks of down nodes keep their slots, because a disruption may be beginning or has just
    ended.
    """
    keeps_unfit: bool = False
    """Whether a change freeze keeps tasks on nodes whose labels or resources no longer fit."""
    silence_s: float = 0.0
    """Seconds without a heartbeat after which a node is down."""
    requests: TaskRequests = TaskRequests()
    """Recent HTTP requests to the new tasks of a staged update with bounds for them."""
    query: QueryVerdict = QueryVerdict()
    """Verdict about the query that the steps of a staged update wait for."""
    sound_nodes: dict[NodeId, bool] = msgspec.field(default_factory=dict)
    """Cache of ``is_sound``.  The owner removes nodes that change."""

    @property
    def rollout_config(self) -> UpdateConfig:
        """Settings of the current or next update, or of the rollback during one."""
        return rollout_config(self.service)

    @property
    def max_attempts(self) -> int:
        """Restart limit of a scheduled job whose restart policy has none.  0 means no limit."""
        return max_attempts_of(self.service.spec.labels)

    def is_tolerated(self, task: Task) -> bool:
        """Return whether the task had ended when a user resumed the update, so that it no longer fails the update."""
        status = self.service.update_status
        until = status.tolerated_until if status is not None else None
        ended_at = self.seen.ended(task)
        if until is None or ended_at is None or unix_ns(task.created_at) > unix_ns(until):
            return False
        return not self.seen.saw_end(task) or ended_at <= self.seen.resumed(self.service.id)

    def node_of(self, task: Task) -> Node | None:
        """Return the task's node, or None if the task has none or the node was removed."""
        return self.node(task.node_id) if task.node_id else None

    def is_on_lost_node(self, task: Task) -> bool:
        """Return whether the task's node is down or removed, so that a task that shows RUNNING may not serve."""
        return bool(task.node_id) and is_lost(self.node_of(task))

    def is_known_to_run(self, task: Task) -> bool:
        """Return whether the task shows RUNNING and its node is not lost."""
        return task.status.state is TaskState.RUNNING and not self.is_on_lost_node(task)

    def is_misplaced(self, task: Task) -> bool:
        """Return whether the task must leave its node, because of the node itself or for a task of higher priority."""
        if not task.node_id:
            return False
        node = self.node(task.node_id)
        if node is None:
            return True
        if is_down_only(node):
            return self.leaves_at(task) <= self.now
        if is_unusable(node) or any(self.is_drained(one.id) for one in task.volumes):
            return True
        if task.preemption is not None:
            return True
        return self.is_unfit(task, node)

    def is_unfit(self, task: Task, node: Node) -> bool:
        """Return whether the active ``node`` no longer meets the constraints of ``task`` or is too small for it.

        A change freeze keeps such a task where it is.
        """
        if self.keeps_unfit:
            return False
        return violates_constraints(task, node) or task.id in self.overcommitted(node.id)

    def moves_start_first(self, task: Task) -> bool:
        """Return whether the task runs on until its replacement runs (``evacuation``), although it must leave its node.

        The node is drained.  Or the node no longer fits, and the service has a minimum of available tasks.  Or the
        task moves for an even spread, and no freeze holds it back.  Or it was preempted before its service was updated
        to keep all tasks, so that it may never stop first.

        Other tasks stop first.  These are tasks without a process, tasks with a volume or host path to write to, tasks
        without restarts, and tasks of a node that is down or drained at once.
        """
        node = self.node_of(task)
        if node is None or node.status.state is NodeState.DOWN or self.service.spec.mode.name != "replicated":
            return False
        if task.preemption is not None and not keeps_all(self.service):
            return False
        if node.spec.availability is Availability.DRAIN:
            if drains_now(node.spec.labels):
                return False
        elif not (
            task.preemption is not None
            or self.is_relocating(task)
            or (required(self.service) and self.is_unfit(task, node))
        ):
            return False
        may_run = task.status.state is TaskState.RUNNING or self.has_unknown_status(task)
        if task.desired_state is not TaskState.RUNNING or not task.is_active or not may_run:
            return False
        if task.is_never_restarted or any(self.is_drained(one.id) for one in task.volumes):
            return False
        return self.may_overlap(task)

    def is_relocating(self, task: Task) -> bool:
        """Return whether the task moves to another node for an even spread.  A freeze delays the move.

        A move to a node that takes no tasks waits until ``manager.rebalance`` withdraws it.
        """
        if task.relocation is None or self.keeps_unfit:
            return False
        target = self.node(task.relocation.target)
        return target is not None and takes_tasks(target)

    def may_overlap(self, task: Task) -> bool:
        """Return whether ``task`` and a new task of the service may run at a time."""
        made_from = replace(self.service.spec, task_template=task.spec)
        return not why_stop_first(made_from) and not why_stop_first(self.service.spec)

    def is_sound(self, node_id: NodeId) -> bool:
        """Return whether no task has to leave the node, except because of its own constraints."""
        sound = self.sound_nodes.get(node_id)
        if sound is None:
            node = self.node(node_id)
            sound = not is_unusable(node) and not self.overcommitted(node_id)
            self.sound_nodes[node_id] = sound
        return sound

    def leaves_at(self, task: Task) -> float:
        """Return when a task whose node is down will be replaced.

        Infinity means that it is not replaced for now, or that its node is not down.
        """
        node = self.node_of(task)
        if node is None or not is_down_only(node) or self.is_frozen:
            return inf
        policy = policy_on(node, self.service)
        return max(replaced_at(policy, task, self.seen.down(node)), self.replaces_from)

    def node_stops_at(self, task: Task) -> float:
        """Return the time by which a down node has certainly stopped the task by itself, or -infinity if the policy is
        not STOP.

        Since it lost its connection, the node does not learn of a drain, a disruption, an update or new labels.  The
        result is infinity if the node may not know that it should stop the task.
        """
        node = self.node_of(task)
        if node is None or node.status.state is not NodeState.DOWN:
            return -inf
        policy = policy_on(node, self.service)
        return replaced_at(policy, task, self.seen.down(node)) if policy.action is OnDisconnect.STOP else -inf

    def keeps_slot(self, task: Task) -> bool:
        """Return whether the task keeps its slot although its node is down."""
        node = self.node_of(task)
        return node is not None and is_down_only(node) and not self.is_misplaced(task)


def is_down_only(node: Node) -> bool:
    """Return whether a node is down and not drained."""
    return node.status.state is NodeState.DOWN and node.spec.availability is not Availability.DRAIN

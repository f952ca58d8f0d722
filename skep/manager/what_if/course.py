"""Records what happens in a rehearsal: the first state of each task, and how many tasks of a service are available."""

from collections import Counter, defaultdict
from collections.abc import Callable

from skep.manager.services.disruption_budget import is_available
from skep.model.node import Node, NodeState, is_lost
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.store.interface import Commit, Created, Deleted, Updated, View


def runs(task: Task, node: Node | None) -> bool:
    """Return whether ``task`` serves, or works as a task of a job does, on a ``node`` that is up."""
    if task.desired_state is not TaskState.COMPLETE:
        return is_available(task, node)
    return task.status.state is TaskState.RUNNING and not is_lost(node)


class Course:
    """Follows the commits of a copy from the supposed change on."""

    def __init__(self, view: Callable[[], View], now: Callable[[], float]) -> None:
        self._view = view
        self._now = now
        self.before: dict[TaskId, Task | None] = {}
        """The first state of each task that changed, or None if it was created."""
        self.services: set[ServiceId] = set()
        """Services whose spec, tasks or nodes changed."""
        self.nodes: set[NodeId] = set()
        """Nodes that changed, or whose tasks did."""
        self.changes: Counter[ServiceId] = Counter()
        """Available tasks more than before, by service."""
        self.lowest: dict[ServiceId, int] = defaultdict(int)
        """The smallest value of ``changes`` at any time."""
        self.last_at: dict[ServiceId, float] = {}
        """When a task of the service last became available."""
        self.has_frozen = False
        """Whether replacement was frozen, because too many nodes are down."""

    def on_commit(self, commit: Commit) -> None:
        """Record a commit."""
        for event in commit.events:
            match event:
                case Updated(Task() as old, Task() as new):
                    self._on_task(old, new)
                case Created(Task() as new):
                    self._on_task(None, new)
                case Deleted(Task() as old):
                    self._on_task(old, None)
                case Updated(Node() as before, Node() as node):
                    self._on_node(before, node)
                case Updated(_, Service() as service) | Created(Service() as service):
                    self.services.add(service.id)
                case Updated(Swarm(), Swarm() as swarm) if swarm.freeze is not None:
                    self.has_frozen = True

    def _on_task(self, old: Task | None, new: Task | None) -> None:
        task = new or old
        assert task is not None, "an event has an object"
        self.before.setdefault(task.id, old)
        self.services.add(task.service_id)
        if task.node_id:
            self.nodes.add(task.node_id)
        node = self._view().lookup(Node, task.node_id)
        was = old is not None and runs(old, node)
        self._count(task.service_id, (new is not None and runs(new, node)) - was)

    def _on_node(self, before: Node, node: Node) -> None:
        if before.status.state is node.status.state and before.spec == node.spec:
            return
        self.nodes.add(node.id)
        is_lost = node.status.state is NodeState.DOWN
        for task in self._view().find(Task, node_id=node.id):
            if task.is_active:
                self.services.add(task.service_id)
            was = runs(task, before)
            self._count(task.service_id, (not is_lost and runs(task, node)) - was)

    def _count(self, id: ServiceId, change: int) -> None:
        if not change:
            return
        self.changes[id] += change
        self.lowest[id] = min(self.lowest[id], self.changes[id])
        if change > 0:
            self.last_at[id] = self._now()

"""Machines that ``skep upgrade --system`` reboots, with the production means.  Only the reboot itself is simulated.

Rule: a node that the command has drained has no task that serves when its machine reboots, because a drain waits for
replacements.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import msgspec

from sim.cluster import SimulatedCluster
from skep.cli.maintain.upgrade_plan import UpgradableNode
from skep.cli.maintain.upgrade_system import SystemMeans
from skep.errors import Unavailable
from skep.model.node import Availability, Node
from skep.model.node_reports.conditions import BOOT_LABEL, ConditionName, condition_label
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId

REBOOT_LABEL = condition_label(ConditionName.REBOOT_REQUIRED)
REBOOTS_S = (1.0, 8.0)
"""Shortest and longest time of a reboot in seconds.  The nodes of most seeds count as down after some three."""
LOST_FOR_S = 30.0
"""Time until a machine returns that does not come back from its reboot.  The command has then given up."""


class Boots:
    """The boot ids of all machines, and which of them need a reboot."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self.cluster = cluster
        self.changes = Counter[str]()
        """Changes of each node's availability, by whom ever."""
        self._numbers = count(1)

    def start(self, id: NodeId) -> None:
        """Let a machine report a boot id that it had before."""
        self.cluster.nodes[id].add_labels({BOOT_LABEL: f"boot{next(self._numbers)}"})

    def require(self, ids: Iterable[NodeId]) -> None:
        """Let machines report that they need a reboot, as after the installation of a kernel."""
        for id in ids:
            self.cluster.nodes[id].add_labels({REBOOT_LABEL: "the kernel is older than the installed one"})

    async def reboot(self, id: NodeId, took_s: float) -> None:
        """Reboot a machine.  Raises: Unavailable: it cannot be reached."""
        cluster = self.cluster
        if id not in cluster.nodes or id in cluster.changing or not cluster.nodes[id].has_session:
            raise Unavailable(f"{id} cannot be reached")
        cluster.changing.add(id)
        cluster.trace.add(f"{id} reboots")
        await cluster.cut_power(id)
        try:
            await asyncio.sleep(took_s)
        finally:
            cluster.changing.discard(id)
            if id in cluster.nodes:
                cluster.nodes[id].remove_label(REBOOT_LABEL)
                self.start(id)
                cluster.start_node(id)


class SimulatedReboots(SystemMeans, frozen=True, kw_only=True):
    """Reboots simulated machines.

    Args:
        lost: machines that return only when the command has given up.
        note: records violated rules.
    """

    boots: Boots
    lost: frozenset[str]
    note: Callable[[Iterable[str]], None]
    known: dict[str, int] = msgspec.field(default_factory=dict)
    """Changes of a node's availability before the command drained it."""

    async def check(self, node: UpgradableNode) -> bool:
        """See ``Means``."""
        self.known[node.id] = self.boots.changes[node.id]
        return await super().check(node)

    async def upgrade(self, node: UpgradableNode) -> None:
        """See ``Means``."""
        self.note(self._serving(node))
        random = self.boots.cluster.random
        took_s = LOST_FOR_S if node.id in self.lost else random.uniform(*REBOOTS_S)
        await self.boots.reboot(NodeId(node.id), took_s)

    def _serving(self, node: UpgradableNode) -> Iterable[str]:
        """Yield the tasks that serve on a drained node, unless its availability was changed more than once."""
        view: Any = self.boots.cluster.view
        found = view.lookup(Node, node.id)
        if found is None or found.spec.availability is not Availability.DRAIN:
            return
        if node.id not in self.known or self.boots.changes[node.id] > self.known[node.id] + 1:
            return
        for task in view.find(Task, node_id=node.id):
            if task.desired_state is TaskState.RUNNING and task.status.state is TaskState.RUNNING:
                yield f"{node.id} is drained and reboots, and task {task.id} runs there"

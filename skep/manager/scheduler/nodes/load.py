"""Lets the measured load of nodes affect the choice among equal nodes.

Nodes are compared by the share of the node that a task would get, because the busy part is not available.  If two nodes
have the same number of tasks and one is half busy with something else, that one counts as if it had twice as many.  The
figures grow with each assignment, so a burst of assignments between two load reports is spread.  A task is never moved
because of load, so nothing oscillates.
"""

from skep.model.values.ids import NodeId

LOAD_MAX = 0.9
"""Maximum load that counts, so that even a busier node gets a tenth of the tasks."""


def effective_tasks(tasks: int, load: float) -> float:
    """Return the number of tasks per free part of a node, as if the whole node were free."""
    return tasks / (1 - min(load, LOAD_MAX))


def used_share(share: float, load: float) -> float:
    """Return the unavailable part of a node if ``share`` is reserved and ``load`` of the rest is in use."""
    return 1 - (1 - share) * (1 - min(load, LOAD_MAX)) if load else share


class MeanLoad:
    """Mean of the nodes' loads, rounded to tenths.

    The sum is kept in integers, so that the order of reports does not matter.
    """

    def __init__(self) -> None:
        self._tenths: dict[NodeId, int] = {}
        self._sum = 0

    def set(self, node_id: NodeId, load: float | None) -> None:
        """Set the load of a node, or None if it reports none."""
        self._sum -= self._tenths.pop(node_id, 0)
        if load is not None:
            self._tenths[node_id] = round(10 * load)
            self._sum += self._tenths[node_id]

    @property
    def mean(self) -> float:
        """Mean load, or 0 if no node reports its load."""
        return round(self._sum / len(self._tenths)) / 10 if self._tenths else 0.0

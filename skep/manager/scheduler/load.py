"""How the measured load of nodes affects the choice among equal nodes.

The part of a node that is in use is not available to a task, so nodes are compared by what a task would get of each:
of two nodes with as many tasks, one that is half busy with something else counts as if it had twice as many.  The
figures grow with each assignment, so a burst of assignments between two load reports spreads; and as a task is
assigned once and never moved because of load, nothing oscillates.
"""

from skep.model.ids import NodeId

LOAD_MAX = 0.9
"""A busier node counts as this busy: it still gets a tenth."""


def effective_tasks(tasks: int, load: float) -> float:
    """Number of tasks per free part of a node, as if the whole node were free."""
    return tasks / (1 - min(load, LOAD_MAX))


def used_share(share: float, load: float) -> float:
    """The part of a node that is not available, if ``share`` of it is reserved and ``load`` of the rest is in use."""
    return 1 - (1 - share) * (1 - min(load, LOAD_MAX)) if load else share


class MeanLoad:
    """Mean of the nodes' loads, rounded to tenths; summed in integers, so that the order of reports does not matter."""

    def __init__(self) -> None:
        self._tenths: dict[NodeId, int] = {}
        self._sum = 0

    def set(self, node_id: NodeId, load: float | None) -> None:
        """Set the load of a node; None: it reports none."""
        self._sum -= self._tenths.pop(node_id, 0)
        if load is not None:
            self._tenths[node_id] = round(10 * load)
            self._sum += self._tenths[node_id]

    @property
    def mean(self) -> float:
        """0 if no node reports its load."""
        return round(self._sum / len(self._tenths)) / 10 if self._tenths else 0.0

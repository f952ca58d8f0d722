"""What the measured load of nodes means to the choice among those that are alike.

The part of a node that is in use is a part that a task does not get, so nodes are compared by what a task would have
of each: of two nodes with as many tasks, one that is half busy with something else counts as if it had twice as many.
Figures grow with each task that is placed, so a burst of placements between two reports spreads; and as a task is
placed once and never moved because of a load, nothing swings.
"""

from skep.model.ids import NodeId

LOAD_MAX = 0.9
"""A node that is busier counts as this busy: it still gets its tenth."""


def crowding(tasks: int, load: float) -> float:
    """How many tasks share the free part of a node, as if it were a whole one."""
    return tasks / (1 - min(load, LOAD_MAX))


def filled(share: float, load: float) -> float:
    """The part of a node that is not to be had any more, when ``share`` of it is reserved and ``load`` is in use."""
    return 1 - (1 - share) * (1 - min(load, LOAD_MAX)) if load else share


class MeanLoad:
    """The mean of what nodes say, in tenths; kept as numbers of tenths, so that the order of news does not matter."""

    def __init__(self) -> None:
        self._tenths: dict[NodeId, int] = {}
        self._sum = 0

    def set(self, node_id: NodeId, load: float | None) -> None:
        """What a node says now; None: nothing."""
        self._sum -= self._tenths.pop(node_id, 0)
        if load is not None:
            self._tenths[node_id] = round(10 * load)
            self._sum += self._tenths[node_id]

    @property
    def mean(self) -> float:
        """0 if no node says anything."""
        return round(self._sum / len(self._tenths)) / 10 if self._tenths else 0.0

"""The cluster that a store is of."""

from skep.errors import FailedPrecondition
from skep.model.swarm import Swarm
from skep.store.interface import View


def cluster_of(view: View) -> Swarm:
    """The cluster object.  Raises: FailedPrecondition: this store holds no cluster yet."""
    for swarm in view.find(Swarm):
        return swarm
    raise FailedPrecondition("this node is not part of a swarm")

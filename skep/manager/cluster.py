"""The cluster object of a store."""

from skep.errors import FailedPrecondition, Unavailable
from skep.model.swarm import Swarm
from skep.store.interface import View


def cluster_of(view: View) -> Swarm:
    """The cluster object.  Raises: FailedPrecondition: there is none yet; Unavailable: it cannot be read."""
    for swarm in view.find(Swarm):
        return swarm
    for why in view.unreadable(Swarm).values():
        raise Unavailable(f"the cluster's settings cannot be read: {why}")
    raise FailedPrecondition("this node is not part of a swarm")

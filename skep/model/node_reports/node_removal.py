"""Tells a removed node about its removal, in the text with which managers refuse its certificate.

The text is SwarmKit's, with the time and the fate of the node's containers added, so managers and nodes of every
version understand each other.  Without the time, the node does not count as removed, and its containers keep running.
"""

import re

import msgspec

from skep.model.values.ids import NodeId
from skep.model.values.times import Timestamp

_REFUSAL = re.compile(
    r"Permission denied: node (?P<id>\S+) was removed from (?:the )?swarm"
    r"(?: at (?P<at>[0-9TZ:.-]+))?(?P<kept>; its containers keep running)?"
)
_LEAVE = "docker swarm leave --force"


class NodeRemoval(msgspec.Struct, frozen=True, kw_only=True):
    """The removal of a node from its cluster."""

    at: Timestamp = Timestamp("")
    """Time of the removal, or empty if the manager did not send it."""
    keeps_containers: bool = False
    """Whether its containers keep running alongside their replacements (``skep node evict --keep``)."""

    def refusal(self, id: NodeId) -> str:
        """Return the text with which managers refuse the calls of node ``id``."""
        at = f" at {self.at}" if self.at else ""
        kept = "; its containers keep running" if self.keeps_containers else ""
        return f"Permission denied: node {id} was removed from the swarm{at}{kept}"

    @property
    def summary(self) -> str:
        """Return a text for a user of the removed node, with the command that ends this state."""
        at = f" at {self.at.partition('.')[0].rstrip('Z')}Z" if self.at else ""
        tasks = "its containers keep running" if self.keeps_containers else "its containers stop"
        return f"this node was removed from the cluster{at}: {_LEAVE} ({tasks})"


def removal_in(refusal: str, id: NodeId) -> NodeRemoval | None:
    """Return the removal that a manager's refusal of node ``id`` reports, or None if the refusal has another reason.

    A refusal without a time does not count.  SwarmKit and older managers send it to every node that is missing in their
    store, even if the store was restored from a backup that is older than the node.
    """
    found = _REFUSAL.fullmatch(refusal)
    if found is None or found["id"] != id or not found["at"]:
        return None
    return NodeRemoval(at=Timestamp(found["at"]), keeps_containers=found["kept"] is not None)

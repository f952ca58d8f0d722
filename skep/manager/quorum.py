"""Quorum state from this manager's view: whether a leader exists, and which other managers respond."""

from collections.abc import Mapping, Set

import msgspec

from skep.model.node import Node
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId
from skep.model.values.times import Timestamp
from skep.store.interface import View


class PeerManager(ApiObject):
    """A manager as seen by this manager.  ``unreachable_seconds`` is 0 while it responds."""

    id: NodeId
    hostname: str = always("")
    addr: str = always("")
    is_reachable: bool = always(True)
    unreachable_seconds: float = 0.0
    has_quorum: bool = always(False)
    """Whether it has contact with a quorum, by its last ping."""


class Quorum(ApiObject):
    """Response of ``GET /skep/quorum``, which never waits.

    ``has_leader`` tells whether reads and writes succeeded a moment ago, and if not, ``since`` tells when they last
    did.  ``own_error`` is a problem of this manager itself, such as a full disk, as a sentence ("Error" in the API).
    """

    has_leader: bool = always(True)
    since: Timestamp = Timestamp("")
    managers: tuple[PeerManager, ...] = always(())
    own_error: str = msgspec.field(default="", name="Error")
    revision: int = 0
    """Revision of this manager's replica.  If several managers have no leader, the one with the highest has the newest
    data.
    """


def quorum(
    view: View, own: NodeId, silent: Mapping[NodeId, float], reachable: Set[NodeId], lost_at: Timestamp
) -> Quorum:
    """Return the quorum state from this manager's own view.

    Args:
        own: This manager, which counts as responding.
        silent: Managers that do not respond, with the seconds since their last ping.
        reachable: Other managers that answered a recent ping and have contact with a quorum.
        lost_at: When contact with a quorum was lost.  Empty if it was not.
    """
    managers = [
        PeerManager(
            id=node.id,
            hostname=node.shown_name,
            addr=node.manager_status.addr,
            is_reachable=node.id == own or node.id not in silent,
            unreachable_seconds=round(silent.get(node.id, 0.0), 1) if node.id != own else 0.0,
            has_quorum=node.id in reachable if node.id != own else not lost_at,
        )
        for node in view.find(Node)
        if node.manager_status is not None
    ]
    managers.sort(key=lambda manager: (manager.hostname, manager.id))
    return Quorum(has_leader=not lost_at, since=lost_at, managers=tuple(managers), revision=view.revision)

"""Whether this manager has a leader above it, and which other managers answer: what it knows without asking anybody."""

from collections.abc import Mapping

from skep.model.encoding import ApiObject, always
from skep.model.ids import NodeId
from skep.model.node import Node
from skep.model.times import Timestamp
from skep.store.interface import View


class PeerManager(ApiObject):
    """A manager as this one hears it.  ``silent_seconds``: 0 while it answers."""

    id: NodeId
    hostname: str = always("")
    addr: str = always("")
    answers: bool = always(True)
    silent_seconds: float = 0.0


class Quorum(ApiObject):
    """Answer of ``GET /skep/quorum``; it never waits.

    ``has_leader``: whether reads and writes went through a moment ago; ``since``: when they did last, if not.
    ``trouble``: what this manager lacks itself, such as disk space, in a sentence; the others may be well.
    """

    has_leader: bool = always(True)
    since: Timestamp = Timestamp("")
    managers: tuple[PeerManager, ...] = always(())
    trouble: str = ""


def quorum(view: View, own: NodeId, silent: Mapping[NodeId, float], lost_at: Timestamp) -> Quorum:
    """What this manager knows.

    Args:
        own: this manager, which answers itself.
        silent: managers that do not answer, with the seconds for which they have not.
        lost_at: when contact with a quorum ended; empty: it has not.
    """
    managers = [
        PeerManager(
            id=node.id,
            hostname=node.description.hostname or node.id,
            addr=node.manager_status.addr,
            answers=node.id == own or node.id not in silent,
            silent_seconds=round(silent.get(node.id, 0.0), 1) if node.id != own else 0.0,
        )
        for node in view.find(Node)
        if node.manager_status is not None
    ]
    managers.sort(key=lambda manager: (manager.hostname, manager.id))
    return Quorum(has_leader=not lost_at, since=lost_at, managers=tuple(managers))

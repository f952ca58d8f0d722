"""The managers this node knows, and which of them to try next."""

from collections.abc import Callable, Mapping, Sequence
from random import Random

from skep.model.ids import NodeId
from skep.node.local import Peer


def next_manager(
    peers: Sequence[Peer], failures: Mapping[str, int], own_id: NodeId, random: Random
) -> Peer | None:
    """Whom to ask for a session: who failed least often; among equals anybody, this machine's own manager last.

    With its own manager last, losing a machine is one event: its node is not looking for a manager at the same
    time as its tasks move.
    """
    if not peers:
        return None
    rank = {peer.addr: (failures.get(peer.addr, 0), peer.node_id == own_id) for peer in peers}
    best = min(rank.values())
    return random.choice([peer for peer in sorted(peers, key=_addr) if rank[peer.addr] == best])


class ManagerList:
    """What the last session said about managers; ``changed`` is called with every new list."""

    def __init__(
        self, peers: Sequence[Peer], changed: Callable[[tuple[Peer, ...]], None] = lambda _: None
    ) -> None:
        self.peers = tuple(peers)
        self._changed = changed
        self._failures: dict[str, int] = {}

    def choose(self, own_id: NodeId, random: Random) -> Peer | None:
        """The manager to try next; None: none is known."""
        return next_manager(self.peers, self._failures, own_id, random)

    def failed(self, peer: Peer) -> None:
        """No session came about with ``peer``, or it broke."""
        self._failures[peer.addr] = self._failures.get(peer.addr, 0) + 1

    def worked(self, peer: Peer) -> None:
        """``peer`` gave a session: all start equal again."""
        self._failures.clear()

    def replace(self, peers: Sequence[Peer]) -> None:
        """A manager said who they all are now.  An empty list is none of theirs and changes nothing."""
        unique = tuple(sorted({peer.addr: peer for peer in peers if peer.addr}.values(), key=_addr))
        if unique and unique != self.peers:
            self.peers = unique
            self._failures = {
                addr: count for addr, count in self._failures.items() if addr in {p.addr for p in unique}
            }
            self._changed(unique)


def _addr(peer: Peer) -> str:
    return peer.addr

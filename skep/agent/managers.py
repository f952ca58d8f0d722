"""The managers this node knows, and which of them to try next."""

from collections.abc import Callable, Mapping, Sequence
from random import Random

from skep.model.ids import NodeId
from skep.model.node import RESPONSE_SECONDS_MAX
from skep.node.local import Peer

ANSWER_SECONDS_MIN = 1.0
DEFAULT_WEIGHT = 10


def patience(period_s: float, managers: int) -> float:
    """Seconds to wait for the answer to a heartbeat: one period, so that a node moves on within a heartbeat.

    The first one (``period_s`` 0) may take longer: many nodes may be registering at the same time.  So may all
    where there is nobody else to go to.
    """
    if managers < 2 or not period_s:
        return RESPONSE_SECONDS_MAX
    return min(max(period_s, ANSWER_SECONDS_MIN), RESPONSE_SECONDS_MAX)


def connect_patience(failures: int, managers: int, absent: int = 0) -> float:
    """Seconds to wait for a connection: a machine without power answers nothing, a crowded one late.

    While some managers answer and ``absent`` ones do not, all of those together take no longer than a single one may:
    a node that went through the dead ones first would come back after its grace.
    """
    if managers < 2:
        return RESPONSE_SECONDS_MAX
    is_answered = absent < managers
    longest_s = (
        max(RESPONSE_SECONDS_MAX / max(absent, 1), ANSWER_SECONDS_MIN)
        if is_answered
        else RESPONSE_SECONDS_MAX
    )
    return min(ANSWER_SECONDS_MIN * float(1 << min(failures, 8)), longest_s)


def next_manager(
    peers: Sequence[Peer],
    failures: Mapping[str, int],
    own_id: NodeId,
    random: Random,
    weights: Mapping[str, int] | None = None,
) -> Peer | None:
    """Whom to ask for a session: who failed least often; among equals anybody, this machine's own manager last.

    ``weights``: by address, as the managers ask for; among equals the heavier is chosen more often.

    With its own manager last, losing a machine is one event: its node is not looking for a manager at the same
    time as its tasks move.
    """
    if not peers:
        return None
    rank = {peer.addr: (failures.get(peer.addr, 0), peer.node_id == own_id) for peer in peers}
    best = min(rank.values())
    equals = [peer for peer in sorted(peers, key=_addr) if rank[peer.addr] == best]
    heavy = [max((weights or {}).get(peer.addr, DEFAULT_WEIGHT), 1) for peer in equals]
    return random.choices(equals, heavy)[0]


class ManagerList:
    """What the last session said about managers; ``changed`` is called with every new list."""

    def __init__(
        self, peers: Sequence[Peer], changed: Callable[[tuple[Peer, ...]], None] = lambda _: None
    ) -> None:
        self.peers = tuple(peers)
        self._changed = changed
        self._failures: dict[str, int] = {}
        self._absent: set[str] = set()
        self._weights: dict[str, int] = {}

    def failures(self, peer: Peer) -> int:
        """How often in a row nothing came of ``peer``."""
        return self._failures.get(peer.addr, 0)

    def unreached(self) -> str:
        """What to say while none of them gives a session."""
        asked = ", ".join(peer.addr for peer in self.peers) or "no address, because it knows none"
        return (
            f"no manager answers: this node asks {asked}. Containers run on. "
            'If the managers are elsewhere now: managers = ["address:2377"] in /etc/skep/skep.toml, and restart skep'
        )

    def choose(self, own_id: NodeId, random: Random) -> Peer | None:
        """The manager to try next; None: none is known."""
        return next_manager(self.peers, self._failures, own_id, random, self._weights)

    def connect_patience(self, peer: Peer) -> float:
        """Seconds to wait for a connection to ``peer``."""
        known = {one.addr for one in self.peers}
        return connect_patience(self.failures(peer), len(known), len(self._absent & known))

    def failed(self, peer: Peer, *, was_there: bool = True) -> None:
        """No session came about with ``peer``, or it broke; ``was_there``: it took the connection."""
        self._failures[peer.addr] = self._failures.get(peer.addr, 0) + 1
        if was_there:
            self._absent.discard(peer.addr)
        else:
            self._absent.add(peer.addr)

    def is_last_of_round(self, peer: Peer) -> bool:
        """Whether every other one has failed as often as ``peer``.

        Until then the next is asked soon, if ``peer`` was not there: most of the managers may be dead.
        """
        return all(self.failures(other) >= self.failures(peer) for other in self.peers)

    def worked(self, peer: Peer) -> None:
        """``peer`` gave a session: all start equal again."""
        self._failures.clear()
        self._absent.clear()

    def replace(self, peers: Sequence[Peer], weights: Mapping[str, int] | None = None) -> None:
        """A manager said who they all are now.  An empty list is none of theirs and changes nothing.

        ``weights``: by address, how large a part of the nodes each is to have.
        """
        self._weights = dict(weights or {})
        unique = tuple(sorted({peer.addr: peer for peer in peers if peer.addr}.values(), key=_addr))
        if unique and unique != self.peers:
            self.peers = unique
            self._failures = {
                addr: count for addr, count in self._failures.items() if addr in {p.addr for p in unique}
            }
            self._changed(unique)


def _addr(peer: Peer) -> str:
    return peer.addr

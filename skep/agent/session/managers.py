"""The known managers, and the choice of the next one to try."""

from collections.abc import Callable, Mapping, Sequence
from random import Random

import msgspec

from skep.errors import Unavailable
from skep.model.node import RESPONSE_SECONDS_MAX
from skep.model.node_reports.conditions import NO_MANAGER_ANSWERS, NO_QUORUM
from skep.model.values.ids import NodeId

RESPONSE_SECONDS_MIN = 1.0
"""Shortest timeout for a response in seconds, so that a short heartbeat period does not end sessions."""
DEFAULT_WEIGHT = 10
"""Weight of a manager for which none is given, as in SwarmKit."""


class KnownManager(msgspec.Struct, frozen=True, rename={"node_id": "NodeID", "addr": "Addr"}):
    """A manager as ``/info`` lists it."""

    node_id: NodeId
    addr: str


def response_timeout(period_s: float, managers: int) -> float:
    """Return the seconds to wait for the response to a heartbeat.

    One period, so that a node switches to another manager within a heartbeat.  The first heartbeat (``period_s`` 0) may
    take longer, because many nodes may be registering at the same time.  Without another manager, every heartbeat may
    take longer.
    """
    if managers < 2 or not period_s:
        return RESPONSE_SECONDS_MAX
    return min(max(period_s, RESPONSE_SECONDS_MIN), RESPONSE_SECONDS_MAX)


def connect_timeout(failures: int, managers: int, absent: int = 0) -> float:
    """Return the seconds to wait for a connection.

    The timeout grows with ``failures``, because an overloaded manager responds slowly.  ``absent`` is the number of
    managers that do not respond while others do.  They share the timeout of a single manager.  Otherwise a node that
    tried the dead managers first would return only after its grace period.
    """
    if managers < 2:
        return RESPONSE_SECONDS_MAX
    responds = absent < managers
    longest_s = (
        max(RESPONSE_SECONDS_MAX / max(absent, 1), RESPONSE_SECONDS_MIN) if responds else RESPONSE_SECONDS_MAX
    )
    return min(RESPONSE_SECONDS_MIN * float(1 << min(failures, 8)), longest_s)


def next_manager(
    peers: Sequence[KnownManager],
    failures: Mapping[str, int],
    own_id: NodeId,
    random: Random,
    weights: Mapping[str, int] | None = None,
) -> KnownManager | None:
    """Return the manager to try next: one with the fewest failures, chosen at random, this node's own manager last.

    ``weights`` come from the managers, by address.  Among equal managers, one with a higher weight is chosen more
    often.

    Because the node's own manager comes last, the loss of a machine is a single event: its node does not look for
    another manager while its tasks are replaced.
    """
    if not peers:
        return None
    rank = {peer.addr: (failures.get(peer.addr, 0), peer.node_id == own_id) for peer in peers}
    best = min(rank.values())
    equals = [peer for peer in sorted(peers, key=_addr) if rank[peer.addr] == best]
    heavy = [max((weights or {}).get(peer.addr, DEFAULT_WEIGHT), 1) for peer in equals]
    return random.choices(equals, heavy)[0]


class ManagerList:
    """The managers as the last session listed them, and the failures to reach them.

    Args:
        changed: Called with every new list.
        address_of: Returns where this node reaches a manager.  Other nodes may use another address.
        show_unreached: Called with a sentence while no manager is reached, and with an empty text once one is.
    """

    def __init__(
        self,
        peers: Sequence[KnownManager],
        changed: Callable[[tuple[KnownManager, ...]], None] = lambda _: None,
        *,
        address_of: Callable[[KnownManager], str] = lambda peer: peer.addr,
        show_unreached: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.peers = tuple(peers)
        self.address_of = address_of
        self._changed = changed
        self._show_unreached = show_unreached
        self._failures: dict[str, int] = {}
        self._absent: set[str] = set()
        self._alone: set[str] = set()
        self._weights: dict[str, int] = {}

    def failures(self, peer: KnownManager) -> int:
        """Return the consecutive failures of ``peer``."""
        return self._failures.get(peer.addr, 0)

    def clear_unreached(self) -> None:
        """Record that a manager has answered, even with a refusal."""
        self._show_unreached("")

    def note_unreached(self, distrust: str = "") -> None:
        """Record that no manager has accepted a session for long.

        ``distrust`` tells why the last manager is not trusted, or is empty.  The managers' root changes when a manager
        is evicted, so an evicted manager that was disconnected at that time can verify none of their messages.
        """
        if distrust:
            self._show_unreached(
                f"no manager is trusted: {distrust}. Containers keep running. "
                "If this node was evicted, run docker swarm leave --force."
            )
            return
        if alone := ", ".join(peer.addr for peer in self.peers if peer.addr in self._alone):
            self._show_unreached(
                f"{NO_MANAGER_ANSWERS} with a leader: {alone} has lost contact with the others. Containers keep "
                "running. Run skep status on that manager to see how to recover"
            )
            return
        tried = ", ".join(peer.addr for peer in self.peers) or "no address, because none is known"
        self._show_unreached(
            f"{NO_MANAGER_ANSWERS}: this node tries {tried}. Containers keep running. "
            'If the managers have new addresses, set managers = ["address:2377"] in its configuration file '
            "(default: /etc/skep/skep.toml) and restart"
        )

    def choose(self, own_id: NodeId, random: Random) -> KnownManager | None:
        """Return the manager to try next, or None if no manager is known."""
        return next_manager(self.peers, self._failures, own_id, random, self._weights)

    def connect_timeout(self, peer: KnownManager) -> float:
        """Return the seconds to wait for a connection to ``peer``."""
        known = {one.addr for one in self.peers}
        return connect_timeout(self.failures(peer), len(known), len(self._absent & known))

    def require_manager(self, peer: KnownManager, found: NodeId) -> None:
        """Check the identity of the manager that a connection to ``peer`` has reached.

        The certificate of a demoted or removed manager stays valid for up to 90 days, and an attacker at the address of
        a manager could use it.  So a manager that the last list does not have is accepted only while no manager of that
        list responds, because all of them may have been replaced.  Managers that the settings name by address have no
        identity to compare.

        Raises:
            Unavailable: Another manager is at this address.
        """
        known = {one.node_id for one in self.peers}
        if not found or not peer.node_id or found in known:
            return
        if not all(self.failures(one) for one in self.peers):
            raise Unavailable(
                f"{peer.addr} is manager {found}, which is not among the managers of this cluster, instead of "
                f"{peer.node_id}"
            )

    def failed(self, peer: KnownManager, *, was_connected: bool = True, reason: str = "") -> None:
        """Record a failed or lost session with ``peer``, which may have accepted the connection, and the reason."""
        self._failures[peer.addr] = self._failures.get(peer.addr, 0) + 1
        if was_connected:
            self._absent.discard(peer.addr)
        else:
            self._absent.add(peer.addr)
        if NO_QUORUM in reason:
            self._alone.add(peer.addr)
        else:
            self._alone.discard(peer.addr)

    def is_last_of_round(self, peer: KnownManager) -> bool:
        """Return whether every other manager has failed as often as ``peer``.

        Until then, the next manager is tried soon if ``peer`` did not accept a connection, because most managers may be
        dead.
        """
        return all(self.failures(other) >= self.failures(peer) for other in self.peers)

    def worked(self, peer: KnownManager) -> None:
        """Forget all failures after ``peer`` accepted a session."""
        self._failures.clear()
        self._absent.clear()
        self._alone.clear()
        self._show_unreached("")

    def replace(self, peers: Sequence[KnownManager], weights: Mapping[str, int] | None = None) -> None:
        """Replace the list of managers by a list from a manager.  An empty list changes nothing.

        ``weights`` has each manager's relative share of nodes, by address.
        """
        self._weights = dict(weights or {})
        unique = tuple(sorted({peer.addr: peer for peer in peers if peer.addr}.values(), key=_addr))
        if unique and unique != self.peers:
            self.peers = unique
            self._failures = {
                addr: count for addr, count in self._failures.items() if addr in {p.addr for p in unique}
            }
            self._changed(unique)


def _addr(peer: KnownManager) -> str:
    return peer.addr

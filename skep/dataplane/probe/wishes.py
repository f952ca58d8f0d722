"""What of a wish can be done.  Pure: a manager says it, and nothing it says may harm this node."""

from ipaddress import ip_address

import msgspec

from skep.model.paths import PathPeer, ProbeTargets
from skep.model.swarm import DEFAULT_DATA_PATH_PORT

PEERS_MAX = 512
"""A node asks no more, whatever it is told."""
_PORT_MAX = (1 << 16) - 1


def sound(wish: ProbeTargets) -> ProbeTargets:
    """``wish`` without addresses that are none, without the node itself, each peer once, no more than ``PEERS_MAX``."""
    peers = {peer.node_id: _sound(peer) for peer in wish.peers if peer.node_id != wish.node.node_id}
    return ProbeTargets(node=_sound(wish.node), peers=tuple(peers.values())[:PEERS_MAX])


def host_and_port(text: str) -> tuple[str, int]:
    """Of ``192.0.2.1:2377`` or ``[fd09::1]:2377``.  Raises: ValueError: it is neither."""
    host, _, port = text.rpartition(":")
    number = int(port)
    if not 0 < number <= _PORT_MAX:
        raise ValueError(f"invalid port {port!r}")
    return str(ip_address(host.removeprefix("[").removesuffix("]"))), number


def _sound(peer: PathPeer) -> PathPeer:
    # The forwarder's port is ten above, and WireGuard's next to it.
    has_port = 0 < peer.vxlan_port <= _PORT_MAX - 16
    return msgspec.structs.replace(
        peer,
        data_path=peer.data_path if has_port and _is_address(peer.data_path) else "",
        vxlan_port=peer.vxlan_port if has_port else DEFAULT_DATA_PATH_PORT,
        control=peer.control if _is_host_and_port(peer.control) else "",
        etcd=peer.etcd if _is_host_and_port(peer.etcd) else "",
        gossip=peer.gossip if _is_host_and_port(peer.gossip) else "",
    )


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def _is_host_and_port(text: str) -> bool:
    try:
        host_and_port(text)
    except ValueError:
        return False
    return True

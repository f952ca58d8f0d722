"""Builders for tests of encrypted networks."""

from collections.abc import Callable
from itertools import count

from skep.dataplane.plan.wireguard import WireGuardKey, own_port
from skep.model.networks.tables import NetworkHead, NetworkTable, Segment, TableNode
from skep.model.networks.wireguard import PublicKey
from skep.model.swarm import DEFAULT_DATA_PATH_PORT
from skep.model.values.ids import NetworkId, NodeId


def numbered_keys(start: int = 1) -> Callable[[], bytes]:
    """Return a function that makes numbered private keys."""
    numbers = count(start)
    return lambda: (8 * next(numbers)).to_bytes(32, "little")


def a_pair(number: int, slot: int = 0) -> WireGuardKey:
    """Return the key pair for a number."""
    return WireGuardKey(private=(8 * number).to_bytes(32, "little"), slot=slot, made_at=0.0)


def published(pair: WireGuardKey) -> PublicKey:
    """Return the key that the owner of ``pair`` publishes."""
    return PublicKey(pair.public, own_port(pair.slot, DEFAULT_DATA_PATH_PORT))


def a_secure_table(
    nodes: dict[str, tuple[WireGuardKey, ...]], *, vni: int = 4097, name: str = "secure"
) -> NetworkTable:
    """Return the table of an encrypted network.  Node ``n1`` is at 192.0.2.1, and so on.  ``nodes``: their key
    pairs.
    """
    return NetworkTable(
        head=NetworkHead(
            id=NetworkId(name),
            name=name,
            segments=(Segment("10.0.2.0/24", "10.0.2.1", vni),),
            is_encrypted=True,
        ),
        nodes={
            NodeId(id): TableNode(
                id=NodeId(id), underlay=f"192.0.2.{id[1:]}", wireguard_keys=tuple(map(published, pairs))
            )
            for id, pairs in nodes.items()
        },
    )

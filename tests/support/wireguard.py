"""Builders for tests of encrypted networks."""

from collections.abc import Callable
from itertools import count

from skep.dataplane.plan.wireguard import KeyPair, own_port
from skep.model.ids import NetworkId, NodeId
from skep.model.swarm import DEFAULT_DATA_PATH_PORT
from skep.model.tables import NetworkHead, Segment, Table, TableNode
from skep.model.wireguard import PublicKey


def numbered_keys(start: int = 1) -> Callable[[], bytes]:
    """Return a function that makes numbered private keys."""
    numbers = count(start)
    return lambda: (8 * next(numbers)).to_bytes(32, "little")


def a_pair(number: int, slot: int = 0) -> KeyPair:
    """Return the key pair for a number."""
    return KeyPair(private=(8 * number).to_bytes(32, "little"), slot=slot, made_at=0.0)


def published(pair: KeyPair) -> PublicKey:
    """Return the key that the owner of ``pair`` publishes."""
    return PublicKey(pair.public, own_port(pair.slot, DEFAULT_DATA_PATH_PORT))


def a_secure_table(nodes: dict[str, tuple[KeyPair, ...]], *, vni: int = 4097, name: str = "secure") -> Table:
    """Return the table of an encrypted network.  Node ``n1`` is at 192.0.2.1, and so on.  ``nodes``: their key
    pairs.
    """
    return Table(
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

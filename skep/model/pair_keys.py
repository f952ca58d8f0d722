"""What a node is told to encrypt its overlays with: keys for each node it shares an encrypted network with.

A pair of nodes has two keys per epoch, one for each direction, which no other node knows.  A new epoch begins with
every rotation; the epochs before it still open what is under way.
"""

import msgspec

from skep.model.ids import NodeId

KEY_BYTES = 32
EPOCHS_KEPT = 3
"""The newest, and two before it: a node that missed one rotation, or two, still shares one with everybody."""


class PairKey(msgspec.Struct, frozen=True):
    """One epoch's keys of a pair of nodes, as one of the two sees them.  32 bytes each; never logged, never shown."""

    epoch: int
    sending: bytes
    receiving: bytes

    def __repr__(self) -> str:
        return f"PairKey(epoch={self.epoch})"


class PeerKeys(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one node needs to talk to one other.  ``keys``: oldest epoch first."""

    node_id: NodeId
    keys: tuple[PairKey, ...]
    wireguard_public: bytes = b""
    """The other's public key for kernel WireGuard; empty: one of the two cannot, both take the path in user space."""


class NodeKeys(msgspec.Struct, frozen=True, kw_only=True):
    """All that one node is told.  It replaces what it was told before."""

    node_id: NodeId
    peers: tuple[PeerKeys, ...] = ()
    wireguard_private: bytes = b""
    """Its own; empty unless some peer is reached by kernel WireGuard."""

    def __repr__(self) -> str:
        return f"NodeKeys(node_id={self.node_id!r}, peers={[peer.node_id for peer in self.peers]!r})"

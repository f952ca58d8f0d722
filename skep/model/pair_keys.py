"""What a node is told to encrypt its overlays with: keys for each node it shares an encrypted network with.

A pair of nodes has two keys per epoch, one for each direction, which no other node knows.  A new epoch begins with
every rotation; the epochs before it still open what is under way.
"""

from collections.abc import Mapping
from enum import Enum

import msgspec

from skep.model.ids import NodeId

KEY_BYTES = 32
EPOCHS_KEPT = 3
"""The newest, and two before it: a node that missed one rotation, or two, still shares one with everybody."""


ENCRYPTION_LABEL = "skep.encryption"
"""Engine label by which a skep node says how it encrypts: a ``Method``; a node without it does not."""


class Method(Enum):
    """How frames of encrypted networks leave a node."""

    WIREGUARD = "wireguard"
    """VXLAN inside the kernel's WireGuard."""
    USER_SPACE = "aes-gcm"
    """A TAP and the forwarder process."""


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


class KeysTold(msgspec.Struct, frozen=True, kw_only=True):
    """One message to a node.  ``is_complete``: peers that are not named are none of its any more."""

    peers: tuple[PeerKeys, ...] = ()
    removed: tuple[NodeId, ...] = ()
    is_complete: bool = False
    wireguard_private: bytes = b""
    """Its own; empty: no peer is reached by kernel WireGuard."""

    def __repr__(self) -> str:
        return f"KeysTold(peers={[peer.node_id for peer in self.peers]!r}, removed={self.removed!r})"


class NodeKeys(msgspec.Struct, frozen=True, kw_only=True):
    """All that one node has been told."""

    peers: Mapping[NodeId, PeerKeys] = {}
    wireguard_private: bytes = b""

    def __repr__(self) -> str:
        return f"NodeKeys(peers={list(self.peers)!r})"


def after(keys: NodeKeys, told: KeysTold) -> NodeKeys:
    """What a node knows that knew ``keys`` and is told this."""
    kept = {} if told.is_complete else {id: one for id, one in keys.peers.items() if id not in told.removed}
    return NodeKeys(
        peers=kept | {one.node_id: one for one in told.peers}, wireguard_private=told.wireguard_private
    )

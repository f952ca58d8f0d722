"""Keys of encrypted overlays, as a manager tells them to a node."""

from skep.errors import InvalidArgument
from skep.model.ids import NodeId
from skep.model.pair_keys import KEY_BYTES, KeysTold, PairKey, PeerKeys
from skep.wire import skep_pb2 as pb


def keys_to_pb(told: KeysTold) -> pb.NodeKeys:
    return pb.NodeKeys(
        complete=told.is_complete,
        peers=[
            pb.PeerKeys(
                node_id=peer.node_id,
                keys=[
                    pb.PairKey(epoch=key.epoch, sending=key.sending, receiving=key.receiving)
                    for key in peer.keys
                ],
                wireguard_public=peer.wireguard_public,
            )
            for peer in told.peers
        ],
        removed=told.removed,
        wireguard_private=told.wireguard_private,
    )


def keys_from_pb(message: pb.NodeKeys) -> KeysTold:
    """Raises: InvalidArgument: a key has not the length of a key."""
    return KeysTold(
        is_complete=message.complete,
        peers=tuple(
            PeerKeys(
                node_id=NodeId(peer.node_id),
                keys=tuple(PairKey(key.epoch, _key(key.sending), _key(key.receiving)) for key in peer.keys),
                wireguard_public=_key(peer.wireguard_public) if peer.wireguard_public else b"",
            )
            for peer in message.peers
        ),
        removed=tuple(NodeId(id) for id in message.removed),
        wireguard_private=_key(message.wireguard_private) if message.wireguard_private else b"",
    )


def _key(data: bytes) -> bytes:
    if len(data) != KEY_BYTES:
        raise InvalidArgument(f"a key of {len(data)} bytes")
    return data

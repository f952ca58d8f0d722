"""Records: the loop's writes to a volume, each of which checks that it still applies."""

from collections.abc import Callable, Mapping

from msgspec.structs import replace

from skep.manager.volumes.steps import Delete, Publish, Step, Unpublish, doubted, settled
from skep.model.node import Node
from skep.model.values.ids import NodeId, VolumeId
from skep.model.volume import PublishState, PublishStatus, Volume, VolumeInfo, VolumeScope
from skep.store.interface import Transaction

INFO_PART, PUBLISH_PART = "info", "publish"
"""Parts of a stored volume that can be damaged separately."""
_DAMAGED = "the store's record of where the volume is published is unreadable: remove the volume with force"


def settle(tx: Transaction, id: VolumeId, needed: frozenset[NodeId]) -> Volume | None:
    """Bring the volume's entries up to date with the nodes that need it, and return it.  None if it has to be left."""
    volume = tx.rely_on(Volume, id)
    if volume is None:
        return None
    if PUBLISH_PART in tx.damaged(Volume).get(id, ()):
        # It looks unpublished: with another entry it might be on two nodes, and the damage would be hidden.
        tx.put(replace(volume, message=_DAMAGED))
        return None
    changed = settled(volume, needed, lambda node_id: tx.lookup(Node, node_id))
    return tx.put(changed) if changed != volume else volume


def announce_creation(tx: Transaction, id: VolumeId) -> bool:
    """Announce that the driver will be asked to create the volume.  Returns False if it was removed before."""
    volume = tx.rely_on(Volume, id)
    if volume is None or volume.info is not None or (volume.pending_delete and not volume.is_creating):
        return False
    tx.put(replace(volume, is_creating=True))
    return True


def record_created(tx: Transaction, id: VolumeId, info: VolumeInfo) -> None:
    """Record that the driver has created the volume."""
    volume = tx.rely_on(Volume, id)
    if volume is not None and volume.info is None:
        tx.put(replace(volume, info=info, is_creating=False, message=""))


def record_published(tx: Transaction, id: VolumeId, node_id: NodeId, context: Mapping[str, str]) -> None:
    """Record that the volume is published on the node."""
    _change(
        tx,
        id,
        node_id,
        PublishState.PENDING,
        lambda one: replace(
            one, state=PublishState.PUBLISHED, publish_context=context, is_doubtful=False, message=""
        ),
    )


def record_unpublished(tx: Transaction, id: VolumeId, node_id: NodeId) -> None:
    """Record that the volume is no longer published on the node."""
    _change(tx, id, node_id, PublishState.PENDING_UNPUBLISH, lambda _: None)


def _change(
    tx: Transaction,
    id: VolumeId,
    node_id: NodeId,
    state: PublishState,
    change: Callable[[PublishStatus], PublishStatus | None],
) -> None:
    """Change the volume's status on a node, if it is still in ``state``."""
    volume = tx.rely_on(Volume, id)
    if volume is None:
        return
    changed = [
        change(one) if one.node_id == node_id and one.state is state else one for one in volume.publish_status
    ]
    tx.put(replace(volume, publish_status=tuple(one for one in changed if one is not None)))


def forget(tx: Transaction, id: VolumeId) -> None:
    """Delete a removed volume that is on no node."""
    volume = tx.rely_on(Volume, id)
    if volume is None or not volume.pending_delete or volume.publish_status:
        return
    if tx.damaged(Volume).get(id):
        return  # the driver may have it
    tx.delete(Volume, id)


def mark_doubtful(tx: Transaction, id: VolumeId, step: Step) -> bool:
    """Have all nodes unpublish the volume, except the node that it is published for.

    Returns False if the step does not concern other nodes.
    """
    volume = tx.rely_on(Volume, id)
    match step:
        case Publish(node_id) if volume is not None and volume.spec.access_mode.scope is VolumeScope.SINGLE:
            tx.put(doubted(volume, frozenset({node_id}), tx.find(Node)))
        case Delete() if volume is not None and not volume.publish_status:
            tx.put(doubted(volume, frozenset(), tx.find(Node)))
        case _:
            return False
    return True


def note(tx: Transaction, id: VolumeId, step: Step, words: str) -> None:
    """Show why a step failed, on the volume or on its entry for the step's node."""
    volume = tx.rely_on(Volume, id)
    if volume is None:
        return
    match step:
        case Publish(node_id) | Unpublish(node_id):
            statuses = tuple(
                replace(one, message=words) if one.node_id == node_id else one
                for one in volume.publish_status
            )
            tx.put(replace(volume, publish_status=statuses))
        case _:
            tx.put(replace(volume, message=words))

"""Index of the cluster volumes on each node, without a scan of all volumes."""

from collections.abc import Collection, Iterable

from skep.model.values.ids import NodeId, VolumeId
from skep.model.volume import Volume


class VolumeIndex:
    """Nodes and the volumes that have a status on them.

    It may lag behind a view by the commits that have not been read yet.  Each of these commits names the objects that
    it changes.
    """

    def __init__(self) -> None:
        self._by_node: dict[NodeId, set[VolumeId]] = {}

    def reset(self, volumes: Iterable[Volume]) -> None:
        """Rebuild the index from all volumes."""
        self._by_node = {}
        for volume in volumes:
            self.change(None, volume)

    def change(self, old: Volume | None, new: Volume | None) -> Collection[NodeId]:
        """Apply a change, and return the nodes that it affects."""
        before = {one.node_id: one for one in old.publish_status} if old is not None else {}
        now = {one.node_id: one for one in new.publish_status} if new is not None else {}
        changed = sorted(id for id in before.keys() | now.keys() if before.get(id) != now.get(id))
        for node_id in changed:
            if new is not None and node_id in now:
                self._by_node.setdefault(node_id, set()).add(new.id)
            elif old is not None and (ids := self._by_node.get(node_id)) is not None:
                ids.discard(old.id)
                if not ids:
                    del self._by_node[node_id]
        return changed

    def on(self, node_id: NodeId) -> Iterable[VolumeId]:
        """Return the volumes with a status on a node, in order."""
        return sorted(self._by_node.get(node_id, ()))

"""What the reports of one node amount to: the paths that fail, once a verdict has settled."""

from collections.abc import Collection, Iterable, Mapping

from skep.manager.paths.records import WRITTEN_MAX
from skep.model.ids import NodeId
from skep.model.node import FailingPath
from skep.model.paths import PathCheck, PathPeer, PathReport

_RANK: dict[str, int] = {
    PathCheck.OVERLAY: 0,
    PathCheck.ENCRYPTED: 1,
    PathCheck.CONTROL: 2,
    PathCheck.ETCD: 3,
}
"""What is written first where not all of it is."""


class Verdicts:
    """Of one node, in one session.

    ``stored``: what was written of the node; that counts until it says something else.
    """

    def __init__(self, stored: Iterable[FailingPath]) -> None:
        self._failing: dict[NodeId, tuple[FailingPath, ...]] = {}
        for path in stored:
            self._failing[path.peer] = (*self._failing.get(path.peer, ()), path)

    def take(self, reports: Iterable[PathReport], peers: Mapping[NodeId, PathPeer]) -> None:
        """The node has found this.  Reports of others than ``peers``, or of a first round, change nothing."""
        for report in reports:
            peer = peers.get(report.peer)
            if peer is None or not report.is_settled:
                continue
            self._failing[peer.node_id] = tuple(
                FailingPath(
                    peer=peer.node_id, hostname=peer.hostname, check=finding.check.value, port=finding.port
                )
                for finding in report.failing
            )

    def keep(self, peers: Collection[NodeId]) -> None:
        """Nobody else is probed any more: nothing is known of others."""
        self._failing = {id: paths for id, paths in self._failing.items() if id in peers}

    def failing(self) -> tuple[FailingPath, ...]:
        """What is to be written: at most ``WRITTEN_MAX``, those that carry containers' packets first."""
        paths = [path for paths in self._failing.values() for path in paths]
        paths.sort(key=lambda path: (_RANK.get(path.check, len(_RANK)), path.peer, path.check))
        return tuple(paths[:WRITTEN_MAX])

"""The settled failures in the probe reports of one node."""

from collections.abc import Collection, Iterable, Mapping

from skep.manager.probes.records import WRITTEN_MAX
from skep.model.ids import NodeId
from skep.model.node import FailingPath
from skep.model.paths import PathCheck, PathPeer, PathReport

_RANK: dict[str, int] = {
    PathCheck.OVERLAY: 0,
    PathCheck.ENCRYPTED: 1,
    PathCheck.CONTROL: 2,
    PathCheck.ETCD: 3,
}
"""Order of writing, if there are too many."""


class ProbeResults:
    """The results of one node, in one session.

    ``stored``: the failing paths written before; they count until the node reports something else.
    """

    def __init__(self, stored: Iterable[FailingPath]) -> None:
        self._failing: dict[NodeId, tuple[FailingPath, ...]] = {}
        for path in stored:
            self._failing[path.peer] = (*self._failing.get(path.peer, ()), path)

    def record(self, reports: Iterable[PathReport], peers: Mapping[NodeId, PathPeer]) -> None:
        """Record reports.  Those about others than ``peers``, or of a first round, are ignored."""
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

    def retain(self, peers: Collection[NodeId]) -> None:
        """Forget all nodes but ``peers``, which are no longer probed."""
        self._failing = {id: paths for id, paths in self._failing.items() if id in peers}

    def failing(self) -> tuple[FailingPath, ...]:
        """The failing paths to write: at most ``WRITTEN_MAX``, those of containers' traffic first."""
        paths = [path for paths in self._failing.values() for path in paths]
        paths.sort(key=lambda path: (_RANK.get(path.check, len(_RANK)), path.peer, path.check))
        return tuple(paths[:WRITTEN_MAX])

"""What the rest of the node asks of its probes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from skep.model.ids import NodeId
from skep.model.paths import PathPeer, PathReport, ProbeTargets


class PathProbes(Protocol):
    """Probes of one node (``paths.Paths``)."""

    def set_targets(self, targets: ProbeTargets | None) -> None:
        """Probe these from now on, new ones at once; the latest targets wins.  None: none, and leave nothing."""

    @property
    def reports(self) -> Mapping[NodeId, PathReport]:
        """The latest of each peer that was probed; for a new listener."""

    async def next_reports(self) -> tuple[PathReport, ...]:
        """Wait until verdicts changed or settled, or an MTU is another; the latest of each peer concerned.

        For one listener.  A slow one misses what was replaced meanwhile, and nothing else.
        """

    async def examine(self, peers: Iterable[PathPeer], *, throughput: bool = False) -> tuple[PathReport, ...]:
        """Probe these now, at most 15 s; for that time they are known, as if they were targets.

        Peers that took longer are left out.  ``throughput``: measured, too, one peer after the other, each with at
        most 32 MiB and 1 s.
        """

    def warnings(self) -> Sequence[str]:
        """Sentences for ``docker info``: what was put right and has a price."""

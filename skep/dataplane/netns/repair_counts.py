"""Counts repairs of changes by other programs, for metrics."""

from collections import Counter
from collections.abc import Iterable, Mapping

import structlog

from skep.dataplane.netns.diff import AddLink, ChangeLink, DeleteLink, Operation, Put, Remove
from skep.dataplane.netns.state import Address, EntryKind, NeighborEntry, RoutingRule

log = structlog.get_logger()

_ENTRIES = {
    EntryKind.FORWARD: "forwarding",
    EntryKind.PORT: "bridge entry",
    EntryKind.NEIGHBOR: "neighbor",
    EntryKind.OWN: "bridge entry",
}


KINDS = ("link", "address", "route", "rule", *sorted({*_ENTRIES.values()}), "sysctl", "rules")


class Repairs:
    """Repairs since the process started, by kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.comparisons = 0
        """Number of comparisons of a namespace with its desired state, whether they led to repairs or not."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Repairs by kind.  Kinds that never occurred are absent."""
        return dict(self._counts)

    @property
    def total(self) -> int:
        """Repairs of all kinds."""
        return self._counts.total()

    def record(self, namespace: str, kinds: Iterable[str]) -> None:
        """Count and log one repair for each of ``kinds``."""
        counts = Counter(kinds)
        self._counts.update(counts)
        log.warning(
            "network repaired",
            namespace=namespace,
            **{kind.replace(" ", "_"): number for kind, number in counts.items()},
        )


def kind_of(operation: Operation) -> str:
    """Return the kind of deviation that ``operation`` repairs."""
    match operation:
        case AddLink() | ChangeLink() | DeleteLink():
            return "link"
        case Put(item) | Remove(item):
            match item:
                case NeighborEntry():
                    return _ENTRIES[item.kind]
                case Address():
                    return "address"
                case RoutingRule():
                    return "rule"
                case _:
                    return "route"
        case _:
            return "sysctl"

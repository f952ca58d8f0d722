"""What was carried and what was dropped, and why.  Each thread has one of its own; readers add them up."""

from collections import Counter
from collections.abc import Iterable

import msgspec


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Since the forwarder began.  ``dropped``: pieces, units, frames or greetings by reason."""

    sent_frames: int = 0
    sent_units: int = 0
    received_frames: int = 0
    received_units: int = 0
    dropped: dict[str, int] = {}


class Counters:
    """One thread's."""

    def __init__(self) -> None:
        self.frames = 0
        self.units = 0
        self.dropped: Counter[str] = Counter()

    def drop(self, reason: str) -> None:
        self.dropped[reason] += 1


def counts(sending: Counters, receiving: Counters, incomplete: int) -> Counts:
    """Both directions together.  ``incomplete``: units of which a piece never came."""
    dropped = _sum([sending.dropped, receiving.dropped, Counter({"incomplete": incomplete})])
    return Counts(
        sent_frames=sending.frames,
        sent_units=sending.units,
        received_frames=receiving.frames,
        received_units=receiving.units,
        dropped=dropped,
    )


def _sum(all_dropped: Iterable[Counter[str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for dropped in all_dropped:
        total.update(dropped.copy())
    return {reason: number for reason, number in sorted(total.items()) if number}

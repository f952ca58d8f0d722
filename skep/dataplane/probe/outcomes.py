"""What came of asking somebody a few times."""

import msgspec

from skep.dataplane.probe.packets import Said


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """``round_trip_s``: the shortest; ``error``: what the kernel said of what failed; ``said``: the last answer."""

    sent: int
    answered: int
    round_trip_s: float | None = None
    error: str = ""
    said: Said | None = None

    @property
    def arrived(self) -> bool:
        """Whether anything did."""
        return self.answered > 0

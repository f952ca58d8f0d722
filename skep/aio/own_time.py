"""Time as one event loop lived it: what a loop did not live through, nobody is blamed for."""

import msgspec


class OwnTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that this loop was there to see."""

    seconds: float = 0.0
    """Own time; only differences mean something."""
    seen_at: float
    """The clock's monotonic time at the last look."""

    def after(self, now: float, tick_s: float, *, is_current: bool = True) -> "OwnTime":
        """Own time at ``now``, one tick later.

        A tick that took longer than twice its length was a standstill of this loop, which no peer shall pay for.
        While not ``is_current``, own time stands still: this process could not hear what others heard.
        """
        passed = min(max(now - self.seen_at, 0.0), 2 * tick_s) if is_current else 0.0
        return OwnTime(seconds=self.seconds + passed, seen_at=now)

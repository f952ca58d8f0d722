"""The clock of a rehearsal, which stands still while decisions are made and jumps to the next event."""

from skep.model.values.times import SECOND_NS


class SupposedClock:
    """Implements ``Clock``.  ``monotonic`` begins at 0."""

    def __init__(self, now_ns: int) -> None:
        self._began_ns = now_ns
        self._passed_s = 0.0

    def now_ns(self) -> int:
        """Return the supposed wall clock time in nanoseconds since 1970."""
        return self._began_ns + round(self._passed_s * SECOND_NS)

    def monotonic(self) -> float:
        """Return the supposed seconds since the beginning."""
        return self._passed_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._passed_s += seconds

    async def sleep(self, seconds: float) -> None:
        """Not available: nothing waits in a rehearsal."""
        raise NotImplementedError

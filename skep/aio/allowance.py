"""How much somebody may do in a time: a bucket that fills steadily, and holds so much at most."""


class Allowance:
    """``per_s`` a second, ``most`` at once.  Time is an argument: seconds that never go back."""

    def __init__(self, most: float, per_s: float, now: float) -> None:
        self._most = most
        self._per_s = per_s
        self._left = most
        self._at = now

    def take(self, now: float) -> bool:
        """Whether one more is allowed; then it is taken."""
        self._left = min(self._most, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

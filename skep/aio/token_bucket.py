"""A rate limit: a token bucket."""


class TokenBucket:
    """A bucket with ``per_s`` new tokens per second, at most ``most``.  Time is an argument in monotonic seconds."""

    def __init__(self, most: float, per_s: float, now: float) -> None:
        self._most = most
        self._per_s = per_s
        self._left = most
        self._at = now

    def take(self, now: float) -> bool:
        """Take a token.  Return whether there was one."""
        self._left = min(self._most, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

"""Which counters of one sender were seen: each is taken once.

Source: RFC 4303, section 3.4.3 (the sliding window of ESP); RFC 6479 for its size.
"""

WINDOW = 2048
"""Units that may overtake one another."""

_MASK = (1 << WINDOW) - 1


class ReplayWindow:
    """The counters of one session that were opened.  One thread's."""

    def __init__(self) -> None:
        self._top = -1
        self._seen = 0

    def may_open(self, counter: int) -> bool:
        """Whether ``counter`` is new: neither seen nor too old to know."""
        behind = self._top - counter
        return behind < 0 or (behind < WINDOW and not self._seen >> behind & 1)

    def mark(self, counter: int) -> None:
        """``counter`` was opened: only what is authentic moves the window."""
        ahead = counter - self._top
        if ahead > 0:
            self._seen = ((self._seen << ahead) | 1) & _MASK if ahead < WINDOW else 1
            self._top = counter
        else:
            self._seen |= 1 << -ahead

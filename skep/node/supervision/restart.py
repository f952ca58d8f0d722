"""Decides when an ended process is restarted.  Pure."""

from collections.abc import Sequence

import msgspec

CRASHES_MAX = 5
"""Crashes within ``CRASH_WINDOW_S`` after which a process is not started again."""
CRASH_WINDOW_S = 60.0
"""Seconds in which crashes are counted."""
_FIRST_DELAY_S = 0.1
"""Seconds before the first new start."""
_GROWTH = 3.0
_DELAY_S_MAX = 10.0
"""Longest pause between two starts."""
_STEPS_MAX = 10
"""Limit for the exponent of the growing pause.  ``_DELAY_S_MAX`` is reached before."""


class StartAgain(msgspec.Struct, frozen=True):
    """Restart the process after ``after_s`` seconds."""

    after_s: float


class GiveUp(msgspec.Struct, frozen=True):
    """Do not restart the process.  ``crashes`` is how often it ended within ``CRASH_WINDOW_S``."""

    crashes: int


def recent(ends: Sequence[float], now: float) -> tuple[float, ...]:
    """Return the ``ends`` (monotonic seconds) that are within ``CRASH_WINDOW_S`` before ``now``."""
    return tuple(end for end in ends if now - end < CRASH_WINDOW_S)


def after_end(ends: Sequence[float], now: float, rng: float, *, gives_up: bool) -> StartAgain | GiveUp:
    """Decide whether to restart after the last of ``ends``.

    The pause grows with every end within the last minute.  With ``gives_up``, the process is not restarted after the
    fifth.

    Args:
        rng: A number from 0 to 1, which spreads the pause over half to all of its length.
    """
    count = len(recent(ends, now))
    if gives_up and count >= CRASHES_MAX:
        return GiveUp(count)
    steps = min(max(count - 1, 0), _STEPS_MAX)
    pause_s = min(_FIRST_DELAY_S * _GROWTH**steps, _DELAY_S_MAX)
    return StartAgain(pause_s * (0.5 + rng / 2))

"""When a process that ended is started again.  Pure decisions."""

from collections.abc import Sequence

import msgspec

CRASHES_MAX = 5
CRASH_WINDOW_S = 60.0
_FIRST_DELAY_S = 0.1
_GROWTH = 3.0
_DELAY_S_MAX = 10.0
_STEPS_MAX = 10


class StartAgain(msgspec.Struct, frozen=True):
    """After so many seconds."""

    after_s: float


class GiveUp(msgspec.Struct, frozen=True):
    """Not again; ``crashes``: ends within ``CRASH_WINDOW_S``."""

    crashes: int


def recent(ends: Sequence[float], now: float) -> tuple[float, ...]:
    """Those of ``ends`` (monotonic seconds) that still count at ``now``."""
    return tuple(end for end in ends if now - end < CRASH_WINDOW_S)


def after_end(ends: Sequence[float], now: float, rng: float, *, gives_up: bool) -> StartAgain | GiveUp:
    """What to do after the last of ``ends``.

    The pause grows with every end within the last minute; the fifth of them is the last, if ``gives_up``.

    Args:
        rng: a number from 0 to 1; spreads the pause over half to all of its length.
    """
    count = len(recent(ends, now))
    if gives_up and count >= CRASHES_MAX:
        return GiveUp(count)
    steps = min(max(count - 1, 0), _STEPS_MAX)
    pause_s = min(_FIRST_DELAY_S * _GROWTH**steps, _DELAY_S_MAX)
    return StartAgain(pause_s * (0.5 + rng / 2))

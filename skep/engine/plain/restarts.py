"""What follows when a plain container has ended: its restart policy, or its removal.  Pure.

Source: moby 20.10, restartmanager/restartmanager.go (the delays, what counts), daemon/monitor.go, daemon/daemon.go
(restore).
"""

from typing import TypeAlias

import msgspec

from skep.engine.options import Plain

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 60.0
LASTED_S = 10.0
"""A container that ran for so long was a good one: its next restart comes at once."""


class Rest(msgspec.Struct, frozen=True):
    """It stays as it is."""


class Remove(msgspec.Struct, frozen=True):
    """Its user wanted it gone with its end (``--rm``)."""


class StartAgain(msgspec.Struct, frozen=True):
    """After ``delay_s``, unless its user decides otherwise meanwhile."""

    delay_s: float


Next: TypeAlias = Rest | Remove | StartAgain


def after_end(plain: Plain, exit_code: int, ran_s: float, delay_before_s: float = 0.0) -> Next:
    """What follows.

    Args:
        exit_code: of its process, or of the start that failed.
        ran_s: how long it ran.
        delay_before_s: the delay of the restart before this one; 0: there was none.
    """
    if plain.auto_remove:
        return Remove()
    if not _wants_restart(plain, exit_code):
        return Rest()
    if not delay_before_s or ran_s >= LASTED_S:
        return StartAgain(FIRST_DELAY_S)
    return StartAgain(min(2 * delay_before_s, LONGEST_DELAY_S))


def after_restart_of_the_node(plain: Plain, exit_code: int, *, was_started: bool) -> Next:
    """The same for a container that this process finds ended: ``always`` then means whatever its user did."""
    if not was_started:
        return Rest()
    if plain.restart.name == "always":
        return StartAgain(0.0)
    return after_end(plain, exit_code, LASTED_S)


def _wants_restart(plain: Plain, exit_code: int) -> bool:
    if plain.is_stopped:
        return False
    match plain.restart.name:
        case "always" | "unless-stopped":
            return True
        case "on-failure":
            limit = plain.restart.attempts_max
            return exit_code != 0 and (not limit or plain.restarts < limit)
        case _:
            return False

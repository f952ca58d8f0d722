"""The level of the stored data: the lowest among what the managers know.  Nothing that a higher one brought is written.

A version that stores something which the one before would not understand raises ``LEVEL``, and stores it only while
``View.level`` has come as far.  The leader raises ``meta/level`` once every manager says that it knows more
(``ManagerStatus``); it never falls: an older manager does not start on a store of a higher level.
"""

from typing import Final

from skep.errors import FailedPrecondition

LEVEL: Final = 1
"""The newest level that this version knows."""

LOWEST: Final = 1
"""That of every version that does not say."""


def decoded_level(stored: bytes) -> int:
    """Raises: FailedPrecondition: it is damaged, or other managers already write what this version does not know."""
    try:
        level = int(stored)
    except ValueError as error:
        raise FailedPrecondition(f"the cluster's level is damaged: {stored!r}") from error
    if level > LEVEL:
        raise FailedPrecondition(
            f"the cluster is at level {level}; this version of Skep knows level {LEVEL} only: upgrade this manager"
        )
    return level

"""How new the assignments are that this node has seen: it never goes back.

A manager that lags behind the others, or was restored from an old copy, would otherwise start what was stopped and
stop what was started.  Only a higher incarnation (a restore, a forced new cluster) starts counting again.
"""

import msgspec

from skep.errors import FailedPrecondition


class Revision(msgspec.Struct, frozen=True, order=True):
    """A point in the cluster's history; of two the larger is the newer."""

    incarnation: int = 0
    number: int = 0


def advanced(seen: Revision, offered: Revision) -> Revision:
    """What was seen after taking ``offered``.

    Raises: FailedPrecondition: it lies before what was seen.
    """
    if offered < seen:
        raise FailedPrecondition(
            f"the manager is behind: it shows revision {offered.incarnation}.{offered.number}, "
            f"this node has seen {seen.incarnation}.{seen.number}"
        )
    return offered

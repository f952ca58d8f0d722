"""Points in the cluster's history.  A node never accepts a point older than the newest it has seen."""

import msgspec

from skep.errors import FailedPrecondition


class Revision(msgspec.Struct, frozen=True, order=True):
    """A point in the cluster's history.  Newer points are larger."""

    incarnation: int = 0
    number: int = 0


def advanced(seen: Revision, offered: Revision) -> Revision:
    """Return the newest revision after accepting ``offered``.

    Raises: FailedPrecondition: ``offered`` is older than ``seen``.
    """
    if offered < seen:
        raise FailedPrecondition(
            f"the manager is behind: it shows revision {offered.incarnation}.{offered.number}, "
            f"this node has seen {seen.incarnation}.{seen.number}"
        )
    return offered

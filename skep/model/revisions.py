"""Points in the cluster's history, which a node never goes back from."""

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

"""The feature level of the stored data, which is the lowest level of all managers, like etcd's cluster version.

A version of Skep has a higher ``LEVEL`` than the one before if it stores data that the one before cannot read.  It
stores such data only once ``View.level`` has reached its level.  The leader raises ``meta/level`` when every manager
reports a higher one (``ManagerStatus``).  The level is never lowered, and a manager does not start on a store with a
higher level than its own.
"""

from typing import Final

from skep.errors import FailedPrecondition

LEVEL: Final = 7
"""The newest level that this version can read."""

CLUSTER_VOLUMES: Final = 2
"""From this level on there may be objects of the kind ``volume``."""

USERS: Final = 3
"""From this level on there may be objects of the kinds ``user`` and ``quota``."""

JOURNAL: Final = 3
"""From this level on there is a journal, because a leader of a lower level would not limit its size."""

SCHEDULES: Final = 4
"""From this level on jobs may have schedules.  A leader of a lower level would run them at once and never again."""

VOLUME_AFFINITIES: Final = 5
"""From this level on services may have the label ``skep.volume-affinity``.  A leader of a lower level knows only the
former name of the label, and would start the tasks of a slot without their data.
"""

STOPS: Final = 6
"""From this level on services may be stopped.  A leader of a lower level would start their tasks."""

PLACEMENTS: Final = 6
"""From this level on services may have constraints that Docker does not have, and labels about their placement.  A
leader of a lower level would not start tasks with such constraints, and would ignore the labels.
"""

NOTIFICATIONS: Final = 6
"""From this level on there may be targets of notifications.  A leader of a lower level would not notify them."""

CERTIFICATES: Final = 6
"""From this level on there may be an account for certificates.  A leader of a lower level would not renew them."""

ADDRESSES: Final = 6
"""From this level on there may be failover addresses.  A manager of a lower level would not confirm them."""

REGISTRATIONS: Final = 6
"""From this level on there may be registrations of services outside.  A leader of a lower level would not remove those
whose leases are over.
"""

ZERO_TASKS: Final = 7
"""From this level on services may be scaled to zero.  A manager of a lower level would not wake them."""

LOWEST: Final = 1
"""The level of managers that do not report one."""


def decoded_level(stored: bytes) -> int:
    """Decode the level.  Raises: FailedPrecondition: it is damaged, or higher than the level of this version."""
    try:
        level = int(stored)
    except ValueError as error:
        raise FailedPrecondition(f"the cluster's level is damaged: {stored!r}") from error
    if level > LEVEL:
        raise FailedPrecondition(
            f"the cluster is at level {level}; this version of Skep supports level {LEVEL} only: upgrade this manager"
        )
    return level

"""When the tasks of a node that is down are replaced.

By default at once.  Labels of the service (``model.labels``) can delay this, forbid it, or have it wait until the
node has certainly stopped the tasks itself.  Until then a task keeps its slot, and continues if the node returns.
"""

from math import inf
from typing import assert_never

from skep.model.labels import DisconnectPolicy, OnDisconnect
from skep.model.node import RESPONSE_SECONDS_MAX
from skep.model.task import Task


def replaced_at(policy: DisconnectPolicy, task: Task, down_at: float) -> float:
    """When ``task``, whose node is down since ``down_at``, is to be replaced; infinity: not while it is down.

    STOP: the node counts the delay from its last contact, which is before ``down_at``, and then gives the container
    its stop grace period.  Both are added, so nothing runs twice.  A node that still waits for a response of its only
    manager has not noticed that it is cut off, so shorter delays count as ``RESPONSE_SECONDS_MAX``.
    """
    match policy.action:
        case OnDisconnect.REPLACE:
            return down_at + policy.delay_s
        case OnDisconnect.KEEP:
            return inf
        case OnDisconnect.STOP:
            return down_at + max(policy.delay_s, RESPONSE_SECONDS_MAX) + task.spec.stop_grace_s
        case _:
            assert_never(policy.action)

"""When the tasks of a node that is down lose their places to others.

By default at once.  A service may have it later, never, or only once the node has surely stopped them itself (labels
of ``model.labels``); and nothing is replaced while replacement is frozen (``storm``).  Until then a task keeps its
slot: should the node return, it is found as it was.
"""

from math import inf
from typing import assert_never

from skep.model.labels import DisconnectPolicy, OnDisconnect
from skep.model.node import ANSWER_SECONDS_MAX
from skep.model.task import Task


def replaced_at(policy: DisconnectPolicy, task: Task, down_at: float, *, is_frozen: bool) -> float:
    """When ``task``, whose node is down since ``down_at``, is to be replaced; infinity: not for now.

    STOP: the node counts its delay from when it was last heard, which is before ``down_at``, and then gives the
    container its time to stop; so with both added nothing runs twice.  One that still waits for an answer of its only
    manager does not know that it is cut off, so a shorter delay begins no earlier.
    """
    if is_frozen:
        return inf
    match policy.action:
        case OnDisconnect.REPLACE:
            return down_at + policy.delay_s
        case OnDisconnect.KEEP:
            return inf
        case OnDisconnect.STOP:
            return down_at + max(policy.delay_s, ANSWER_SECONDS_MAX) + task.spec.stop_grace_s
        case _:
            assert_never(policy.action)

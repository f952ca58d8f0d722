"""Decides when the tasks of a down node are replaced.

By default they are replaced at once.  Labels of the service (``model.options.labels``) can delay or forbid that, or
delay it until the node itself has certainly stopped the tasks.  Until then a task keeps its slot, and continues if the
node reconnects.
"""

from math import inf
from typing import assert_never

from msgspec.structs import replace

from skep.model.node import RESPONSE_SECONDS_MAX, Node
from skep.model.options.labels import DisconnectPolicy, OnDisconnect, disconnect_policy
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.times import SECOND_NS, unix_ns

UNCERTAIN_S = 2.0
"""If a node's last contact was less than this many seconds after a change of labels, it may not have received the
change.

The margin covers the difference between the clocks of two managers, which may have made the two stamps.
"""


def policy_on(node: Node, service: Service) -> DisconnectPolicy:
    """Return the policy for the tasks of ``service`` on a down node.

    With STOP the node acts on the labels that it received last.  If these may be earlier labels, the longest delay
    counts.  If the node would stop nothing according to one of them, the delay is infinite, because no task may run
    twice.
    """
    present = disconnect_policy(service.spec.labels)
    if present.action is not OnDisconnect.STOP or not service.past_disconnects or node.silent_since is None:
        return present
    heard_ns = unix_ns(node.silent_since) - UNCERTAIN_S * SECOND_NS
    earlier = [
        disconnect_policy(past.labels) for past in service.past_disconnects if unix_ns(past.until) >= heard_ns
    ]
    delays_s = [one.delay_s if one.action is OnDisconnect.STOP else inf for one in earlier]
    return replace(present, delay_s=max([present.delay_s, *delays_s]))


def replaced_at(policy: DisconnectPolicy, task: Task, down_at: float) -> float:
    """Return the time at which ``task`` is replaced, whose node is down since ``down_at``.  Infinity means that it is
    not replaced while the node is down.

    With STOP the node counts the delay from its last contact, which is before ``down_at``, and then waits for the
    container's stop grace period.  Both are added, so that nothing runs twice.  A node that still waits for a response
    from its only manager has not noticed the disconnection, so shorter delays count as ``RESPONSE_SECONDS_MAX``.
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

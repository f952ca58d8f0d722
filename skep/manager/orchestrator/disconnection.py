"""When the tasks of a node that is down are replaced.

By default at once.  Labels of the service (``model.labels``) can delay this, forbid it, or have it wait until the
node has certainly stopped the tasks itself.  Until then a task keeps its slot, and continues if the node returns.
"""

from math import inf
from typing import assert_never

from msgspec.structs import replace

from skep.model.labels import DisconnectPolicy, OnDisconnect, disconnect_policy
from skep.model.node import RESPONSE_SECONDS_MAX, Node
from skep.model.service import Service
from skep.model.task import Task
from skep.model.times import SECOND_NS, unix_ns

UNCERTAIN_S = 2.0
"""A node that was last heard within this time after a change of labels may not have received it.  The two stamps may
be of two managers' clocks."""


def policy_on(node: Node, service: Service) -> DisconnectPolicy:
    """The policy for the tasks of ``service`` on a node that is down.

    With STOP it is the node that acts, by the labels that it was sent.  If they may be earlier ones, the longest delay
    counts; where the node would stop nothing by one of them, the delay has no end: nothing may run twice.
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

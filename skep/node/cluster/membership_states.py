"""Membership of a node in a cluster as a state machine: all states, events and transitions.  Pure.

Three machines share one table.  No two of them have a state in common:

* *membership*, for the life of the node process: outside, entering (init, join, restore), member, leaving
* *session*, for each start of agent and manager supervisor: whether there has been a session yet
* *role*, for the same time: whether this node has a manager process.  The certificate decides that.  ``promoting`` and
  ``demoting`` write files, and are repeated until that succeeds.  Every other state waits for an event.

``docs/design/node.md`` draws the table.
"""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

from skep.model.node import NodeRole


class MembershipState(Enum):
    """A state of one of the three machines."""

    STARTING = "starting"
    """``node.json`` has not been read yet."""
    UNREADABLE = "unreadable"
    """``node.json`` cannot be read, so it is not known whether the node is a member.  Reading is retried."""
    OUTSIDE = "outside"
    LOCKED = "locked"
    """The manager's keys are encrypted (autolock), and the node waits for ``docker swarm unlock``."""
    ENTERING = "entering"
    """Init, join or restore is in progress.  A failure leaves nothing behind, and ``node.json`` is written last."""
    MEMBER = "member"
    RECOVERING = "recovering"
    """``docker swarm init --force-new-cluster``: agent and manager are stopped, tasks keep running."""
    FAILED = "failed"
    """The node is a member, but its agent has ended because the cluster refuses it.

    ``docker swarm leave`` ends this state.
    """
    LEAVING = "leaving"

    PENDING = "pending"
    """No manager has accepted a session yet."""
    ACTIVE = "active"
    """There has been a session.  The state stays the same while managers are unreachable."""

    WORKER = "worker"
    PROMOTING = "promoting"
    MANAGER = "manager"
    REMOVED = "removed"
    """The other managers have removed this manager, but its certificate still has the role manager."""
    DEMOTING = "demoting"


class MembershipEvent(Enum):
    """Causes of state changes."""

    NO_FILE = "no node.json"
    LOADED = "node.json read"
    LOADED_LOCKED = "node.json read, keys locked"
    READ_FAILED = "node.json not readable"
    ENTER = "init, join or restore"
    ENTERED = "node.json written"
    ENTER_FAILED = "init, join or restore failed"
    UNLOCKED = "unlock"
    RECOVER = "init with force-new-cluster"
    RESTARTED = "agent and manager started again"
    REFUSED = "refused by the cluster"
    LEAVE = "leave"
    LEFT = "cluster data removed"

    SESSION = "first session"

    CERTIFIED_MANAGER = "manager certificate"
    CERTIFIED_WORKER = "worker certificate"
    FILES_WRITTEN = "manager files written"
    FILES_REMOVED = "manager files removed"
    EXPELLED = "removed by other managers"
    RESET = "manager files replaced"


TRANSITIONS: Mapping[tuple[MembershipState, MembershipEvent], MembershipState] = MappingProxyType(
    {
        (MembershipState.STARTING, MembershipEvent.NO_FILE): MembershipState.OUTSIDE,
        (MembershipState.STARTING, MembershipEvent.LOADED): MembershipState.MEMBER,
        (MembershipState.STARTING, MembershipEvent.LOADED_LOCKED): MembershipState.LOCKED,
        (MembershipState.STARTING, MembershipEvent.READ_FAILED): MembershipState.UNREADABLE,
        # The API is served before node.json is read.
        (MembershipState.STARTING, MembershipEvent.ENTER): MembershipState.ENTERING,
        (MembershipState.UNREADABLE, MembershipEvent.NO_FILE): MembershipState.OUTSIDE,
        (MembershipState.UNREADABLE, MembershipEvent.LOADED): MembershipState.MEMBER,
        (MembershipState.UNREADABLE, MembershipEvent.LOADED_LOCKED): MembershipState.LOCKED,
        (MembershipState.UNREADABLE, MembershipEvent.READ_FAILED): MembershipState.UNREADABLE,
        (MembershipState.UNREADABLE, MembershipEvent.LEAVE): MembershipState.LEAVING,
        (MembershipState.OUTSIDE, MembershipEvent.ENTER): MembershipState.ENTERING,
        # Reading was being retried when a user left by force.
        (MembershipState.OUTSIDE, MembershipEvent.NO_FILE): MembershipState.OUTSIDE,
        (MembershipState.OUTSIDE, MembershipEvent.READ_FAILED): MembershipState.UNREADABLE,
        (MembershipState.LOCKED, MembershipEvent.UNLOCKED): MembershipState.MEMBER,
        (MembershipState.LOCKED, MembershipEvent.LEAVE): MembershipState.LEAVING,
        (MembershipState.ENTERING, MembershipEvent.ENTERED): MembershipState.MEMBER,
        (MembershipState.ENTERING, MembershipEvent.ENTER_FAILED): MembershipState.LEAVING,
        # The request that waits for a session reports the refusal.
        (MembershipState.ENTERING, MembershipEvent.REFUSED): MembershipState.ENTERING,
        (MembershipState.MEMBER, MembershipEvent.RECOVER): MembershipState.RECOVERING,
        (MembershipState.MEMBER, MembershipEvent.REFUSED): MembershipState.FAILED,
        (MembershipState.MEMBER, MembershipEvent.LEAVE): MembershipState.LEAVING,
        (MembershipState.FAILED, MembershipEvent.RECOVER): MembershipState.RECOVERING,
        (MembershipState.FAILED, MembershipEvent.LEAVE): MembershipState.LEAVING,
        # An agent may be refused at the moment when it is stopped.
        (MembershipState.RECOVERING, MembershipEvent.REFUSED): MembershipState.RECOVERING,
        (MembershipState.RECOVERING, MembershipEvent.RESTARTED): MembershipState.MEMBER,
        (MembershipState.LEAVING, MembershipEvent.REFUSED): MembershipState.LEAVING,
        (MembershipState.LEAVING, MembershipEvent.LEFT): MembershipState.OUTSIDE,
        #
        (MembershipState.PENDING, MembershipEvent.SESSION): MembershipState.ACTIVE,
        #
        (MembershipState.WORKER, MembershipEvent.CERTIFIED_WORKER): MembershipState.WORKER,
        (MembershipState.WORKER, MembershipEvent.CERTIFIED_MANAGER): MembershipState.PROMOTING,
        (MembershipState.PROMOTING, MembershipEvent.FILES_WRITTEN): MembershipState.MANAGER,
        (MembershipState.MANAGER, MembershipEvent.CERTIFIED_WORKER): MembershipState.DEMOTING,
        (MembershipState.MANAGER, MembershipEvent.EXPELLED): MembershipState.REMOVED,
        (MembershipState.REMOVED, MembershipEvent.CERTIFIED_WORKER): MembershipState.DEMOTING,
        (MembershipState.REMOVED, MembershipEvent.RESET): MembershipState.MANAGER,
        (MembershipState.DEMOTING, MembershipEvent.FILES_REMOVED): MembershipState.WORKER,
    }
)


def after(state: MembershipState, event: MembershipEvent) -> MembershipState:
    """Return the next state.  An event that the table does not have for ``state`` is a bug."""
    following = TRANSITIONS.get((state, event))
    assert following is not None, f"{event.name} in state {state.name}"
    return following


def certified(role: NodeRole) -> MembershipEvent:
    """Return the event of a certificate for ``role``."""
    return MembershipEvent.CERTIFIED_MANAGER if role is NodeRole.MANAGER else MembershipEvent.CERTIFIED_WORKER


def docker_state(membership: MembershipState, session: MembershipState | None, error: str) -> str:
    """Return ``LocalNodeState`` of ``/info``: ``inactive``, ``locked``, ``pending``, ``active`` or ``error``.

    Args:
        session: ``PENDING`` or ``ACTIVE``, or None if neither agent nor manager has been started.
        error: Why the node does not take part in its cluster as it should, or empty if it does.
    """
    if membership is MembershipState.LOCKED:
        return "locked"
    if membership is MembershipState.UNREADABLE:
        return "error"
    if session is None:
        return "inactive"
    return "error" if error else session.value

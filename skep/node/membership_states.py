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


class State(Enum):
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


class Event(Enum):
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


TRANSITIONS: Mapping[tuple[State, Event], State] = MappingProxyType(
    {
        (State.STARTING, Event.NO_FILE): State.OUTSIDE,
        (State.STARTING, Event.LOADED): State.MEMBER,
        (State.STARTING, Event.LOADED_LOCKED): State.LOCKED,
        (State.STARTING, Event.READ_FAILED): State.UNREADABLE,
        # The API is served before node.json is read.
        (State.STARTING, Event.ENTER): State.ENTERING,
        (State.UNREADABLE, Event.NO_FILE): State.OUTSIDE,
        (State.UNREADABLE, Event.LOADED): State.MEMBER,
        (State.UNREADABLE, Event.LOADED_LOCKED): State.LOCKED,
        (State.UNREADABLE, Event.READ_FAILED): State.UNREADABLE,
        (State.UNREADABLE, Event.LEAVE): State.LEAVING,
        (State.OUTSIDE, Event.ENTER): State.ENTERING,
        # Reading was being retried when a user left by force.
        (State.OUTSIDE, Event.NO_FILE): State.OUTSIDE,
        (State.OUTSIDE, Event.READ_FAILED): State.UNREADABLE,
        (State.LOCKED, Event.UNLOCKED): State.MEMBER,
        (State.LOCKED, Event.LEAVE): State.LEAVING,
        (State.ENTERING, Event.ENTERED): State.MEMBER,
        (State.ENTERING, Event.ENTER_FAILED): State.LEAVING,
        # The request that waits for a session reports the refusal.
        (State.ENTERING, Event.REFUSED): State.ENTERING,
        (State.MEMBER, Event.RECOVER): State.RECOVERING,
        (State.MEMBER, Event.REFUSED): State.FAILED,
        (State.MEMBER, Event.LEAVE): State.LEAVING,
        (State.FAILED, Event.RECOVER): State.RECOVERING,
        (State.FAILED, Event.LEAVE): State.LEAVING,
        # An agent may be refused at the moment when it is stopped.
        (State.RECOVERING, Event.REFUSED): State.RECOVERING,
        (State.RECOVERING, Event.RESTARTED): State.MEMBER,
        (State.LEAVING, Event.REFUSED): State.LEAVING,
        (State.LEAVING, Event.LEFT): State.OUTSIDE,
        #
        (State.PENDING, Event.SESSION): State.ACTIVE,
        #
        (State.WORKER, Event.CERTIFIED_WORKER): State.WORKER,
        (State.WORKER, Event.CERTIFIED_MANAGER): State.PROMOTING,
        (State.PROMOTING, Event.FILES_WRITTEN): State.MANAGER,
        (State.MANAGER, Event.CERTIFIED_WORKER): State.DEMOTING,
        (State.MANAGER, Event.EXPELLED): State.REMOVED,
        (State.REMOVED, Event.CERTIFIED_WORKER): State.DEMOTING,
        (State.REMOVED, Event.RESET): State.MANAGER,
        (State.DEMOTING, Event.FILES_REMOVED): State.WORKER,
    }
)


def after(state: State, event: Event) -> State:
    """Return the next state.  An event that the table does not have for ``state`` is a bug."""
    following = TRANSITIONS.get((state, event))
    assert following is not None, f"{event.name} in state {state.name}"
    return following


def certified(role: NodeRole) -> Event:
    """Return the event of a certificate for ``role``."""
    return Event.CERTIFIED_MANAGER if role is NodeRole.MANAGER else Event.CERTIFIED_WORKER


def docker_state(membership: State, session: State | None, error: str) -> str:
    """Return ``LocalNodeState`` of ``/info``: ``inactive``, ``locked``, ``pending``, ``active`` or ``error``.

    Args:
        session: ``PENDING`` or ``ACTIVE``, or None if neither agent nor manager has been started.
        error: Why the node does not take part in its cluster as it should, or empty if it does.
    """
    if membership is State.LOCKED:
        return "locked"
    if membership is State.UNREADABLE:
        return "error"
    if session is None:
        return "inactive"
    return "error" if error else session.value

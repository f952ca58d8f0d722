"""Notifications about problems of the cluster: topics, and targets as the API shows them."""

from enum import Enum

from skep.model.values.encoding import ApiObject, always
from skep.model.values.times import Timestamp


class Topic(Enum):
    """Kind of problem that a target is notified about."""

    NODE = "node"
    """A node is down, or a manager is unreachable."""
    SERVICE = "service"
    """A service is degraded."""
    DEPLOY = "deploy"
    """A service's update was paused or rolled back."""
    DISK = "disk"
    """A node's disk is full or nearly full."""
    CERTIFICATE = "certificate"
    """A certificate expires soon and is not renewed."""
    BACKUP = "backup"
    """The last backup failed or is too old."""
    INVARIANT = "invariant"
    """An invariant of the cluster's state is violated (``skep verify``)."""


STACK_TOPICS = (Topic.SERVICE, Topic.DEPLOY)
"""Topics whose problems may belong to a stack."""


class TargetSpec(ApiObject):
    """Body of a request for a target.

    Attributes:
        url: Where messages go.  The scheme chooses the form: ``https``, ``slack+https``, ``matrix+https``, ``smtps``.
        secret: Signs webhooks, or authenticates at a Matrix or mail server.  Never shown.
        on: Topics, or empty for all of them.
        stacks: Stacks whose services are reported, or empty for the whole cluster.
        allow_internal: Whether the target may be on loopback, link-local, or on a node.
    """

    name: str = ""
    url: str = always("")
    secret: str = ""
    on: tuple[Topic, ...] = ()
    stacks: tuple[str, ...] = ()
    allow_internal: bool = False


class TargetState(ApiObject):
    """A target as it is shown.  ``to`` is its address without credentials."""

    name: str = always("")
    kind: str = always("")
    to: str = always("")
    on: tuple[Topic, ...] = always(())
    stacks: tuple[str, ...] = always(())
    allow_internal: bool = always(False)
    has_secret: bool = always(False)
    sent: int = always(0)
    """Messages that were delivered."""
    failed: int = always(0)
    """Attempts that failed."""
    dropped: int = always(0)
    """Notices that were given up."""
    waiting: int = always(0)
    """Notices that are not delivered yet."""
    last_sent_at: Timestamp = Timestamp("")
    failing_since: Timestamp = Timestamp("")
    next_attempt_at: Timestamp = Timestamp("")
    """Time of the next attempt after a failure."""
    error: str = ""
    """Reason why the last attempt failed, or empty after a success."""


class SentTest(ApiObject):
    """Response to a test: the id of the message that the target accepted."""

    id: str = always("")

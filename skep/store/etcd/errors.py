"""etcd's errors, distinguished by their text, because several have the same gRPC status.

Source: etcd 3.5, api/v3rpc/rpctypes/error.go; each was reproduced.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from skep.errors import SkepError, Unavailable
from skep.rpc.status import CallFailed, Lost
from skep.store.transactions.updates import NO_LEADER


class Uncertain(Unavailable):
    """No response arrived.  The request may have taken effect, or may still do so."""


class Interrupted(Uncertain):
    """The member stopped during the call, perhaps to restart."""


class Busy(Unavailable):
    """The store is overloaded.  The request had no effect."""


class OutOfSpace(Unavailable):
    """The database has reached its quota.  Plain writes are refused until the leader has freed space."""


class NotServing(Unavailable):
    """This member is a learner and serves after its promotion."""


class StillLearning(Unavailable):
    """The learner has not caught up with the leader yet, and is promoted later."""


class NoLearner(SkepError):
    """The member is a voter already."""


class NoMember(SkepError):
    """The member does not exist."""


class Compacted(Unavailable):
    """The requested history is compacted.  The caller has to reload everything."""


class InvalidRequest(SkepError):
    """etcd rejected the request as invalid, which is a bug of Skep."""


_ERRORS: tuple[tuple[str, type[SkepError], str], ...] = (
    ("leader changed", Uncertain, NO_LEADER),
    ("no leader", Uncertain, NO_LEADER),
    ("request timed out", Uncertain, NO_LEADER),
    ("previous leader failure", Uncertain, NO_LEADER),
    ("context deadline exceeded", Uncertain, NO_LEADER),
    ("server stopped", Interrupted, "the store is stopping"),
    ("too many requests", Busy, "the store is busy: try again"),
    # raft's own text during a transfer of leadership
    ("raft proposal dropped", Busy, "the store is changing its leader: try again"),
    ("database space exceeded", OutOfSpace, "the store has reached its quota; see `skep status`"),
    ("rpc not supported for learner", NotServing, "this manager is still joining the cluster"),
    (
        "can only promote a learner member which is in sync",
        StillLearning,
        "this manager has not caught up yet",
    ),
    ("can only promote a learner member", NoLearner, "this manager is a voter already"),
    ("too many learner members", Busy, "another manager is joining at the moment: try again"),
    ("member not found", NoMember, "this manager is not a member of the cluster's store"),
    ("peerURLs exists", Busy, "this manager is a member of the cluster's store already"),
    ("unhealthy cluster", Busy, "the cluster of managers is not healthy: try again"),
    ("required revision has been compacted", Compacted, "the requested history is compacted"),
    ("required revision is a future revision", Compacted, "the store was restored to an older state"),
    *(
        (text, InvalidRequest, f"etcd refused: {text}")
        for text in (
            "duplicate key given in txn request",
            "request is too large",
            "too many operations in txn request",
            "key is not provided",
        )
    ),
)
"""Triples of a text in the message, Skep's error, and the text for users.  The first match counts."""


@contextmanager
def etcd_errors() -> Iterator[None]:
    """Translate the errors of a call to Skep's.

    Raises Uncertain, Busy, OutOfSpace, NotServing, Compacted or InvalidRequest.
    """
    try:
        yield
    except CallFailed as error:
        raise error_of(str(error)) from error
    except TimeoutError as error:
        raise Uncertain(NO_LEADER) from error
    except OSError as error:
        kind = Interrupted if isinstance(error, Lost) else Uncertain
        raise kind(f"the store does not respond: {error}") from error


def error_of(message: str) -> SkepError:
    """Return Skep's error for etcd's ``message``."""
    for text, error, shown in _ERRORS:
        if text in message:
            return error(shown)
    # An unknown error counts as temporary, and the request may have taken effect.
    return Uncertain(f"the store failed: {message}")

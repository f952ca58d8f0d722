"""What etcd's refusals mean, told apart by their text: the same gRPC status stands for several of them.

Source: etcd 3.5, api/v3rpc/rpctypes/error.go; each meaning was provoked (etcd note, section 10).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from skep.errors import SkepError, Unavailable
from skep.rpc.status import CallFailed
from skep.store.updates import NO_LEADER


class Uncertain(Unavailable):
    """No answer: what was asked for may have happened, or may yet."""


class Busy(Unavailable):
    """Too much at once; nothing happened."""


class OutOfSpace(Unavailable):
    """The database has reached its quota: plain writes are refused until the leader has made room."""


class NotServing(Unavailable):
    """This member only learns; it serves after its promotion."""


class StillLearning(Unavailable):
    """The member has not caught up with the leader yet: it gets its vote later."""


class NoLearner(SkepError):
    """The member has its vote already."""


class NoMember(SkepError):
    """There is no such member."""


class Compacted(Unavailable):
    """The history asked for is gone: load again."""


class Refused(SkepError):
    """etcd found the request itself wrong, which is our mistake."""


_MEANINGS: tuple[tuple[str, type[SkepError], str], ...] = (
    ("leader changed", Uncertain, NO_LEADER),
    ("no leader", Uncertain, NO_LEADER),
    ("request timed out", Uncertain, NO_LEADER),
    ("previous leader failure", Uncertain, NO_LEADER),
    ("context deadline exceeded", Uncertain, NO_LEADER),
    ("server stopped", Uncertain, "the store is stopping"),
    ("too many requests", Busy, "the store is busy: try again"),
    # While leadership is handed over: raft's own words, which etcd passes on.
    ("raft proposal dropped", Busy, "the store is changing its leader: try again"),
    ("database space exceeded", OutOfSpace, "the store has reached its quota; see `skep status`"),
    ("rpc not supported for learner", NotServing, "this manager is still joining the cluster"),
    (
        "can only promote a learner member which is in sync",
        StillLearning,
        "this manager has not caught up yet",
    ),
    ("can only promote a learner member", NoLearner, "this manager has its vote already"),
    ("too many learner members", Busy, "another manager is joining at the moment: try again"),
    ("member not found", NoMember, "this manager is no member of the cluster's store"),
    ("peerURLs exists", Busy, "this manager is a member of the cluster's store already"),
    ("unhealthy cluster", Busy, "the cluster of managers is not healthy: try again"),
    ("required revision has been compacted", Compacted, "the history asked for is gone"),
    ("required revision is a future revision", Compacted, "the store was restored to an older state"),
    *(
        (text, Refused, f"etcd refused: {text}")
        for text in (
            "duplicate key given in txn request",
            "request is too large",
            "too many operations in txn request",
            "key is not provided",
        )
    ),
)
"""Text in the message -> meaning -> what a user reads.  First match wins."""


@contextmanager
def etcd_errors() -> Iterator[None]:
    """Raise our errors instead of those of a call.

    Raises: Uncertain, Busy, OutOfSpace, NotServing, Compacted, Refused.
    """
    try:
        yield
    except CallFailed as error:
        raise meaning_of(str(error)) from error
    except TimeoutError as error:
        raise Uncertain(NO_LEADER) from error
    except OSError as error:
        raise Uncertain(f"the store does not answer: {error}") from error


def meaning_of(message: str) -> SkepError:
    """Our error for etcd's ``message``."""
    for text, meaning, sentence in _MEANINGS:
        if text in message:
            return meaning(sentence)
    # Whatever it is, it may pass, and what was asked for may have happened.
    return Uncertain(f"the store failed: {message}")

"""Per-key error handling of the control loops, with the manager's only broad ``except Exception``.

A loop makes the decision about each object inside ``Failures.caught``.  If the decision raises, the traceback is logged
once, the object's next decision is delayed, and the loop continues with the next object.  The error is kept, so that it
can be written to the object.
"""

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import ClassVar, TypeVar

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.errors import SkepError, Unavailable
from skep.manager.control_loops.work_queue import WorkQueue
from skep.store.interface import Commit, Event, NotLeader, Transaction, Updated, Updates, WatchLagged

log = structlog.get_logger()

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K", bound=str)

FIRST_DELAY_S = 0.5
"""Seconds before a failed decision is repeated."""
LONGEST_DELAY_S = 60.0
"""Longest delay in seconds before a failing decision is repeated."""
UNAVAILABLE_S_MAX = 5.0
"""Longest delay in seconds after ``Unavailable``, which is a failure of the store and not of the object."""

ERROR_CHARACTERS_MAX = 1000
"""Longest text of an error, in characters.  It is written to objects and may quote user input."""
LOGGED_MAX = 1000
"""Largest number of errors that are remembered, so that each is logged once."""
WRITE_FAILURES_MAX = 10_000
"""If there are more write failures, expired ones are dropped, because their keys may never occur again."""


class BadObject(SkepError):
    """An unexpected exception in the transaction of one object."""


class Reported(SkepError):
    """Failure that the decision has shown already: its key backs off, and nothing is logged."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """The last error of one object."""

    error: str
    failures: int
    """Number of failures in a row."""
    retry_at: float
    """Monotonic time in seconds."""
    is_unavailable: bool = False
    """The store was unavailable, and the object itself may be fine."""


class Failures:
    """The failing objects of one loop, with their backoff."""

    def __init__(
        self,
        clock: Clock,
        random: Random,
        first_s: float | None = None,
        longest_s: float | None = None,
    ) -> None:
        """Create an empty record.

        Args:
            first_s: Delay after the first failure, or None for ``FIRST_DELAY_S``.
            longest_s: Longest delay, or None for ``LONGEST_DELAY_S``.
        """
        self._first_s = first_s or FIRST_DELAY_S
        self._longest_s = longest_s or LONGEST_DELAY_S
        self._clock = clock
        self._random = random
        self._failures: dict[str, Failure] = {}
        self._write_failures: dict[str, Failure] = {}
        self._forget_above = WRITE_FAILURES_MAX

    def caught(self, key: str) -> "_Caught":
        """Return a context for one object's decision.

        It records and suppresses every ``Exception`` but ``NotLeader`` and ``WatchLagged``.
        """
        return _Caught(self, key)

    def record(self, key: str, error: Exception) -> None:
        """Record that the decision about ``key`` raised ``error``."""
        before = self._failures.get(key)
        self._failures[key] = failure = self._after(before, error, self._longest_s)
        if not isinstance(error, Reported) and (before is None or before.error != failure.error):
            log.error("decision failed", object=key, error=failure.error, exc_info=error)

    def of(self, key: str) -> Failure | None:
        """Return the failure of the last decision about ``key``, or None if it succeeded."""
        return self._failures.get(key)

    def clear(self, key: str) -> None:
        """Record that the decision about ``key`` succeeded, or that the object was deleted."""
        self._failures.pop(key, None)

    def refusal(self, what: str, key: str) -> Failure | None:
        """Return the failure of the last attempt to write ``what`` (a part of the object ``key``), if the store refused
        it.

        None if it was written or the store was unavailable.
        """
        failure = self._write_failures.get(_write_key(what, key))
        return failure if failure is not None and not failure.is_unavailable else None

    def write_failure(self, what: str, key: str) -> Failure | None:
        """Return why ``what`` of ``key`` was not written last time, including an unavailable store."""
        return self._write_failures.get(_write_key(what, key))

    def clear_write_failure(self, what: str, key: str) -> None:
        """Record that ``what`` of ``key`` was written, or is no longer wanted."""
        self._write_failures.pop(_write_key(what, key), None)

    def record_write_failure(self, what: str, key: str, error: SkepError) -> Failure:
        """Record that ``what`` of ``key`` was not written, and return the failure with its retry time."""
        is_unavailable, key = isinstance(error, Unavailable), _write_key(what, key)
        before = self._write_failures.get(key)
        failure = self._after(
            before,
            error,
            UNAVAILABLE_S_MAX if is_unavailable else self._longest_s,
            is_unavailable=is_unavailable,
        )
        if not is_unavailable and (before is None or before.error != failure.error):
            log.error("change refused", object=key, error=failure.error)
        self._write_failures[key] = failure
        if len(self._write_failures) > self._forget_above:
            now = self._clock.monotonic()
            self._write_failures = {
                key: one for key, one in self._write_failures.items() if one.retry_at > now
            }
            # The limit is doubled. Otherwise each further failure would filter the whole map while many thousands are
            # refused at once.
            self._forget_above = max(WRITE_FAILURES_MAX, 2 * len(self._write_failures))
        return failure

    def requeue_failed(self, queue: WorkQueue[K], what: str, results: Iterable[tuple[K, object]]) -> None:
        """Requeue the keys whose changes the store did not write, with growing delays.

        Args:
            what: Kind of change.  A key may have failures of several kinds.
            results: For each key a ``SkepError``, or any other value if the change was written.
        """
        results = list(results)
        failed = {key: result for key, result in results if isinstance(result, SkepError)}
        if self._write_failures:
            for key in {key for key, _ in results} - failed.keys():
                self.clear_write_failure(what, key)
        for key, error in failed.items():
            queue.add_at(key, self.record_write_failure(what, key, error).retry_at)
        if failed:
            first = str(next(iter(failed.values())))
            log.warning("write failed, will retry", what=what, count=len(failed), reason=first)

    def _after(
        self, before: Failure | None, error: Exception, longest_s: float, *, is_unavailable: bool = False
    ) -> Failure:
        failures = before.failures + 1 if before else 1
        delay_s = min(self._first_s * 2 ** min(failures - 1, 10), longest_s)
        # The class says something only about an error that nobody expects.
        named = "" if isinstance(error, SkepError) and str(error) else f"{type(error).__name__}: "
        return Failure(
            error=f"{named}{error}"[:ERROR_CHARACTERS_MAX],
            failures=failures,
            retry_at=self._clock.monotonic() + delay_s * self._random.uniform(0.5, 1.0),
            is_unavailable=is_unavailable,
        )


def _write_key(what: str, key: str) -> str:
    return f"{what} of {key}"


class _Caught:
    """One decision.  This is a class because a generator would cost more than many decisions do."""

    __slots__ = ("_failures", "_key")

    def __init__(self, failures: Failures, key: str) -> None:
        self._failures = failures
        self._key = key

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if error is None:
            self._failures.clear(self._key)
            return False
        if isinstance(error, NotLeader | WatchLagged) or not isinstance(error, Exception):
            return False
        self._failures.record(self._key, error)
        return True


def isolated(what: str, id: str) -> "_Isolated":
    """Return a context that logs and suppresses errors about one object.  It does not retry, and is for events and
    snapshots.
    """
    return _Isolated(what, id)


def for_each_isolated(what: str, objects: Iterable[T], enter: Callable[[T], object]) -> None:
    """Call ``enter`` for each object, ``isolated``.  A new leader does so for hundreds of thousands of objects."""
    rest, is_over = iter(objects), False
    while not is_over:
        entering = _Isolated(what, "")
        with entering:
            for one in rest:
                entering.id = one.id  # type: ignore[attr-defined]
                enter(one)
            is_over = True


class _Isolated:
    __slots__ = ("_what", "id")
    _logged: ClassVar[dict[tuple[str, str, str], None]] = {}
    """Errors that were already logged, the newest last."""

    def __init__(self, what: str, id: str) -> None:
        self._what = what
        self.id = id

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if error is None:
            return False
        if isinstance(error, NotLeader | WatchLagged) or not isinstance(error, Exception):
            return False
        key = self._what, self.id, f"{type(error).__name__}: {error}"
        if key not in self._logged:
            if len(self._logged) >= LOGGED_MAX:
                del self._logged[next(iter(self._logged))]
            self._logged[key] = None
            log.error("event not handled", what=self._what, object=self.id, error=key[2], exc_info=error)
        return True


def handle_isolated(what: str, handle: Callable[[Commit], object], commit: Commit) -> None:
    """Call ``handle`` with a commit.  If that raises, call it with each event alone, so that only the bad event is
    lost.

    ``handle`` may then get an event twice, which is harmless because loops are level-triggered.
    """
    try:
        handle(commit)
    except (NotLeader, WatchLagged):
        raise
    except Exception:
        for event in commit.events:
            with isolated(what, object_id(event)):
                handle(Commit(commit.revision, (event,)))


def object_id(event: Event) -> str:
    """Return the id of the object that changed."""
    id: str = (event.new if isinstance(event, Updated) else event.object).id  # type: ignore[attr-defined]
    return id


def isolating_errors(body: Callable[[Transaction, T], R]) -> Callable[[Transaction, T], R]:
    """Return ``body`` for ``update_each``.  An unexpected exception only fails its own item (``BadObject``)."""

    def run(tx: Transaction, item: T) -> R:
        try:
            return body(tx, item)
        except SkepError:
            raise
        except Exception as error:
            log.error("change failed", change=type(item).__name__, exc_info=error)
            raise BadObject(f"{type(error).__name__}: {error}") from error

    return run


async def write_each(
    term: Updates, body: Callable[[Transaction, T], R], items: Sequence[T]
) -> Sequence[R | SkepError]:
    """Run ``isolating_errors(body)`` per item, each in its own transaction, in as few raft entries as possible.

    Return one result or error per item, in order.
    Raises: NotLeader: the term is over.
    """
    results = await term.update_each(isolating_errors(body), items)
    for result in results:
        if isinstance(result, NotLeader):
            raise result
    return results

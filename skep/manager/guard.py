"""The manager's only broad ``except Exception``: a bad object never stops a loop.

A loop runs each object's decision inside ``guarded``.  When it raises, the traceback is logged once, the object's
key backs off, and the loop goes on with the next object; what went wrong is kept to be written on the object.
"""

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import ClassVar, TypeVar

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.errors import SkepError, Unavailable
from skep.manager.agenda import Agenda
from skep.store.interface import Commit, Event, NotLeader, Transaction, Updated, Updates, WatchLagged

log = structlog.get_logger()

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K", bound=str)

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 60.0
AWAY_S_MAX = 5.0
"""The longest delay where the store was only not available: then nothing is wrong with the object."""


ERROR_CHARACTERS_MAX = 1000
"""It is written on objects, and may quote what users wrote."""
SAID_MAX = 1000
UNWRITTEN_MAX = 10_000
"""Keys remembered before those whose time has passed are forgotten: nobody may ever ask for them again."""


class BadObject(SkepError):
    """Something nobody foresaw happened while a change of one object was made."""


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with one object."""

    error: str
    failures: int
    """How often in a row."""
    retry_at: float
    """On the clock's monotonic time."""
    is_away: bool = False
    """The store was not available, and nothing is known of the object."""


class Guard:
    """Remembers which objects of one loop are in trouble."""

    def __init__(self, clock: Clock, random: Random) -> None:
        self._clock = clock
        self._random = random
        self._troubles: dict[str, Trouble] = {}
        self._unwritten: dict[str, Trouble] = {}
        self._forget_above = UNWRITTEN_MAX

    def guarded(self, key: str) -> "_Guarded":
        """Run one object's decision; what it raises ends here, except that the term is over."""
        return _Guarded(self, key)

    def note(self, key: str, error: Exception) -> None:
        """A decision about ``key`` has raised."""
        before = self._troubles.get(key)
        self._troubles[key] = trouble = self._after(before, error, LONGEST_DELAY_S)
        if before is None or before.error != trouble.error:
            log.error("decision failed", object=key, error=trouble.error, exc_info=error)

    def trouble(self, key: str) -> Trouble | None:
        """What went wrong the last time, if it did."""
        return self._troubles.get(key)

    def forget(self, key: str) -> None:
        """A decision about ``key`` has not raised, or the object is gone."""
        self._troubles.pop(key, None)

    def refused(self, what: str, key: str) -> Trouble | None:
        """Why the store refused ``what`` of ``key`` the last time; None where it took it, or was only not available."""
        trouble = self._unwritten.get(_written(what, key))
        return trouble if trouble is not None and not trouble.is_away else None

    def unwritten(self, what: str, key: str) -> Trouble | None:
        """Why ``what`` of ``key`` was not written the last time, whatever kept it from that."""
        return self._unwritten.get(_written(what, key))

    def forget_unwritten(self, what: str, key: str) -> None:
        """It was written, or is no longer to be."""
        self._unwritten.pop(_written(what, key), None)

    def note_unwritten(self, what: str, key: str, error: SkepError) -> Trouble:
        """``what`` was decided about ``key`` was not written: when to try again."""
        is_away, key = isinstance(error, Unavailable), _written(what, key)
        before = self._unwritten.get(key)
        trouble = self._after(before, error, AWAY_S_MAX if is_away else LONGEST_DELAY_S, is_away=is_away)
        if not is_away and (before is None or before.error != trouble.error):
            log.error("change refused", object=key, error=trouble.error)
        self._unwritten[key] = trouble
        if len(self._unwritten) > self._forget_above:
            now = self._clock.monotonic()
            self._unwritten = {key: one for key, one in self._unwritten.items() if one.retry_at > now}
            # Not again at each further one, where many thousands are refused at once.
            self._forget_above = max(UNWRITTEN_MAX, 2 * len(self._unwritten))
        return trouble

    def try_again(self, agenda: Agenda[K], what: str, results: Iterable[tuple[K, object]]) -> None:
        """Have the keys whose changes the store did not take looked at again, later from time to time.

        Args:
            what: is written; of each key some others may be at the same time.
            results: a ``SkepError``, or anything else where a change was taken.
        """
        results = list(results)
        failed = {key: result for key, result in results if isinstance(result, SkepError)}
        if self._unwritten:
            for key in {key for key, _ in results} - failed.keys():
                self.forget_unwritten(what, key)
        for key, error in failed.items():
            agenda.add_at(key, self.note_unwritten(what, key, error).retry_at)
        if failed:
            first = str(next(iter(failed.values())))
            log.warning("not written, trying again", what=what, count=len(failed), reason=first)

    def _after(
        self, before: Trouble | None, error: Exception, longest_s: float, *, is_away: bool = False
    ) -> Trouble:
        failures = before.failures + 1 if before else 1
        delay_s = min(FIRST_DELAY_S * 2 ** min(failures - 1, 10), longest_s)
        return Trouble(
            error=f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS_MAX],
            failures=failures,
            retry_at=self._clock.monotonic() + delay_s * self._random.uniform(0.5, 1.0),
            is_away=is_away,
        )


def _written(what: str, key: str) -> str:
    return f"{what} of {key}"


class _Guarded:
    """One guarded decision.  A class, as a generator's frame would cost more than many a decision does."""

    __slots__ = ("_guard", "_key")

    def __init__(self, guard: Guard, key: str) -> None:
        self._guard = guard
        self._key = key

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if error is None:
            self._guard.forget(self._key)
            return False
        if isinstance(error, NotLeader) or not isinstance(error, Exception):
            return False
        self._guard.note(self._key, error)
        return True


def apart(what: str, id: str) -> "_Apart":
    """What goes wrong about one object ends here, with its trace in the log; for what is taken in, not decided."""
    return _Apart(what, id)


def each_apart(what: str, objects: Iterable[T], enter: Callable[[T], object]) -> None:
    """``enter`` each of the objects ``apart``; a new leader does that with hundreds of thousands of them."""
    rest, is_over = iter(objects), False
    while not is_over:
        entering = _Apart(what, "")
        with entering:
            for one in rest:
                entering.id = one.id  # type: ignore[attr-defined]
                enter(one)
            is_over = True


class _Apart:
    __slots__ = ("_what", "id")
    _said: ClassVar[dict[tuple[str, str, str], None]] = {}
    """What was logged already, the newest last."""

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
        if key not in self._said:
            if len(self._said) >= SAID_MAX:
                del self._said[next(iter(self._said))]
            self._said[key] = None
            log.error("not taken in", what=self._what, object=self.id, error=key[2], exc_info=error)
        return True


def note_apart(what: str, note: Callable[[Commit], object], commit: Commit) -> None:
    """``note`` a commit; where that fails, each of its events by itself, so that all but the bad one are noted.

    ``note`` may see an event twice then: it says *look again*, never *what to do*.
    """
    try:
        note(commit)
    except (NotLeader, WatchLagged):
        raise
    except Exception:
        for event in commit.events:
            with apart(what, id_of(event)):
                note(Commit(commit.revision, (event,)))


def id_of(event: Event) -> str:
    """Of the object that changed."""
    id: str = (event.new if isinstance(event, Updated) else event.object).id  # type: ignore[attr-defined]
    return id


def contained(body: Callable[[Transaction, T], R]) -> Callable[[Transaction, T], R]:
    """``body`` for ``update_each``, in which a bad object fails alone instead of failing all items with it."""

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
    """``contained(body)`` once per item, each a transaction of its own, in as few raft entries as possible.

    One result or error per item, in order.
    Raises: NotLeader: the term is over.
    """
    results = await term.update_each(contained(body), items)
    for result in results:
        if isinstance(result, NotLeader):
            raise result
    return results

"""The manager's only broad ``except Exception``: a bad object never stops a loop.

A loop runs each object's decision inside ``guarded``.  When it raises, the traceback is logged once, the object's
key backs off, and the loop goes on with the next object; what went wrong is kept to be written on the object.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.agenda import Agenda
from skep.store.interface import NotLeader, Transaction, Updates

log = structlog.get_logger()

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K", bound=str)

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 60.0
RETRY_S = 0.5
"""Until the next attempt when the store did not take a change (jittered)."""


class BadObject(SkepError):
    """Something nobody foresaw happened while a change of one object was made."""


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with one object."""

    error: str
    failures: int
    """How often in a row."""
    retry_at: float
    """On the clock's monotonic time."""


class Guard:
    """Remembers which objects of one loop are in trouble."""

    def __init__(self, clock: Clock, random: Random) -> None:
        self._clock = clock
        self._random = random
        self._troubles: dict[str, Trouble] = {}

    def guarded(self, key: str) -> "_Guarded":
        """Run one object's decision; what it raises ends here, except that the term is over."""
        return _Guarded(self, key)

    def note(self, key: str, error: Exception) -> None:
        """A decision about ``key`` has raised."""
        before = self._troubles.get(key)
        failures = before.failures + 1 if before else 1
        text = f"{type(error).__name__}: {error}"
        if before is None or before.error != text:
            log.error("decision failed", object=key, error=text, exc_info=error)
        delay_s = min(FIRST_DELAY_S * 2 ** min(failures - 1, 10), LONGEST_DELAY_S)
        retry_at = self._clock.monotonic() + delay_s * self._random.uniform(0.5, 1.0)
        self._troubles[key] = Trouble(error=text, failures=failures, retry_at=retry_at)

    def trouble(self, key: str) -> Trouble | None:
        """What went wrong the last time, if it did."""
        return self._troubles.get(key)

    def forget(self, key: str) -> None:
        """The object is gone."""
        self._troubles.pop(key, None)

    def try_again(self, agenda: Agenda[K], what: str, failed: Sequence[tuple[K, SkepError]]) -> None:
        """Have the keys whose changes the store did not take looked at again soon; ``what`` they are is logged once."""
        if not failed:
            return
        log.warning("not written, trying again", what=what, count=len(failed), reason=str(failed[0][1]))
        now = self._clock.monotonic()
        for key, _ in failed:
            agenda.add_at(key, now + RETRY_S * self._random.uniform(0.5, 1.0))


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

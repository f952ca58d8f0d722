"""Work about one object (a container, a task, an image, a probe) whose failure must stay its own.

In a ``TaskGroup`` an exception of one task cancels all the others.  Work that concerns one object therefore never
lets one out: ``contain`` does it once, ``persist`` again and again until it works.  Both log an error when it first
appears, with its trace unless it is one of ours, and hand it to ``on_error``, where the object shows it.
"""

import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError

log = structlog.get_logger()

T = TypeVar("T")

CHARACTERS_MAX = 300
"""Of an error as an object shows it: what a container can make long stays short."""


def _nothing(_: Exception) -> None:
    """The log is told, and that is all."""


async def contain(
    work: Awaitable[T], event: str, /, *, on_error: Callable[[Exception], None] = _nothing, **keys: Any
) -> T | None:
    """What came of ``work``; None when it failed, which is logged as ``event`` with ``keys``."""
    try:
        return await work
    except Exception as error:
        report(error, event, **keys)
        on_error(error)
        return None


async def persist(
    work: Callable[[], Awaitable[T]],
    event: str,
    /,
    *,
    clock: Clock,
    first_s: float = 0.1,
    longest_s: float = 60.0,
    chance: Callable[[], float] = random.random,
    on_error: Callable[[Exception], None] = _nothing,
    passes: tuple[type[Exception], ...] = (),
    kinds: tuple[type[Exception], ...] = (Exception,),
    **keys: Any,
) -> T:
    """The result of ``work``, which is called anew after each failure, with pauses that grow to ``longest_s``.

    Work that went well for ``longest_s`` before it failed begins with short pauses again.

    Args:
        event: the line of the log; the same error again is logged for debugging only.
        on_error: told every error.
        passes: errors that the caller wants to see: they are raised.
        kinds: of errors that are tried again; any other is raised, too.
    """
    backoff = Backoff(first_s, longest_s, chance=chance)
    before = ""
    while True:
        began = clock.monotonic()
        try:
            result = await work()
        except passes:
            raise
        except kinds as error:
            if clock.monotonic() - began >= longest_s:
                backoff.reset()
            delay_s = backoff.next_delay_s()
            if explain(error) != before:
                before = explain(error)
                report(error, event, again_in_s=round(delay_s, 2), **keys)
            else:
                log.debug(event, error=before, again_in_s=round(delay_s, 2), **keys)
            on_error(error)
        else:
            if before:
                log.info("works again", after=event, **keys)
            return result
        await clock.sleep(delay_s)


def report(error: Exception, event: str, **keys: Any) -> None:
    """Log ``error``: one of ours in a line, any other with its trace."""
    if isinstance(error, SkepError):
        log.warning(event, error=explain(error), **keys)
    else:
        log.error(event, error=explain(error), exc_info=error, **keys)


def explain(error: BaseException) -> str:
    """``error`` in one short line: our sentence, the system's, or the kind of bug that it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    elif isinstance(error, SkepError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    return text[:CHARACTERS_MAX]

"""Error handling per object (a container, a task, an image, a probe): one that fails does not affect the others.

In a ``TaskGroup`` an exception of one task cancels all the others.  So work about one object raises none: ``isolate``
does it once, ``retry`` repeats it until it succeeds.  Both log an error when it first appears, with its traceback
unless it is a ``SkepError``, and pass it to ``on_error``, which shows it on the object.
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
"""Of an error as an object shows it, since containers can make texts long."""


def _nothing(_: Exception) -> None:
    """The error is logged only."""


async def isolate(
    work: Awaitable[T], event: str, /, *, on_error: Callable[[Exception], None] = _nothing, **keys: Any
) -> T | None:
    """The result of ``work``; None when it failed, which is logged as ``event`` with ``keys``."""
    try:
        return await work
    except Exception as error:
        log_error(error, event, **keys)
        on_error(error)
        return None


async def retry(
    work: Callable[[], Awaitable[T]],
    event: str,
    /,
    *,
    clock: Clock,
    first_s: float = 0.1,
    longest_s: float = 60.0,
    rng: Callable[[], float] = random.random,
    on_error: Callable[[Exception], None] = _nothing,
    passes: tuple[type[Exception], ...] = (),
    kinds: tuple[type[Exception], ...] = (Exception,),
    **keys: Any,
) -> T:
    """The result of ``work``, which is called again after each failure, with pauses that grow to ``longest_s``.

    After work that ran for ``longest_s`` before it failed, the pauses are short again.

    Args:
        event: of the log line; the same error again is logged at level debug.
        on_error: called with every error.
        passes: errors that are raised.
        kinds: of errors that are retried; any other is raised, too.
    """
    backoff = Backoff(first_s, longest_s, rng=rng)
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
            if describe_error(error) != before:
                before = describe_error(error)
                log_error(error, event, again_in_s=round(delay_s, 2), **keys)
            else:
                log.debug(event, error=before, again_in_s=round(delay_s, 2), **keys)
            on_error(error)
        else:
            if before:
                log.info("works again", after=event, **keys)
            return result
        await clock.sleep(delay_s)


def log_error(error: Exception, event: str, **keys: Any) -> None:
    """Log ``error``: a ``SkepError`` in one line, any other with its traceback."""
    if isinstance(error, SkepError):
        log.warning(event, error=describe_error(error), **keys)
    else:
        log.error(event, error=describe_error(error), exc_info=error, **keys)


def describe_error(error: BaseException) -> str:
    """``error`` in one short line: its text, the system's reason, or the type of an unexpected exception."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    elif isinstance(error, SkepError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    return text[:CHARACTERS_MAX]

"""Error handling per object (a container, a task, an image, a probe): a failure does not affect other objects.

In a ``TaskGroup``, an exception in one task cancels all others, so work on one object must not raise.  ``isolate`` runs
the work once, ``retry`` repeats it until it succeeds, and ``Rounds`` calls plain functions for many objects.  Each of
them logs an error when it first occurs, with the traceback unless it is a ``SkepError``.  ``isolate`` and ``retry``
also pass the error to ``on_error``, which shows it on the object.
"""

import random
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Any, TypeVar

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError

log = structlog.get_logger()

T = TypeVar("T")

CHARACTERS_MAX = 300
"""Longest error that an object shows, in characters.  Containers can produce long texts."""


def _nothing(_: Exception) -> None:
    """Do nothing: the error is only logged."""


async def isolate(
    work: Awaitable[T], event: str, /, *, on_error: Callable[[Exception], None] = _nothing, **keys: Any
) -> T | None:
    """Return the result of ``work``, or None after a failure, which is logged as ``event`` with ``keys``."""
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
    """Repeat ``work`` until it succeeds, with pauses that grow to ``longest_s``, and return its result.

    The pauses start over after an attempt that ran for ``longest_s`` before it failed.

    Args:
        event: Event of the log line.  Repetitions of the same error are logged at level debug.
        on_error: Called with every error.
        passes: Types of errors that are raised without a retry.
        kinds: Types of errors that are retried.  Any other error is raised.
    """
    failing = _Failing(event, Backoff(first_s, longest_s, rng=rng), keys)
    while True:
        began = clock.monotonic()
        try:
            result = await work()
        except passes:
            raise
        except kinds as error:
            if clock.monotonic() - began >= longest_s:
                failing.backoff.reset()
            delay_s = failing.record(error)
            on_error(error)
        else:
            failing.end()
            return result
        await clock.sleep(delay_s)


class Rounds:
    """Work on many objects that is due in every round.  An object that fails is attempted less and less often.

    Args:
        event: Event of the log line.  Repetitions of the same error are logged at level debug.
    """

    def __init__(
        self,
        event: str,
        clock: Clock,
        *,
        first_s: float = 1.0,
        longest_s: float = 60.0,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._event = event
        self._clock = clock
        self._new_backoff = partial(Backoff, first_s, longest_s, rng=rng)
        self._failing: dict[str, _Failing] = {}

    def attempt(self, key: str, work: Callable[[], object], **keys: Any) -> None:
        """Call ``work`` for the object ``key``, unless it failed a short time ago.

        Args:
            keys: Keys of the log line.
        """
        failing = self._failing.get(key)
        if failing is not None and self._clock.monotonic() < failing.again_at:
            return
        try:
            work()
        except Exception as error:
            if failing is None:
                failing = self._failing[key] = _Failing(self._event, self._new_backoff(), keys)
            failing.again_at = self._clock.monotonic() + failing.record(error)
        else:
            if failing is not None:
                del self._failing[key]
                failing.end()

    def keep(self, keys: Collection[str]) -> None:
        """Forget all objects except these."""
        for key in self._failing.keys() - keys:
            del self._failing[key]


class _Failing:
    """Work that is repeated, with the error of its last attempt."""

    def __init__(self, event: str, backoff: Backoff, keys: Mapping[str, Any]) -> None:
        self.backoff = backoff
        self.again_at = 0.0
        self._event = event
        self._keys = keys
        self._error = ""

    def record(self, error: Exception) -> float:
        """Log ``error`` if it differs from the last one.  Return the seconds until the next attempt."""
        delay_s, text = self.backoff.next_delay_s(), describe_error(error)
        if text != self._error:
            self._error = text
            log_error(error, self._event, again_in_s=round(delay_s, 2), **self._keys)
        else:
            log.debug(self._event, error=text, again_in_s=round(delay_s, 2), **self._keys)
        return delay_s

    def end(self) -> None:
        """Log the recovery if the work had failed."""
        if self._error:
            log.info("recovered", after=self._event, **self._keys)


def log_error(error: Exception, event: str, **keys: Any) -> None:
    """Log ``error``: a ``SkepError`` in one line, any other with its traceback."""
    if isinstance(error, SkepError):
        log.warning(event, error=describe_error(error), **keys)
    else:
        log.error(event, error=describe_error(error), exc_info=error, **keys)


def describe_error(error: BaseException) -> str:
    """Describe ``error`` in one short line: its text, the system's reason, or the type of an unexpected exception."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    elif isinstance(error, SkepError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    return text[:CHARACTERS_MAX]

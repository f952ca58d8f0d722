"""Watchdog of the manager's event loop: a thread that keeps a hung manager from leading forever.

Even if the manager hangs, its etcd stays raft's leader.  If the loop runs no callback for some seconds (because of an
endless computation, or a disk that blocks), the thread transfers leadership to another manager.  If that lasts longer,
it dumps the stacks of all threads and ends the process, which is then restarted.  If the process is stopped as a whole,
this thread stops as well, which the supervisor detects (``node.supervision.responses``).
"""

import asyncio
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from skep.aio.clock import Clock, until_tick
from skep.aio.event_loop.hang_detection import LIMITS, HangAction, HangDetector, HangLimits
from skep.errors import SkepError

log = structlog.get_logger(__name__)

TICK_S = 0.5
"""Seconds between two callbacks in the watched loop."""
EXIT_CODE = 70
"""EX_SOFTWARE."""

HandOver = Callable[[], Coroutine[Any, Any, object]]


@contextmanager
def watching(hand_over: HandOver, last_words: Callable[[str], None], clock: Clock) -> Iterator[None]:
    """Watch the running loop.

    ``hand_over`` runs on a loop of its own.  ``last_words`` is called with the reason before the process ends.
    """
    watch = Watchdog(asyncio.get_running_loop(), hand_over, lambda why: _end(last_words, why), clock)
    watch.start()
    try:
        yield
    finally:
        watch.stop()


class Watchdog:
    """Watches one loop from a separate thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        hand_over: HandOver,
        end: Callable[[str], None],
        clock: Clock,
        tick_s: float = TICK_S,
        limits: HangLimits = LIMITS,
    ) -> None:
        """``end`` ends the process and is called with the reason.  ``tick_s`` is the time between two probes."""
        self._tick_s, self._limits = tick_s, limits
        self._loop = loop
        self._hand_over = hand_over
        self._end = end
        self._clock = clock
        self._answered = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loop watch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._answered.set()
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread before the loop closes.  Does not wait for a hand-over in progress."""
        self._stopped.set()

    def _run(self) -> None:
        patience = HangDetector(self._tick_s, self._clock.monotonic(), self._limits)
        # The loop wakes for its own timers at the same times.
        while not self._stopped.wait(until_tick(self._clock.monotonic(), self._tick_s)):
            has_response = self._answered.is_set()
            if has_response and not self._ask():
                return
            match patience.record(self._clock.monotonic(), has_response=has_response):
                case HangAction.HAND_OVER:
                    log.error("event loop blocked: transferring leadership", silent_s=patience.silent_s)
                    self._have_another_lead()
                case HangAction.END:
                    self._end(f"its event loop did not respond for {patience.silent_s:.0f} s")
                    return

    def _ask(self) -> bool:
        """Schedule a callback in the loop.  Returns whether the loop still exists."""
        self._answered.clear()
        try:
            self._loop.call_soon_threadsafe(self._answered.set)
        except RuntimeError:
            return False  # the loop is closed
        return True

    def _have_another_lead(self) -> None:
        try:
            asyncio.run(self._hand_over())
        except (SkepError, OSError) as error:
            log.warning("leadership not transferred", reason=str(error))


def _end(last_words: Callable[[str], None], why: str) -> None:
    log.error("event loop blocked: ending the manager", reason=why)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    try:
        last_words(why)
    finally:
        os._exit(EXIT_CODE)  # the blocked loop would never run an orderly shutdown

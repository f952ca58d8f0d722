"""A thread that watches over the manager's event loop, so that a manager which hangs does not lead for ever.

Its etcd would go on as raft's leader whatever the manager beside it does.  When the loop takes no callback for some
seconds (it computes without end, or waits for a disk), the thread has another manager lead; when it does not for
longer, it writes down where every thread stands and ends the process, which is started again.  A process that is
stopped as a whole stops this thread, too: that is the supervisor's to find (``node.supervision.answers``).
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

from skep.aio.clock import Clock
from skep.aio.hang_detection import Action, HangDetector
from skep.errors import SkepError

log = structlog.get_logger(__name__)

TICK_S = 0.5
EXIT_CODE = 70
"""EX_SOFTWARE."""

HandOver = Callable[[], Coroutine[Any, Any, object]]


@contextmanager
def watching(hand_over: HandOver, last_words: Callable[[str], None], clock: Clock) -> Iterator[None]:
    """Watch the running loop.  ``hand_over`` runs on a loop of its own; ``last_words``: told before the end."""
    watch = Watchdog(asyncio.get_running_loop(), hand_over, lambda why: _end(last_words, why), clock)
    watch.start()
    try:
        yield
    finally:
        watch.stop()


class Watchdog:
    """Watches one loop from a thread of its own."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        hand_over: HandOver,
        end: Callable[[str], None],
        clock: Clock,
    ) -> None:
        """``end``: ends the process, told why."""
        self._loop = loop
        self._hand_over = hand_over
        self._end = end
        self._clock = clock
        self._answered = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loop watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._answered.set()
        self._thread.start()

    def stop(self) -> None:
        """End; the loop is about to close.  A hand-over under way is not waited for."""
        self._stopped.set()

    def _run(self) -> None:
        patience = HangDetector(TICK_S, self._clock.monotonic())
        while not self._stopped.wait(TICK_S):
            has_response = self._answered.is_set()
            if has_response and not self._ask():
                return
            match patience.record(self._clock.monotonic(), has_response=has_response):
                case Action.HAND_OVER:
                    log.error("the event loop hangs: another manager is to lead", silent_s=patience.silent_s)
                    self._have_another_lead()
                case Action.END:
                    self._end(f"its event loop did not answer for {patience.silent_s:.0f} s")
                    return

    def _ask(self) -> bool:
        """Have the loop answer when it gets to it; gives whether there still is one."""
        self._answered.clear()
        try:
            self._loop.call_soon_threadsafe(self._answered.set)
        except RuntimeError:
            return False  # closed
        return True

    def _have_another_lead(self) -> None:
        try:
            asyncio.run(self._hand_over())
        except (SkepError, OSError) as error:
            log.warning("leadership not handed over", reason=str(error))


def _end(last_words: Callable[[str], None], why: str) -> None:
    log.error("the manager ends itself", reason=why)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    try:
        last_words(why)
    finally:
        os._exit(EXIT_CODE)  # the loop would never get to anything gentler

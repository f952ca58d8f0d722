"""Simulates many seeds, and reports failures.

Garbage is collected only between runs, because the objects of a run live until its end.  Worker processes
leave out everything older than their first run, because it is not garbage.
"""

import gc
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice

import structlog

from sim.run import RunResult, simulate

Simulate = Callable[[int], RunResult]

RUN_CPU_S_MAX = 300.0
"""Processor seconds after which one run is interrupted.  The average is below one."""
RUNS_PER_COLLECTION = 10
CHUNK = RUNS_PER_COLLECTION
"""Number of seeds that a process takes at a time.  With more, the last process works alone for long."""


def results(
    seeds: Iterable[int], run: Simulate = simulate, cpu_s_max: float = RUN_CPU_S_MAX
) -> Iterator[RunResult]:
    """Simulate one seed after another in this process, each within ``cpu_s_max`` of processor time."""
    with quiet():
        for number, seed in enumerate(seeds, 1):
            with interrupted_if_endless(cpu_s_max):
                result = run(seed)
            yield result
            if number % RUNS_PER_COLLECTION == 0:
                gc.collect()


def failures(seeds: Iterable[int], processes: int = 0, run: Simulate = simulate) -> Iterator[RunResult]:
    """Simulate seeds in ``processes`` processes (0: one per processor).  Yield the runs with violations."""
    with ProcessPoolExecutor(processes or os.cpu_count(), initializer=gc.freeze) as pool:
        for found in pool.map(partial(_failed, run=run), chunked(seeds, CHUNK)):
            yield from found


def report(result: RunResult, lines: int = 60) -> str:
    """Return the violations of a run, the events before the first one, and the command to reproduce it."""
    return "\n".join(
        [
            f"seed {result.seed} failed; reproduce: make sim SEED={result.seed}",
            *(f"  {violation}" for violation in result.violations),
            "events before:",
            *(f"  {line}" for line in result.trace[-lines:]),
        ]
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Disable logs, and garbage collection during runs."""
    before = structlog.get_config()
    was_enabled = gc.isenabled()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    gc.disable()
    try:
        yield
    finally:
        structlog.configure(**before)
        if was_enabled:
            gc.enable()


class Endless(Exception):
    """One iteration of a run's event loop does not end."""


@contextmanager
def interrupted_if_endless(cpu_s_max: float = RUN_CPU_S_MAX) -> Iterator[None]:
    """Raise ``Endless`` in a run after ``cpu_s_max``, and every second from then on.  Main thread only."""

    def interrupt(*_: object) -> None:
        raise Endless(f"after {cpu_s_max:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s_max, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def chunked(seeds: Iterable[int], size: int) -> Iterator[list[int]]:
    """Yield ``seeds`` in lists of ``size``."""
    rest = iter(seeds)
    while chunk := list(islice(rest, size)):
        yield chunk


def _failed(seeds: list[int], run: Simulate) -> list[RunResult]:
    return [result for result in results(seeds, run) if result.violations]

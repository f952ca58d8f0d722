"""Simulates many seeds, and reports failures.

Garbage is collected only between runs, since the objects of a run live until its end.
"""

import gc
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice

import structlog

from sim.run import RunResult, simulate

Simulate = Callable[[int], RunResult]

RUNS_PER_COLLECTION = 10
CHUNK = 25


def results(seeds: Iterable[int], run: Simulate = simulate) -> Iterator[RunResult]:
    """Simulate one seed after another in this process."""
    with quiet():
        for number, seed in enumerate(seeds, 1):
            yield run(seed)
            if number % RUNS_PER_COLLECTION == 0:
                gc.collect()


def failures(seeds: Iterable[int], processes: int = 0, run: Simulate = simulate) -> Iterator[RunResult]:
    """Simulate seeds in ``processes`` processes (0: one per processor); gives the runs with violations."""
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        for found in pool.map(partial(_failed, run=run), chunked(seeds, CHUNK)):
            yield from found


def report(result: RunResult, lines: int = 60) -> str:
    """The violations of a run, the events before the first one, and the command to reproduce it."""
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


def chunked(seeds: Iterable[int], size: int) -> Iterator[list[int]]:
    """``seeds`` in lists of ``size``."""
    rest = iter(seeds)
    while chunk := list(islice(rest, size)):
        yield chunk


def _failed(seeds: list[int], run: Simulate) -> list[RunResult]:
    return [result for result in results(seeds, run) if result.violations]

"""Many lives in a row: ``python -m sim 123`` lives one seed and tells what happened, ``--seeds 10000`` many.

Garbage is collected between lives only: what a life makes lives until its end.
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

from sim.life import Outcome, live

Live = Callable[[int], Outcome]

LIVES_BETWEEN_COLLECTIONS = 10
CHUNK = 25


def outcomes(seeds: Iterable[int], life: Live = live) -> Iterator[Outcome]:
    """Live one seed after another in this process."""
    with quiet():
        for number, seed in enumerate(seeds, 1):
            yield life(seed)
            if number % LIVES_BETWEEN_COLLECTIONS == 0:
                gc.collect()


def failures(seeds: Iterable[int], processes: int = 0, life: Live = live) -> Iterator[Outcome]:
    """Live all seeds on all processors (or as many as ``processes``), and give the lives that went wrong."""
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        for found in pool.map(partial(_failed, life=life), chunked(seeds, CHUNK)):
            yield from found


def report(outcome: Outcome, lines: int = 60) -> str:
    """What went wrong, what happened before it, and how to see it again."""
    return "\n".join(
        [
            f"seed {outcome.seed} failed; alone: make sim SEED={outcome.seed}",
            *(f"  {violation}" for violation in outcome.violations),
            "before it:",
            *(f"  {line}" for line in outcome.trace[-lines:]),
        ]
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without logs, and without collections in the middle of a life."""
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


def _failed(seeds: list[int], life: Live) -> list[Outcome]:
    return [outcome for outcome in outcomes(seeds, life) if outcome.violations]

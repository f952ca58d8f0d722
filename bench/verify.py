"""Measures how long one look of ``skep verify`` takes a manager, and for how long it holds the event loop.

::

    .venv/bin/python -m bench.verify                            # the table, kept in results/
    .venv/bin/python -m bench.verify --nodes 500 --tasks 10000

It uses the state of ``bench.what_if``, which violates nothing.  Without violations, a check has a single look.
"""

import argparse
import asyncio
import gc
import time
from collections.abc import Iterable
from datetime import UTC, datetime

import msgspec

from bench.machine import noise
from bench.run import commit, result_name, write_result
from bench.what_if import REPEAT, TABLE, a_state
from skep.aio.clock import SystemClock
from skep.aio.event_loop import gc_settings
from skep.manager.verify.loop import InvariantCheck
from skep.store.state import State

HEADER = (
    "| nodes | tasks | wall, s | processor, s | loop held, ms | longest slice, ms | violations | busy |\n"
    "|---|---|---|---|---|---|---|---|"
)
HELD_MS = 20.0
"""Promised limit at 5,000 nodes and 100,000 tasks."""


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """One check."""

    seconds: float
    processor_s: float
    held_ms: float
    """Longest delay of another task of the event loop, which includes time that other processes took."""
    slice_ms: float
    """Longest processor time without a pause."""
    found: int
    busy: float
    """Share of the machine that was busy just before."""


async def check(state: State) -> Timing:
    """Check the state once."""
    busy = noise()
    held_s = slice_s = 0.0

    async def watch() -> None:
        nonlocal held_s, slice_s
        while True:
            before, processor = time.perf_counter(), time.process_time()
            await asyncio.sleep(0)
            held_s = max(held_s, time.perf_counter() - before)
            slice_s = max(slice_s, time.process_time() - processor)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    began, processor = time.perf_counter(), time.process_time()
    found = await InvariantCheck(lambda: state, SystemClock()).run()
    took, processor_s = time.perf_counter() - began, time.process_time() - processor
    await asyncio.sleep(0)
    watching.cancel()
    return Timing(
        seconds=took,
        processor_s=processor_s,
        held_ms=1000 * held_s,
        slice_ms=1000 * slice_s,
        found=len(found),
        busy=busy,
    )


def _lines(nodes: int, tasks: int, timings: Iterable[Timing]) -> list[str]:
    return [
        f"| {nodes} | {tasks} | {one.seconds:.3f} | {one.processor_s:.3f} | {one.held_ms:.1f} | {one.slice_ms:.1f} "
        f"| {one.found} | {one.busy:.0%} |"
        for one in timings
    ]


def main() -> None:
    """Measure one size, or the whole table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--tasks", type=int)
    options = parser.parse_args()
    now, at = datetime.now(UTC), commit()
    sizes = [(options.nodes or 500, options.tasks or 10_000)] if options.nodes or options.tasks else TABLE
    lines, kept = [HEADER], []
    for nodes, tasks in sizes:
        state = a_state(nodes, tasks)
        gc_settings.configure_gc()  # as the manager's process does after loading
        timings = []
        for _ in range(REPEAT):
            timings.append(asyncio.run(check(state)))
            gc.collect()
        lines += _lines(nodes, tasks, timings)
        kept.append({"nodes": nodes, "tasks": tasks, "timings": msgspec.to_builtins(timings)})
        gc.unfreeze()
    print("\n".join(lines))
    if len(sizes) > 1:
        text = "\n".join(
            (
                f"# `skep verify`, {now:%Y-%m-%d %H:%M} UTC, commit {at}",
                "",
                f"One look at a state without violations. Limit at 5,000 nodes: the loop is held {HELD_MS:g} ms.",
                "`busy`: share of the machine that other work took just before. Where it is high, processor time",
                "is the figure to read: other processes delay a loop as well.",
                "",
                *lines,
                "",
            )
        )
        write_result(result_name(now, at, "verify"), text, kept)


if __name__ == "__main__":
    main()

"""A manager that records long callbacks: ``bench.thousands --holds`` runs this instead of ``skep.manager.process``.

It measures each callback's processor time, so that the result is the same on a busy machine.  At its end it writes the
callbacks that took 10 ms or more to ``holds.txt`` in the directory of the manager's log, by called function.
"""

import asyncio
import cProfile
import gc
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from skep.manager import process
from skep.paths import Paths

LONG_S = 0.01


def run(paths: Paths) -> None:
    """Run as ``process.run`` does.  With ``PROFILE`` in the environment, also write a profile of everything to
    ``profile.out``.
    """
    holds: dict[str, list[float]] = defaultdict(list)
    run_handle = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run_handle(handle)
        took = time.thread_time() - began
        if took >= LONG_S:
            holds[name_of(handle)].append(took)

    asyncio.Handle._run = timed  # type: ignore[method-assign]
    gc.callbacks.append(_collections(holds))
    profile = cProfile.Profile(time.thread_time) if "PROFILE" in os.environ else None
    try:
        if profile is not None:
            profile.enable()
        process.run(paths)
    finally:
        if profile is not None:
            profile.disable()
            profile.dump_stats(str(paths.data.with_name("profile.out")))
        _write(paths.data.with_name("holds.txt"), holds)


def _collections(holds: dict[str, list[float]]) -> Callable[[str, dict[str, int]], None]:
    """Record the time of the garbage collector.

    This time is also counted for the callback that the collector interrupted.
    """
    began = 0.0

    def note(phase: str, about: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.thread_time()
        elif (took := time.thread_time() - began) >= LONG_S:
            holds[f"collector, generation {about['generation']}"].append(took)

    return note


def name_of(handle: asyncio.Handle) -> str:
    owner = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
    if isinstance(owner, asyncio.Task):
        return f"{owner.get_name()} {getattr(owner.get_coro(), '__qualname__', '?')}"
    return f"{type(owner).__name__} {getattr(handle._callback, '__qualname__', handle._callback)}"  # type: ignore[attr-defined]


def _write(target: Path, holds: dict[str, list[float]]) -> None:
    lines = [
        f"{sum(took):8.2f} s in {len(took):6}, longest {max(took) * 1000:7.1f} ms, "
        f"over 50 ms {sum(one > 0.05 for one in took):5}  {name}"
        for name, took in sorted(holds.items(), key=lambda item: -max(item[1]))
    ]
    target.write_text("\n".join([*lines, ""]))

"""Compares the processor time of containers under runc and under crun, alternately on one machine with cgroup v2 only.

``python -m bench.runtimes [PAIRS]`` prints the medians.  They count this process, which has the engine, and all its
descendants: conmon, the runtime, the container.  Processor time is known at the end of a process, so a figure covers a
container from its creation to its removal.
"""

import asyncio
import os
import resource
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from skep.agent.executor.oci import OciExecutor
from skep.engine.containers.container import ExecConfig
from skep.node.host.reaping import adopt_orphans
from tests.integration.node.conftest import Runner
from tests.support.engine import runc_lab
from tests.support.engine.runc_lab import Lab

_WARM_UPS = 3
"""Containers of each runtime that are not counted: they load programs and compile filters."""
_RUNTIMES = ("runc", "crun")
_EXECS = {"start and end": 0, "start, exec and end": 1}


def _used_s() -> tuple[float, float]:
    """Return the processor time in seconds of this process and of all ended descendants."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime, others.ru_utime + others.ru_stime


def _reap_all() -> None:
    """Wait for the ends of all orphans, so that their processor time is counted."""
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


async def _life(lab: Lab, executor: OciExecutor, execs: int) -> tuple[float, float]:
    """Run one container.  Return the processor time in ms of this process and of its descendants."""
    engine = executor.engine
    before = _used_s()
    container = await Runner(lab, engine).start("sleep", "1000")
    for _ in range(execs):
        made = engine.execs.create(container.id, ExecConfig(command=("true",)))
        (await engine.execs.start(made)).close()
        await engine.execs.wait(made)
    await engine.remove(container.id, force=True)
    _reap_all()
    own, others = (now - then for now, then in zip(_used_s(), before, strict=True))
    return own * 1000, others * 1000


async def _measure(pairs: int) -> None:
    adopt_orphans()
    print(f"kernel {os.uname().release}, {pairs} containers of each kind, median processor time in ms")
    async with AsyncExitStack() as stack:
        labs = {}
        for name in _RUNTIMES:
            runc_lab.RUNTIME = name
            lab = await stack.enter_async_context(Lab(Path(tempfile.mkdtemp(prefix="skep-bench-"))).running())
            executor = lab.executor()
            await stack.enter_async_context(executor.running())
            labs[name] = lab, executor
        for kind, execs in _EXECS.items():
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in _RUNTIMES}
            for number in range(_WARM_UPS + pairs):
                for name in sorted(_RUNTIMES, reverse=bool(number % 2)):
                    times = await _life(*labs[name], execs)
                    if number >= _WARM_UPS:
                        found[name].append(times)
            for part, choose in (("conmon, runtime, container", lambda one: one[1]), ("with Skep", sum)):
                runc, crun = (statistics.median(map(choose, found[name])) for name in _RUNTIMES)
                print(
                    f"{kind:20} {part:27} runc {runc:6.1f}  crun {crun:6.1f}  ratio {crun / runc:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    asyncio.run(_measure(int(sys.argv[1]) if len(sys.argv) > 1 else 20))

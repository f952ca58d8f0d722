"""Compares the processor time of containers under runc and under crun, alternately on one machine with cgroup v2 only.

``python -m bench.runtimes [PAIRS]`` prints the medians.  The processor time is the whole machine's: Skep, conmon, the
runtime, the container and the kernel.  So nothing else may run there, as in ``make virtual``.
"""

import asyncio
import itertools
import os
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from skep.agent.executor.oci import OciExecutor
from skep.engine.containers.container import ExecConfig
from tests.integration.node.conftest import Runner
from tests.support.engine import runc_lab
from tests.support.engine.runc_lab import Lab

_WARM_UPS = 3
"""Containers of each runtime that are not counted: they load programs and compile filters."""
_PHASES = ("start", "exec", "end and removal")


def _used_s() -> float:
    """Return the processor time that all processes of this machine have used since its boot.

    Source: Linux, Documentation/scheduler/sched-stats.rst (the seventh number of a processor).
    """
    lines = Path("/proc/schedstat").read_text().splitlines()
    return sum(int(line.split()[7]) for line in lines if line.startswith("cpu")) / 1e9


async def _life(lab: Lab, executor: OciExecutor) -> tuple[float, ...]:
    """Run one container, and return the processor time of each phase in seconds."""

    engine = executor.engine
    container = await Runner(lab, engine).create("sleep", "1000")
    times = [_used_s()]
    await engine.start(container.id)
    times.append(_used_s())
    made = engine.execs.create(container.id, ExecConfig(command=("true",)))
    (await engine.execs.start(made)).close()
    await engine.execs.wait(made)
    times.append(_used_s())
    await engine.remove(container.id, force=True)
    times.append(_used_s())
    return tuple(after - before for before, after in itertools.pairwise(times))


async def _measure(pairs: int) -> None:
    found: dict[str, list[tuple[float, ...]]] = {"runc": [], "crun": []}
    async with AsyncExitStack() as stack:
        labs = {}
        for name in found:
            runc_lab.RUNTIME = name
            lab = await stack.enter_async_context(Lab(Path(tempfile.mkdtemp(prefix="skep-bench-"))).running())
            executor = lab.executor()
            await stack.enter_async_context(executor.running())
            labs[name] = lab, executor
        for number in range(_WARM_UPS + pairs):
            for name in sorted(found, reverse=bool(number % 2)):
                times = await _life(*labs[name])
                if number >= _WARM_UPS:
                    found[name].append(times)
    print(f"kernel {os.uname().release}, {pairs} containers under each runtime, median processor time in ms")
    for position, phase in enumerate((*_PHASES, "all")):
        columns = {
            name: [sum(one) if phase == "all" else one[position] for one in times]
            for name, times in found.items()
        }
        runc, crun = (statistics.median(columns[name]) * 1000 for name in ("runc", "crun"))
        print(f"{phase:16} runc {runc:7.1f}  crun {crun:7.1f}  ratio {crun / runc:.2f}")


if __name__ == "__main__":
    asyncio.run(_measure(int(sys.argv[1]) if len(sys.argv) > 1 else 20))

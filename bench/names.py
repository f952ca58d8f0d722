"""Name resolution on one node: the duration of responses, and the net process's cost per container.

Containers are namespaces with the benchmark's own net process.  Queries come from a separate process, at an even rate,
from ten of the containers in turn.  The time of a query counts from the moment when it was due, even if it was sent
late.  That process and the net process share the machine's processors.
"""

import asyncio
import json
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bench.figures import Figure, at_quantile, run_alone, run_undisturbed
from bench.machine import processor_s
from skep.linux.detached import read_pid_file
from skep.model.networks.tables import NetworkTable
from skep.paths import Paths
from tests.support.networks.names_lab import NamesLab, Resolver, forks
from tests.support.networks.tables import a_network, a_served

SERVICES = 500
RATE = 5000
CONTAINERS = 100
SECONDS = 5.0
LIMIT_P99_MS = 1.0
LIMIT_MEMORY_MIB = 0.2
NAMES = ("s1", "s2.front", "tasks.s3", "4.s4", "s5", "all.tasks.s6", "s7.1.t1", "s8")


def a_table(services: int = SERVICES, tasks: int = 4, moved: int = 0) -> NetworkTable:
    """Return the table of a network with that many services.

    ``moved`` moves the tasks of the first to other addresses.
    """
    return a_network(
        *(
            a_served(
                f"s{number}",
                f"10.1.{number // 200}.{1 + number % 200}",
                [f"10.{2 + (moved if not number else 0)}.{number % 200}.{1 + task}" for task in range(tasks)],
            )
            for number in range(services)
        ),
        subnets=["10.1.0.0/16"],
    )


def pss_mib(pid: int) -> float:
    """Return the memory of a process: its own, and its part of shared pages."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ValueError("no Pss")


def net_pid(lab: NamesLab) -> int:
    found = read_pid_file(lab.paths.pid_file("net"))
    assert found is not None
    return found.pid


def figures(runs: int) -> list[Figure]:
    """Measure responses in ``runs`` runs of some seconds, and memory."""
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(_with_lab(Path(directory), runs))


async def _with_lab(directory: Path, runs: int) -> list[Figure]:
    async with names_lab(directory) as lab:
        resolvers, per_container_mib = await _containers(lab)
        return [*await _answers(lab, resolvers, runs), _memory(per_container_mib)]


async def _containers(lab: NamesLab) -> tuple[list[Resolver], float]:
    """Return a resolver in each container, and the net process's memory per container, in MiB."""
    table = a_table()
    lab.write(table)
    resolvers: list[Resolver] = []
    memory = []
    for number in range(CONTAINERS):
        await lab.container(f"c{number}")
        await lab.serve(f"c{number}", table)
        resolvers.append(await lab.resolver(f"c{number}"))
        for name in NAMES:
            await resolvers[-1].ask(name)
        if number in (0, CONTAINERS - 1):
            memory.append(pss_mib(net_pid(lab)))
    return resolvers, (memory[1] - memory[0]) / (CONTAINERS - 1)


async def _answers(lab: NamesLab, resolvers: list[Resolver], runs: int) -> list[Figure]:
    async def one(_: int) -> tuple[float, float, float]:
        before = processor_s(net_pid(lab))
        times = await _time_queries([one.socket for one in resolvers[:10]], SECONDS)
        spent = processor_s(net_pid(lab)) - before
        return at_quantile(times, 0.5) * 1e3, at_quantile(times, 0.99) * 1e3, spent / len(times) * 1e6

    values, busy = await run_undisturbed(runs, one)
    halves, slow, spent = (tuple(column) for column in zip(*values, strict=True))
    what = f"an answer at {RATE} questions a second, network of {SERVICES} services"
    return [
        Figure(number=9, what=f"{what}, p99", unit="ms", values=slow, limit=LIMIT_P99_MS, busy=tuple(busy)),
        Figure(number=0, what=f"{what}, p50", unit="ms", values=halves),
        Figure(number=0, what="processor time of the net process for a question", unit="µs", values=spent),
    ]


def _memory(mib: float) -> Figure:
    what = f"net process, for each of {CONTAINERS} containers with rules of 5 services"
    return Figure(number=4, what=what, unit="MiB", values=(mib,), limit=LIMIT_MEMORY_MIB)


@asynccontextmanager
async def names_lab(directory: Path) -> AsyncIterator[NamesLab]:
    """Run a net process without containers."""
    paths = Paths(directory / "data", directory / "run")
    paths.run.mkdir()
    async with forks(paths) as started:
        lab = NamesLab(paths, started)
        try:
            await lab.start_process()
            yield lab
        finally:
            await lab.close()


async def _time_queries(sockets: list[socket.socket], seconds: float) -> list[float]:
    descriptors = [one.fileno() for one in sockets]
    words = ("ask", str(RATE), str(seconds), ",".join(map(str, descriptors)), *NAMES)
    load = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.names_load", *words, stdout=asyncio.subprocess.PIPE, pass_fds=descriptors
    )
    output, _ = await load.communicate()
    took: list[float] = json.loads(output)
    return took


if __name__ == "__main__":
    run_alone(__doc__, "names", figures)

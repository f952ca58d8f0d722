"""Names of one node: how long answers take, and what a container costs the net process.

Containers are namespaces with a net process of the benchmark's own; questions come from a process of their own, at an
even rate, from all containers in turn.  A question counts from the moment it was due.  ``python -m bench.names``
"""

import argparse
import asyncio
import json
import os
import socket
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import quiet
from bench.run import commit, result_name, write_result
from skep.model.tables import Table
from skep.node.supervision.identity import read_pid_file
from skep.paths import Paths
from tests.names_lab import NamesLab, forks
from tests.tables import a_network, a_served

SERVICES = 500
RATE = 5000
LIMIT_P99_MS = 1.0
QUIET = 0.15
"""Results are kept only if nothing else took more of the machine."""
NAMES = ("s1", "s2.front", "tasks.s3", "4.s4", "s5", "all.tasks.s6", "s7.1.t1", "s8")


def a_table(services: int = SERVICES, tasks: int = 4, moved: int = 0) -> Table:
    """A network with so many services; ``moved``: other addresses for the tasks of the first."""
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
    """Memory of a process: its own, and its share of what it shares."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ValueError("no Pss")


def processor_s(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def net_pid(lab: NamesLab) -> int:
    found = read_pid_file(lab.paths.pid_file("net"))
    assert found is not None
    return found.pid


async def measured(containers: int, seconds: float, pairs: int) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as directory:
        paths = Paths(Path(directory, "data"), Path(directory, "run"))
        paths.run.mkdir()
        async with forks(paths) as started:
            lab = NamesLab(paths, started)
            try:
                await lab.start_process()
                return await _measured(lab, containers, seconds, pairs)
            finally:
                await lab.close()


async def _measured(lab: NamesLab, containers: int, seconds: float, repeats: int) -> dict[str, Any]:
    table = a_table()
    lab.write(table)
    resolvers = []
    memory = []
    for number in range(containers):
        await lab.container(f"c{number}")
        await lab.serve(f"c{number}", table)
        resolvers.append(await lab.resolver(f"c{number}"))
        for name in NAMES:
            await resolvers[-1].ask(name)
        if number in (0, containers - 1):
            memory.append(pss_mib(net_pid(lab)))
    took = []
    for _ in range(repeats):
        busy = await asyncio.to_thread(quiet)
        before = processor_s(net_pid(lab))
        times = sorted(await _asked([one.socket for one in resolvers[:10]], seconds))
        took.append(
            {
                "busy": busy,
                "processor_us": (processor_s(net_pid(lab)) - before) / len(times) * 1e6,
                "p50_ms": times[len(times) // 2] * 1000,
                "p99_ms": times[len(times) * 99 // 100] * 1000,
                "largest_ms": times[-1] * 1000,
            }
        )
    return {
        "containers": containers,
        "services": SERVICES,
        "net process, MiB": memory[1],
        "per container, KiB": (memory[1] - memory[0]) / (containers - 1) * 1024,
        "runs": took,
    }


async def _asked(sockets: list[socket.socket], seconds: float) -> list[float]:
    descriptors = [one.fileno() for one in sockets]
    words = ("ask", str(RATE), str(seconds), ",".join(map(str, descriptors)), *NAMES)
    load = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.names_load", *words, stdout=asyncio.subprocess.PIPE, pass_fds=descriptors
    )
    output, _ = await load.communicate()
    took: list[float] = json.loads(output)
    return took


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--containers", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--dry", action="store_true", help="keep nothing; else what a quiet machine gave is kept"
    )
    arguments = parser.parse_args()
    now = datetime.now(UTC)
    result = asyncio.run(measured(arguments.containers, arguments.seconds, arguments.repeats))
    runs = result["runs"]
    text = "\n".join(
        (
            f"# Names of one node, {now:%Y-%m-%d %H:%M} UTC, commit {commit()}",
            "",
            f"{RATE} questions a second from 10 of {result['containers']} containers, on a network of {SERVICES}",
            f"services, {arguments.seconds:g} s each; client and net process share the machine's processors. A",
            "question counts from the moment it was due. `processor_us`: of the net process, for one question.",
            "",
            "| | median of runs | smallest .. largest | limit |",
            "|---|---|---|---|",
            *(
                f"| {key} | {median(one[key] for one in runs):.3f} "
                f"| {min(one[key] for one in runs):.3f} .. {max(one[key] for one in runs):.3f} "
                f"| {LIMIT_P99_MS if key == 'p99_ms' else ''} |"
                for key in ("p50_ms", "p99_ms", "largest_ms", "processor_us")
            ),
            "",
            f"Net process: {result['net process, MiB']:.1f} MiB (PSS), {result['per container, KiB']:.1f} KiB for each",
            "container more, with the rules of 5 services loaded in each.",
            "",
        )
    )
    print(text)
    print("busy with other things before each run:", *(f"{one['busy']:.0%}" for one in runs))
    if not arguments.dry and max(one["busy"] for one in runs) <= QUIET:
        write_result(result_name(now, commit(), "names"), text, result)


if __name__ == "__main__":
    main()

"""Virtual addresses: the time that they add to a request, and how fast a change reaches many containers.

Requests are sent from one namespace to another over a bridge, alternately to the task's own address and to the virtual
one.  Changes are sent to a net process that serves many containers, all of which use the service.  When it responds,
the change has reached every namespace.
"""

import asyncio
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench.figures import Figure, alternate, ratio, run_alone, run_undisturbed
from bench.machine import processor_s
from bench.names import a_table, names_lab, net_pid
from tests.support.networks.names_lab import NamesLab
from tests.support.networks.tables import a_network, a_served

VIRTUAL, BACKEND, CLIENT = "10.0.1.2", "10.0.1.11", "10.0.1.5"
LIMIT_RATIO = 1.1
LIMIT_UPDATE_MS = 200.0
KINDS = {"kept": "over a kept connection", "new": "over a new connection"}
REQUESTS = 2000
CONTAINERS, CHANGES_PER_PAIR = 100, 5
TURNS = 5
"""Number of turns to each address, in one pair."""


def figures(pairs: int) -> list[Figure]:
    """Measure the added time of a virtual address, and the speed of changes."""
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(_measure(Path(directory), pairs))


async def _measure(directory: Path, pairs: int) -> list[Figure]:
    async with names_lab(directory) as lab:
        return [*await _requests(lab, pairs), *await _updates(lab, pairs)]


async def _requests(lab: NamesLab, pairs: int) -> list[Figure]:
    table = a_network(a_served("web", VIRTUAL, [BACKEND]))
    lab.write(table)
    await lab.container("server", BACKEND)
    await lab.container("client", CLIENT)
    await lab.serve("client", table)
    await (await lab.resolver("client")).ask("web")
    server = await _end(lab, "server", "serve", BACKEND)
    assert server.stdout is not None
    await server.stdout.readline()
    addresses = {"direct": BACKEND, "virtual": VIRTUAL}

    async def one(number: int) -> dict[tuple[str, str], float]:
        """Return p50 in µs for each kind of connection to each address."""
        found: dict[tuple[str, str], float] = {}
        for kind in KINDS:

            async def time_requests(to: str, kind: str = kind) -> float:
                client = await _end(lab, "client", "request", addresses[to], str(REQUESTS), kind)
                output, _ = await client.communicate()
                return median([float(one) for one in json.loads(output)]) * 1e6

            taken = await alternate(list(addresses), number, TURNS, time_requests)
            found |= {(kind, to): value for to, value in taken.items()}
        return found

    try:
        values, busy = await run_undisturbed(pairs, one)
    finally:
        server.kill()
        await server.wait()
    return [
        ratio(
            2,
            f"a request by a virtual address beside the task's own, {title}, µs p50",
            {to: [value[kind, to] for value in values] for to in addresses},
            limit=LIMIT_RATIO,
            busy=busy,
        )
        for kind, title in KINDS.items()
    ]


async def _updates(lab: NamesLab, pairs: int) -> list[Figure]:
    """Measure until a change of one service's tasks is in the namespaces of all containers that use it."""
    await lab.change(table := a_table())
    for number in range(CONTAINERS):
        await lab.container(f"c{number}")
        await lab.serve(f"c{number}", table)
        resolver = await lab.resolver(f"c{number}")
        for name in ("s0", "s1", "s2", "s3", "s4"):
            await resolver.ask(name)

    numbers = itertools.count()

    async def one(_: int) -> list[tuple[float, float]]:
        return [await _change(lab, next(numbers)) for _ in range(CHANGES_PER_PAIR)]

    rounds, busy = await run_undisturbed(pairs, one)
    taken = [change for changes in rounds for change in changes]
    what = f"a change of one of 500 services, in {CONTAINERS} containers of one node"
    return [
        Figure(
            number=7,
            what=f"{what}, from the table to all namespaces, p99",
            unit="ms",
            values=tuple(wall for wall, _ in taken),
            quantile=0.99,
            limit=LIMIT_UPDATE_MS,
            busy=tuple(busy),
        ),
        Figure(
            number=0,
            what="processor time of the net process for such a change",
            unit="ms",
            values=tuple(spent for _, spent in taken),
        ),
    ]


async def _change(lab: NamesLab, number: int) -> tuple[float, float]:
    """Return milliseconds until a change is in force, and of the net process's processor time."""
    changed = lab.write(a_table(moved=100 + number % 2, tasks=4 + number % 2))
    spent, begun = processor_s(net_pid(lab)), time.perf_counter()
    await lab.client.refresh([changed])
    return (time.perf_counter() - begun) * 1e3, (processor_s(net_pid(lab)) - spent) * 1e3


async def _end(lab: NamesLab, id: str, *words: str) -> asyncio.subprocess.Process:
    """Start a process in the container's namespace."""
    enter = ("nsenter", f"--net={lab.paths.netns / id}", sys.executable, "-m", "bench.names_load")
    return await asyncio.create_subprocess_exec(*enter, *words, stdout=asyncio.subprocess.PIPE)


if __name__ == "__main__":
    run_alone(__doc__, "virtual", figures)

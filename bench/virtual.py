"""Virtual addresses: what they add to a request, and how fast a change reaches many containers.

Requests go from one namespace to another over a bridge, to the task's own address and to the virtual one in turn.
Changes are told to a net process that serves many containers, all of which use the service; one that is answered has
reached every namespace.  ``python -m bench.virtual``
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import quiet
from bench.names import QUIET, a_table
from bench.run import commit, result_name, write_result
from skep.paths import Paths
from tests.names_lab import NamesLab, forks
from tests.tables import a_network, a_served

VIRTUAL, BACKEND, CLIENT = "10.0.1.2", "10.0.1.11", "10.0.1.5"
LIMIT_RATIO = 1.1
LIMIT_UPDATE_MS = 200.0
KINDS = ("kept", "new")


async def measured(pairs: int, count: int, containers: int, changes: int) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as directory:
        paths = Paths(Path(directory, "data"), Path(directory, "run"))
        paths.run.mkdir()
        async with forks(paths) as started:
            lab = NamesLab(paths, started)
            try:
                await lab.start_process()
                busy: list[float] = []
                requests = await _requests(lab, pairs, count, busy)
                updates = await _updates(lab, containers, changes, busy)
                return {"requests": requests, "updates_ms": updates, "busy": busy}
            finally:
                await lab.close()


async def _requests(
    lab: NamesLab, pairs: int, count: int, busy: list[float]
) -> dict[str, list[dict[str, float]]]:
    table = a_network(a_served("web", VIRTUAL, [BACKEND]))
    lab.write(table)
    await lab.container("server", BACKEND)
    await lab.container("client", CLIENT)
    await lab.serve("client", table)
    await (await lab.resolver("client")).ask("web")
    server = await _end(lab, "server", "serve", BACKEND)
    assert server.stdout is not None
    await server.stdout.readline()
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    try:
        for pair in range(pairs):
            busy.append(await asyncio.to_thread(quiet))
            for kind in KINDS:
                medians = {}
                for address in (BACKEND, VIRTUAL) if pair % 2 else (VIRTUAL, BACKEND):
                    client = await _end(lab, "client", "request", address, str(count), kind)
                    output, _ = await client.communicate()
                    medians["virtual" if address == VIRTUAL else "direct"] = median(json.loads(output))
                found[kind].append(medians)
    finally:
        server.kill()
        await server.wait()
    return found


async def _updates(lab: NamesLab, containers: int, changes: int, busy: list[float]) -> list[float]:
    """Milliseconds until a change of one service's tasks is in the namespaces of all containers that use it."""
    await lab.change(table := a_table())
    for number in range(containers):
        await lab.container(f"c{number}")
        await lab.serve(f"c{number}", table)
        resolver = await lab.resolver(f"c{number}")
        for name in ("s0", "s1", "s2", "s3", "s4"):
            await resolver.ask(name)
    took = []
    for number in range(changes):
        busy.append(await asyncio.to_thread(quiet))
        lab.write(changed := a_table(moved=100 + number % 2, tasks=4 + number % 2))
        begun = time.perf_counter()
        await lab.client.refresh([changed.head.id])
        took.append((time.perf_counter() - begun) * 1000)
    return took


async def _end(lab: NamesLab, id: str, *words: str) -> asyncio.subprocess.Process:
    """A process in the container's namespace."""
    enter = ("nsenter", f"--net={lab.paths.netns / id}", sys.executable, "-m", "bench.names_load")
    return await asyncio.create_subprocess_exec(*enter, *words, stdout=asyncio.subprocess.PIPE)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--containers", type=int, default=100)
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument(
        "--dry", action="store_true", help="keep nothing; else what a quiet machine gave is kept"
    )
    arguments = parser.parse_args()
    now = datetime.now(UTC)
    result = asyncio.run(measured(arguments.pairs, arguments.count, arguments.containers, arguments.changes))
    updates = sorted(result["updates_ms"])
    rows = []
    for kind, title in (("kept", "request over a kept connection"), ("new", "request over a new connection")):
        pairs = result["requests"][kind]
        direct, virtual = ([one[which] * 1e6 for one in pairs] for which in ("direct", "virtual"))
        ratios = [one["virtual"] / one["direct"] for one in pairs]
        rows.append(
            f"| {title}, p50 | {median(direct):.1f} | {median(virtual):.1f} "
            f"| {median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f}) | {LIMIT_RATIO} |"
        )
    text = "\n".join(
        (
            f"# Virtual addresses, {now:%Y-%m-%d %H:%M} UTC, commit {commit()}",
            "",
            f"Medians of {arguments.pairs} pairs of {arguments.count} requests of one byte, in turn.",
            "",
            "| | direct, µs | virtual, µs | ratio | limit |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"A change of one of 500 services, of which each of {arguments.containers} containers uses five, is in all",
            f"their namespaces after {median(updates):.0f} ms (median of {len(updates)}; {updates[0]:.0f} ..",
            f"{updates[-1]:.0f}; limit {LIMIT_UPDATE_MS:.0f}), the reading of the table included.",
            "",
        )
    )
    print(text)
    print("busy with other things:", *(f"{one:.0%}" for one in result["busy"]))
    if not arguments.dry and max(result["busy"]) <= QUIET:
        write_result(result_name(now, commit(), "virtual"), text, result)


if __name__ == "__main__":
    main()

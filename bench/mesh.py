"""The routing mesh of skep nodes: what it adds to a request beside asking the task's own node.

::

    .venv/bin/python -m bench.mesh                     # seven pairs, kept in results/
    .venv/bin/python -m bench.mesh --pairs 3 --requests 1000

Three nodes and a client are network namespaces on one bridge; the rules are the product's (``tests/mesh_lab.py``).  A
pair is one kept connection from the client each way, in turn: *direct* to a server on node 3 itself, as a port in host
mode without any rule; by the *mesh* through node 1 to the same server in a task on node 3.  *Update* is the time from
a changed table until the rules of one node are in force.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench.machine import noise
from bench.run import commit, result_name, write_result
from tests.mesh_lab import NETWORK, MeshLab

PAIRS, REQUESTS = 7, 3000
UPDATES = 20
RATIO_MAX = 1.5
"""The issue's limit: median of the pairs' ratios of p50."""

_SERVER = """
import socket, threading
listener = socket.create_server(("0.0.0.0", 7001))
print("ready", flush=True)
def serve(connection):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := connection.recv(1000):
        connection.sendall(data)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
_CLIENT = """
import socket, statistics, sys, time
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
taken = []
for number in range(int(sys.argv[3]) + 100):
    began = time.perf_counter()
    connection.sendall(b"x" * 100)
    connection.recv(1000)
    taken.append(time.perf_counter() - began)
print(statistics.median(taken[100:]) * 1e6)
"""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Every single value: p50 of a request, and of an update."""

    direct_us: list[float]
    mesh_us: list[float]
    update_ms: list[float]
    busy: float

    @property
    def ratio(self) -> float:
        """Mesh by direct: the median of the pairs' ratios."""
        return statistics.median(mesh / one for one, mesh in zip(self.direct_us, self.mesh_us, strict=True))


def main() -> None:
    """Measure, and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of each connection")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="skep-bench-") as directory:
        result = asyncio.run(_measure(Path(directory), options.pairs, options.requests))
    text = report(result)
    print(text)
    write_result(result_name(datetime.now(UTC), commit(), "mesh"), text, msgspec.to_builtins(result))


def report(result: Result) -> str:
    """The table."""

    def spread(values: Sequence[float]) -> str:
        return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    rows = [
        "| what | direct | by the mesh | ratio | limit |",
        "|---|---|---|---|---|",
        (
            f"| a request's p50, us, task on another node | {spread(result.direct_us)} | {spread(result.mesh_us)} "
            f"| {result.ratio:.2f} | at most {RATIO_MAX} |"
        ),
        f"| a change of backends, ms, one node | | {spread(result.update_ms)} | | |",
        "",
        f"The machine was {result.busy:.0%} busy with other things before.",
    ]
    return "\n".join(rows) + "\n"


async def _measure(directory: Path, pairs: int, requests: int) -> Result:
    busy = noise()
    async with MeshLab(directory, 3, has_ipv6=False).running() as lab:
        task = await lab.add_task("t1", lab.nodes[2])
        lab.publish(("tcp", 8080, 7001))
        await lab.spread()
        servers = [await _python(place, _SERVER) for place in (lab.nodes[2].netns, task.netns)]
        try:
            for server in servers:
                assert server.stdout is not None
                await server.stdout.readline()
            direct, mesh = await _requests(lab, pairs, requests)
            updates = await _updates(lab)
        finally:
            for server in servers:
                server.kill()
                await server.wait()
    return Result(direct_us=direct, mesh_us=mesh, update_ms=updates, busy=busy)


async def _requests(lab: MeshLab, pairs: int, requests: int) -> tuple[list[float], list[float]]:
    taken: dict[str, list[float]] = {"direct": [], "mesh": []}
    for pair in range(pairs):
        for way in ("direct", "mesh") if pair % 2 else ("mesh", "direct"):
            node, port = (lab.nodes[2], 7001) if way == "direct" else (lab.nodes[0], 8080)
            client = await _python(lab.client, _CLIENT, node.address, str(port), str(requests))
            async with asyncio.timeout(60):
                output, _ = await client.communicate()
            taken[way].append(float(output))
    return taken["direct"], taken["mesh"]


async def _updates(lab: MeshLab) -> list[float]:
    """Tasks that come and go, on a node that has none of them."""
    others = [await lab.add_task(f"t{number}", lab.nodes[1]) for number in range(2, 6)]
    taken = []
    for number in range(UPDATES):
        others[number % 4].is_serving = not others[number % 4].is_serving
        table, node = lab.table(), lab.nodes[0]
        began = time.perf_counter()
        await node.mesh.apply({NETWORK: table}, frozenset({NETWORK}))
        taken.append((time.perf_counter() - began) * 1e3)
    return taken


async def _python(netns: Path, code: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        "nsenter",
        f"--net={netns}",
        sys.executable,
        "-c",
        code,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
    )


if __name__ == "__main__":
    main()

"""The routing mesh of skep nodes: what it adds to a request beside asking the task's own node.

::

    .venv/bin/python -m bench.mesh                     # seven pairs, kept in results/
    .venv/bin/python -m bench.mesh --pairs 3 --requests 1000

Three nodes and a client are network namespaces on one bridge; the rules are the product's (``tests/mesh_lab.py``).  A
pair is one kept connection from the client each way, in turn: *direct* to the task on node 3 by a port in host mode of
that node; by the *mesh* through node 1 to the same task.  A request is answered by an HTTP server in Python, of which
the network is a small part, and by an echo, of which it is nearly all; the issue's limit is on the first.  *Update* is
the time from a changed table until the rules of one node are in force.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from ipaddress import IPv4Network
from pathlib import Path

import msgspec

from bench.machine import noise
from bench.run import commit, result_name, write_result
from skep.node.network.overlay import tables
from skep.node.network.rules import HostPort, gateway_table
from tests.mesh_lab import NETWORK, MeshLab

PAIRS, REQUESTS = 7, 3000
UPDATES = 20
RATIO_MAX = 1.5
"""The issue's limit: median of the pairs' ratios of p50."""

_ECHO = """
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
_HTTP = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"hello\\n")
    def log_message(self, *_):
        pass
server = ThreadingHTTPServer(("0.0.0.0", 7002), Handler)
print("ready", flush=True)
server.serve_forever()
"""
_CLIENT = """
import socket, statistics, sys, time
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
request = b"GET / HTTP/1.1\\r\\nHost: mesh\\r\\n\\r\\n"
taken = []
for number in range(int(sys.argv[3]) + 100):
    began = time.perf_counter()
    connection.sendall(request)
    answer = b""
    while not answer.endswith((b"hello\\n", request)):
        answer += connection.recv(1000)
    taken.append(time.perf_counter() - began)
print(statistics.median(taken[100:]) * 1e6)
"""
_SERVERS = {"http": (_HTTP, 7002, 8082, 9002), "echo": (_ECHO, 7001, 8081, 9001)}
"""Program, its port, its port of the mesh, its port in host mode."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Every single value: p50 of a request in microseconds by kind of server, and of an update."""

    direct_us: dict[str, list[float]]
    mesh_us: dict[str, list[float]]
    update_ms: list[float]
    busy: float

    def ratio(self, kind: str) -> float:
        """Mesh by direct: the median of the pairs' ratios."""
        pairs = zip(self.direct_us[kind], self.mesh_us[kind], strict=True)
        return statistics.median(mesh / one for one, mesh in pairs)


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

    limits = {"http": f"at most {RATIO_MAX}", "echo": ""}
    rows = ["| what | direct | by the mesh | ratio | limit |", "|---|---|---|---|---|"]
    rows += [
        f"| p50 of a request, us, {kind}, task on another node | {spread(result.direct_us[kind])} "
        f"| {spread(result.mesh_us[kind])} | {result.ratio(kind):.2f} | {limit} |"
        for kind, limit in limits.items()
    ]
    rows += [
        f"| a change of backends, ms, one node | | {spread(result.update_ms)} | | |",
        "",
        f"The machine was {result.busy:.0%} busy with other things before.",
    ]
    return "\n".join(rows) + "\n"


async def _measure(directory: Path, pairs: int, requests: int) -> Result:
    busy = noise()
    async with MeshLab(directory, 3, has_ipv6=False).running() as lab:
        node = lab.nodes[2]
        task = await lab.add_task("t1", node)
        lab.publish(*(("tcp", mesh, port) for _, port, mesh, _ in _SERVERS.values()))
        await lab.spread()
        inside = "172.18.0." + task.addresses[0].rpartition(".")[2]
        host_ports = [HostPort("tcp", host, inside, port) for _, port, _, host in _SERVERS.values()]
        gateway = gateway_table("skep-gw", IPv4Network("172.18.0.0/16"), host_ports)
        await node.nft(tables.whole(gateway))
        servers = [await _python(task.netns, program) for program, *_ in _SERVERS.values()]
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


async def _requests(
    lab: MeshLab, pairs: int, requests: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    direct: dict[str, list[float]] = {kind: [] for kind in _SERVERS}
    mesh: dict[str, list[float]] = {kind: [] for kind in _SERVERS}
    for pair in range(pairs):
        for kind, (_, _, by_mesh, by_host) in _SERVERS.items():
            ways = ((direct, lab.nodes[2], by_host), (mesh, lab.nodes[0], by_mesh))
            for found, node, port in ways if pair % 2 else reversed(ways):
                client = await _python(lab.client, _CLIENT, node.address, str(port), str(requests))
                async with asyncio.timeout(60):
                    output, _ = await client.communicate()
                found[kind].append(float(output))
    return direct, mesh


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

"""The routing mesh of Skep nodes: the time that it adds to a request, compared with a request to the task's own node.

Three nodes and a client are network namespaces on one bridge, with the product's rules
(``tests/support/networks/mesh_lab.py``).  A pair is one kept connection from the client in each way: *direct* to the
task on node 3 by a port in host mode of that node, and by the *mesh* through node 1 to the same task.  The servers are
an HTTP server in Python, where the network is a small part of the time, and an echo, where it is nearly all. *Update*
is the time from a changed table until the rules of one node are in force.
"""

import asyncio
import sys
import tempfile
import time
from ipaddress import IPv4Network
from pathlib import Path

from bench.figures import Figure, alternate, ratio, run_alone, run_undisturbed
from skep.dataplane.netns import nft_table
from skep.dataplane.plan.gateway import HostPort, gateway_table
from tests.support.networks.mesh_lab import NETWORK, LabNode, MeshLab

REQUESTS = 1500
TURNS = 5
"""Number of turns of each way, in one pair."""
UPDATES = 20
RATIO_MAX = 1.5
"""Limit of the median of the pairs' ratios of p50."""

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
"""Program, its port, its port in the mesh, its port in host mode."""


def figures(pairs: int) -> list[Figure]:
    """Measure requests and updates."""
    with tempfile.TemporaryDirectory(prefix="skep-bench-") as directory:
        return asyncio.run(_measure(Path(directory), pairs))


async def _measure(directory: Path, pairs: int) -> list[Figure]:
    async with MeshLab(directory, 3, has_ipv6=False).running() as lab:
        node = lab.nodes[2]
        task = await lab.add_task("t1", node)
        lab.publish(*(("tcp", mesh, port) for _, port, mesh, _ in _SERVERS.values()))
        await lab.spread()
        inside = "172.18.0." + task.addresses[0].rpartition(".")[2]
        host_ports = [HostPort("tcp", host, inside, port) for _, port, _, host in _SERVERS.values()]
        gateway = gateway_table("skep-gw", IPv4Network("172.18.0.0/16"), host_ports)
        await node.nft(nft_table.whole(gateway))
        servers = [await _python(task.netns, program) for program, *_ in _SERVERS.values()]
        try:
            for server in servers:
                assert server.stdout is not None
                await server.stdout.readline()
            return [*await _requests(lab, pairs), await _updates(lab)]
        finally:
            for server in servers:
                server.kill()
                await server.wait()


async def _requests(lab: MeshLab, pairs: int) -> list[Figure]:
    async def one(number: int) -> dict[tuple[str, str], float]:
        """Return p50 in µs for each kind of server and each way."""
        found: dict[tuple[str, str], float] = {}
        for kind, (_, _, by_mesh, by_host) in _SERVERS.items():
            ends = {"direct": (lab.nodes[2], by_host), "mesh": (lab.nodes[0], by_mesh)}

            async def time_requests(way: str, ends: dict[str, tuple[LabNode, int]] = ends) -> float:
                node, port = ends[way]
                client = await _python(lab.client, _CLIENT, node.address, str(port), str(REQUESTS))
                async with asyncio.timeout(60):
                    output, _ = await client.communicate()
                return float(output)

            taken = await alternate(list(ends), number, TURNS, time_requests)
            found |= {(kind, way): value for way, value in taken.items()}
        return found

    values, busy = await run_undisturbed(pairs, one)
    return [
        ratio(
            5 if limit else 0,
            f"a request by the mesh beside direct, {kind}, task on another node, µs p50",
            {way: [value[kind, way] for value in values] for way in ("direct", "mesh")},
            limit=limit,
            busy=busy,
        )
        for kind, limit in {"http": RATIO_MAX, "echo": None}.items()
    ]


async def _updates(lab: MeshLab) -> Figure:
    """Measure tasks that start and stop, on a node that has none of them."""
    others = [await lab.add_task(f"t{number}", lab.nodes[1]) for number in range(2, 6)]
    taken = []
    for number in range(UPDATES):
        others[number % 4].is_serving = not others[number % 4].is_serving
        table, node = lab.table(), lab.nodes[0]
        began = time.perf_counter()
        await node.mesh.apply(node.id, {NETWORK: table}, frozenset({NETWORK}))
        taken.append((time.perf_counter() - began) * 1e3)
    return Figure(number=0, what="a change of backends in one node's mesh", unit="ms", values=tuple(taken))


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
    run_alone(__doc__, "mesh", figures)

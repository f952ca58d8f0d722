"""Requests through the front door, compared with the same HAProxy configured by hand.

Both are processes of the machine's HAProxy on loopback, before a third process as the task.  The door has the
configuration that a node writes: the map of routes, counters of latencies by route, lines in reserve for further tasks.
By hand, HAProxy has one host and one backend, with what its user sees in common: the log in JSON, headers for the
service that clients cannot forge, attempts at another task that repeat no ``POST``, and responses to the challenges of
an authority, as users of HAProxy write them.  The client is ``ab``, with kept connections.
"""

import asyncio
import csv
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.figures import Figure, alternate, ratio, run_alone, run_undisturbed
from skep.dataplane.door.configuration import CHALLENGES, LOG_LINE, quoted
from tests.support.networks.door_rig import DoorRig, a_door, free_port

HOST = "app.example.com"
REQUESTS, CONNECTIONS = 5_000, 32
RATE_MIN, P99_MAX = 0.97, 1.1
"""Bounds of the ratios: what the door adds is a small part of a request."""
TURNS = 20
"""Number of turns of each way, in one pair.  Many short ones, so that other work of the machine meets both ways."""
START_S = 20.0
"""Time limit of HAProxy's start in seconds, on a machine with other work."""
RUN_S = 60.0
"""Time limit of one turn in seconds.  It takes less than one on a quiet machine."""
_BY_HAND = """
global
    log stdout len 4096 format raw local0
defaults
    mode http
    log global
    log-format {log}
    option dontlognull
    timeout client 60s
    timeout http-request 10s
    timeout http-keep-alive 10s
    timeout connect 2s
    timeout server 60s
    retries 3
    option redispatch 1
    retry-on conn-failure empty-response
frontend http
    bind 127.0.0.1:{port}
    http-request return status 200 content-type text/plain lf-string "%[path,field(-1,/)].me" if {{ path_beg {acme} }}
    http-request disable-l7-retry unless {{ method GET HEAD OPTIONS PUT DELETE }}
    http-request set-var(txn.host) req.hdr(host)
    http-request set-var(txn.path) path
    http-request del-header Forwarded
    http-request set-header X-Forwarded-For %[src]
    http-request set-header X-Forwarded-Host %[req.hdr(host)]
    http-request set-header X-Forwarded-Proto http
    use_backend app if {{ req.hdr(host) -i {host} }}
backend app
    server s1 {task}
"""
_TASK = """
defaults
    mode http
    timeout client 60s
    timeout connect 2s
    timeout server 60s
frontend http
    bind {task}
    http-request return status 200 content-type text/plain string hello
"""


def figures(pairs: int) -> list[Figure]:
    """Measure throughput and latency."""
    with tempfile.TemporaryDirectory(prefix="skep-bench-") as directory:
        return asyncio.run(_measure(Path(directory), pairs))


async def _measure(directory: Path, pairs: int) -> list[Figure]:
    (directory / "door").mkdir()
    async with a_door(directory / "door") as rig:
        task, port = f"127.0.0.2:{rig.task_port}", free_port()
        rig.service("web", {"skep.http": HOST})
        rig.task("t1", "web", "127.0.0.2")
        await rig.apply()
        by_hand = _BY_HAND.format(port=port, host=HOST, task=task, log=quoted(LOG_LINE), acme=CHALLENGES)
        async with (
            _haproxy(directory / "task", _TASK.format(task=task), ("127.0.0.2", rig.task_port)),
            _haproxy(directory / "hand", by_hand, ("127.0.0.1", port)) as master,
        ):
            ways = {"by hand": _Way(port, master), "door": _Way(rig.port, rig.pid)}
            return await _pairs(directory, ways, pairs, rig)


class _Way(NamedTuple):
    port: int
    master: int
    """Id of HAProxy's master process."""


async def _pairs(directory: Path, ways: dict[str, _Way], pairs: int, rig: DoorRig) -> list[Figure]:
    async def one(number: int) -> dict[str, tuple[float, ...]]:
        """Return requests per second, p99 in ms and processor time per request in us of each way."""
        slow: dict[str, list[float]] = defaultdict(list)
        cost: dict[str, list[float]] = defaultdict(list)

        async def send(way: str) -> float:
            before_s = _processor_s(ways[way].master)
            rate, p99 = await _send(directory, ways[way].port)
            cost[way].append((_processor_s(ways[way].master) - before_s) / REQUESTS * 1e6)
            slow[way].append(p99)
            return rate

        rates = await alternate(list(ways), number, TURNS, send)
        await rig.door.read_statistics()  # as a node does every few seconds
        return {way: (rates[way], median(slow[way]), median(cost[way])) for way in ways}

    for way in ways.values():
        await _send(directory, way.port)
    values, busy = await run_undisturbed(pairs, one)
    columns = {way: tuple(zip(*(value[way] for value in values), strict=True)) for way in ways}
    what = f"through the door beside HAProxy by hand, {CONNECTIONS} kept connections"
    rates, latencies, costs = ({way: columns[way][place] for way in ways} for place in (0, 1, 2))
    return [
        ratio(0, f"requests a second {what}", rates, limit=RATE_MIN, is_least=True, busy=busy),
        ratio(0, f"p99 of a request {what}, ms", latencies, limit=P99_MAX),
        ratio(0, f"processor time of HAProxy per request {what}, us", costs),
    ]


def _processor_s(master: int) -> float:
    """Return the processor time of HAProxy's workers, which also counts on a busy machine."""
    found = 0
    for worker in Path(f"/proc/{master}/task/{master}/children").read_text().split():
        for thread in Path(f"/proc/{worker}/task").iterdir():
            found += int((thread / "schedstat").read_text().split()[0])
    return found / 1e9


async def _send(directory: Path, port: int) -> tuple[float, float]:
    """Send requests, and return how many were answered in a second, and their p99 in milliseconds."""
    table = directory / "percentages.csv"
    words = ("-q", "-k", "-n", str(REQUESTS), "-c", str(CONNECTIONS), "-H", f"Host: {HOST}", "-e", str(table))
    client = await asyncio.create_subprocess_exec(
        "ab", *words, f"http://127.0.0.1:{port}/", stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(RUN_S):
        output, _ = await client.communicate()
    text = output.decode()
    rate = re.search(r"Requests per second: +([0-9.]+)", text)
    assert rate is not None, text
    assert "Non-2xx" not in text, text
    with table.open() as file:
        rows = {row[0]: row[1] for row in csv.reader(file)}
    return float(rate[1]), float(rows["99"])


@asynccontextmanager
async def _haproxy(directory: Path, text: str, address: tuple[str, int]) -> AsyncIterator[int]:
    """Run HAProxy with a configuration during the block, once it listens at ``address``.  Yield its process id."""
    directory.mkdir()
    file = directory / "haproxy.cfg"
    file.write_text(text)
    program = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin") or "haproxy"
    with (directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(program, "-W", "-f", str(file), stdout=log, stderr=log)
    try:
        async with asyncio.timeout(START_S):
            while True:
                with suppress(ConnectionRefusedError):
                    _, writer = await asyncio.open_connection(*address)
                    writer.close()
                    break
                await asyncio.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        await process.wait()


if __name__ == "__main__":
    run_alone(__doc__ or "", "door", figures)

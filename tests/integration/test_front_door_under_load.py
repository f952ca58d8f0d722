"""The front door under 500 requests a second: a dead node, a bad version, an update and a renewed certificate.

The cluster is made by ``skep up``.  Two commands of the guide give it the first name with a certificate.
"""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.integration.networks.lab import HERE, PLACES, PYTHON, outside
from tests.integration.networks.test_failover_addresses import holders
from tests.integration.test_up import an_ssh_server
from tests.support.harness.documents import shell_blocks
from tests.support.machines.lab import door_image
from tests.support.machines.playground_rig import (
    SKEP,
    TestCluster,
    a_playground,
    nodes_by_name,
    running,
    wait_running,
    wait_until,
)
from tests.support.security.pebble import pebble_in

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.needs("curl", "pebble", "pebble-challtestsrv", "ssh"),
]

COMMANDS = shell_blocks("docs/guide/front-door.md")[3].strip().splitlines()
NAME = "www.example.com"
RATE = int(os.environ.get("SKEP_TEST_RATE", "500"))
"""Requests a second.  A busy machine may send fewer, which fails the test."""
RATE_MIN = 0.95
"""Share of these requests that the client must have sent."""
WEIGHT_MAX = 0.07
"""Largest share of requests at a canary of 5 %, from the first to the last one that it got."""
CANARY = {
    "skep.update": "canary",
    "skep.update.steps": "5%",
    "skep.update.step-time": "60s",
    "skep.update.max-errors": "1%",
}
WORKERS = ("w8", "w9")


class Failure(msgspec.Struct):
    """A failed request: when it began and failed, and when its connection began to open."""

    began: float
    opened: float
    ended: float
    error: str


class Load(msgspec.Struct):
    """What the client has seen.  ``began``: requests by the tenth of a second in which they began."""

    began: dict[int, int] = {}
    answered: dict[str, int] = {}
    failed: list[Failure] = []
    late_s: float = 0.0

    def sent(self, since: float, until: float) -> int:
        return sum(count for tenth, count in self.began.items() if since * 10 <= tenth < until * 10)

    def failed_in(self, since: float, until: float) -> list[Failure]:
        return [one for one in self.failed if since <= one.began < until]


@contextmanager
def load(cluster: TestCluster, address: str, issuer: Path) -> Iterator[Load]:
    """Send requests during the block.  The result is complete after it."""
    seen = Load()
    words = ["--rate", str(RATE), "--ca", str(issuer), "--name", NAME, address]
    client = subprocess.Popen(
        ["nsenter", f"--net={outside(cluster)}", sys.executable, str(HERE / "open_loop_client.py"), *words],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "asking\n"
        yield seen
    finally:
        client.send_signal(signal.SIGTERM)
        found = msgspec.json.decode(client.communicate(timeout=120)[0], type=Load)
        seen.began, seen.answered, seen.failed = found.began, found.answered, found.failed
        seen.late_s = found.late_s


@contextmanager
def a_cluster_of_skep_up() -> Iterator[TestCluster]:
    """Yield a manager that runs no tasks, and two workers that ``skep up`` has joined to it."""
    with a_playground("underload", managers=1) as cluster:
        for name in WORKERS:
            cluster.skep("add", "worker", name)
        (cluster.directory / "ssh").mkdir()
        asyncio.run(join(cluster, cluster.directory / "ssh"))
        cluster.node("m1").docker("node", "update", "--availability", "drain", "m1")
        yield cluster


async def join(cluster: TestCluster, directory: Path) -> None:
    async with an_ssh_server(cluster, directory) as (port, environment):
        machines = [
            f"ssh://{name}@127.0.0.1:{port}{cluster.node(name).socket.removeprefix('unix://')}"
            for name in ("m1", *WORKERS)
        ]
        process = await asyncio.create_subprocess_exec(
            *(SKEP, "up", *machines), env=os.environ | environment, stderr=asyncio.subprocess.PIPE
        )
        _, err = await asyncio.wait_for(process.communicate(), 150)
    assert process.returncode == 0, err.decode()
    assert nodes_by_name(cluster.node("m1")).keys() == {"m1", *WORKERS}


def run(cluster: TestCluster, *commands: str) -> str:
    """Run commands on a machine that is no node."""
    done = subprocess.run(
        ["nsenter", f"--net={outside(cluster)}", "bash", "-e", "-c", "\n".join(commands)],
        env={
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(cluster.directory),
            "DOCKER_HOST": cluster.node("m1").socket,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def certificate(cluster: TestCluster) -> dict[str, Any]:
    found = json.loads(run(cluster, "skep certificate ls -o json"))["Certificates"]
    return next((one for one in found if one["Name"] == NAME), {})


def test_a_name_of_two_commands_under_500_requests_a_second() -> None:
    with a_cluster_of_skep_up() as cluster:
        m1 = cluster.node("m1")
        tarball = cluster.directory / "door.tar"
        tarball.write_bytes(door_image().data)
        m1.docker("load", "--quiet", "--input", str(tarball))
        base, _, _ = m1.description["addr"].rpartition(".")
        validated_at = cluster.node(WORKERS[0]).description["addr"]
        address = str(ip_address(m1.description["addr"]) + 80)
        with pebble_in(outside(cluster), f"{base}.1", validated_at, cluster.directory) as pebble:
            up, create = COMMANDS
            run(
                cluster,
                f"{up} --image skep-door:latest --directory {pebble.directory} --roots {pebble.own_roots}",
            )
            wait_running(m1, "skep-door", len(WORKERS), within_s=90)
            run(cluster, create)
            wait_until(lambda: bool(certificate(cluster).get("NotAfter")), "a certificate", within_s=90)
            run(cluster, f"skep cluster address {address}/24", *served())
            wait_running(m1, "site", 4, within_s=120)
            wait_until(lambda: holders(cluster, address) != [], "a node holds the address", within_s=60)
            ask = f"curl -s --cacert {pebble.issuer} --resolve {NAME}:443:{address} https://{NAME}/ || true"
            wait_until(lambda: " serving" in run(cluster, ask), "it serves", within_s=60)
            with load(cluster, address, pebble.issuer) as seen:
                times = changes(cluster, address)
        report(seen, times)
        judge(seen, times)


def served() -> Sequence[str]:
    """Return the command that makes the service one that can fail, of four tasks that end in order."""
    mounts = " ".join(
        f"--mount-add type=bind,source={one},target={one},readonly" for one in PLACES if Path(one).exists()
    )
    health = "--health-cmd 'nc -w 2 127.0.0.1 80 </dev/null' --health-interval 1s --health-retries 30"
    canary = " ".join(f"--label-add {label}={value}" for label, value in CANARY.items())
    program = f"--args '{PYTHON} {HERE}/graceful_server.py 80' --stop-grace-period 30s"
    return [
        f"docker service update --quiet --replicas 4 --update-order start-first {mounts} {health} {program} site",
        f"docker service update --quiet {canary} site",
    ]


def changes(cluster: TestCluster, address: str) -> dict[str, float]:
    """Change everything, and return when each change began."""
    m1, times = cluster.node("m1"), {"start": time.time()}
    time.sleep(2)  # the load before any change, to compare with
    (holder,) = holders(cluster, address)
    times["kill"] = time.time()
    cluster.skep("kill", holder)
    wait_until(lambda: holders(cluster, address) not in ([], [holder]), "another node has it", within_s=60)
    times["moved"] = time.time()
    wait_running(m1, "site", 4, within_s=120)
    cluster.skep("start", holder)
    wait_running(m1, "skep-door", len(WORKERS), within_s=90)
    times["canary"] = time.time()
    said = run(
        cluster,
        "docker service update --quiet --env-add STATUS=500 site || true",
        "docker service inspect --format '{{.UpdateStatus.Message}}' site",
    )
    assert "requests to new tasks failed" in said
    wait_running(m1, "site", 4, within_s=60)
    times["roll"] = time.time()
    before = {task["ID"] for task in running(m1, "site")}
    plain = " ".join(f"--label-rm {label}" for label in CANARY)
    run(cluster, f"docker service update --quiet {plain} --env-add STATUS=200 site")
    assert before.isdisjoint(task["ID"] for task in running(m1, "site"))
    times["renew"] = time.time()
    former = certificate(cluster)["NotAfter"]
    run(cluster, f"skep certificate renew {NAME}")
    wait_until(lambda: certificate(cluster)["NotAfter"] > former, "another certificate", within_s=90)
    time.sleep(2)  # the load after the last change
    times["end"] = time.time()
    return times


def report(seen: Load, times: dict[str, float]) -> None:
    phases = ["start", "kill", "canary", "roll", "renew", "end"]
    for name, after in itertools.pairwise(phases):
        since, until = times[name], times[after]
        failed = seen.failed_in(since, until)
        print(f"{name}: {until - since:.1f} s, {seen.sent(since, until)} sent, {len(failed)} failed")
        print(*(f"  {one}" for one in failed[:5]), sep="\n")
    print(f"p99 of lateness {seen.late_s:.3f} s, answered {seen.answered}")


def judge(seen: Load, times: dict[str, float]) -> None:
    start, moved, canary, roll, end = (times[one] for one in ("start", "moved", "canary", "roll", "end"))
    sent = seen.sent(start, end)
    assert sent >= RATE_MIN * RATE * (end - start), "the machine was too busy for this rate"
    assert sum(seen.began.values()) == sum(seen.answered.values()) + len(seen.failed)
    assert seen.failed_in(0, times["kill"]) == []
    # Requests with a connection to the killed node, or to a task there before it counted as down.
    lost = seen.failed_in(times["kill"], canary)
    assert [one for one in lost if one.opened > moved] == []
    assert seen.failed_in(roll, end + 60) == []
    bad = seen.failed_in(canary, roll)
    assert bad, "the bad version got requests"
    assert [one for one in bad if one.error != "ValueError: status 500"] == []
    assert len(bad) <= 0.05 * seen.sent(canary, roll)
    first, last = bad[0].began, bad[-1].began
    assert len(bad) <= WEIGHT_MAX * max(seen.sent(first, last), 20 * RATE / 100)

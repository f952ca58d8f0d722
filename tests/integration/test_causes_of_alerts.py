"""The packaged alerts about processes, containers, networks and the store, in a real Prometheus: each by its cause."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.machines.playground_rig import IDLE, IMAGE, TestCluster, a_playground, wait_until
from tests.support.store.store_disks import mounted, store_on_a_disk
from tests.support.telemetry.prometheus_rig import Prometheus

pytestmark = [pytest.mark.slow, pytest.mark.needs("prometheus", "mkfs.ext4"), pytest.mark.timeout(400)]

SETTING = 'metrics-addr = ":9323"\n'
QUOTA = 'store-quota = "16MiB"\n'
FILLED = "dd if=/dev/zero of=/dev/shm/filler bs=64k count=620; while :; do sleep 3600 & wait $!; done"
"""38.75 of 40 MiB, and what the shell needs."""
QUESTIONS = "while :; do for i in 1 2 3 4 5 6; do nslookup nosuch.example & done; wait; done"
UNUSED = "192.168.100.250"
"""An address of the nodes' network that no machine has."""
HALT_S = 0.8
"""Longer than what an alert takes for late: half a second."""


class Alerts:
    """A cluster and the Prometheus that watches it."""

    def __init__(self, cluster: TestCluster, prometheus: Prometheus, disk: Path) -> None:
        """``disk``: the file system below that of the store of m1."""
        self.cluster, self._prometheus, self.disk = cluster, prometheus, disk
        self.m1, self.w1 = cluster.node("m1"), cluster.node("w1")

    def fires(self, name: str) -> bool:
        return name in self._prometheus.fired()

    def wait_for(self, *names: str, within_s: float = 90) -> None:
        for name in names:
            wait_until(lambda name=name: self.fires(name), f"{name} fires", within_s)  # type: ignore[misc]

    def wait_for_the_end(self, *names: str, within_s: float = 90) -> None:
        for name in names:
            wait_until(lambda name=name: not self.fires(name), f"{name} ends", within_s)  # type: ignore[misc]


@pytest.fixture(scope="module")
def alerts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alerts]:
    folder = tmp_path_factory.mktemp("prometheus")
    configured = {"m1": SETTING + QUOTA, "w1": SETTING}
    with a_playground("causes", configured=configured, managers=1, workers=1) as cluster:
        prometheus = Prometheus(("nsenter", f"--net={cluster.node('m1').description['netns']}"))
        with a_store_on_two_disks(cluster, "m1", folder) as disk, prometheus.running(folder):
            wait_until(lambda: prometheus.targets() == 2, "both nodes are found", 150)
            yield Alerts(cluster, prometheus, disk)


@contextmanager
def a_store_on_two_disks(cluster: TestCluster, name: str, folder: Path) -> Iterator[Path]:
    """The store of a manager lies on a file system that lies on another one, which is given.

    While that is frozen, what is written reaches the memory and not the disk.
    """
    below = folder / "below"
    below.mkdir()
    subprocess.run(["mkfs.ext4", "-q", folder / "disk", "600M"], check=True)
    with mounted(below, "-o", "loop", folder / "disk"):
        subprocess.run(["mkfs.ext4", "-q", below / "disk", "400M"], check=True)
        with store_on_a_disk(cluster, name, "-o", "loop", below / "disk"):
            yield below


@contextmanager
def frozen(path: Path) -> Iterator[None]:
    """Nothing that is written there reaches the disk."""
    subprocess.run(["fsfreeze", "--freeze", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", path], check=True)


def test_a_service_that_starts_slowly(alerts: Alerts) -> None:
    """Its node comes after a minute: nothing else takes so long."""
    m1 = alerts.m1
    begun = time.monotonic()
    m1.docker(
        "service", "create", "-d", "--name", "late", "--constraint", "node.labels.late==yes", IMAGE, *IDLE
    )
    wait_until(lambda: time.monotonic() - begun > 62, "a minute", 70)
    m1.docker("node", "update", "--label-add", "late=yes", "w1")
    alerts.wait_for("SkepTaskStartSlow")
    m1.docker("service", "rm", "late")


def test_a_container_near_its_memory_limit(alerts: Alerts) -> None:
    limits = ("--memory", "40m", "--memory-swap", "40m", "--shm-size", "64m")
    alerts.w1.docker("run", "-d", "--name", "filled", *limits, IMAGE, "sh", "-c", FILLED)
    alerts.wait_for("SkepContainerNearMemoryLimit")
    alerts.w1.docker("rm", "-f", "filled")
    alerts.wait_for_the_end("SkepContainerNearMemoryLimit")


def test_name_servers_that_do_not_answer(alerts: Alerts) -> None:
    w1 = alerts.w1
    w1.docker("network", "create", "questions")
    network = ("--network", "questions", "--dns", UNUSED)
    w1.docker("run", "-d", "--name", "asks", *network, IMAGE, "sh", "-c", QUESTIONS)
    alerts.wait_for("SkepDNSUpstreamTimeouts", within_s=180)
    w1.docker("rm", "-f", "asks")
    w1.docker("network", "rm", "questions")


def test_a_program_that_changes_networks_again_and_again(alerts: Alerts) -> None:
    def is_up() -> bool:
        shown = alerts.cluster.skep("exec", "w1", "--", "ip", "-o", "link", "show", "skep-gw").stdout
        return ",UP" in shown.partition(">")[0]

    for _ in range(24):
        alerts.cluster.skep("exec", "w1", "--", "ip", "link", "set", "skep-gw", "down")
        wait_until(is_up, "the bridge is up again", 60)
    alerts.wait_for("SkepNetworkRepairs")


def test_a_node_process_that_is_late(alerts: Alerts) -> None:
    def is_late() -> bool:
        for pid in alerts.w1.pids("skep-node"):
            os.kill(pid, signal.SIGSTOP)
            try:
                time.sleep(HALT_S)
            finally:
                os.kill(pid, signal.SIGCONT)
        return alerts.fires("SkepEventLoopLag")

    wait_until(is_late, "the process is late", 90)


def test_a_manager_process_that_stands_still(alerts: Alerts) -> None:
    """Its node ends it after a while, and starts the next one."""
    (process,) = alerts.m1.pids("skep-manager")
    os.kill(process, signal.SIGSTOP)
    alerts.wait_for("SkepManagerUnreachable", "SkepNodeWithoutSession", "SkepNodeCondition")
    alerts.wait_for_the_end("SkepManagerUnreachable", "SkepNodeWithoutSession", "SkepNodeCondition")


def test_a_disk_of_the_store_that_is_slow(alerts: Alerts) -> None:
    def is_slow() -> bool:
        with frozen(alerts.disk):
            create = ["config", "create", f"at-{time.monotonic_ns()}", "-"]
            writing = subprocess.Popen(
                ["docker", "-H", alerts.m1.socket, *create], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
            assert writing.stdin is not None
            writing.stdin.write(b"content")
            writing.stdin.close()
            time.sleep(HALT_S)
        writing.wait(60)
        return alerts.fires("SkepStoreDiskSlow")

    wait_until(is_slow, "the disk is slow", 180)


def test_a_store_that_is_nearly_full(alerts: Alerts) -> None:
    """Users' objects are refused at nine tenths; what the leader then frees is filled again."""
    made: list[str] = []

    def is_full() -> bool:
        name = f"large-{len(made)}"
        content = os.urandom(225_000).hex()
        if alerts.m1.docker("config", "create", name, "-", stdin=content, check=False).returncode == 0:
            made.append(name)
        return alerts.fires("SkepStoreNearlyFull")

    wait_until(is_full, "the store is nearly full", 180)
    assert len(made) < 60
    alerts.m1.docker("config", "rm", *made)
    alerts.wait_for_the_end("SkepStoreNearlyFull", within_s=180)

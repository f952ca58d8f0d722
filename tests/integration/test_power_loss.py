"""Everything of a node is killed at once, at some moment of something unfinished; then it is switched on again."""

import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skep.model.values.times import unix_ns
from tests.support.machines.daemon_rig import INIT, DaemonRig, daemon_rig
from tests.support.machines.playground_rig import (
    IDLE,
    IMAGE,
    SKEP,
    TestNode,
    containers,
    create,
    running,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SEED = 7


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[DaemonRig]:
    with daemon_rig(tmp_path) as made:
        yield made


def moments(count: int, longest_s: float) -> list[float]:
    """Seconds after the beginning of what is interrupted: spread over it, the same in every run."""
    rng = random.Random(SEED)
    return [longest_s * (number + rng.random()) / count for number in range(count)]


def meanwhile(work: Callable[[], object], after_s: float, strike: Callable[[], object]) -> None:
    """Begin ``work`` in a thread, ``strike`` after a time, and wait until the thread has ended, however."""

    def attempt() -> None:
        try:
            work()
        except (OSError, AssertionError):
            pass  # that is what it is interrupted for

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join(after_s)
    strike()
    thread.join(60)
    assert not thread.is_alive()


# --- init -----------------------------------------------------------------------------------------------------------


def is_whole(node: TestNode, name: str) -> bool:
    """Whether the service's two tasks run, each in the one container that it says."""
    return is_whole_of(node, name, 2)


def is_whole_of(node: TestNode, name: str, replicas: int) -> bool:
    """Whether ``replicas`` tasks run, each in the one container that it says."""
    said = {task["Status"]["ContainerStatus"]["ContainerID"] for task in running(node, name)}
    return len(said) == replicas and {container["Id"] for container in containers(node, name)} == said


def kill_everything(rig: DaemonRig) -> None:
    """SIGKILL for all that shares the daemon's network namespace."""
    assert rig.process is not None
    home = os.readlink(f"/proc/{rig.process.pid}/ns/net")
    while pids := _inside(home):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        rig.process.wait(10)
    # One that ends leaves its namespaces before it is gone.
    wait_until(lambda: not (rig.pid_of("net") or rig.pid_of("manager")), "all are gone")
    rig.process = None


def _inside(namespace: str) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_text()
            if (
                os.readlink(f"/proc/{entry}/ns/net") == namespace
                and stat.rpartition(")")[2].split()[0] != "Z"
            ):
                found.append(int(entry))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("after_s", moments(8, 1.2), ids=lambda after_s: f"{after_s * 1000:.0f}ms")
def test_an_interrupted_init_is_whole_or_has_never_been(rig: DaemonRig, after_s: float) -> None:
    rig.start()
    meanwhile(lambda: rig.ask("POST", "/v1.41/swarm/init", INIT), after_s, lambda: kill_everything(rig))
    rig.start()
    wait_until(lambda: rig.swarm()["LocalNodeState"] in ("inactive", "active"), "it knows where it stands")
    if rig.swarm()["LocalNodeState"] == "inactive":
        left = (rig.data / "manager", rig.data / "certificates")
        wait_until(lambda: not any(path.exists() for path in left), "nothing of the attempt is left")
        assert rig.ask("POST", "/v1.41/swarm/init", INIT)[0] == 200
    wait_until(lambda: rig.get("/nodes")[0] == 200, "the manager answers")
    (node,) = rig.get("/nodes")[1]
    wait_until(lambda: rig.get("/nodes")[1][0]["Status"]["State"] == "ready", "the node is ready")
    assert node["ID"] == rig.swarm()["NodeID"]


# --- services -------------------------------------------------------------------------------------------------------


def test_services_are_whole_after_a_power_loss_while_they_are_made(own_m1: TestNode) -> None:
    """Every service whose create was answered is there, with exactly its replicas, each with one container."""
    wanted: list[str] = []
    for number, after_s in enumerate(moments(5, 1.5)):

        def make_services(number: int = number) -> None:
            for letter in "abcdef":
                name = f"s{number}{letter}"
                create(own_m1, name, 2, "--restart-delay", "0s")
                wanted.append(name)

        meanwhile(make_services, after_s, lambda: own_m1.cluster.skep("kill", "m1"))
        own_m1.cluster.skep("start", "m1")
        wait_until(lambda: own_m1.docker("service", "ls", check=False).returncode == 0, "it answers")
        there = {service["Spec"]["Name"] for service in own_m1.client().api.services()}
        assert set(wanted) <= there
        for name in sorted(there):
            wait_running(own_m1, name, 2, within_s=60)
        for name in sorted(there):
            # A task whose container ended with the machine is shown as running until its node has reported it.
            wait_until(lambda name=name: is_whole(own_m1, name), f"one container for each task of {name}")
        for name in sorted(there):
            own_m1.docker("service", "rm", name)
            if name in wanted:
                wanted.remove(name)
        wait_until(lambda: not own_m1.client().api.containers(all=True), "all is removed", within_s=60)


def test_killed_monitors_use_up_attempts(own_m1: TestNode) -> None:
    """A playground's power loss kills the monitors on the same boot; a restart of the machine would not count."""
    create(own_m1, "once", 1, "--restart-max-attempts", "1", "--restart-delay", "0s")
    wait_running(own_m1, "once", 1)
    for number in range(2):
        own_m1.cluster.skep("kill", "m1")
        own_m1.cluster.skep("start", "m1")
        wait_until(lambda: own_m1.docker("service", "ls", check=False).returncode == 0, "it answers")
        if number == 0:
            wait_until(lambda: is_whole_of(own_m1, "once", 1), "the service runs again", within_s=60)
    tasks = own_m1.client().api.tasks
    ended = ["failed", "failed"]
    wait_until(
        lambda: [one["Status"]["State"] for one in tasks(filters={"service": "once"})] == ended,
        "it is given up",
        within_s=60,
    )


# --- images ---------------------------------------------------------------------------------------------------------


def test_an_image_is_whole_or_absent_after_a_power_loss_while_it_is_loaded(
    own_m1: TestNode, tmp_path: Path
) -> None:
    archive = tmp_path / "image.tar"
    own_m1.docker("tag", IMAGE, "again:1")
    own_m1.docker("save", "-o", str(archive), "again:1")
    for number, after_s in enumerate(moments(6, 0.3)):
        own_m1.docker("rmi", "-f", *{image["Id"] for image in own_m1.client().api.images()})
        assert not own_m1.client().api.images()
        meanwhile(
            lambda: own_m1.docker("load", "-i", str(archive), check=False),
            after_s,
            lambda: own_m1.cluster.skep("kill", "m1"),
        )
        own_m1.cluster.skep("start", "m1")
        wait_until(lambda: own_m1.docker("service", "ls", check=False).returncode == 0, "it answers")
        if own_m1.client().api.images():
            copy = tmp_path / f"copy{number}.tar"
            own_m1.docker("save", "-o", str(copy), "again:1")
        else:
            own_m1.docker("load", "-i", str(archive))
        words = ["--detach", "--name", f"from{number}", "again:1", *IDLE]
        own_m1.docker("service", "create", *words)
        wait_running(own_m1, f"from{number}", 1)
        own_m1.docker("service", "rm", f"from{number}")
        wait_until(lambda: not own_m1.client().api.containers(all=True), "the service is gone")


# --- stacks ---------------------------------------------------------------------------------------------------------

CHAIN = """
name: chain
services:
  web:
    image: busybox:1
    command: sleep 600
    depends_on: {migrate: {condition: service_completed_successfully}}
  migrate:
    image: busybox:1
    command: "true"
    restart: "no"
    depends_on: {db: {condition: service_healthy}}
  db:
    image: busybox:1
    command: sh -c "sleep 3; touch /healthy; exec sleep 600"
    healthcheck: {test: test -f /healthy, interval: 500ms, retries: 100}
"""


def test_a_stack_starts_in_its_order_after_a_power_loss(own_m1: TestNode, tmp_path: Path) -> None:
    """The web's container waits for the database to be healthy; the migration has completed and does not run again."""
    (tmp_path / "chain.yaml").write_text(CHAIN)
    words = (
        "stack",
        "deploy",
        "--resolve-image",
        "never",
        "--timeout",
        "100",
        "-c",
        f"{tmp_path}/chain.yaml",
    )
    deployed = subprocess.run(
        [SKEP, "--host", own_m1.socket, *words], capture_output=True, text=True, check=False
    )
    assert deployed.returncode == 0, deployed.stderr
    before = {name: started(own_m1, name) for name in ("chain_db", "chain_web")}
    runs = own_m1.docker("service", "ps", "-q", "chain_migrate").stdout.split()
    own_m1.cluster.skep("kill", "m1")
    own_m1.cluster.skep("start", "m1")
    wait_until(lambda: own_m1.docker("service", "ls", check=False).returncode == 0, "it answers")
    wait_until(
        lambda: all(
            started(own_m1, name)[0] not in ("", id_before) for name, (id_before, _) in before.items()
        ),
        "both are started again",
        within_s=90,
    )
    db, _ = started(own_m1, "chain_db")
    checks = own_m1.client().api.inspect_container(db)["State"]["Health"]["Log"]
    healthy = min((one["End"] for one in checks if one["ExitCode"] == 0), key=unix_ns)
    assert unix_ns(started(own_m1, "chain_web")[1]) > unix_ns(healthy)
    assert own_m1.docker("service", "ps", "-q", "chain_migrate").stdout.split() == runs


def started(node: TestNode, service: str) -> tuple[str, str]:
    """Id of the one container of a service that runs, and when it was started; empty: none runs."""
    found = node.client().api.containers(
        filters={"label": f"com.docker.swarm.service.name={service}", "status": "running"}
    )
    if len(found) != 1:
        return "", ""
    state = node.client().api.inspect_container(found[0]["Id"])["State"]
    return found[0]["Id"], state["StartedAt"]

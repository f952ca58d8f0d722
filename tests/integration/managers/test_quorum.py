"""With too few managers nothing is decided, and that is said; with enough of them it goes on."""

import subprocess
import time
from collections.abc import Sequence

import pytest

from tests.support.machines.playground_rig import (
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    wait_running,
    wait_until,
)
from tests.support.managers.managers_rig import (
    can_write,
    roles,
    secrets,
    wait_managers,
    write,
)

NO_LEADER = (
    "The swarm does not have a leader. It's possible that too few managers are online. "
    "Make sure more than half of the managers are online."
)
WAITS_S = 5
"""How long a request waits for a leader."""

TOLERATED = {1: 0, 2: 0, 3: 1, 4: 1, 5: 2}

pytestmark = pytest.mark.timeout(300)


def refusal(node: TestNode, *command: str) -> str:
    """What the docker command prints when it is refused."""
    done = node.docker(*command, check=False)
    assert done.returncode != 0, f"{command} was accepted without a quorum"
    return done.stderr


@pytest.mark.slow
def test_without_a_quorum_reads_and_writes_say_so_and_work_goes_on() -> None:
    """Two managers, one killed: what ran runs on; when the other is back, everything is as it was."""
    with a_playground("noquorum", managers=2, workers=1) as cluster:
        m1, w1 = cluster.node("m1"), cluster.node("w1")
        wait_managers(m1, "m1", "m2")
        write(m1, "before")
        m1.docker("service", "create", "--detach", "--name", "web", "--constraint", "node.hostname==w1",
                  "busybox:1", "sleep", "3600")  # fmt: skip
        (task,) = wait_running(m1, "web", 1)
        cluster.skep("kill", "m2")
        wait_until(lambda: NO_LEADER in refusal(m1, "node", "ls"), "reads say that there is no leader")
        assert NO_LEADER in refusal(m1, "secret", "create", "during", "/etc/hostname")
        swarm = m1.client().info()["Swarm"]
        assert NO_LEADER in swarm["Error"]
        assert swarm["ControlAvailable"]
        says_so_at_once(m1)
        alone = f"{m1.description['addr']}:2377 has lost contact with the others"
        wait_until(
            lambda: any(alone in text for text in w1.client().info()["Warnings"] or ()), "w1 names m1", 60
        )
        assert [c["Labels"]["com.docker.swarm.task.id"] for c in w1.client().api.containers()] == [task["ID"]]
        _restart(cluster, "m1")
        assert NO_LEADER in refusal(m1, "node", "ls")
        cluster.skep("start", "m2")
        wait_managers(m1, "m1", "m2")
        assert "before" in secrets(m1)
        assert "during" not in secrets(m1)
        assert [task["ID"]] == [running["ID"] for running in wait_running(m1, "web", 1)]


def says_so_at_once(node: TestNode) -> None:
    """Skep's own commands show what this manager knew, who is missing, and the ways out."""

    def skep(*words: str) -> subprocess.CompletedProcess[str]:
        command = [SKEP, "--host", node.socket, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    status = wait_until(
        lambda: "NO LEADER" in (done := skep("status")).stdout and done, "the status tells of it"
    )
    assert status.returncode == 4
    assert "1 of 2 managers responds (m2 does not)" in status.stdout
    assert "skep cluster recover" in status.stdout
    assert "SERVICE" in status.stdout, "what this manager knew"
    explained = skep("explain", "web")
    assert explained.returncode == 0, explained.stderr
    assert "web: 1 of 1 tasks run" in explained.stdout
    assert "NO LEADER" in explained.stderr
    diagnosed = skep("doctor", "network")
    assert "NO LEADER" in diagnosed.stderr
    assert diagnosed.returncode == 1
    assert "m2" in diagnosed.stdout


def _restart(cluster: TestCluster, name: str) -> None:
    cluster.skep("kill", name)
    cluster.skep("start", name)


def wait_leaderless(node: TestNode) -> None:
    """Wait until this manager says that there is no leader."""
    wait_until(lambda: NO_LEADER in refusal(node, "node", "ls"), f"{node.name} has no leader")


@pytest.mark.slow
@pytest.mark.parametrize("managers", TOLERATED)
def test_the_quorum_table(managers: int) -> None:
    """With the tolerated loss every manager left takes writes; with one more none does; with that one back all do."""
    with a_playground(f"table{managers}x", managers=managers) as cluster:
        names = [f"m{number}" for number in range(1, managers + 1)]
        m1 = cluster.node("m1")
        wait_managers(m1, *names)
        assert m1.client().info()["Swarm"]["Managers"] == managers
        lost, kept = names[managers - TOLERATED[managers] :], names[: managers - TOLERATED[managers]]
        for name in lost:
            cluster.skep("kill", name)
        _all_write([cluster.node(name) for name in kept], "tolerated")
        one_more = kept.pop()
        cluster.skep("kill", one_more)
        for node in map(cluster.node, kept):
            wait_leaderless(node)
            assert not can_write(node, f"refused-{node.name}")
        cluster.skep("start", one_more)
        _all_write([cluster.node(name) for name in (*kept, one_more)], "again")
        assert not any(name.startswith("refused") for name in secrets(cluster.node(one_more)))


def _all_write(nodes: Sequence[TestNode], what: str) -> None:
    for node in nodes:
        name = f"{what}-{node.name}"
        wait_until(lambda node=node, name=name: can_write(node, name), f"{node.name} takes a write", 60)
    for node in nodes:
        assert {f"{what}-{other.name}" for other in nodes} <= secrets(node)


@pytest.mark.slow
def test_five_managers_with_one_in_maintenance_and_one_killed_stay_writable() -> None:
    names = [f"m{number}" for number in range(1, 6)]
    with a_playground("five", managers=5, workers=1) as cluster:
        m1 = cluster.node("m1")
        wait_managers(m1, *names)
        m1.docker(
            "service", "create", "--detach", "--name", "web", "--replicas", "6", "busybox:1", "sleep", "3600"
        )
        wait_running(m1, "web", 6)
        m1.docker("node", "update", "--availability", "drain", "m5")
        wait_until(lambda: not cluster.node("m5").client().api.containers(), "m5 is empty")
        (holder,) = cluster.node("m5").description["pids"]
        cluster.skep("kill", "m5")  # switched off for its maintenance
        cluster.skep("kill", "m4")
        _all_write([cluster.node(name) for name in ("m1", "m2", "m3")], "three-of-five")
        wait_running(m1, "web", 6, within_s=60)
        wait_until(lambda: roles(m1)["m4"] == roles(m1)["m5"] == "unreachable", "both are shown")
        cluster.skep("start", "m5")
        wait_managers_with_one_away(m1)
        assert cluster.node("m5").description["pids"] != [holder]
        assert "three-of-five-m1" in secrets(cluster.node("m5"))


def wait_managers_with_one_away(seen_by: TestNode) -> None:
    """m5 answers again, m4 does not."""
    wait_until(lambda: roles(seen_by).get("m5") == "reachable", "m5 is back", 60)
    assert roles(seen_by)["m4"] == "unreachable"


def test_a_request_waits_for_a_leader_and_not_for_ever() -> None:
    """A leader that is gone for a moment costs waiting, no error; one that stays away costs five seconds."""
    with a_playground("patience", managers=3) as cluster:
        leads = wait_managers(cluster.node("m1"), "m1", "m2", "m3")
        asked = cluster.node(next(name for name in ("m1", "m2", "m3") if name != leads))
        cluster.skep("kill", leads)
        write(asked, "in-the-gap")
        assert "in-the-gap" in secrets(asked)
        third = next(name for name in ("m1", "m2", "m3") if name not in {leads, asked.name})
        cluster.skep("kill", third)
        begun = time.monotonic()
        assert NO_LEADER in refusal(asked, "node", "ls")
        assert time.monotonic() - begun >= WAITS_S - 1

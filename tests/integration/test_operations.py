"""What an operator does with a whole cluster: drain and forget nodes, wait for services, complete words."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.machines.playground_rig import (
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    create,
    nodes_by_name,
    running,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(240)

DEAF = ("sh", "-c", "trap '' TERM; while :; do sleep 1; done")
"""Command that ignores SIGTERM."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    """A manager and a worker."""
    with a_playground("operations", managers=1, workers=1) as made:
        yield made


def skep(node: TestNode, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [SKEP, "-H", node.socket, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}{done.stdout}"
    return done


def test_a_drained_node_is_empty_when_the_command_ends_and_a_lost_one_is_forgotten(
    cluster: TestCluster,
) -> None:
    m1 = cluster.node("m1")
    # They stop at the end of their grace period.  The command prints the tasks that it finds at its first look.
    create(m1, "web", 4, "--stop-grace-period", "5s", command=DEAF)
    tasks = wait_running(m1, "web", 4, 60)
    worker = nodes_by_name(m1)["w1"]["ID"]
    assert {task["NodeID"] for task in tasks} > {worker}
    refused = skep(m1, "node", "forget", "w1", check=False)
    assert refused.returncode == 1
    assert (
        "w1 is ready, not down. Drain it and run docker swarm leave there, or run skep node evict w1."
        in refused.stderr
    )

    drained = skep(m1, "node", "drain", "w1")
    assert drained.stdout == (
        "w1 is drained: no tasks are left\n"
        "To give it tasks again, run docker node update --availability active w1.\n"
    )
    assert "left: web." in drained.stderr
    left = m1.docker("node", "ps", "w1", "--format", "{{.CurrentState}}").stdout
    assert "Running" not in left
    assert skep(m1, "service", "wait", "web", "--timeout", "60").stderr.endswith("web: 4 of 4 tasks run\n")
    assert {task["NodeID"] for task in running(m1, "web")} == {nodes_by_name(m1)["m1"]["ID"]}

    cluster.skep("kill", "w1")
    wait_until(lambda: nodes_by_name(m1)["w1"]["Status"]["State"] == "down", "the loss of w1", 60)
    assert skep(m1, "node", "forget", "w1").stdout == "w1\n"
    assert set(nodes_by_name(m1)) == {"m1"}


@pytest.mark.slow
def test_nodes_that_left_or_were_lost_remove_themselves_and_live_ones_stay() -> None:
    """Slow: a minute is the shortest setting."""
    with a_playground("forgets", managers=1, workers=4) as cluster:
        m1 = cluster.node("m1")
        assert skep(m1, "cluster", "forget-nodes").stdout == "never\n"
        assert skep(m1, "cluster", "forget-nodes", "1m").stdout == "1m\n"
        skep(m1, "node", "drain", "w3")
        create(m1, "web", 4, "--stop-grace-period", "1s")
        wait_running(m1, "web", 4, 60)

        cluster.skep("kill", "w1")
        cluster.node("w2").docker("swarm", "leave")
        stay = {"m1 Ready Active", "w3 Ready Drain", "w4 Ready Active"}
        lost = {"w1 Down Active", "w2 Down Active"}
        wait_until(lambda: _listed(m1) == stay | lost, "w1 and w2 are down", 60)
        wait_until(lambda: not lost & _listed(m1), "w1 and w2 have removed themselves", 120)
        assert _listed(m1) == stay
        nodes = nodes_by_name(m1)
        wait_running(m1, "web", 4, 60)
        assert {task["NodeID"] for task in running(m1, "web")} <= {nodes["m1"]["ID"], nodes["w4"]["ID"]}


def _listed(node: TestNode) -> set[str]:
    """``docker node ls``: hostname, status and availability of each."""
    columns = "{{.Hostname}} {{.Status}} {{.Availability}}"
    return set(node.docker("node", "ls", "--format", columns).stdout.splitlines())


def test_waiting_for_a_service_ends_with_the_cause_when_it_cannot_run(cluster: TestCluster) -> None:
    m1 = cluster.node("m1")
    create(m1, "broken", 1, "--restart-condition", "none", command=["no-such-command"])
    done = skep(m1, "service", "wait", "broken", check=False)
    assert done.returncode == 1
    assert "no-such-command" in done.stderr.splitlines()[-1]
    late = skep(m1, "service", "wait", "--timeout", "0.5", "missing", check=False)
    assert (late.returncode, late.stderr) == (
        1,
        "Error: service missing not found. List services with skep service ls.\n",
    )


def test_an_update_is_paused_resumed_and_aborted_by_commands(cluster: TestCluster) -> None:
    m1 = cluster.node("m1")
    create(m1, "site", 2, "--stop-grace-period", "1s", "--update-monitor", "1s", "--update-delay", "1h")
    wait_running(m1, "site", 2, 60)
    nothing = skep(m1, "update", "pause", "site", check=False)
    assert (nothing.returncode, nothing.stderr) == (
        1,
        "Error: service site has no update in progress: there is nothing to pause\n",
    )
    m1.docker("service", "update", "--detach", "--env-add", "A=1", "site")
    paused = skep(m1, "update", "pause", "site").stdout
    assert paused == (
        "site: paused: manually paused. Next: skep update resume site, or skep update abort site\n"
    )
    state = m1.docker(
        "service", "inspect", "site", "--format", "{{.UpdateStatus.State}} {{.UpdateStatus.Message}}"
    )
    assert state.stdout == "paused manually paused\n"
    assert "it is paused. Run skep update resume site" in skep(m1, "explain", "site").stdout
    assert skep(m1, "update", "resume", "site").stdout == "site: updating: update in progress\n"
    aborted = skep(m1, "update", "abort", "site").stdout
    assert aborted == "site: rollback started: manually requested rollback\n"
    wait_until(
        lambda: (
            m1.docker("service", "inspect", "site", "--format", "{{.UpdateStatus.State}}").stdout
            == "rollback_completed\n"
        ),
        "the end of the rollback",
        60,
    )
    m1.docker("service", "rm", "site")
    docker = skep(m1, "update", "--cpus", "1", "no-such-container", check=False)
    assert "No such container: no-such-container" in docker.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell: str) -> None:
    script = subprocess.run([SKEP, "completion", shell], capture_output=True, text=True, check=True).stdout
    assert f"_SKEP_COMPLETE={shell}_complete" in script
    if shell == "bash":
        words = os.environ | {
            "COMP_WORDS": "skep stack de",
            "COMP_CWORD": "2",
            "_SKEP_COMPLETE": "bash_complete",
        }
        done = subprocess.run([SKEP], capture_output=True, text=True, env=words, check=False)
        assert done.stdout == "plain,deploy\n"

"""Three managers: all serve, one leads, any of them may go."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machines.playground_rig import TestCluster, a_playground, create, wait_running, wait_until
from tests.support.managers.managers_rig import (
    LEADER,
    REACHABLE,
    UNREACHABLE,
    WORKER,
    can_write,
    leader,
    others,
    roles,
    secrets,
    wait_managers,
    write,
)

pytestmark = pytest.mark.timeout(300)

ALL = ("m1", "m2", "m3")


@pytest.fixture(scope="module")
def three() -> Iterator[TestCluster]:
    """m1, m2 and m3 are managers, w1 is a worker.  Each test restores this, with any leader."""
    with a_playground("three", managers=3, workers=1) as cluster:
        yield cluster


def test_every_manager_serves_the_same_cluster(three: TestCluster) -> None:
    """What one manager has acknowledged, every other one shows at once."""
    managers = [three.node(name) for name in ALL]
    wait_managers(managers[0], *ALL)
    for index, manager in enumerate(managers):
        write(manager, f"by-{index}")
        assert all(f"by-{index}" in secrets(other) for other in managers)
    assert {frozenset(roles(manager).items()) for manager in managers} == {
        frozenset(roles(managers[0]).items())
    }
    assert managers[0].client().info()["Swarm"]["Managers"] == 3


def test_a_service_runs_with_any_leader_and_through_any_manager(three: TestCluster) -> None:
    asked = three.node(others(wait_managers(three.node("m1"), *ALL), *ALL)[0])
    create(asked, "web", 4)
    wait_running(asked, "web", 4)
    asked.client().api.remove_service("web")


def test_leadership_moves_before_a_planned_stop(three: TestCluster) -> None:
    before = wait_managers(three.node("m1"), *ALL)
    watcher = three.node(others(before, *ALL)[0])
    (manager,) = three.node(before).pids("skep-manager")
    os.kill(manager, signal.SIGTERM)
    wait_until(lambda: leader(watcher) not in {"", before}, "another one leads")
    assert can_write(watcher, "after-stop")
    wait_until(lambda: manager not in three.node(before).pids("skep-manager"), "the old one has ended")
    wait_managers(watcher, *ALL)


def test_a_killed_leader_costs_nothing_that_was_acknowledged(three: TestCluster) -> None:
    """Its manager and etcd are killed; the next leader, even the restarted one, continues."""
    before = wait_managers(three.node("m1"), *ALL)
    victim, watcher = three.node(before), three.node(others(before, *ALL)[0])
    pids = [*victim.pids("etcd"), *victim.pids("skep-manager")]  # in this order: etcd ends with its manager
    assert len(pids) == 2
    write(watcher, "before-kill")
    for pid in pids:
        victim.kill(pid)
    wait_until(lambda: can_write(watcher, "after-kill"), "a write is accepted")
    assert not set(pids) & {pid for pid, _ in victim.processes()}
    wait_managers(watcher, *ALL)
    wait_managers(victim, *ALL)
    assert {"before-kill", "after-kill"} <= secrets(victim)


def test_a_worker_becomes_a_manager_and_a_worker_again(three: TestCluster) -> None:
    m1, w1 = three.node("m1"), three.node("w1")
    m1.docker("node", "promote", "w1")
    wait_managers(m1, *ALL, "w1")
    wait_until(lambda: roles(w1) == roles(m1), "the new manager serves")
    assert w1.pids("etcd")
    write(w1, "by-w1")
    m1.docker("node", "demote", "w1")
    wait_managers(m1, *ALL)
    wait_until(lambda: not w1.pids("etcd") and not w1.pids("skep-manager"), "its manager has ended")
    refusal = "Worker nodes can't be used to view or modify cluster state"
    wait_until(lambda: refusal in w1.docker("node", "ls", check=False).stderr, "it says that it is a worker")
    wait_until(lambda: not (Path(w1.description["state_dir"]) / "manager").exists(), "nothing is kept")
    assert "by-w1" in secrets(m1)


def test_the_leader_can_be_demoted(three: TestCluster) -> None:
    """Leadership moves first; the demoted one goes on as a worker, with its containers."""
    before = wait_managers(three.node("m1"), *ALL)
    staying = others(before, *ALL)
    old, watcher = three.node(before), three.node(staying[0])
    old.docker("node", "demote", before)
    wait_managers(watcher, *staying)
    assert roles(watcher)[before] == WORKER
    wait_until(lambda: not old.pids("etcd"), "its store has ended")
    warning = watcher.client().info()["Swarm"]["Warnings"]
    assert any("two-manager configuration" in sentence for sentence in warning)
    watcher.docker("node", "promote", before)
    wait_managers(watcher, *ALL)


def test_a_manager_does_not_leave_unasked(three: TestCluster) -> None:
    m1 = three.node("m1")
    wait_managers(m1, *ALL)
    leaving = m1.docker("swarm", "leave", check=False).stderr
    assert "You are attempting to leave the swarm on a node that is participating as a manager." in leaving
    assert "--force-new-cluster" in leaving
    removing = m1.docker("node", "rm", "--force", "m2", check=False).stderr
    assert "is a cluster manager and is a member of the raft cluster" in removing
    assert "It must be demoted to worker before removal" in removing


def test_a_dead_manager_is_shown_and_replaced(three: TestCluster) -> None:
    before = wait_managers(three.node("m1"), *ALL)
    dead, watcher = others(before, *ALL)[0], three.node(before)
    three.skep("kill", dead)
    wait_until(lambda: roles(watcher).get(dead) == UNREACHABLE, "it is shown as unreachable")
    assert roles(watcher)[before] == LEADER
    watcher.docker("node", "demote", dead)
    wait_until(lambda: roles(watcher).get(dead) == WORKER, "it is out of the consensus")
    wait_until(lambda: _state(three, watcher.name, dead) == "down", "its node is down")
    watcher.docker("node", "rm", dead)
    assert dead not in roles(watcher)
    three.skep("start", dead)
    three.node(dead).docker("swarm", "leave", "--force")
    _join(three, dead, watcher.name)
    wait_managers(watcher, *ALL)
    assert roles(three.node(dead))[dead] == REACHABLE


def _state(cluster: TestCluster, seen_by: str, name: str) -> str:
    nodes = cluster.node(seen_by).client().api.nodes()
    return next(str(n["Status"]["State"]) for n in nodes if n["Description"]["Hostname"] == name)


def _join(cluster: TestCluster, name: str, at: str) -> None:
    """Have a node join as a manager."""
    token = cluster.node(at).docker("swarm", "join-token", "-q", "manager").stdout.strip()
    addr = cluster.node(at).description["addr"]
    cluster.node(name).docker("swarm", "join", "--token", token, f"{addr}:2377")


def test_a_leader_whose_process_stands_still_is_replaced_within_seconds(three: TestCluster) -> None:
    """Stopped is the manager alone: its etcd lives, and would lead for ever."""
    before = wait_managers(three.node("m1"), *ALL)
    victim, watcher = three.node(before), three.node(others(before, *ALL)[0])
    (manager,) = victim.pids("skep-manager")
    os.kill(manager, signal.SIGSTOP)
    create(watcher, "meanwhile", 2)
    # Three seconds of silence, an election, and the start of two containers.
    wait_running(watcher, "meanwhile", 2, within_s=12)
    wait_until(lambda: leader(watcher) not in {"", before}, "another one leads")
    assert manager in victim.pids("skep-manager"), "leadership went before the process did"
    wait_until(lambda: manager not in victim.pids("skep-manager"), "it is killed")
    wait_managers(watcher, *ALL)
    wait_managers(victim, *ALL)
    watcher.client().api.remove_service("meanwhile")


def test_after_two_rotations_of_the_root_right_after_each_other_every_etcd_is_a_member(
    three: TestCluster,
) -> None:
    """The second one waits until every etcd trusts the root of the first."""
    manager = three.node(others(wait_managers(three.node("m1"), *ALL), *ALL)[0])

    def is_rotated() -> bool:
        return manager.docker("swarm", "ca", "--rotate", "--quiet", check=False).returncode == 0

    def are_restarted() -> bool:
        return all(three.node(name).pids("etcd") not in ([], before[name]) for name in ALL)

    for number in range(2):
        before = {name: three.node(name).pids("etcd") for name in ALL}
        wait_until(is_rotated, f"rotation {number} ends", 90)
    wait_until(are_restarted, "every etcd has restarted", 60)
    for name in ALL:
        wait_until(lambda name=name: can_write(three.node(name), f"after-rotations-{name}"), f"{name} writes")
    wait_managers(manager, *ALL)


def test_a_manager_joins_right_after_a_rotation_of_the_root(three: TestCluster) -> None:
    """Its certificate is of a root that the others' etcds trust after their restarts alone."""
    manager = three.node(others(wait_managers(three.node("m1"), *ALL), *ALL)[0])
    manager.docker("swarm", "ca", "--rotate", "--quiet")
    manager.docker("node", "promote", "w1")
    wait_managers(manager, *ALL, "w1")
    manager.docker("node", "demote", "w1")
    wait_until(lambda: roles(manager).get("w1") == WORKER, "it is a worker again")
    wait_managers(manager, *ALL)

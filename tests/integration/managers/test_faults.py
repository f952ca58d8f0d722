"""Three managers and two workers, and what may happen to them: exactly what has to move moves, nothing is lost."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from docker.errors import DockerException
from requests.exceptions import RequestException

from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.requests import PREFIX
from tests.support.machines.kills import PAIRS, strike, wait_started_again
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    containers,
    create,
    nodes_by_name,
    remove_services,
    running,
    wait_running,
    wait_until,
)
from tests.support.managers.managers_rig import (
    UNREACHABLE,
    WORKER,
    can_write,
    others,
    roles,
    secrets,
    wait_managers,
    write,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MANAGERS = ("m1", "m2", "m3")
NODES = (*MANAGERS, "w1", "w2")
NO_LEADER = "The swarm does not have a leader."
NAMES = (f"kept-{number}" for number in count())
"""Secrets that are never removed: whatever was acknowledged has to be there at the end of each test."""


@pytest.fixture(scope="module")
def five() -> Iterator[TestCluster]:
    with a_playground("faults", managers=3, workers=2) as cluster:
        yield cluster


@pytest.fixture
def leads(five: TestCluster) -> Iterator[str]:
    """Who leads five nodes that are all well; afterwards they are again, and what was acknowledged is everywhere."""
    before = wait_managers(five.node("m1"), *MANAGERS)
    wait_ready(five.node("m1"))
    yield before
    watcher = five.node("m1")
    wait_managers(watcher, *MANAGERS)
    wait_ready(watcher)
    assert {frozenset(secrets(five.node(name))) for name in MANAGERS} == {frozenset(secrets(watcher))}
    remove_services(watcher)
    wait_until(lambda: not any(containers(five.node(name), "web") for name in NODES), "all is removed", 60)


def nodes(seen_by: TestNode) -> dict[str, dict[str, Any]]:
    """Nodes by host name; none: this one does not answer."""
    try:
        return nodes_by_name(seen_by)
    except (DockerException, RequestException):
        return {}


def ready(seen_by: TestNode) -> set[str]:
    return {name for name, node in nodes(seen_by).items() if node["Status"]["State"] == "ready"}


def wait_ready(seen_by: TestNode) -> None:
    wait_until(lambda: ready(seen_by) == set(NODES), "all nodes are ready", 60)


def places(seen_by: TestNode) -> dict[str, str]:
    """Id of each task of ``web`` that runs and is to run -> its node's host name."""
    names = {node["ID"]: name for name, node in nodes(seen_by).items()}
    return {task["ID"]: names[task["NodeID"]] for task in running(seen_by, "web")}


def pids(cluster: TestCluster, *names: str) -> dict[str, int]:
    """Container -> pid, of ``web`` on these nodes."""
    return {id: pid for name in names for id, pid in container_pids(cluster.node(name), "web").items()}


def a_service(seen_by: TestNode, replicas: int, *options: str) -> dict[str, str]:
    """``web`` with its tasks running: their places."""
    create(seen_by, "web", replicas, "--restart-delay", "0s", *options)
    wait_running(seen_by, "web", replicas)
    return places(seen_by)


def acknowledged(node: TestNode) -> str:
    """Write something through ``node``; what is to be there from now on."""
    name = next(NAMES)
    write(node, name)
    return name


@contextmanager
def switched_off(cluster: TestCluster, name: str) -> Iterator[TestNode]:
    """A node without power: none of its processes lives, and what lay on tmpfs is gone.  Then it is started again."""
    node = cluster.node(name)
    cluster.skep("kill", name)
    try:
        assert not list(node.processes())
        yield node
    finally:
        cluster.skep("start", name)


class Writing:
    """Writes through one node without a pause, in a thread, and remembers what was acknowledged."""

    def __init__(self, node: TestNode, prefix: str) -> None:
        self.acknowledged: set[str] = set()
        self._names = (f"{prefix}-{number}" for number in count())
        self._node = node
        self._ends = Event()
        self._thread = Thread(target=self._write)

    def __enter__(self) -> "Writing":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join(60)

    def _write(self) -> None:
        while not self._ends.is_set():
            name = next(self._names)
            if can_write(self._node, name):
                self.acknowledged.add(name)

    def wait_more(self, what: str) -> None:
        """Wait until three more writes have been acknowledged."""
        enough = len(self.acknowledged) + 3
        wait_until(lambda: len(self.acknowledged) >= enough, what, 60)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_two_of_the_leaders_processes_die(five: TestCluster, leads: str, pair: tuple[str, str]) -> None:
    victim, watcher = five.node(leads), five.node(others(leads, *MANAGERS)[0])
    tasks = a_service(watcher, 10)
    assert leads in tasks.values()
    before = pids(five, *NODES)
    with Writing(watcher, f"during-{'-'.join(pair)}") as writing:
        struck = strike(victim, *pair)
        writing.wait_more("writes are acknowledged while they are away, or again")
        wait_started_again(victim, struck)
        wait_managers(watcher, *MANAGERS)
        wait_until(lambda: leads in ready(victim), f"{leads} answers")
    assert writing.acknowledged <= secrets(victim)
    wait_running(watcher, "web", 10)
    assert places(watcher) == tasks
    assert pids(five, *NODES) == before
    watcher.docker("service", "scale", "--detach", "web=11")  # the whole chain works again
    wait_running(watcher, "web", 11)
    assert before.items() <= pids(five, *NODES).items()


def test_a_worker_loses_its_power_and_only_its_tasks_move(five: TestCluster, leads: str) -> None:
    watcher = five.node(leads)
    tasks = a_service(watcher, 4, "--constraint", "node.role==worker")
    kept = pids(five, "w2")
    moving = {task for task, name in tasks.items() if name == "w1"}
    assert len(moving) == 2
    with switched_off(five, "w1") as lost:
        wait_until(lambda: list(places(watcher).values()) == ["w2"] * 4, "w2 has all", 60)
        assert set(tasks) - set(places(watcher)) == moving
        assert kept.items() <= pids(five, "w2").items()
    wait_until(lambda: "w1" in ready(watcher), "w1 is back")
    wait_until(lambda: not containers(lost, "web"), "it keeps nothing that was replaced")
    assert set(places(watcher).values()) == {"w2"}


def test_the_leader_loses_its_power_amid_writes_and_only_its_tasks_move(
    five: TestCluster, leads: str
) -> None:
    lost, staying = five.node(leads), others(leads, *MANAGERS)
    watcher = five.node(staying[0])
    tasks = a_service(watcher, 10)
    moving = {task for task, name in tasks.items() if name == leads}
    assert moving
    kept = pids(five, *others(leads, *NODES))
    with Writing(lost, "by-leader") as at_leader, Writing(watcher, "by-other") as elsewhere:
        at_leader.wait_more("the leader acknowledges writes")
        elsewhere.wait_more("another one does")
        with switched_off(five, leads):
            elsewhere.wait_more("writes are acknowledged again")
            wait_until(
                lambda: leads not in places(watcher).values() and len(places(watcher)) == 10, "moved", 60
            )
            assert set(tasks) - set(places(watcher)) == moving
            assert kept.items() <= pids(five, *others(leads, *NODES)).items()
        wait_managers(watcher, *MANAGERS)
    everything = at_leader.acknowledged | elsewhere.acknowledged
    assert len(everything) >= 9
    for name in MANAGERS:
        assert everything <= secrets(five.node(name))
    assert leads not in places(watcher).values(), "nothing moved back"
    wait_until(lambda: not containers(lost, "web"), "it keeps nothing that was replaced")


# --- history that is gone ---------------------------------------------------------------------------------------------


def compact(node: TestNode) -> int:
    """Have the store forget its history up to now; the revision."""
    (pid,) = node.pids("skep-manager")

    async def now() -> int:
        async with EtcdClient(Path(f"/proc/{pid}/root/run/skep/etcd.sock")) as client:
            reply = await client.range(pb.RangeRequest(key=PREFIX))
            await client.compact(reply.header.revision)
            return int(reply.header.revision)

    return asyncio.run(now())


def manager_log(node: TestNode) -> str:
    return (Path(node.description["state_dir"]).parent / "skep.log").read_text(errors="replace")


def test_a_manager_is_away_for_longer_than_the_history(five: TestCluster, leads: str) -> None:
    """It is switched off; when it is back, what it had seen last is not in the store's history any more."""
    away, at = five.node(others(leads, *MANAGERS)[0]), five.node(leads)
    tasks = a_service(at, 4, "--constraint", "node.role==worker")
    before = pids(five, "w1", "w2")
    removed = acknowledged(at)
    with switched_off(five, away.name):
        api = at.client().api
        api.remove_secret(next(one["ID"] for one in api.secrets() if one["Spec"]["Name"] == removed))
        meanwhile = {acknowledged(at) for _ in range(20)}
        compact(at)
    wait_managers(at, *MANAGERS)
    assert meanwhile <= secrets(away)
    assert removed not in secrets(away)
    assert places(away) == places(at) == tasks
    assert pids(five, "w1", "w2") == before


def test_the_watch_of_a_manager_that_stood_still_is_cut_off_by_compaction(
    five: TestCluster, leads: str
) -> None:
    """Its process is stopped while its store goes on; the store drops the watch, and it loads everything again."""
    still, at = five.node(others(leads, *MANAGERS)[0]), five.node(leads)
    tasks = a_service(at, 4, "--constraint", "node.role==worker")
    before = pids(five, "w1", "w2")
    (manager,) = still.pids("skep-manager")
    reported = manager_log(still).count("replica reloads the store")
    os.kill(manager, signal.SIGSTOP)
    try:
        wait_until(lambda: roles(at)[still.name] == UNREACHABLE, "it is shown as unreachable")
        meanwhile = {acknowledged(at) for _ in range(5)}
        api = at.client().api
        for number in range(300):  # more than a watch holds for a reader that does not read
            api.create_config(f"large-{number}", os.urandom(30_000))
        for config in api.configs():
            api.remove_config(config["ID"])
        compact(at)
    finally:
        os.kill(manager, signal.SIGCONT)
    wait_until(lambda: manager_log(still).count("replica reloads the store") > reported, "it loads again")
    wait_managers(at, *MANAGERS)
    assert still.pids("skep-manager") == [manager]
    assert meanwhile <= secrets(still)
    assert still.client().api.configs() == []
    assert places(still) == places(at) == tasks
    assert pids(five, "w1", "w2") == before


def test_a_partitioned_manager_refuses_requests_for_lack_of_a_leader(five: TestCluster, leads: str) -> None:
    """Its own store answers and its watch is silent; it gives no answer that might be old, and its agents move on."""
    alone, at = five.node(others(leads, *MANAGERS)[0]), five.node(leads)
    tasks = a_service(at, 4, "--constraint", "node.role==worker")
    before = pids(five, "w1", "w2")
    seen = secrets(alone)
    five.skep("cut", alone.name)
    try:
        missed = acknowledged(at)
        wait_until(lambda: roles(at)[alone.name] == UNREACHABLE, "it is shown as unreachable")
        said = wait_until(lambda: alone.docker("secret", "ls", check=False).stderr, "it refuses to answer")
        assert NO_LEADER in said
        assert stale_secrets(alone) == seen, "its watch is silent"
        assert not can_write(alone, "refused")
        wait_until(lambda: {"w1", "w2"} <= ready(at), "the workers have sessions")
        assert pids(five, "w1", "w2") == before
    finally:
        five.skep("reconnect", alone.name)
    wait_managers(at, *MANAGERS)
    wait_managers(alone, *MANAGERS)
    assert missed in secrets(alone), "it has caught up"
    assert "refused" not in secrets(at)
    assert places(alone) == places(at) == tasks
    assert pids(five, "w1", "w2") == before


def stale_secrets(node: TestNode) -> set[str]:
    """What this manager has seen, whether it is the newest or not."""
    api = node.client().api
    response = api.get(api.base_url + "/v1.41/secrets", headers={"X-Skep-Stale": "1"}, timeout=10)
    response.raise_for_status()
    return {secret["Spec"]["Name"] for secret in response.json()}


# --- a damaged disk ---------------------------------------------------------------------------------------------------


def test_of_three_one_with_a_damaged_log_comes_back_as_its_message_says(
    five: TestCluster, leads: str
) -> None:
    broken, at = five.node(others(leads, *MANAGERS)[0]), five.node(leads)
    tasks = a_service(at, 4, "--constraint", "node.role==worker")
    before = pids(five, "w1", "w2")
    with switched_off(five, broken.name):
        kept = acknowledged(at)
        log = Path(broken.description["state_dir"]) / "manager/etcd/data/member/wal"
        segments = list(log.glob("*.wal"))
        assert segments
        for segment in segments:
            segment.write_bytes(b"")
    error = wait_until(lambda: swarm_error(broken), "it says what is wrong", 60)
    assert "the store's log is damaged or gone" in error
    steps = ("docker swarm leave --force", "docker node demote", "docker node rm", "join again")
    assert [step for step in steps if step in error] == list(steps)

    broken.docker("swarm", "leave", "--force")
    at.docker("node", "demote", broken.name)
    wait_until(lambda: roles(at).get(broken.name) == WORKER, "it is out of the consensus")
    wait_until(lambda: broken.name not in ready(at), "its node is down")
    at.docker("node", "rm", broken.name)
    token = at.docker("swarm", "join-token", "--quiet", "manager").stdout.strip()
    broken.docker("swarm", "join", "--token", token, f"{at.description['addr']}:2377")
    wait_managers(at, *MANAGERS)
    assert kept in secrets(broken)
    assert acknowledged(broken) in secrets(at)
    assert places(broken) == places(at) == tasks
    assert pids(five, "w1", "w2") == before


def swarm_error(node: TestNode) -> str:
    swarm = node.client().info()["Swarm"]
    return str(swarm["Error"]) if swarm["LocalNodeState"] == "error" else ""

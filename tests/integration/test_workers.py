"""A manager and two workers: services spread, workers fall and return, leave and are forgotten."""

import contextlib
import io
import json
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from tests.support.clients.docker_calls import raw_get
from tests.support.images.archives import a_docker_archive, a_file, a_tar, sha256
from tests.support.machines.playground_rig import (
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    containers,
    create,
    remove_services,
    running,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(180)

QUICK = ("--restart-delay", "0s")


@pytest.fixture(scope="module")
def trio() -> Iterator[TestCluster]:
    """m1, w1 and w2."""
    with a_playground("trio", managers=1, workers=2) as cluster:
        yield cluster


@pytest.fixture
def m1(trio: TestCluster) -> Iterator[TestNode]:
    """The manager, with all nodes ready and active and no service, before and after."""
    node = trio.node("m1")
    yield node
    remove_services(node)
    api = node.client().api
    for name in ("m1", "w1", "w2"):
        node.docker("node", "update", "--availability", "active", node_id(node, name))
    everywhere = [trio.node(name).client().api for name in ("m1", "w1", "w2")]
    wait_until(
        lambda: not api.tasks() and not any(one.containers(all=True) for one in everywhere),
        "everything of the test is removed",
    )


def nodes(manager: TestNode, hostname: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = manager.client().api.nodes()
    return [node for node in found if node["Description"]["Hostname"] == hostname]


def node_id(manager: TestNode, hostname: str) -> str:
    """Of the node of that name that is up, or of the only one."""
    found = nodes(manager, hostname)
    ready = [node for node in found if node["Status"]["State"] == "ready"] or found
    return str(ready[0]["ID"])


def state_of(manager: TestNode, hostname: str) -> str:
    (node,) = nodes(manager, hostname)
    return str(node["Status"]["State"])


def spread(manager: TestNode, service: str) -> Counter[str]:
    """Running tasks by hostname."""
    hostnames = {node["ID"]: node["Description"]["Hostname"] for node in manager.client().api.nodes()}
    return Counter(hostnames[task["NodeID"]] for task in running(manager, service))


def container_counts(cluster: TestCluster, service: str, *names: str) -> dict[str, int]:
    return {name: len(containers(cluster.node(name), service)) for name in names}


def test_a_service_spreads_over_the_nodes_and_each_shows_its_own_share(
    trio: TestCluster, m1: TestNode
) -> None:
    create(m1, "web", 6, command=("sh", "-c", "echo from $(hostname); sleep 1000"))
    wait_running(m1, "web", 6)
    assert spread(m1, "web") == {"m1": 2, "w1": 2, "w2": 2}
    wait_until(
        lambda: container_counts(trio, "web", "m1", "w1", "w2") == {"m1": 2, "w1": 2, "w2": 2},
        "each node shows its two containers",
    )
    listed = m1.docker("node", "ls", "--format", "{{.Hostname}} {{.Status}} {{.ManagerStatus}}").stdout
    assert sorted(line.strip() for line in listed.splitlines()) == ["m1 Ready Leader", "w1 Ready", "w2 Ready"]

    w1 = trio.node("w1")
    (name, _) = w1.docker("ps", "--format", "{{.Names}}").stdout.split()
    assert name.startswith("web.")
    assert w1.docker("exec", name, "echo", "inside").stdout == "inside\n"
    wait_until(lambda: w1.docker("logs", name).stdout.startswith("from "), "the container's logs")
    refused = w1.docker("node", "ls", check=False)
    assert "This node is not a swarm manager. Worker nodes can't be used" in refused.stderr
    assert w1.client().info()["Swarm"]["ControlAvailable"] is False
    assert w1.client().info()["Swarm"]["RemoteManagers"][0]["Addr"].endswith(":2377")

    wait_until(
        lambda: len(m1.docker("service", "logs", "web").stdout.splitlines()) == 6,
        "the service's logs come from all nodes",
    )
    lines = m1.docker("service", "logs", "web").stdout.splitlines()
    assert {line.partition("@")[2].split()[0] for line in lines} == {"m1", "w1", "w2"}


@pytest.mark.slow
def test_a_drained_node_gives_its_tasks_away_and_takes_new_ones_when_active(
    trio: TestCluster, m1: TestNode
) -> None:
    create(m1, "web", 6, *QUICK)
    wait_running(m1, "web", 6)
    m1.docker("node", "update", "--availability", "drain", node_id(m1, "w1"))
    wait_until(lambda: spread(m1, "web") == {"m1": 3, "w2": 3}, "the drained node is empty")
    wait_until(lambda: not containers(trio.node("w1"), "web"), "its containers are stopped")
    m1.docker("node", "update", "--availability", "active", node_id(m1, "w1"))
    m1.docker("service", "scale", "--detach", "web=9")
    wait_running(m1, "web", 9)
    assert spread(m1, "web") == {"m1": 3, "w1": 3, "w2": 3}


@pytest.mark.slow
def test_a_dead_workers_tasks_are_replaced_and_what_it_ran_is_not_started_again_when_it_returns(
    trio: TestCluster, m1: TestNode
) -> None:
    create(m1, "web", 6, *QUICK)
    wait_running(m1, "web", 6)
    trio.skep("kill", "w1")
    wait_until(lambda: state_of(m1, "w1") == "down", "the dead node is down", within_s=20)
    wait_until(lambda: spread(m1, "web") == {"m1": 3, "w2": 3}, "its tasks run elsewhere")
    trio.skep("start", "w1")
    wait_until(lambda: state_of(m1, "w1") == "ready", "it is back")
    w1 = trio.node("w1")
    wait_until(
        lambda: (
            w1.client().api.containers() == []
            and {one["State"] for one in w1.client().api.containers(all=True)} <= {"exited"}
        ),
        "its superseded containers stay ended",
    )
    assert spread(m1, "web") == {"m1": 3, "w2": 3}
    m1.docker("service", "scale", "--detach", "web=8")
    wait_running(m1, "web", 8)
    assert spread(m1, "web") == {"m1": 3, "w1": 2, "w2": 3}


@pytest.mark.slow
def test_a_partitioned_worker_keeps_its_containers_until_it_gets_new_assignments(
    trio: TestCluster, m1: TestNode
) -> None:
    create(m1, "web", 3, *QUICK)
    wait_running(m1, "web", 3)
    w1 = trio.node("w1")
    before = container_pids(w1, "web")
    assert len(before) == 1
    trio.skep("cut", "w1")
    try:
        wait_until(lambda: state_of(m1, "w1") == "down", "the cut node is down", within_s=30)
        wait_until(lambda: sum(spread(m1, "web").values()) == 3, "three run")
        assert "w1" not in spread(m1, "web")
        assert container_pids(w1, "web") == before
    finally:
        trio.skep("reconnect", "w1")
    wait_until(lambda: state_of(m1, "w1") == "ready", "it is back", within_s=40)
    wait_until(lambda: not containers(w1, "web"), "what was replaced is stopped")
    wait_running(m1, "web", 3)


@pytest.mark.slow
def test_a_killed_daemon_of_a_worker_costs_no_container(trio: TestCluster, m1: TestNode) -> None:
    create(m1, "web", 6, *QUICK)
    wait_running(m1, "web", 6)
    w1 = trio.node("w1")
    before = container_pids(w1, "web")
    for pid in w1.pids("skep-node"):
        w1.kill(pid)
    wait_until(lambda: w1.docker("ps", check=False).returncode == 0, "the daemon answers again")
    wait_until(lambda: container_pids(w1, "web") == before, "the same containers")
    wait_running(m1, "web", 6)
    assert container_pids(w1, "web") == before
    assert spread(m1, "web") == {"m1": 2, "w1": 2, "w2": 2}


@pytest.mark.slow
def test_a_worker_leaves_is_removed_and_another_joins(trio: TestCluster, m1: TestNode) -> None:
    create(m1, "web", 6, *QUICK)
    wait_running(m1, "web", 6)
    w2, left = trio.node("w2"), node_id(m1, "w2")
    assert "is not down and can't be removed" in m1.docker("node", "rm", left, check=False).stderr
    assert w2.docker("swarm", "leave").stdout == "Node left the swarm.\n"
    assert w2.client().info()["Swarm"]["LocalNodeState"] == "inactive"
    assert w2.client().api.containers(all=True) == []
    wait_until(lambda: state_of(m1, "w2") == "down", "the node that left is down")
    wait_until(lambda: spread(m1, "web") == {"m1": 3, "w1": 3}, "its tasks run elsewhere")
    m1.docker("node", "rm", left)
    assert nodes(m1, "w2") == []

    token = m1.docker("swarm", "join-token", "-q", "worker").stdout.strip()
    joined = w2.docker("swarm", "join", "--token", token, f"{m1.description['addr']}:2377")
    assert joined.stdout == "This node joined a swarm as a worker.\n"
    wait_until(lambda: state_of(m1, "w2") == "ready", "it is in again")
    assert node_id(m1, "w2") != left
    m1.docker("service", "scale", "--detach", "web=9")
    wait_running(m1, "web", 9)
    assert spread(m1, "web") == {"m1": 3, "w1": 3, "w2": 3}


@pytest.mark.slow
def test_constraints_place_tasks_on_the_nodes_that_meet_them(trio: TestCluster, m1: TestNode) -> None:
    m1.docker("node", "update", "--label-add", "disk=ssd", node_id(m1, "w1"))
    create(m1, "fast", 3, "--constraint", "node.labels.disk==ssd")
    create(m1, "far", 2, "--constraint", "node.role==worker")
    wait_running(m1, "fast", 3)
    wait_running(m1, "far", 2)
    assert spread(m1, "fast") == {"w1": 3}
    assert set(spread(m1, "far")) <= {"w1", "w2"}
    m1.docker("node", "update", "--label-rm", "disk", node_id(m1, "w1"))


@pytest.mark.slow
def test_the_manager_comes_back_to_workers_that_went_on(trio: TestCluster, m1: TestNode) -> None:
    """Power loss of the only manager: what runs on the workers runs on, and is adopted, not doubled."""
    create(m1, "web", 4, *QUICK, "--constraint", "node.role==worker")
    wait_running(m1, "web", 4)
    before = {name: container_pids(trio.node(name), "web") for name in ("w1", "w2")}
    trio.skep("kill", "m1")
    trio.skep("start", "m1")
    wait_until(lambda: m1.docker("node", "ls", check=False).returncode == 0, "the manager answers", 60)
    wait_until(
        lambda: [state_of(m1, name) for name in ("m1", "w1", "w2")] == ["ready"] * 3, "all nodes ready", 60
    )
    wait_running(m1, "web", 4)
    assert {name: container_pids(trio.node(name), "web") for name in ("w1", "w2")} == before


def test_tasks_leave_a_node_that_was_labeled_anew_but_not_while_it_is_paused(
    trio: TestCluster, m1: TestNode
) -> None:
    first, other = node_id(m1, "w1"), node_id(m1, "w2")
    m1.docker("node", "update", "--label-add", "zone=north", first)
    create(m1, "web", 2, *QUICK, "--constraint", "node.labels.zone==north")
    wait_running(m1, "web", 2)
    before = container_pids(trio.node("w1"), "web")
    assert len(before) == 2
    m1.docker("node", "update", "--availability", "pause", first)
    m1.docker("node", "update", "--label-rm", "zone", first)
    m1.docker("node", "update", "--label-add", "zone=north", other)
    m1.docker("service", "scale", "--detach", "web=4")
    wait_running(m1, "web", 4)  # by now the leader has looked at all that was changed before
    assert spread(m1, "web") == {"w1": 2, "w2": 2}
    assert container_pids(trio.node("w1"), "web") == before
    m1.docker("node", "update", "--availability", "active", first)
    wait_until(lambda: spread(m1, "web") == {"w2": 4}, "those that are out of place have moved")
    wait_until(lambda: not containers(trio.node("w1"), "web"), "their containers are stopped")
    m1.docker("node", "update", "--label-rm", "zone", other)


def give_gpus(cluster: TestCluster, name: str, count: int) -> None:
    """Have a node start again with so many; its containers run on."""
    node = cluster.node(name)
    (cluster.directory / name / "skep.toml").write_text(
        f'generic-resources = ["gpu={count}"]\n' if count else ""
    )
    for pid in node.pids("skep-node"):
        node.kill(pid)
    seen_by = cluster.node("m1")

    def gpus() -> int:
        (shown,) = nodes(seen_by, name)
        resources = shown["Description"]["Resources"].get("GenericResources") or []
        return sum(resource["DiscreteResourceSpec"]["Value"] for resource in resources)

    wait_until(lambda: gpus() == count and state_of(seen_by, name) == "ready", f"{name} has {count}")


@pytest.mark.slow
def test_the_youngest_tasks_leave_a_node_that_has_less_than_is_reserved(
    trio: TestCluster, m1: TestNode
) -> None:
    try:
        give_gpus(trio, "w1", 3)
        create(m1, "web", 1, *QUICK, "--generic-resource", "gpu=1")
        (oldest,) = wait_running(m1, "web", 1)
        m1.docker("service", "scale", "--detach", "web=3")
        wait_running(m1, "web", 3)
        assert spread(m1, "web") == {"w1": 3}
        give_gpus(trio, "w2", 2)
        assert spread(m1, "web") == {"w1": 3}
        give_gpus(trio, "w1", 1)
        wait_until(lambda: spread(m1, "web") == {"w1": 1, "w2": 2}, "two have moved")
        assert oldest["ID"] in {task["ID"] for task in running(m1, "web")}
    finally:
        remove_services(m1)
        for name in ("w1", "w2"):
            give_gpus(trio, name, 0)


def update_status(manager: TestNode) -> dict[str, Any]:
    found: dict[str, Any] = manager.client().api.inspect_service("web").get("UpdateStatus") or {}
    return found


def lose_w1_during_an_update(trio: TestCluster, m1: TestNode, replicas: int, *words: str) -> set[str]:
    """Kill w1 when the first half of the tasks is new; gives the tasks from before the update."""
    step = ("--update-parallelism", str(replicas // 2), "--update-delay", "10s", "--update-monitor", "500ms")
    settings = (*step, "--stop-grace-period", "1s")
    create(m1, "web", replicas, *QUICK, *settings, *words)
    before = {task["ID"] for task in wait_running(m1, "web", replicas)}
    m1.docker("service", "update", "--detach", "--env-add", "A=1", "web")
    wait_until(
        lambda: any(task["ID"] not in before for task in running(m1, "web")), "a new task runs", within_s=20
    )
    trio.skep("kill", "w1")
    assert update_status(m1)["State"] == "updating"
    return before


def waiting_update(manager: TestNode) -> dict[str, Any] | None:
    """Where the update stands, once it waits for something with a deadline."""
    api = manager.client().api
    response = raw_get(api, "/skep/services/web/explain").json()
    update: dict[str, Any] = response.get("Update") or {}
    return update if "no suitable node" in update.get("WaitingFor", "") and update.get("Deadline") else None


def bring_back_w1(trio: TestCluster, m1: TestNode) -> None:
    trio.skep("start", "w1")
    wait_until(lambda: state_of(m1, "w1") == "ready", "it is back")


@pytest.mark.slow
def test_an_update_that_loses_a_node_midway_is_completed_on_the_others(
    trio: TestCluster, m1: TestNode
) -> None:
    before = lose_w1_during_an_update(trio, m1, 4, "--constraint", "node.role==worker")
    try:
        wait_until(lambda: update_status(m1)["State"] == "completed", "the update is complete", within_s=60)
        wait_until(lambda: spread(m1, "web") == {"w2": 4}, "all run on the other one")
        assert not before & {task["ID"] for task in running(m1, "web")}
    finally:
        bring_back_w1(trio, m1)


@pytest.mark.slow
def test_an_update_that_loses_its_only_node_midway_ends_and_names_task_and_cause(
    trio: TestCluster, m1: TestNode
) -> None:
    only = ("--constraint", "node.hostname==w1", "--label", "skep.progress-deadline=5s")
    lose_w1_during_an_update(trio, m1, 2, *only)
    try:
        reported = wait_until(lambda: waiting_update(m1), "the update tells what it waits for")
        assert "no suitable node" in reported["WaitingFor"]
        assert reported["Step"].endswith("of 2 tasks are new")
        wait_until(lambda: update_status(m1)["State"] == "paused", "the update has ended", within_s=60)
        message = update_status(m1)["Message"]
        known = {task["ID"] for task in m1.client().api.tasks(filters={"service": "web"})}
        assert [id for id in known if id in message] != []
        assert "made no progress within" in message
        assert "no suitable node" in message
    finally:
        bring_back_w1(trio, m1)


def an_image_like(node: TestNode, name: str) -> bytes:
    """An archive of busybox with one more layer, so that no node has all of it yet."""
    saved = b"".join(node.client().api.get_image(IMAGE))
    with tarfile.open(fileobj=io.BytesIO(saved)) as archive:

        def read(path: str) -> bytes:
            found = archive.extractfile(path)
            assert found is not None
            return found.read()

        (item,) = json.loads(read("manifest.json"))
        config = json.loads(read(item["Config"]))
        layers = [read(path) for path in item["Layers"]]
    layers.append(a_tar(a_file("mark", f"{name}\n".encode())))
    config["rootfs"]["diff_ids"].append(sha256(layers[-1]))
    config["history"] = []
    return a_docker_archive(*layers, tags=(name,), config=json.dumps(config).encode())


def create_from(node: TestNode, name: str, image: str, *options: str) -> None:
    words = ["--detach", "--name", name, "--restart-delay", "0.2s", *options, image]
    node.docker("service", "create", *words, "sh", "-c", "cat /mark; sleep 1000")


def test_an_image_that_only_the_manager_has_runs_on_every_node(trio: TestCluster, m1: TestNode) -> None:
    image = "localhost:1/alone:1"
    m1.client().api.load_image(an_image_like(m1, image))
    create_from(m1, "alone", image, "--mode", "global")
    wait_running(m1, "alone", 3)
    w1 = trio.node("w1")
    assert w1.docker("images", "--format", "{{.ID}}", image).stdout == (
        m1.docker("images", "--format", "{{.ID}}", image).stdout
    )
    wait_until(
        lambda: m1.docker("service", "logs", "--raw", "alone").stdout.count(image) == 3,
        "each task has the file of the image's own layer",
    )


def test_a_tag_that_one_worker_alone_has_is_used_there_and_everywhere_once_a_manager_has_it(
    trio: TestCluster, m1: TestNode
) -> None:
    image, w1 = "localhost:1/local:1", trio.node("w1")
    archive = an_image_like(m1, image)
    w1.client().api.load_image(archive)
    create_from(m1, "local", image, "--mode", "global")
    (task,) = wait_running(m1, "local", 1)
    assert task["NodeID"] == node_id(m1, "w1")
    wait_until(
        lambda: "No such image" in m1.docker("service", "ps", "--no-trunc", "local").stdout,
        "the others say what is missing",
    )
    m1.client().api.load_image(archive)
    wait_running(m1, "local", 3, within_s=60)


def refused(worker: TestNode, *words: str) -> bool:
    done = worker.docker(*words, check=False)
    return (
        done.returncode == 1 and "This node is not a swarm manager. Worker nodes can't be used" in done.stderr
    )


def test_a_worker_shows_the_cluster_to_its_clients_where_that_is_allowed(
    trio: TestCluster, m1: TestNode
) -> None:
    w1 = trio.node("w1")
    create(m1, "web", 2)
    wait_running(m1, "web", 2)
    assert refused(w1, "service", "ls")
    assert refused(w1, "node", "ls")
    switch = partial(subprocess.run, check=True, timeout=30)
    switch([SKEP, "--host", m1.socket, "cluster", "worker-reads", "on"])
    try:
        wait_until(lambda: not refused(w1, "service", "ls"), "the cluster allows it")
        ours, theirs = (node.client().api for node in (m1, w1))
        assert [one["Spec"]["Name"] for one in theirs.services()] == ["web"]
        assert theirs.inspect_service("web") == ours.inspect_service("web")
        tasks = theirs.tasks(filters={"service": "web", "desired-state": "running"})
        assert {task["ID"] for task in tasks} == {task["ID"] for task in running(m1, "web")}
        assert {one["ID"] for one in theirs.nodes()} == {one["ID"] for one in ours.nodes()}
        m1.docker("network", "create", "--driver", "overlay", "far")
        assert "far" in w1.docker("network", "ls", "--format", "{{.Name}}").stdout.split()
        with contextlib.closing(theirs.events(decode=True, filters={"type": "service"})) as events:
            m1.docker("service", "update", "--detach", "--label-add", "seen=1", "web")
            event = next(events)
            assert (event["Type"], event["Actor"]["Attributes"]["name"]) == ("service", "web")
        history = subprocess.run(
            [SKEP, "--host", w1.socket, "history", "web"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
        assert "service web created" in history
        assert "create service web" not in history  # who asked is for administrators
        # It reads only.
        assert refused(w1, "service", "rm", "web")
        assert refused(w1, "secret", "ls")
        assert w1.docker("service", "inspect", "nothing", check=False).returncode == 1
    finally:
        m1.docker("network", "rm", "far", check=False)
        switch([SKEP, "--host", m1.socket, "cluster", "worker-reads", "off"])
    wait_until(lambda: refused(w1, "service", "ls"), "the cluster does not allow it any more")

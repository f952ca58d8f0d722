"""Local volumes of a service's slots: tasks return to them, and wait for their node where the service says so."""

import subprocess
from collections.abc import Iterator, Mapping

import pytest

from tests.support.machines.playground_rig import (
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    nodes_by_name,
    remove_services,
    running,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(180)

WRITE_ONCE = "[ -e /data/who ] || cat /etc/hostname >/data/who; exec sleep 1000"


@pytest.fixture(scope="module")
def trio() -> Iterator[TestCluster]:
    """m1, w1 and w2."""
    with a_playground("slotvolumes", managers=1, workers=2) as cluster:
        yield cluster


@pytest.fixture
def m1(trio: TestCluster) -> Iterator[TestNode]:
    """The manager, with no service before and after."""
    node = trio.node("m1")
    yield node
    remove_services(node)
    for id in by_id(node):
        node.docker("node", "update", "--availability", "active", id)


def create_db(m1: TestNode, name: str, *words: str) -> None:
    """Two replicas with a volume each, on workers only."""
    mount = f"type=volume,source={name}-{{{{.Task.Slot}}}},target=/data"
    where = ("--constraint", "node.role == worker", "--restart-delay", "0s", "--stop-grace-period", "1s")
    m1.docker(
        *(
            "service",
            "create",
            "--detach",
            "--name",
            name,
            "--replicas",
            "2",
            "--mount",
            mount,
            *where,
            *words,
        ),
        *(IMAGE, "sh", "-c", WRITE_ONCE),
    )


def slots(m1: TestNode, name: str) -> Mapping[int, str]:
    """Slot -> hostname of its node, once both run."""
    hostnames = {id: one["Description"]["Hostname"] for id, one in by_id(m1).items()}
    return {task["Slot"]: hostnames[task["NodeID"]] for task in wait_running(m1, name, 2)}


def by_id(m1: TestNode) -> Mapping[str, dict[str, dict[str, str]]]:
    return {one["ID"]: one for one in m1.client().api.nodes()}


def written(trio: TestCluster, m1: TestNode, name: str) -> Mapping[int, str]:
    """Slot -> what its first task has written."""
    return {
        slot: _written(trio.node(hostname), f"{name}.{slot}.") for slot, hostname in slots(m1, name).items()
    }


def _written(node: TestNode, name: str) -> str:
    (container,) = node.client().containers.list(filters={"name": name})
    wait_until(lambda: container.exec_run(["cat", "/data/who"]).exit_code == 0, "it has written")
    return str(container.exec_run(["cat", "/data/who"]).output.decode().strip())


def wait_reported(m1: TestNode, name: str) -> None:
    """Return when the managers know which slots the volumes are of, without any task."""

    def reported() -> set[str]:
        labels = [one["Description"]["Engine"].get("Labels") or {} for one in m1.client().api.nodes()]
        words = [word for some in labels for word in some.get("skep.slot-volumes", "").split()]
        return {word.partition("@")[0] for word in words if word.startswith(name)}

    wanted = {f"{name}-1={name}.1", f"{name}-2={name}.2"}
    wait_until(lambda: reported() == wanted, "the nodes report the volumes")


def explained(m1: TestNode, name: str) -> str:
    command = [SKEP, "--host", m1.socket, "explain", name]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def test_each_slot_has_its_volume_again_when_it_is_scaled_up_or_its_service_made_again(
    trio: TestCluster, m1: TestNode
) -> None:
    create_db(m1, "db")
    nodes, first = slots(m1, "db"), written(trio, m1, "db")
    assert sorted(nodes) == [1, 2]
    assert len(set(first.values())) == 2, "each slot has a volume of its own"
    wait_reported(m1, "db")
    m1.docker("service", "scale", "--detach", "db=0")
    wait_until(lambda: not m1.client().api.tasks(), "no task of it is left")
    # Without its volumes the next tasks would go where there is most room: not to the node that is busy now.
    m1.docker(
        *("service", "create", "--detach", "--name", "busy", "--replicas", "3"),
        *("--constraint", f"node.hostname == {nodes[2]}", IMAGE, "sleep", "1000"),
    )
    wait_running(m1, "busy", 3)
    m1.docker("service", "scale", "--detach", "db=2")
    assert (slots(m1, "db"), written(trio, m1, "db")) == (nodes, first)
    m1.docker("service", "rm", "db")
    wait_until(lambda: not m1.client().api.tasks(filters={"name": "db"}), "its tasks are removed")
    create_db(m1, "db")
    assert (slots(m1, "db"), written(trio, m1, "db")) == (nodes, first)


def test_a_kept_slot_waits_for_its_node_until_that_is_back_or_its_data_is_given_up(
    trio: TestCluster, m1: TestNode
) -> None:
    create_db(m1, "kept", "--label", "skep.volume-affinity=required")
    nodes, first = slots(m1, "kept"), written(trio, m1, "kept")
    away = nodes[2]
    node_id = nodes_by_name(m1)[away]["ID"]
    m1.docker("node", "update", "--availability", "drain", node_id)
    words = f"volume kept-2 of slot 2 is on node {away}, whose availability is drain"
    wait_until(lambda: words in m1.docker("service", "ps", "--no-trunc", "kept").stdout, "it says so")
    assert words in explained(m1, "kept")
    (waiting,) = (
        task
        for task in m1.client().api.tasks(filters={"service": "kept"})
        if task["Slot"] == 2 and task["Status"]["State"] == "pending"
    )
    assert words in explained(m1, waiting["ID"])
    m1.docker("node", "update", "--availability", "active", node_id)
    assert (slots(m1, "kept"), written(trio, m1, "kept")) == (nodes, first)
    m1.docker("node", "update", "--availability", "drain", node_id)
    wait_until(lambda: words in m1.docker("service", "ps", "--no-trunc", "kept").stdout, "it waits again")
    m1.docker("service", "update", "--detach", "--label-add", "skep.volume-affinity=none", "kept")
    assert set(slots(m1, "kept").values()) == {nodes[1]}
    assert written(trio, m1, "kept")[2] != first[2], "with an empty volume"


def test_a_services_volume_has_the_same_options_on_every_node_or_its_task_is_rejected(
    trio: TestCluster, m1: TestNode
) -> None:
    names = ("m1", "w1", "w2")
    options = {"type": "tmpfs", "device": "tmpfs", "o": "size=64k"}
    words = ",".join(f'"volume-opt={name}={value}"' for name, value in options.items())
    mount = f"type=volume,source=memory,target=/data,volume-label=team=red,{words}"
    trio.node("w2").docker("volume", "create", "memory")  # the same name, without options
    m1.docker(
        *("service", "create", "--detach", "--name", "cache", "--mode", "global", "--mount", mount),
        *("--restart-delay", "1s", "--stop-grace-period", "1s", IMAGE, "sleep", "1000"),
    )
    wait_running(m1, "cache", 2, 60)
    refused = (
        "volume memory exists with other options than the mount: use the same options, or another volume"
    )
    wait_until(lambda: "Rejected" in m1.docker("service", "ps", "--no-trunc", "cache").stdout, "w2 refuses")
    assert refused in m1.docker("service", "ps", "--no-trunc", "cache").stdout
    trio.node("w2").docker("volume", "rm", "memory")
    wait_running(m1, "cache", 3, 60)
    for name in names:
        volume = trio.node(name).client().volumes.get("memory").attrs
        assert (volume["Options"], volume["Labels"]) == (options, {"team": "red"}), name
        (container,) = trio.node(name).client().containers.list(filters={"name": "cache"})
        assert b"size=64k" in container.exec_run(["grep", " /data ", "/proc/mounts"]).output
    m1.docker("service", "rm", "cache")
    for name in names:
        node = trio.node(name)
        wait_until(
            lambda node=node: node.docker("volume", "rm", "-f", "memory", check=False).returncode == 0,  # type: ignore[misc]
            "the volume is removed",
        )


@pytest.mark.slow
def test_a_kept_slot_waits_for_a_node_that_is_down_and_another_goes_elsewhere_and_says_what_it_left(
    trio: TestCluster, m1: TestNode
) -> None:
    create_db(m1, "held", "--label", "skep.volume-affinity=required")
    create_db(m1, "free")
    nodes, first = slots(m1, "held"), written(trio, m1, "held")
    free = {hostname: slot for slot, hostname in slots(m1, "free").items()}
    away = nodes[2]
    trio.skep("kill", away)
    words = f"volume held-2 of slot 2 is on node {away}, which is down"
    wait_until(lambda: words in explained(m1, "held"), "it waits", within_s=40)
    wait_until(lambda: set(slots(m1, "free").values()) == {nodes[1]}, "the other has moved")
    (moved,) = (task for task in running(m1, "free") if task["Slot"] == free[away])
    assert f"earlier data: volume free-{free[away]} of slot {free[away]} is on node {away}" in explained(
        m1, moved["ID"]
    )
    trio.skep("start", away)
    assert (slots(m1, "held"), written(trio, m1, "held")) == (nodes, first)

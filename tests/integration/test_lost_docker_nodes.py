"""Docker nodes when a manager is lost, and when the playground goes."""

import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.machines.docker_engines import ENGINES, FOR_ENGINES, inside
from tests.support.machines.playground_rig import (
    IMAGE,
    TestCluster,
    containers,
    create,
    no_playground_yet,
    wait_running,
    wait_until,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs("root", "dockerd"),
    pytest.mark.timeout(240),
]


def test_engines_move_on_when_their_manager_is_lost_and_no_container_notices(
    nothing_left: TestCluster,
) -> None:
    nothing_left.skep("up", "--managers", "3", "--docker-workers", "2")
    m1, m2 = nothing_left.node("m1"), nothing_left.node("m2")
    engines = [nothing_left.node(name) for name in ENGINES]
    m1.docker("network", "create", "-d", "overlay", "--attachable", *FOR_ENGINES, "net1")
    on_net1 = ("--network", "net1", "--endpoint-mode", "dnsrr", "--replicas-max-per-node", "1")
    create(m1, "web", 2, *on_net1)
    wait_running(m1, "web", 2)
    before = [containers(engine, "web")[0]["Id"] for engine in engines]

    assert m1.client().api.inspect_node("m1")["ManagerStatus"]["Leader"]
    nothing_left.skep("kill", "m1")
    wait_until(lambda: m2.client().api.inspect_node("m1")["Status"]["State"] == "down", "m1 is down")
    # New tasks come to run only once both engines have a session with a manager that lives.
    create(m2, "next", 2, *on_net1)
    wait_running(m2, "next", 2, within_s=60)
    assert [containers(engine, "web")[0]["Id"] for engine in engines] == before
    assert len(m2.client().api.tasks(filters={"service": "web"})) == 2  # none was replaced
    for engine, container in zip(engines, before, strict=True):
        ours, theirs = (containers(one, "next")[0]["Id"] for one in engines)
        assert ours != theirs
        lookup = partial(inside, engine, container, "busybox", "nslookup", "tasks.next")
        wait_until(lambda lookup=lookup: lookup().count("10.0.1.") == 2, f"{engine.name} knows both")
    run = ("run", "--rm", "--network", "net1", IMAGE, "busybox", "nslookup", "web")
    assert engines[0].docker(*run).stdout.count("10.0.1.") == 2


def test_no_mount_and_no_process_of_an_engine_outlives_down(nothing_left: TestCluster) -> None:
    directory = str(nothing_left.directory)
    nothing_left.skep("up", "--managers", "1", "--docker-workers", "1")
    m1 = nothing_left.node("m1")
    create(m1, "web", 1, "--constraint", "node.hostname==d1")
    wait_running(m1, "web", 1)
    nothing_left.down()
    assert directory not in Path("/proc/self/mountinfo").read_text()
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert directory not in listed
    assert not list(Path("/sys/fs/cgroup").glob(f"**/skep-playground/{nothing_left.name}-*"))


@pytest.fixture
def nothing_left() -> Iterator[TestCluster]:
    """A playground that is not up."""
    with no_playground_yet("dz") as cluster:
        yield cluster

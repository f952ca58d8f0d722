"""The disk of the leader of three becomes full: another one leads, and requests to the full one get the reason."""

import asyncio
import os
from pathlib import Path

import pytest
from docker.errors import DockerException
from requests.exceptions import RequestException

from skep.model.node_reports.conditions import condition_label
from skep.store.etcd.client import EtcdClient
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    create,
    nodes_by_name,
    running,
    wait_running,
    wait_until,
)
from tests.support.managers.managers_rig import leader, others, roles, wait_managers, write
from tests.support.store.store_disks import store_of, store_on_a_disk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MANAGERS = ("m1", "m2", "m3")
SMALL_DISK = ("-t", "tmpfs", "-o", "size=400m,mode=700", "skep-disk")
MISSING = "MB of disk space are missing for the store of this manager. Make room: it goes on by itself."


def make_lead(cluster: TestCluster, name: str) -> None:
    """Move leadership to ``name``, by the store's own call."""
    leads = cluster.node(wait_managers(cluster.node(name), *MANAGERS))
    if leads.name == name:
        return
    id = next(n["ID"] for n in leads.client().api.nodes() if n["Description"]["Hostname"] == name)
    (manager,) = leads.pids("skep-manager")

    async def move() -> None:
        async with EtcdClient(Path(f"/proc/{manager}/root/run/skep/etcd.sock")) as client:
            members = (await client.members()).members
            await client.move_leader(next(member.id for member in members if member.name == id))

    asyncio.run(move())
    wait_until(lambda: leader(cluster.node(name)) == name, f"{name} leads", 60)


def fill(disk: Path) -> Path:
    """Leave 1 MB of room; the file that takes it."""
    filler = disk / "filler"
    free = os.statvfs(disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - (1 << 20))
    return filler


def put_config(node: TestNode, name: str) -> bool:
    """Whether this was acknowledged."""
    try:
        node.client().api.create_config(name, os.urandom(700_000))
    except (DockerException, RequestException):
        return False
    return True


def configs(node: TestNode) -> set[str]:
    return {config["Spec"]["Name"] for config in node.client().api.configs()}


def condition(seen_by: TestNode, name: str) -> str:
    """What this node's condition ``store-full`` says, as another one shows it."""
    engine = nodes_by_name(seen_by)[name]["Description"]["Engine"]
    return str((engine.get("Labels") or {}).get(condition_label("store-full"), ""))


def refusal(node: TestNode) -> str:
    """What this node says when it is asked, once it says what is missing."""
    said = node.docker("node", "ls", check=False).stderr
    return said if MISSING in said else ""


def test_the_leader_of_three_runs_out_of_disk() -> None:
    with a_playground("full", managers=3) as cluster, store_on_a_disk(cluster, "m1", *SMALL_DISK) as disk:
        full, other = cluster.node("m1"), cluster.node("m2")
        make_lead(cluster, "m1")
        create(other, "web", 6)
        tasks = {task["ID"] for task in wait_running(other, "web", 6)}
        (etcd,) = full.pids("etcd")
        filler = fill(disk)
        acknowledged = set()
        for number in range(200):
            if put_config(full, f"c{number}"):
                acknowledged.add(f"c{number}")
            if etcd not in full.pids("etcd"):
                break
        else:
            pytest.fail("the disk never ran full")

        wait_until(lambda: leader(other) in others("m1", *MANAGERS), "another one leads", 60)
        write(other, "meanwhile")
        said = wait_until(lambda: refusal(full), "the full one says so", 60)
        assert str(store_of(full)) in said
        assert MISSING in full.client().info()["Swarm"]["Error"]
        wait_until(
            lambda: "disk space" in str(full.client().info()["Warnings"]), "its own conditions say so", 60
        )
        wait_until(lambda: "disk space" in condition(other, "m1"), "the others show its conditions", 60)
        assert not put_config(full, "refused")
        assert not full.pids("etcd")
        wait_until(lambda: roles(other)["m1"] == "unreachable", "it has no vote that counts", 60)

        filler.unlink()
        wait_managers(other, *MANAGERS)
        wait_until(
            lambda: "disk space" not in str(full.client().info()["Warnings"]), "the condition has ended", 60
        )
        wait_managers(full, *MANAGERS)
        assert acknowledged <= configs(full)
        assert configs(full) == configs(other)
        assert "refused" not in configs(full)
        assert tasks == {task["ID"] for task in running(full, "web")}, "nothing moved"

"""An overlay network after the loss of managers: its names, its addresses, and those of new tasks."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines.playground_rig import (
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    create,
    ready,
    wait_running,
    wait_until,
)
from tests.support.machines.talks import fetched
from tests.support.managers.managers_rig import can_write, wait_managers

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

SERVE = ("sh", "-c", "mkdir /www; echo I am $NAME >/www/index.html; exec httpd -f -p 80 -h /www")


def skep(node: TestNode, *words: str) -> str:
    command = [SKEP, "--host", node.socket, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout


def serve(node: TestNode, name: str, role: str) -> None:
    where = ("--network", "back", "--constraint", f"node.role=={role}", "--env", f"NAME={name}")
    create(node, name, 1, *where, command=SERVE)


def addresses(node: TestNode) -> dict[str, Any]:
    """What the network and its first service have been given."""
    network = node.client().api.inspect_network("back")
    endpoint = node.client().api.inspect_service("web")["Endpoint"]
    return {
        "network": {key: network[key] for key in ("Id", "IPAM", "Options", "Attachable")},
        "service": endpoint["VirtualIPs"],
    }


def recover(cluster: TestCluster, _: Path) -> TestNode:
    """Continue with the manager that is left."""
    cluster.skep("kill", "m2")
    m1 = cluster.node("m1")
    wait_until(lambda: not can_write(m1, "probe"), "without a quorum nothing is written")
    skep(m1, "cluster", "recover", "--yes")
    return m1


def force(cluster: TestCluster, _: Path) -> TestNode:
    """The same by docker's command."""
    cluster.skep("kill", "m2")
    m1 = cluster.node("m1")
    wait_until(lambda: not can_write(m1, "probe"), "without a quorum nothing is written")
    address = m1.description["addr"]
    m1.docker("swarm", "init", "--force-new-cluster", "--advertise-addr", address)
    return m1


def restore(cluster: TestCluster, scratch: Path) -> TestNode:
    """Restore a backup on another machine, after the loss of both managers."""
    (scratch / "key").write_bytes(bytes(range(64)))
    key = ("--key-file", str(scratch / "key"), str(scratch / "backup"))
    skep(cluster.node("m1"), "backup", *key)
    new = cluster.node(cluster.skep("add", "manager").stdout.split()[0])
    for name in ("m1", "m2"):
        cluster.skep("kill", name)
    restored = skep(new, "restore", "--yes", *key)
    (line,) = [line.strip() for line in restored.splitlines() if line.strip().startswith("managers = ")]
    settings = cluster.directory / "w1" / "skep.toml"
    settings.write_text(f"{line}\n{settings.read_text()}")
    cluster.skep("kill", "w1")
    cluster.skep("start", "w1")
    return new


@pytest.mark.parametrize("way", [recover, force, restore], ids=lambda way: way.__name__)
def test_a_name_is_found_over_an_overlay_after_the_loss_of_managers(
    way: Callable[[TestCluster, Path], TestNode], tmp_path: Path
) -> None:
    with a_playground("overlays", managers=2, workers=1) as cluster:
        m1, w1 = cluster.node("m1"), cluster.node("w1")
        wait_managers(m1, "m1", "m2")
        m1.docker("network", "create", "--driver", "overlay", "--attachable", "back")
        serve(m1, "web", "worker")
        (before,) = wait_running(m1, "web", 1)
        given = addresses(m1)

        manager = way(cluster, tmp_path)
        wait_until(lambda: "w1" in ready(manager), "the worker is back", within_s=60)
        assert addresses(manager) == given
        (after,) = wait_running(manager, "web", 1)
        if way is not restore:  # there the worker was switched off
            assert after["ID"] == before["ID"], "it ran on"
        serve(manager, "late", "manager")
        (late,) = wait_running(manager, "late", 1, within_s=60)
        assert late["NodeID"] == manager.client().info()["Swarm"]["NodeID"]
        for node, name, other in ((manager, "late", "web"), (w1, "web", "late")):
            for host in (other, f"tasks.{other}"):
                wait_until(
                    lambda node=node, name=name, host=host, other=other: (  # type: ignore[misc]
                        fetched(node, name, f"http://{host}/") == f"I am {other}\n"
                    ),
                    f"{name} reaches {host} over the overlay",
                    within_s=30,
                )

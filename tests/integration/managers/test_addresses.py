"""Managers whose machines get other addresses: one by one, and all at once."""

import json
import subprocess
from collections.abc import Mapping, Sequence

import pytest

from skep.playground.names import UNDERLAY
from tests.support.machines.playground_rig import TestCluster, a_playground, wait_running, wait_until
from tests.support.managers.managers_rig import secrets, wait_managers, write

ALL = ("m1", "m2", "m3")

pytestmark = pytest.mark.timeout(300)


def move(cluster: TestCluster, name: str, addr: str) -> None:
    """Give a node that is switched off another address, in its network and in its configuration."""
    node = cluster.node(name).description
    netns, before = node["netns"].rpartition("/")[2], node["addr"]
    (link,) = json.loads(_ip("-n", netns, "-json", "address", "show", "to", before))
    device = link["ifname"]
    gateway = f"{before.rpartition('.')[0]}.1"
    _ip("-n", netns, "address", "delete", f"{before}/24", "dev", device)
    _ip("-n", netns, "address", "add", f"{addr}/24", "dev", device)
    _ip("-n", netns, "route", "replace", UNDERLAY, "via", gateway)
    file = cluster.directory / "cluster.json"
    description = json.loads(file.read_text())
    for known in description["nodes"]:
        if known["name"] == name:
            known["addr"] = addr
    file.write_text(json.dumps(description))


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=True).stdout


def name_managers(cluster: TestCluster, name: str, addrs: Sequence[str]) -> None:
    """Write into a node's configuration where managers may be."""
    configuration = cluster.directory / name / "skep.toml"
    configuration.write_text(f"managers = {json.dumps([f'{addr}:2377' for addr in addrs])}\n")


def addresses(cluster: TestCluster, seen_by: str) -> dict[str, str]:
    """Host name of each manager -> its address as the cluster shows it."""
    nodes = cluster.node(seen_by).client().api.nodes()
    return {
        node["Description"]["Hostname"]: node["ManagerStatus"]["Addr"].rpartition(":")[0]
        for node in nodes
        if "ManagerStatus" in node
    }


def wait_known(cluster: TestCluster, seen_by: str, name: str, addr: str) -> None:
    """Wait until the manager ``name`` is shown at ``addr``."""
    wait_until(lambda: addresses(cluster, seen_by)[name] == addr, f"{name} is known to be at {addr}")


@pytest.mark.slow
def test_all_managers_move_at_once_and_find_each_other() -> None:
    """All known addresses are wrong; those in the configuration are enough."""
    after = {"m1": "192.168.100.51", "m2": "192.168.100.52", "m3": "192.168.100.53"}
    with a_playground("move", managers=3, workers=1) as cluster:
        m1 = cluster.node("m1")
        wait_managers(m1, *ALL)
        write(m1, "before")
        before = addresses(cluster, "m1")
        for name in (*ALL, "w1"):
            cluster.skep("kill", name)
        for name, addr in after.items():
            move(cluster, name, addr)
        for name in (*ALL, "w1"):
            name_managers(cluster, name, list(after.values()))
            cluster.skep("start", name)
        wait_managers(m1, *ALL)
        wait_until(lambda: addresses(cluster, "m2") == after, "the new addresses are written down")
        assert not set(before.values()) & set(after.values())
        assert "before" in secrets(cluster.node("m3"))
        m1.docker("service", "create", "--detach", "--name", "web", "--constraint", "node.hostname==w1",
                  "busybox:1", "sleep", "3600")  # fmt: skip
        wait_running(m1, "web", 1)


def translate(cluster: TestCluster, outside: Mapping[str, str]) -> None:
    """Have the network between the nodes translate addresses that no interface has: outer -> inner."""
    rules = "".join(f"ip daddr {outer} dnat to {inner};" for outer, inner in outside.items())
    table = (
        f"table ip nat {{ chain pre {{ type nat hook prerouting priority -100; {rules} }}; "
        "chain post { type nat hook postrouting priority 100; ct status dnat masquerade; }; }"
    )
    switch = f"/run/netns/skep-{cluster.name}-net"
    command = ["nsenter", f"--net={switch}", "nft", "-f", "-"]
    subprocess.run(command, input=table, text=True, timeout=20, check=True)


@pytest.mark.slow
def test_managers_behind_address_translation_reach_each_other() -> None:
    """Each advertises an address that none of its interfaces has; calls seem to come from the translator."""
    with a_playground("nat", managers=1) as cluster:
        for name in ("m2", "m3"):
            cluster.skep("add", "manager", name)
        m2, m3 = cluster.node("m2"), cluster.node("m3")
        outer = {"m2": "192.168.200.2", "m3": "192.168.200.3"}
        translate(cluster, {outer[node.name]: node.description["addr"] for node in (m2, m3)})
        m2.docker("swarm", "init", "--advertise-addr", outer["m2"])
        token = m2.docker("swarm", "join-token", "-q", "manager").stdout.strip()
        m3.docker("swarm", "join", "--advertise-addr", outer["m3"], "--token", token, f"{outer['m2']}:2377")
        wait_managers(m3, "m2", "m3")
        assert addresses(cluster, "m3") == outer
        write(m3, "through-translation")
        assert secrets(m2) == {"through-translation"}
        listed = _ip("-n", m3.description["netns"].rpartition("/")[2], "-json", "address", "show")
        assert not any(addr in listed for addr in outer.values())


@pytest.mark.slow
def test_managers_move_one_after_another() -> None:
    """Without configuration, each manager that comes back announces its address to the others."""
    after = {"m1": "192.168.100.61", "m2": "192.168.100.62", "m3": "192.168.100.63"}
    with a_playground("moves", managers=3) as cluster:
        wait_managers(cluster.node("m1"), *ALL)
        for name, addr in after.items():
            cluster.skep("kill", name)
            move(cluster, name, addr)
            cluster.skep("start", name)
            for seen_by in ALL:
                wait_managers(cluster.node(seen_by), *ALL)
                wait_known(cluster, seen_by, name, addr)
            write(cluster.node(name), f"from-{name}")
        assert secrets(cluster.node("m1")) == {f"from-{name}" for name in ALL}

"""Every flag of ``docker swarm init`` and ``join``, typed as users type them, and what the cluster shows of each."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.machines.playground_rig import (
    IMAGE,
    TestCluster,
    TestNode,
    a_playground,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(300)

EXTRA = "10.99.0.7"


@pytest.fixture(scope="module")
def machines() -> Iterator[TestCluster]:
    """m2 and m3 are in no swarm; m2 has an address more than it can choose from."""
    with a_playground("flags", managers=1) as cluster:
        for name in ("m2", "m3"):
            cluster.skep("add", "manager", name)
        _ip(cluster.node("m2"), "link", "add", "extra0", "type", "veth", "peer", "name", "extra1")
        _ip(cluster.node("m2"), "address", "add", f"{EXTRA}/24", "dev", "extra0")
        _ip(cluster.node("m2"), "link", "set", "extra0", "up")
        yield cluster


@pytest.fixture
def m2(machines: TestCluster) -> Iterator[TestNode]:
    node = machines.node("m2")
    yield node
    node.docker("swarm", "leave", "--force", check=False)


def _ip(node: TestNode, *words: str) -> None:
    netns = node.description["netns"].rpartition("/")[2]
    subprocess.run(["ip", "-n", netns, *words], capture_output=True, timeout=20, check=True)


def swarm(node: TestNode) -> dict[str, Any]:
    """The ``Swarm`` section of ``docker info``."""
    response: dict[str, Any] = json.loads(node.docker("info", "--format", "{{json .Swarm}}").stdout)
    return response


def itself(node: TestNode) -> dict[str, Any]:
    """The node as it inspects itself."""
    response: dict[str, Any] = json.loads(node.docker("node", "inspect", "self").stdout)[0]
    return response


def test_a_machine_with_several_addresses_names_them_and_stays_outside(m2: TestNode) -> None:
    said = m2.docker("swarm", "init", check=False).stderr
    assert "could not choose an IP address to advertise since this system has multiple addresses" in said
    assert EXTRA in said
    assert m2.description["addr"] in said
    assert swarm(m2)["LocalNodeState"] == "inactive"


def test_an_interface_and_a_port_are_an_address(m2: TestNode) -> None:
    m2.docker("swarm", "init", "--advertise-addr", "extra0:2400", "--listen-addr", "0.0.0.0:2400")
    assert itself(m2)["ManagerStatus"]["Addr"] == f"{EXTRA}:2400"
    assert swarm(m2)["NodeAddr"] == EXTRA
    joining = m2.docker("swarm", "join-token", "worker").stdout
    assert f"{EXTRA}:2400" in joining


def test_init_takes_every_flag(m2: TestNode) -> None:
    said = m2.docker(
        "swarm", "init",
        "--advertise-addr", EXTRA,
        "--data-path-addr", m2.description["addr"], "--data-path-port", "4800",
        "--default-addr-pool", "10.20.0.0/16", "--default-addr-pool", "10.30.0.0/16",
        "--default-addr-pool-mask-length", "26",
        "--availability", "drain",
        "--autolock",
        "--cert-expiry", "720h0m0s", "--dispatcher-heartbeat", "2s", "--task-history-limit", "7",
        "--snapshot-interval", "500", "--max-snapshots", "2",
    ).stdout  # fmt: skip
    assert "SWMKEY-1-" in said
    cluster = swarm(m2)["Cluster"]
    assert cluster["DataPathPort"] == 4800
    assert cluster["DefaultAddrPool"] == ["10.20.0.0/16", "10.30.0.0/16"]
    assert cluster["SubnetSize"] == 26
    spec = cluster["Spec"]
    assert spec["EncryptionConfig"]["AutoLockManagers"] is True
    assert spec["CAConfig"]["NodeCertExpiry"] == 720 * 3600 * 10**9
    assert spec["Dispatcher"]["HeartbeatPeriod"] == 2 * 10**9
    assert spec["Orchestration"]["TaskHistoryRetentionLimit"] == 7
    assert spec["Raft"]["SnapshotInterval"] == 500
    assert spec["Raft"]["KeepOldSnapshots"] == 2
    assert itself(m2)["Spec"]["Availability"] == "drain"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--advertise-addr", "nonsense0"), "advertise address must be a non-zero IP address or network interface"),
        (("--advertise-addr", "0.0.0.0"), "advertise address must be a non-zero IP address or network interface"),
        (("--listen-addr", "nonsense0"), "listen address must be an IP address or network interface"),
        (("--data-path-addr", "10.1.1.1:5"), "data path address must be a non-zero IP address or network interface"),
        (("--data-path-port", "80"), "1024"),
        (("--default-addr-pool", "10.20.0.0/16", "--default-addr-pool-mask-length", "8"), "10.20.0.0/16"),
        (("--cert-expiry", "1m"), "minimum certificate expiry time is: 1h0m0s"),
        (("--external-ca", "protocol=cfssl,url=http://ca.example"), "must begin with https://"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_and_nothing_is_kept(
    m2: TestNode, flags: tuple[str, ...], sentence: str
) -> None:
    said = m2.docker("swarm", "init", *(() if "--advertise-addr" in flags else ("--advertise-addr", EXTRA)),
                     *flags, check=False)  # fmt: skip
    assert said.returncode != 0
    assert sentence in said.stderr
    assert swarm(m2)["LocalNodeState"] == "inactive"


def test_join_takes_every_flag(machines: TestCluster) -> None:
    m1, m3 = machines.node("m1"), machines.node("m3")
    token = m1.docker("swarm", "join-token", "-q", "worker").stdout.strip()
    addr = m3.description["addr"]
    m3.docker(
        "swarm", "join", "--token", token,
        "--advertise-addr", addr, "--listen-addr", f"{addr}:2390", "--data-path-addr", "eth0",
        "--availability", "pause",
        f"{m1.description['addr']}:2377",
    )  # fmt: skip
    shown = json.loads(m1.docker("node", "inspect", "m3").stdout)[0]
    assert shown["Spec"]["Availability"] == "pause"
    assert shown["Status"]["Addr"] == addr
    assert swarm(m3)["NodeAddr"] == addr
    again = m3.docker("swarm", "join", "--token", token, f"{m1.description['addr']}:2377", check=False).stderr
    assert "This node is already part of a swarm" in again
    m3.docker("swarm", "leave")
    wait_until(lambda: swarm(m3)["LocalNodeState"] == "inactive", "it has left")


def test_the_token_says_what_joins_and_a_rotated_one_is_refused_while_members_stay(
    machines: TestCluster,
) -> None:
    m1, m3 = machines.node("m1"), machines.node("m3")

    def join(token: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        return m3.docker("swarm", "join", "--token", token, f"{m1.description['addr']}:2377", check=check)

    def own_id() -> str:
        """Return the id of m3, because former nodes of this name may still be listed."""
        return m3.docker("info", "--format", "{{.Swarm.NodeID}}").stdout.strip()

    def is_listed(words: str, node_id: str = "") -> bool:
        shown = m1.docker("node", "ls", "--format", "{{.ID}} {{.Status}} {{.ManagerStatus}}").stdout
        return f"{node_id or own_id()} {words}" in [line.strip() for line in shown.splitlines()]

    def leave() -> None:
        node_id = own_id()
        m3.docker("swarm", "leave", "--force")
        wait_until(lambda: is_listed("Down", node_id), "it has left")
        m1.docker("node", "rm", node_id)

    tokens = {
        role: m1.docker("swarm", "join-token", "-q", role).stdout.strip() for role in ("worker", "manager")
    }
    assert join(tokens["worker"]).stdout == "This node joined a swarm as a worker.\n"
    wait_until(lambda: is_listed("Ready"), "the worker is ready")
    m1.docker("swarm", "join-token", "--rotate", "worker")
    there = ("--constraint", "node.hostname==m3")
    m1.docker("service", "create", "--detach", "--name", "web", *there, IMAGE, "sleep", "600")
    wait_running(m1, "web", 1)
    m1.docker("service", "rm", "web")
    leave()
    assert (
        "A valid join token is necessary to join this cluster" in join(tokens["worker"], check=False).stderr
    )
    assert swarm(m3)["LocalNodeState"] == "inactive"

    assert join(tokens["manager"]).stdout == "This node joined a swarm as a manager.\n"
    wait_until(lambda: is_listed("Ready Reachable"), "the manager is ready")
    m1.docker("node", "demote", own_id())
    wait_until(lambda: is_listed("Ready"), "it is a worker")
    wait_until(lambda: not swarm(m3)["ControlAvailable"], "it knows")
    leave()

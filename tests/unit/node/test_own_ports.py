"""The ports that a node keeps for its own daemon, and that it gives to no container."""

from pathlib import Path

import pytest

from skep.agent.session.session_state import SessionState
from skep.bootstrap import ManagerConfig, encode
from skep.configuration.configuration import Configuration, TcpHost, UnixHost
from skep.dataplane.ports import UnreservedPorts
from skep.errors import AlreadyExists
from skep.model.values.ids import ClusterId, NodeId
from skep.node.cluster.local import LocalNode, write_local_node
from skep.node.layers.foundation import OwnPorts, own_ports
from skep.paths import Paths
from tests.support.engine.container_networks import NetPorts
from tests.support.engine.oci_rig import QuickClock

WORKER = LocalNode(
    node_id=NodeId("n"), cluster_id=ClusterId("c"), is_manager=False, listen_addr="0.0.0.0:2377"
)
MANAGER = LocalNode(
    node_id=NodeId("n"), cluster_id=ClusterId("c"), is_manager=True, listen_addr="192.0.2.1:5377"
)
CONFIGURATION = Configuration(
    hosts=(UnixHost(Path("/run/skep.sock")), TcpHost("0.0.0.0", 2376)),
    dashboard=("192.0.2.1", 8443),
    metrics_addr=("127.0.0.1", 9323),
)


def test_a_machine_in_no_cluster_keeps_what_it_listens_on() -> None:
    assert own_ports(Configuration(), None) == {}
    assert own_ports(CONFIGURATION, None) == {
        ("tcp", 2376): "the API",
        ("tcp", 8443): "the dashboard",
        ("tcp", 9323): "metrics",
    }


def test_a_worker_keeps_the_ports_of_networks_before_it_has_one() -> None:
    found = own_ports(Configuration(), WORKER)
    assert found.keys() == {("tcp", 2374), ("udp", 4789), ("udp", 4799), ("udp", 4800), ("udp", 4802)}
    found = own_ports(Configuration(wireguard_port=51820), WORKER, data_path_port=5000)
    assert found.keys() == {("tcp", 2374), ("udp", 5000), ("udp", 51820), ("udp", 51821), ("udp", 51823)}


def test_a_manager_keeps_where_it_listens_and_its_etcd() -> None:
    found = own_ports(Configuration(), MANAGER)
    assert (found["tcp", 5377], found["tcp", 15377]) == ("managers", "etcd")
    assert ("tcp", 7946) in found
    assert own_ports(Configuration(peer_addr=":6000"), MANAGER)["tcp", 6000] == "etcd"
    found = own_ports(Configuration(peer_addr=":6000"), MANAGER, peer_addr="192.0.2.1:5378")
    assert found["tcp", 5378] == "etcd", (
        "where it listens counts, whatever is configured or the default by now"
    )
    assert ("tcp", 6000) not in found


class AnyPorts(NetPorts):
    """A free port is the lowest from 2376."""

    async def reserve(
        self, protocol: str, port: int, address: str = "", target: tuple[str, int] | None = None
    ) -> int:
        while not port or (protocol, port, address) in self.keys:
            port = max(port + 1, 2376)
        return await super().reserve(protocol, port, address, target)


async def test_no_container_gets_a_port_of_the_daemon_whoever_asks() -> None:
    net = AnyPorts()
    ports = UnreservedPorts(net, lambda: {("tcp", 2376): "the API", ("tcp", 2377): "managers"})
    for address, where in (("", "0.0.0.0:2376"), ("::", "[::]:2376"), ("192.0.2.1", "192.0.2.1:2376")):
        with pytest.raises(AlreadyExists) as refused:
            await ports.reserve("tcp", 2376, address)
        assert str(refused.value) == f"Bind for {where} failed: port is reserved for the API"
    assert await ports.reserve("udp", 2376) == 2376
    assert await ports.reserve("tcp", 0) == 2378, "a free port is not one of those either"
    assert net.keys == {("udp", 2376, ""), ("tcp", 2378, "")}


async def test_a_port_that_the_daemon_comes_to_use_is_let_go() -> None:
    net = NetPorts()
    net.keys = {("tcp", 8443, ""), ("tcp", 8443, "::"), ("tcp", 80, "")}
    ports = UnreservedPorts(net, lambda: {("tcp", 8443): "the dashboard"})
    assert list(await ports.list_held()) == [("tcp", 80, "")]
    assert net.keys == {("tcp", 80, "")}


def test_a_node_reports_its_ports_and_follows_what_its_cluster_says(tmp_path: Path) -> None:
    session = SessionState(QuickClock())
    ports = OwnPorts(lambda: Configuration(data_dir=tmp_path), session)
    assert ports.labels() == {}
    write_local_node(paths_of(tmp_path).node_json, MANAGER)
    session.data_path_port = 5000
    assert ports.labels() == {"skep.reserved-ports": "tcp=2374,5377,7946,15377 udp=5000,5010,5011,5013"}
    of_an_early_version = ManagerConfig(
        data_dir=str(tmp_path),
        run_dir=str(tmp_path),
        node_id=MANAGER.node_id,
        cluster_id=MANAGER.cluster_id,
        listen_addr=MANAGER.listen_addr,
        advertise_addr=MANAGER.listen_addr,
        hostname="m1",
    )
    paths_of(tmp_path).manager_config.parent.mkdir(parents=True, exist_ok=True)
    paths_of(tmp_path).manager_config.write_bytes(encode(of_an_early_version))
    assert ports.labels() == {"skep.reserved-ports": "tcp=2374,5377,5378,7946 udp=5000,5010,5011,5013"}
    paths_of(tmp_path).node_json.write_text("damaged")
    assert ports.labels() == {}


def paths_of(directory: Path) -> Paths:
    return Configuration(data_dir=directory).paths

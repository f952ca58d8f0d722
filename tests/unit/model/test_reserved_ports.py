"""Ports that only administrators publish on, from the nodes of a cluster."""

from msgspec.structs import replace

from skep.model.networks.reserved_ports import of_cluster, of_data_path
from skep.model.node import EngineDescription, ManagerStatus, Node, NodeDescription
from skep.model.values.ids import NodeId


def a_node(label: str, status: ManagerStatus | None = None) -> Node:
    engine = EngineDescription(engine_version="1", labels={"skep.reserved-ports": label})
    return Node(id=NodeId("n"), description=NodeDescription(engine=engine), manager_status=status)


def test_the_ports_of_a_cluster_with_defaults_are_reserved() -> None:
    assert of_cluster(4789, ()).keys() == {
        ("tcp", 22), ("tcp", 2374), ("tcp", 2376), ("tcp", 2377), ("tcp", 2378), ("tcp", 7946),
        ("udp", 7946), ("udp", 4789), ("udp", 4799), ("udp", 4800), ("udp", 4802),
    }  # fmt: skip


def test_ports_that_are_configured_are_reserved_and_named() -> None:
    status = ManagerStatus(addr="192.0.2.1:5377", peer_addr="[2001:db8::1]:5400")
    found = of_cluster(5789, (a_node("tcp=9323,8443 udp=", status),))
    assert found["tcp", 5377] == "managers"
    assert found["tcp", 5400] == "etcd"
    assert found["tcp", 9323] == found["tcp", 8443] == "a manager"
    assert found["udp", 5789] == "overlay networks"
    assert ("udp", 4789) not in found


def test_the_word_of_a_worker_and_what_cannot_be_read_reserve_nothing() -> None:
    usual = of_cluster(4789, ())
    assert of_cluster(4789, (a_node("tcp=80,443"),)) == usual
    status = ManagerStatus(addr="nowhere", peer_addr="")
    assert (
        of_cluster(4789, (a_node("tcp=x udp", status), replace(a_node(""), manager_status=status))) == usual
    )


def test_wireguard_has_the_port_after_the_data_paths_or_the_configured_one() -> None:
    assert set(of_data_path(4789)) == {("udp", 4789), ("udp", 4799), ("udp", 4800), ("udp", 4802)}
    assert set(of_data_path(4789, 51820)) == {
        ("udp", 4789),
        ("udp", 51820),
        ("udp", 51821),
        ("udp", 51823),
    }

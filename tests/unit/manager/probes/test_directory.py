"""The probe targets of nodes, derived from the store."""

from msgspec.structs import replace

from skep.manager.probes.directory import changes_directory, directory_of, managers_for, targets_for
from skep.manager.probes.plan import ALL_PAIRS_MAX, ProbePlan
from skep.model.networks.data_planes import PATHS_LABEL
from skep.model.networks.paths import PathPeer
from skep.model.node import (
    EngineDescription,
    ManagerStatus,
    Node,
    NodeDescription,
    NodeState,
    NodeStatus,
    Reachability,
)
from skep.model.values.ids import NodeId


def a_node(name: str, number: int = 1, manager: ManagerStatus | None = None) -> Node:
    engine = EngineDescription(labels={PATHS_LABEL: "1"})
    return Node(
        id=NodeId(name),
        description=NodeDescription(hostname=name, engine=engine),
        status=NodeStatus(state=NodeState.READY, addr=f"10.0.0.{number}"),
        manager_status=manager,
    )


def a_manager(
    name: str, number: int, peer_port: int | None = 2378, reachability: Reachability = Reachability.REACHABLE
) -> Node:
    host = f"10.0.0.{number}"
    peer_addr = f"{host}:{peer_port}" if peer_port else ""
    status = ManagerStatus(reachability=reachability, addr=f"{host}:2377", peer_addr=peer_addr)
    return a_node(name, number, status)


def etcds(*nodes: Node, reported: str) -> dict[str, str]:
    """The addresses of the others' etcd in the node's targets."""
    directory = directory_of(nodes, 4789)
    requested = targets_for(NodeId(reported), directory, ProbePlan(directory.peers, {}), lambda _: ())
    assert requested is not None
    return {peer.node_id: peer.etcd for peer in requested.peers}


def test_probe_targets_of_managers_have_etcd_addresses_and_those_of_workers_do_not() -> None:
    nodes = (a_manager("m1", 1), a_manager("m2", 2, 2380), a_manager("older", 3, None), a_node("w1", 4))
    assert etcds(*nodes, reported="m1") == {"m2": "10.0.0.2:2380", "older": "", "w1": ""}
    assert etcds(*nodes, reported="w1") == {"m1": "", "m2": "", "older": ""}


def test_managers_ask_each_other_in_a_cluster_of_any_size() -> None:
    managers = [a_manager(f"m{number}", number) for number in range(1, 6)]
    workers = [a_node(f"w{number}", 5 + number) for number in range(3 * ALL_PAIRS_MAX)]
    reported = etcds(*managers, *workers, reported="m1")
    assert {name for name, etcd in reported.items() if etcd} == {"m2", "m3", "m4", "m5"}


def test_diagnostics_have_the_same_targets() -> None:
    directory = directory_of((a_manager("m1", 1), a_manager("m2", 2), a_node("w1", 3)), 4789)
    asked = PathPeer(node_id=NodeId("m2"), hostname="m2", control="10.0.0.2:2377")
    assert managers_for(NodeId("m1"), directory) == (replace(asked, etcd="10.0.0.2:2378"),)
    assert asked in managers_for(NodeId("w1"), directory)


def test_another_peer_port_is_seen() -> None:
    before = a_manager("m1", 1)
    assert changes_directory(before, replace(before, manager_status=a_manager("m1", 1, 2380).manager_status))
    assert not changes_directory(before, replace(before, peer_roots="x"))


def test_nodes_are_probed_until_they_are_known_to_be_down() -> None:
    lost = a_manager("m2", 2)
    for state, probed in ((NodeState.UNKNOWN, {"m1", "m2"}), (NodeState.DOWN, {"m1"})):
        node = replace(lost, status=replace(lost.status, state=state))
        assert set(directory_of((a_manager("m1", 1), node), 4789).peers) == probed


def test_the_ports_of_a_manager_are_probed_once_it_has_joined() -> None:
    """Before, it does not listen yet, and the others would report that they cannot reach it."""
    joining = a_manager("m2", 2, reachability=Reachability.UNKNOWN)
    directory = directory_of((a_manager("m1", 1), joining), 4789)
    assert (directory.peers[joining.id].control, directory.peers[joining.id].etcd) == ("", "")
    assert directory.managers == (NodeId("m1"),)
    joined, lost = a_manager("m2", 2), a_manager("m2", 2, reachability=Reachability.UNREACHABLE)
    assert changes_directory(joining, joined)
    assert directory_of((joined,), 4789).peers == directory_of((lost,), 4789).peers
    assert directory_of((lost,), 4789).managers == (lost.id,)

"""The routing mesh between real namespaces: who is reached, and what a task sees of its client."""

import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from skep.model.networks.tables import TableSplit
from skep.model.values.ids import ContainerId
from tests.support.networks.mesh_lab import CLIENT, CLIENT_IPV6, MeshLab

PORTS = (("tcp", 8080, 80), ("udp", 8080, 80))


async def spread_tasks(lab: MeshLab, *nodes: int) -> None:
    """Tasks t1, t2, ... on nodes by their numbers, published."""
    lab.publish(*PORTS)
    for number, node in enumerate(nodes, 1):
        await lab.add_task(f"t{number}", lab.nodes[node - 1])
    await lab.spread()


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_every_node_answers_and_the_task_sees_the_clients_own_address(
    lab: MeshLab, protocol: str
) -> None:
    await spread_tasks(lab, 3)
    for node in lab.nodes:
        assert await lab.ask(node.address, 8080, protocol) == f"t1 {CLIENT}"
        assert await lab.ask(node.address_ipv6, 8080, protocol) == f"t1 {CLIENT_IPV6}"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_tasks_that_have_a_way_out_by_ipv6_answer_by_the_way_of_the_question(
    lab: MeshLab, protocol: str
) -> None:
    lab.has_ways_out_ipv6 = True
    await spread_tasks(lab, 3)
    for node in lab.nodes:
        assert await lab.ask(node.address_ipv6, 8080, protocol) == f"t1 {CLIENT_IPV6}"
        assert await lab.ask(node.address, 8080, protocol) == f"t1 {CLIENT}"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_the_clients_own_address_arrives_after_the_task_has_moved(lab: MeshLab, protocol: str) -> None:
    await spread_tasks(lab, 3)
    assert await lab.ask(lab.nodes[0].address, 8080, protocol) == f"t1 {CLIENT}"
    await lab.add_task("t2", lab.nodes[1])
    lab.tasks[0].is_serving = False
    await lab.spread()
    for node in lab.nodes:
        assert await lab.ask(node.address, 8080, protocol) == f"t2 {CLIENT}"
        assert await lab.ask(node.address_ipv6, 8080, protocol) == f"t2 {CLIENT_IPV6}"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_a_client_on_a_node_is_seen_as_the_nodes_ingress_address(lab: MeshLab, protocol: str) -> None:
    await spread_tasks(lab, 3)
    for node in lab.nodes:
        for address in ("127.0.0.1", node.address):
            assert await lab.ask_on(node, address, 8080, protocol) == f"t1 {node.ingress[0]}"
        assert await lab.ask_on(node, node.address_ipv6, 8080, protocol) == f"t1 {node.ingress[1]}"
    asked_elsewhere = await lab.ask_on(lab.nodes[0], lab.nodes[1].address, 8080, protocol)
    assert asked_elsewhere == f"t1 {lab.nodes[0].address}"


@pytest.mark.parametrize("node_count", [2, 3, 5])
async def test_connections_are_spread_evenly_over_all_tasks(lab: MeshLab, node_count: int) -> None:
    """160 connections; a share differs by chance by less than five standard deviations."""
    await spread_tasks(lab, *([1, 2, 3] * 2)[:node_count])
    responses = Counter([await lab.ask(lab.nodes[0].address, 8080) for _ in range(160)])
    share = 160 / node_count
    assert len(responses) == node_count
    assert all(abs(count - share) < 5 * (share * (1 - 1 / node_count)) ** 0.5 for count in responses.values())


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_new_tasks_of_a_staged_update_get_their_share_of_a_published_port(
    lab: MeshLab, protocol: str
) -> None:
    """240 connections to all nodes, with and without the new task; a share differs by five standard deviations."""
    await spread_tasks(lab, 1, 1, 3)
    lab.tasks[2].version = 2
    for percent in (5, 40, 0, 100, 25):
        lab.split = TableSplit(percent, (2,))
        await lab.spread()
        asked = [lab.nodes[number % 3] for number in range(240)]
        found = Counter([(await lab.ask(node.address, 8080, protocol)).split()[0] for node in asked])
        share = 240 * percent / 100
        assert abs(found["t3"] - share) <= 5 * (share * (1 - percent / 100)) ** 0.5, (percent, found)
        assert percent in (0, 100) or {"t1", "t2"} < found.keys()


async def test_an_open_connection_stays_while_the_share_of_new_tasks_changes(lab: MeshLab) -> None:
    await spread_tasks(lab, 1, 3)
    lab.tasks[1].version = 2
    lab.split = TableSplit(0, (2,))
    await lab.spread()
    with await lab.in_client(socket.create_connection, (lab.nodes[1].address, 8080), 3) as client:
        for percent in (0, 50, 100):
            lab.split = TableSplit(percent, (2,))
            await lab.spread()
            client.send(b"still\n")
            assert (await lab.in_client(client.recv, 1000)).startswith(b"t1 "), percent


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_tasks_that_come_later_serve_every_protocol(lab: MeshLab, protocol: str) -> None:
    """A count of tasks that is new gets a chain of its own, in a later transaction than the maps."""
    await spread_tasks(lab, 1)
    for count in range(2, 5):
        await lab.add_task(f"t{count}", lab.nodes[count % 3])
        await lab.spread()
        responses = {await lab.ask(lab.nodes[0].address, 8080, protocol) for _ in range(40)}
        assert len(responses) == count


async def test_a_port_without_a_serving_task_refuses_at_once(lab: MeshLab) -> None:
    await spread_tasks(lab, 3)
    lab.tasks[0].is_serving = False
    await lab.spread()
    for node in lab.nodes:
        for protocol in ("tcp", "udp"):
            for address in (node.address, node.address_ipv6):
                with pytest.raises(ConnectionRefusedError):
                    await lab.ask(address, 8080, protocol, timeout_s=1)
            for address in ("127.0.0.1", "::1"):
                with pytest.raises(ConnectionRefusedError):
                    await lab.ask_on(node, address, 8080, protocol, timeout_s=1)


async def test_a_port_that_is_withdrawn_refuses_and_leaves_nothing_behind(lab: MeshLab) -> None:
    await spread_tasks(lab, 1)
    assert "skep_ingress" in await lab.nodes[0].nft("list ruleset")
    lab.publish()
    await lab.spread()
    for node in lab.nodes:
        with pytest.raises(ConnectionRefusedError):
            await lab.ask(node.address, 8080, timeout_s=1)
        assert await node.nft("list ruleset") == ""
        assert not await node.reservations.list_held()


async def test_an_established_connection_stays_while_others_go_elsewhere(lab: MeshLab) -> None:
    await spread_tasks(lab, 1, 2)
    asked = await lab.in_client(open_connections, lab.nodes[2].address, 12)
    try:
        assert {name for name, _ in asked} == {"t1", "t2"}
        lab.tasks[0].is_serving = False
        await lab.spread()
        again = [(await lab.in_client(say, connection), connection) for _, connection in asked]
        assert [name for name, _ in again] == [name for name, _ in asked]
        assert {await lab.ask(lab.nodes[2].address, 8080) for _ in range(12)} == {f"t2 {CLIENT}"}
        lab.tasks[1].is_serving = False
        await lab.spread()
        assert {await lab.in_client(say, connection) for _, connection in asked} == {"t1", "t2"}
    finally:
        for _, connection in asked:
            connection.close()


async def test_a_udp_flow_moves_when_its_task_serves_no_more(lab: MeshLab) -> None:
    await spread_tasks(lab, 1)
    with await lab.in_client(udp_client, lab.nodes[2].address) as client:
        assert await lab.in_client(say, client) == "t1"
        await lab.add_task("t2", lab.nodes[1])
        await lab.spread()
        assert await lab.in_client(say, client) == "t1", "a flow stays while its task serves"
        lab.tasks[0].is_serving = False
        await lab.spread()
        assert await lab.in_client(say, client) == "t2"


async def test_a_udp_flow_that_began_before_its_port_was_published_is_led_to_the_task(lab: MeshLab) -> None:
    lab.publish(("udp", 9999, 80))
    await lab.add_task("t1", lab.nodes[0])
    await lab.spread()
    with await lab.in_client(udp_client, lab.nodes[0].address) as client:
        with await lab.nodes[0].namespaces.run(lab.nodes[0].netns, udp_server) as own:
            client.send(b"hello\n")  # the node's own server holds the port: a flow that is led nowhere
            assert (await lab.in_client(own.recv, 100)) == b"hello\n"
        lab.publish(*PORTS)
        await lab.spread()
        assert await lab.in_client(say, client) == "t1"


@pytest.mark.parametrize("ports", [(), (("udp", 9999, 80),)])
async def test_a_udp_flow_of_a_port_that_is_not_published_any_more_is_the_nodes_own(
    lab: MeshLab, ports: tuple[tuple[str, int, int], ...]
) -> None:
    await spread_tasks(lab, 1)
    node = lab.nodes[0]
    with await lab.in_client(udp_client, node.address) as client:
        assert await lab.in_client(say, client) == "t1"
        lab.publish(*ports)
        await lab.spread()
        with await node.namespaces.run(node.netns, udp_server) as own:
            client.send(b"hello\n")
            assert (await lab.in_client(own.recv, 100)) == b"hello\n"


async def test_a_udp_flow_is_moved_after_a_restart_that_missed_the_change(lab: MeshLab) -> None:
    await spread_tasks(lab, 1)
    node = lab.nodes[2]
    with await lab.in_client(udp_client, node.address) as client:
        assert await lab.in_client(say, client) == "t1"
        await lab.add_task("t2", lab.nodes[1])
        lab.tasks[0].is_serving = False
        node.mesh = node.new_mesh()
        await lab.spread()
        assert await lab.in_client(say, client) == "t2"


async def test_packets_that_only_pass_through_are_not_led_away(lab: MeshLab) -> None:
    """A node is the client's router to another machine that has a server of its own on the published port."""
    await spread_tasks(lab, 1)
    await lab.places.create("beyond", {})
    path = lab.places.path("beyond")
    await lab.batch("n1", f"link add far type veth peer name eth0 netns {path}", "link set far up")
    await lab.batch("n1", "addr add 198.51.100.1/24 dev far")
    await lab.batch("beyond", "link set eth0 up", "addr add 198.51.100.2/24 dev eth0")
    await lab.batch("beyond", "route add default via 198.51.100.1")
    await lab.batch("client", f"route add 198.51.100.0/24 via {lab.nodes[0].address}")
    server = await lab.places.run(path, socket.create_server, ("198.51.100.2", 8080))
    with server, await lab.in_client(connect, "198.51.100.2") as connection:
        accepted, peer = server.accept()
        accepted.close()
        assert peer[0] == CLIENT
        assert connection.getpeername()[0] == "198.51.100.2"


async def test_a_neighbor_reaches_neither_the_loopback_of_a_node_nor_a_task_directly(lab: MeshLab) -> None:
    await spread_tasks(lab, 1)
    await lab.batch("client", f"route add 10.0.0.0/24 via {lab.nodes[0].address}")
    with pytest.raises(TimeoutError):
        await lab.ask("10.0.0.10", 80, timeout_s=1)
    await lab.batch(
        "client", "link set lo down", f"route add 127.0.0.1 via {lab.nodes[0].address} dev eth0 onlink"
    )
    with pytest.raises(OSError, match=r"timed out|unreachable"):
        await lab.ask("127.0.0.1", 8080, timeout_s=1)


async def test_a_task_gets_nowhere_by_the_ingress_network(lab: MeshLab) -> None:
    """Its default route for IPv6 is there for answers only."""
    await spread_tasks(lab, 1)
    task = lab.tasks[0]

    def send_out(kind: int) -> None:
        with socket.socket(socket.AF_INET6, kind) as out:
            out.settimeout(1)
            out.connect((CLIENT_IPV6, 99))
            out.send(b"hello")
            out.recv(1)

    server = await lab.in_client(lambda: socket.create_server((CLIENT_IPV6, 99), family=socket.AF_INET6))
    with server:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with pytest.raises(OSError, match=r"unreachable|not permitted"):
                await lab.places.run(task.netns, send_out, kind)


async def test_a_port_bound_to_one_address_answers_there_only(lab: MeshLab) -> None:
    lab.publish(("tcp", 8080, 80), host_ip="127.0.0.1")
    await lab.add_task("t1", lab.nodes[1])
    await lab.spread()
    for node in lab.nodes:
        assert await lab.ask_on(node, "127.0.0.1", 8080) == f"t1 {node.ingress[0]}"
        with pytest.raises(ConnectionRefusedError):
            await lab.ask(node.address, 8080, timeout_s=1)
    lab.publish(("tcp", 8080, 80), host_ip=lab.nodes[0].address)  # which the other nodes do not have
    await lab.spread()
    assert await lab.ask(lab.nodes[0].address, 8080) == f"t1 {CLIENT}"
    with pytest.raises(ConnectionRefusedError):
        await lab.ask(lab.nodes[1].address, 8080, timeout_s=1)
    with pytest.raises(ConnectionRefusedError):
        await lab.ask_on(lab.nodes[0], "127.0.0.1", 8080, timeout_s=1)
    lab.tasks[0].is_serving = False
    await lab.spread()
    with pytest.raises(ConnectionRefusedError):
        await lab.ask(lab.nodes[0].address, 8080, timeout_s=1)


async def test_a_client_that_sticks_meets_one_task_by_every_node(lab: MeshLab) -> None:
    lab.publish(("tcp", 8080, 80), ("tcp", 8081, 80), is_sticky=True)
    for number in range(1, 6):
        await lab.add_task(f"t{number}", lab.nodes[number % 3])
    await lab.spread()
    responses = {await lab.ask(node.address, 8080) for node in lab.nodes for _ in range(5)}
    assert len(responses) == 1
    clients = [f"192.0.2.{number}" for number in range(110, 150)]
    await lab.batch("client", *(f"addr add {address}/24 dev eth0" for address in clients))
    before = {client: await lab.in_client(ask_as, client, lab.nodes[0].address) for client in clients}
    assert len(set(before.values())) == 5
    lab.tasks[0].is_serving = False
    await lab.spread()
    after = {client: await lab.in_client(ask_as, client, lab.nodes[1].address) for client in clients}
    assert "t1" not in after.values()
    assert {client for client in clients if after[client] != before[client]} == {
        client for client in clients if before[client] == "t1"
    }


async def test_with_the_label_for_local_tasks_a_node_prefers_its_own(lab: MeshLab) -> None:
    lab.publish(("tcp", 8080, 80), prefers_local=True)
    await lab.add_task("t1", lab.nodes[0])
    await lab.add_task("t2", lab.nodes[1])
    await lab.spread()
    assert {await lab.ask(lab.nodes[0].address, 8080) for _ in range(10)} == {f"t1 {CLIENT}"}
    assert {await lab.ask(lab.nodes[1].address, 8080) for _ in range(10)} == {f"t2 {CLIENT}"}
    assert {await lab.ask(lab.nodes[2].address, 8080) for _ in range(20)} == {f"t1 {CLIENT}", f"t2 {CLIENT}"}


async def test_answers_go_back_through_nodes_that_come_later_and_rules_of_those_that_went_are_gone(
    tmp_path: Path,
) -> None:
    async with MeshLab(tmp_path, 3, has_ipv6=True).running() as lab:
        lab.known = lab.nodes[:2]
        await spread_tasks(lab, 1)
        with pytest.raises(TimeoutError):
            await lab.ask(lab.nodes[2].address, 8080, timeout_s=1)
        lab.known = lab.nodes
        await lab.spread()
        assert await lab.ask(lab.nodes[2].address, 8080) == f"t1 {CLIENT}"
        assert await lab.ask(lab.nodes[2].address_ipv6, 8080) == f"t1 {CLIENT_IPV6}"
        lab.known = lab.nodes[:1]
        await lab.spread()
        task = lab.tasks[0]
        assert "10.0.0.203" not in await lab.places.run(task.netns, all_routes)
        assert "10.0.0.201" in await lab.places.run(task.netns, all_routes)


async def test_a_restarted_node_process_finds_ways_back_and_removes_those_of_nodes_that_went(
    lab: MeshLab,
) -> None:
    await spread_tasks(lab, 1)
    task = lab.tasks[0]
    with await lab.in_client(connect, lab.nodes[1].address) as connection:
        assert await lab.in_client(say, connection) == "t1"
        task.node.mesh.reply_routing.remove(ContainerId("t1"))
        task.node.mesh = task.node.new_mesh()
        await lab.join(task)
        lab.known = lab.nodes[:2]
        await lab.spread()
        assert await lab.in_client(say, connection) == "t1"
        assert await lab.ask(lab.nodes[0].address, 8080) == f"t1 {CLIENT}"
    assert "10.0.0.203" not in await lab.places.run(task.netns, all_routes)


def open_connections(address: str, count: int) -> list[tuple[str, socket.socket]]:
    """Connections and who is at their other end."""
    connections = [connect(address) for _ in range(count)]
    return [(say(connection), connection) for connection in connections]


def connect(address: str) -> socket.socket:
    return socket.create_connection((address, 8080), timeout=3)


def udp_client(address: str) -> socket.socket:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(3)
    client.connect((address, 8080))
    return client


def udp_server() -> socket.socket:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.settimeout(3)
    server.bind(("0.0.0.0", 8080))
    return server


def say(connection: socket.socket) -> str:
    """Say something; the name of who answers."""
    connection.send(b"hello\n")
    return connection.recv(100).decode().partition(" ")[0]


def ask_as(client: str, address: str) -> str:
    with socket.create_connection((address, 8080), timeout=3, source_address=(client, 0)) as connection:
        return say(connection)


def all_routes() -> str:
    commands = [
        ["ip", "rule"],
        ["ip", "route", "show", "table", "all"],
        ["ip", "-6", "route", "show", "table", "all"],
    ]
    return "".join(subprocess.run(one, capture_output=True, text=True, check=True).stdout for one in commands)

"""Which nodes of a playground answer at which published port."""

import os

from msgspec.structs import replace

from skep.dataplane.proxy.relays import backend_order
from skep.linux.processes import start_ticks_of
from skep.playground.description import PlaygroundDescription, PlaygroundNode
from skep.playground.relay import relay_port, targets


def a_node(name: str, addr: str, *, is_up: bool = True) -> PlaygroundNode:
    pids = (os.getpid(),) if is_up else ()
    return PlaygroundNode(
        name=name,
        role="manager",
        endpoint="unix:///x",
        addr=addr,
        pids=pids,
        started=start_ticks_of(os.getpid()) or 0,
        netns="",
        cgroup="",
        state_dir="",
        link=("", ""),
        start=(),
    )


CLUSTER = PlaygroundDescription(
    name="p", nodes=(a_node("m1", "a1"), a_node("w1", "a2"), a_node("w2", "a3", is_up=False))
)
NODES = [{"ID": f"id-{name}", "Description": {"Hostname": name}} for name in ("m1", "w1", "w2")]


def test_a_port_of_the_mesh_answers_on_every_node_that_is_up() -> None:
    ports = [
        {"PublishedPort": 8080, "PublishMode": "ingress", "Protocol": "tcp"},
        {"PublishedPort": 53, "PublishMode": "ingress", "Protocol": "udp"},
        {"PublishedPort": 99, "PublishMode": "ingress", "Protocol": "sctp"},
    ]
    assert targets(CLUSTER, NODES, [{"Endpoint": {"Ports": ports}}, {}], []) == {
        (53, "udp"): (("a1", 53), ("a2", 53)),
        (8080, "tcp"): (("a1", 8080), ("a2", 8080)),
    }


def test_a_port_in_host_mode_answers_where_its_task_runs() -> None:
    def a_task(node: str, state: str, port: int) -> dict[str, object]:
        return {
            "NodeID": f"id-{node}",
            "Status": {"State": state, "PortStatus": {"Ports": [{"PublishedPort": port, "Protocol": "tcp"}]}},
        }

    tasks = [a_task("m1", "running", 30001), a_task("w1", "failed", 30002), a_task("w2", "running", 30003)]
    assert targets(CLUSTER, NODES, [], tasks) == {(30001, "tcp"): (("a1", 30001),)}


def test_the_api_of_managers_with_tls_is_relayed() -> None:
    worker = replace(a_node("w9", "a9"), role="worker")
    assert targets(CLUSTER, NODES, [], []) == {}
    served = replace(CLUSTER, tls=True, nodes=(*CLUSTER.nodes, worker))
    assert targets(served, NODES, [], []) == {(2376, "tcp"): (("a1", 2376), ("a2", 2376))}


def test_the_api_of_managers_is_one_managers_as_long_as_it_answers() -> None:
    """A command of docker sends its requests on several connections, and an exec is known to its own node only."""
    backends = (("a1", 2376), ("a2", 2376), ("a3", 2376))
    api, web = relay_port((2376, "tcp"), backends), relay_port((8080, "tcp"), backends)
    orders = {backend_order(api, "127.0.0.1", lambda at=at: at) for at in (0.0, 0.4, 0.9)}
    assert len(orders) == 1
    assert len({backend_order(web, "127.0.0.1", lambda at=at: at) for at in (0.0, 0.4, 0.9)}) == 3


def test_ports_are_served_on_loopback_unless_another_address_was_chosen() -> None:
    assert relay_port((80, "tcp"), (("a1", 80),)).address == "127.0.0.1"
    assert relay_port((80, "tcp"), (("a1", 80),), "0.0.0.0").address == "0.0.0.0"

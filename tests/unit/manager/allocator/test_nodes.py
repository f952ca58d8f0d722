"""A node's own addresses on networks."""

from msgspec.structs import replace

from skep.manager.allocator.addresses import AddressAllocations
from skep.manager.allocator.nodes import networks_of_node, node_attachments
from skep.model.network import Network
from skep.model.node import Node, NodeState
from skep.model.task import NetworkAttachment, Task, TaskState
from tests.support.builders import a_docker_node, a_node, a_task, an_overlay

INGRESS = an_overlay("ingress", subnet="10.0.0.0/24", ingress=True)
NET1, NET2 = an_overlay("net1"), an_overlay("net2", subnet="10.0.2.0/24")


def on(network: Network, state: TaskState = TaskState.RUNNING) -> Task:
    return replace(a_task(state=state), networks_attachments=(NetworkAttachment(network=network),))


def test_an_engine_needs_the_ingress_network_and_those_of_its_tasks() -> None:
    tasks = [on(NET1), on(NET2, TaskState.FAILED)]
    assert set(networks_of_node(a_docker_node(), tasks, INGRESS, ())) == {"ingress", "net1"}
    assert set(networks_of_node(a_docker_node(), (), None, (NET2,))) == {"net2"}


def test_a_skep_node_needs_the_ingress_network_alone_once_a_port_is_published_and_keeps_it() -> None:
    def wanted(node: Node, *, is_published: bool) -> set[str]:
        return set(networks_of_node(node, [on(NET1)], INGRESS, (), is_published=is_published))

    placed = replace(a_node(state=NodeState.DOWN), attachments=(NetworkAttachment(network=INGRESS),))
    assert wanted(a_node(), is_published=False) == set()
    assert wanted(a_node(), is_published=True) == {"ingress"}
    assert wanted(a_node(state=NodeState.DOWN), is_published=True) == set()
    assert wanted(placed, is_published=False) == {"ingress"}
    assert networks_of_node(placed, (), None, (), is_published=True) == {}


def test_addresses_that_a_node_has_stay_with_it() -> None:
    allocations = AddressAllocations()
    node = a_docker_node()
    first = node_attachments(node, {NET2.id: NET2}, lambda network: allocations.allocate_all("node", network))
    node = replace(node, attachments=first)
    both = node_attachments(
        node, {NET1.id: NET1, NET2.id: NET2}, lambda network: allocations.allocate_all("node", network)
    )
    assert [one.addresses for one in both] == [("10.0.1.2/24",), ("10.0.2.2/24",)]
    assert both[1] == first[0]

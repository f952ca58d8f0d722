"""Which nodes' plain containers may join a network, and how many of them."""

import pytest

from skep.errors import InvalidArgument, PermissionDenied, ResourceExhausted
from skep.model.network import IPAMConfig, IPAMOptions, Network, NetworkSpec
from skep.model.networks.attaching import (
    ATTACH_LABEL,
    attach_constraints,
    require_attachable,
    require_share,
    require_subnets,
)
from skep.model.node import EngineDescription, Node, NodeDescription, NodeRole, NodeSpec
from skep.model.values.ids import NetworkId, NodeId


def a_network(**labels: str) -> Network:
    return Network(
        id=NetworkId("n"),
        spec=NetworkSpec(name="back", attachable=True, labels=labels),
        ipam_options=IPAMOptions(configs=(IPAMConfig(subnet="10.0.1.0/24"), IPAMConfig(subnet="fd00::/64"))),
    )


def a_node(role: NodeRole = NodeRole.WORKER, **labels: str) -> Node:
    said = NodeDescription(hostname="trusted", engine=EngineDescription(labels={"zone": "inner"}))
    return Node(id=NodeId("n1"), spec=NodeSpec(role=role, labels=labels), description=said)


def test_without_the_label_every_node_may_as_in_docker():
    require_attachable(a_network(), a_node())
    with pytest.raises(PermissionDenied, match="not manually attachable"):
        require_attachable(Network(id=NetworkId("n"), spec=NetworkSpec(name="back")), a_node())


@pytest.mark.parametrize(
    ("label", "node", "may"),
    [
        ("node.labels.zone==inner", a_node(zone="inner"), True),
        ("node.labels.zone==inner", a_node(zone="outer"), False),
        ("node.labels.zone==inner", a_node(), False),
        ("node.role==manager, node.labels.zone!=outer", a_node(NodeRole.MANAGER), True),
        ("node.role==manager, node.labels.zone!=outer", a_node(NodeRole.MANAGER, zone="outer"), False),
        ("node.id==n1", a_node(), True),
    ],
)
def test_the_label_names_the_nodes_that_may(label, node, may):
    network = a_network(**{ATTACH_LABEL: label})
    if may:
        require_attachable(network, node)
    else:
        with pytest.raises(PermissionDenied, match="which this node does not meet"):
            require_attachable(network, node)


@pytest.mark.parametrize("label", ["engine.labels.zone==inner", "node.hostname==trusted", "nonsense", ""])
def test_what_a_node_says_of_itself_opens_nothing(label):
    with pytest.raises(InvalidArgument):
        attach_constraints(label)
    with pytest.raises(PermissionDenied):
        require_attachable(a_network(**{ATTACH_LABEL: label}), a_node())


def test_one_node_of_several_leaves_half_of_the_addresses_to_the_others():
    require_share(a_network(), 127, nodes=2)
    with pytest.raises(ResourceExhausted, match="half of the 256 addresses of network back"):
        require_share(a_network(), 128, nodes=2)
    require_share(a_network(), 250, nodes=1)


def test_an_address_that_the_network_cannot_have_is_refused_at_once() -> None:
    require_subnets(a_network(), ("10.0.1.9", "fd00::9/64"))
    unknown = Network(id=NetworkId("n"), spec=NetworkSpec(name="back"))
    require_subnets(unknown, ("10.9.9.9",))
    for address in ("10.9.9.9", "fd01::9"):
        with pytest.raises(InvalidArgument, match="It does not belong to any of this network's subnets"):
            require_subnets(a_network(), (address,))
    with pytest.raises(InvalidArgument, match="invalid IP address: x"):
        require_subnets(a_network(), ("x" * 200,))

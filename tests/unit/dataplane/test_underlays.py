"""The underlay of each network, as it was measured."""

from collections.abc import Collection

import msgspec

from skep.dataplane.plan.overlay import Underlay, mtu_of
from skep.dataplane.underlays import Underlays
from skep.model.networks.tables import NetworkHead, NetworkTable, Segment, TableNode
from skep.model.values.ids import NetworkId, NodeId

ME, NEAR, FAR = NodeId("me"), NodeId("near"), NodeId("far")


class FarIsNarrow:
    """``FAR`` is behind a router that carries 1400."""

    def underlay_between(self, node: NodeId, nodes: Collection[NodeId], underlay: Underlay) -> Underlay:
        assert node == ME
        return msgspec.structs.replace(underlay, mtu=1400) if FAR in nodes else underlay


def a_table(name: str, *nodes: NodeId, is_encrypted: bool = False) -> NetworkTable:
    return NetworkTable(
        head=NetworkHead(id=NetworkId(name), name=name, is_encrypted=is_encrypted),
        nodes={id: TableNode(id=id, underlay=f"192.0.2.{number}") for number, id in enumerate(nodes, 1)},
    )


def narrow() -> Underlays:
    underlays = Underlays(FarIsNarrow())
    underlays.found = {"192.0.2.1": Underlay("192.0.2.1", 1500)}
    return underlays


def test_each_network_has_the_mtu_between_its_own_nodes() -> None:
    underlays = narrow()
    assert underlays.of(ME, a_table("a", ME, NEAR)) == Underlay("192.0.2.1", 1500)
    assert underlays.of(ME, a_table("b", ME, FAR)) == Underlay("192.0.2.1", 1400)


def test_a_node_without_an_address_on_a_network_has_no_underlay_there() -> None:
    assert narrow().of(ME, None) is None
    assert narrow().of(ME, a_table("a", NEAR)) is None
    assert narrow().of(ME, NetworkTable(head=NetworkHead(id=NetworkId("a"), name="a"))) is None


def test_tunnels_lie_on_the_nodes_own_device_whatever_arrives_at_other_nodes() -> None:
    """Each encrypted network has the MTU between its own nodes; the tunnel takes what the widest of them sends."""
    far, plain = a_table("b", ME, FAR, is_encrypted=True), a_table("c", ME, FAR)
    assert narrow().of_tunnels(ME, (plain, far)) == Underlay("192.0.2.1", 1500)
    assert narrow().of_tunnels(ME, (plain,)) == Underlay("")


def test_a_network_with_ipv6_has_what_ipv6_needs() -> None:
    segments = (Segment("10.0.4.0/24", "10.0.4.1", 4100), Segment("fd04::/64", "fd04::1", 4100))
    dual = NetworkHead(id=NetworkId("d"), name="d", segments=segments)
    assert mtu_of(dual, Underlay("192.0.2.1", 1280)) == 1280
    assert mtu_of(msgspec.structs.replace(dual, segments=segments[:1]), Underlay("192.0.2.1", 1280)) == 1230

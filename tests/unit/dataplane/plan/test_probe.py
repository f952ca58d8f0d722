"""What the probes' namespace holds, and who is let in."""

from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.netns.diff import difference
from skep.dataplane.netns.state import EntryKind, NamespaceState
from skep.dataplane.plan.overlay import Underlay
from skep.dataplane.plan.packet_filter import probe_filter
from skep.dataplane.plan.probe import DEVICE, address_of, probe_state, reached
from skep.model.networks.paths import PROBE_VNI, PathPeer, ProbeTargets
from skep.model.values.ids import NodeId

IDS = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=25).map(NodeId)


def a_node(id: str, data_path: str) -> PathPeer:
    return PathPeer(node_id=NodeId(id), hostname=id, data_path=data_path)


TARGETS = ProbeTargets(
    node=a_node("me", "192.0.2.1"),
    peers=(a_node("two", "192.0.2.2"), a_node("six", "fd09::6"), a_node("docker", "")),
)


@given(IDS)
def test_an_address_is_one_of_a_host_and_always_the_same(id: NodeId) -> None:
    address = address_of(id)
    assert address.startswith("10.")
    assert address not in ("10.0.0.0", "10.255.255.255")
    assert address == address_of(id)


def test_peers_on_the_same_kind_of_underlay_are_reached() -> None:
    assert {peer.node_id for peer in reached(TARGETS).values()} == {"two"}


def test_a_peer_has_its_entries_and_the_device_never_fragments() -> None:
    state = probe_state(TARGETS, Underlay("192.0.2.1", 1500), offloads=None)
    link = state.links[DEVICE]
    assert link.mtu == 1450
    assert link.vxlan is not None
    assert (link.vxlan.vni, link.vxlan.is_whole) == (PROBE_VNI, True)
    assert {(one.kind, one.address) for one in state.entries} == {
        (EntryKind.FORWARD, "192.0.2.2"),
        (EntryKind.NEIGHBOR, address_of(NodeId("two"))),
    }
    assert difference(state, state) == []
    assert difference(state, NamespaceState()) != []


@given(st.lists(IDS, min_size=1, max_size=8, unique=True))
def test_every_address_has_one_peer(ids: list[NodeId]) -> None:
    own, *others = ids
    requested = ProbeTargets(
        node=a_node(own, "192.0.2.1"), peers=tuple(a_node(one, "192.0.2.9") for one in others)
    )
    state = probe_state(requested, Underlay("192.0.2.1"), offloads=False)
    forwarded = [one.mac for one in state.entries if one.kind is EntryKind.FORWARD]
    assert len(forwarded) == len(set(forwarded)) == len(reached(requested))
    assert state.links[DEVICE].offloads is False


def test_only_peers_are_let_in() -> None:
    elements = probe_filter(TARGETS, ("skep-gw",)).elements
    assert {value for name, value in elements if name == "peers4"} == {f"192.0.2.2 . {PROBE_VNI}"}
    assert {value for name, value in elements if name == "peers6"} == {f"fd09::6 . {PROBE_VNI}"}
    assert ("vnis", str(PROBE_VNI)) in elements
    assert ("bridges", '"skep-gw"') in elements

"""What a manager says is taken as far as it makes sense."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.plan.overlay import Underlay
from skep.dataplane.plan.packet_filter import probe_filter
from skep.dataplane.plan.probe import PEERS_MAX, host_and_port, probe_state, sound
from skep.model.networks.paths import PathPeer, ProbeTargets
from skep.model.values.ids import NodeId

TEXTS = st.one_of(
    st.sampled_from(
        ("", "192.0.2.1", "fd09::1", "fe80::1%eth0", "192.0.2.1:2377", "[fd09::1]:2377", "x", "1.2.3.4:0")
    ),
    st.text(max_size=20),
)
PEERS = st.builds(
    PathPeer,
    node_id=st.text(max_size=5).map(NodeId),
    hostname=st.text(max_size=5),
    data_path=TEXTS,
    vxlan_port=st.integers(-5, 70000),
    control=TEXTS,
    gossip=TEXTS,
)


@given(st.builds(ProbeTargets, node=PEERS, peers=st.lists(PEERS, max_size=5).map(tuple)))
def test_whatever_is_said_something_sound_is_done(requested: ProbeTargets) -> None:
    found = sound(requested)
    assert sound(found) == found
    assert found.node.node_id not in {peer.node_id for peer in found.peers}
    for peer in (found.node, *found.peers):
        for one in (peer.control, peer.gossip):
            assert not one or host_and_port(one)
    probe_filter(found, ())
    probe_state(found, Underlay(found.node.data_path or "192.0.2.1"), offloads=None)


def test_what_makes_sense_stays() -> None:
    peer = PathPeer(
        node_id=NodeId("p"), hostname="h", data_path="fd09::1", vxlan_port=4790, control="[fd09::1]:2377",
        gossip="192.0.2.7:7946", encrypted=True,
    )  # fmt: skip
    requested = ProbeTargets(node=PathPeer(node_id=NodeId("me"), hostname="m"), peers=(peer,))
    assert sound(requested) == requested


def test_there_is_an_end_to_peers() -> None:
    peers = tuple(PathPeer(node_id=NodeId(f"n{number}"), hostname="h") for number in range(PEERS_MAX + 1))
    requested = ProbeTargets(node=PathPeer(node_id=NodeId("me"), hostname="m"), peers=peers)
    assert sound(requested).peers == peers[:PEERS_MAX]


@pytest.mark.parametrize(
    ("text", "found"), [("192.0.2.1:2377", ("192.0.2.1", 2377)), ("[fd09::1]:80", ("fd09::1", 80))]
)
def test_an_address_with_a_port(text: str, found: tuple[str, int]) -> None:
    assert host_and_port(text) == found


@pytest.mark.parametrize(
    "text", ["", "x", "192.0.2.1", "192.0.2.1:", "192.0.2.1:0", "host:80", "[::1]:65536"]
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        host_and_port(text)

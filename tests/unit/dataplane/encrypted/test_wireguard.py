"""What kernel WireGuard is told, as data; and that the messages can be encoded."""

import base64
import subprocess
from collections.abc import AsyncIterator
from ipaddress import IPv6Address, IPv6Network

import pytest
from pyroute2.netlink.generic.wireguard import AsyncWireGuard

from skep.dataplane.encrypted import wireguard
from skep.dataplane.encrypted.wireguard import WireGuardDevice, changes, device, inner_address
from skep.model.ids import NodeId
from skep.model.pair_keys import NodeKeys, PairKey, PeerKeys
from tests.unit.dataplane.encrypted.rig import a_key, mirrored

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def public(name: str) -> bytes:
    return name.encode().ljust(32, b"p")


def keys_with(*names: str, epoch: int = 1) -> NodeKeys:
    peers = {
        NodeId(name): PeerKeys(node_id=NodeId(name), keys=(a_key(epoch),), wireguard_public=public(name))
        for name in names
    }
    return NodeKeys(peers=peers, wireguard_private=b"o" * 32)


UNDERLAYS = {B: "192.0.2.2", C: "192.0.2.3"}


def made(keys: NodeKeys) -> WireGuardDevice:
    found = device(A, keys, UNDERLAYS, vxlan_port=4789, underlay_mtu=1500)
    assert found is not None
    return found


def test_each_peer_may_use_its_own_address_only() -> None:
    found = made(keys_with("b", "c"))
    assert (found.port, found.mtu) == (4800, 1440)
    assert [(peer.endpoint, peer.inner) for peer in found.peers] == [
        ("192.0.2.2", inner_address(B)),
        ("192.0.2.3", inner_address(C)),
    ]
    assert len({inner_address(one) for one in (A, B, C)}) == 3
    assert all(IPv6Address(inner_address(one)) in IPv6Network("fd73:6b65:7065:6e63::/64") for one in (A, B))


def test_both_ends_have_the_same_preshared_key_and_another_in_the_next_epoch() -> None:
    def preshared(keys: list[PairKey]) -> bytes:
        return wireguard.preshared(PeerKeys(node_id=B, keys=tuple(keys)))

    assert preshared([a_key(1), a_key(2)]) == preshared(mirrored([a_key(2)])) != preshared([a_key(1)])


def test_a_peer_without_wireguard_is_left_to_user_space() -> None:
    keys = keys_with("b")
    plain = PeerKeys(node_id=C, keys=(a_key(1),))
    both = NodeKeys(peers={**keys.peers, C: plain}, wireguard_private=keys.wireguard_private)
    assert [peer.endpoint for peer in made(both).peers] == ["192.0.2.2"]
    assert device(A, NodeKeys(peers={C: plain}), UNDERLAYS, vxlan_port=4789, underlay_mtu=1500) is None


def test_only_what_changed_is_said_and_peers_that_stay_are_not_replaced() -> None:
    first = made(keys_with("b", "c"))
    messages = changes(None, first)
    assert messages[0] == {"private_key": base64.b64encode(b"o" * 32).decode(), "listen_port": 4800}
    assert len(messages) == 3
    assert changes(first, first) == []
    later = made(keys_with("b", epoch=2))
    removal, update = changes(first, later)
    assert removal == {"peer": {"public_key": base64.b64encode(public("c")).decode(), "remove": True}}
    assert update["peer"]["preshared_key"] == base64.b64encode(later.peers[0].preshared).decode()
    assert "remove" not in update["peer"]


class Recording(AsyncWireGuard):  # type: ignore[misc]  # pyroute2 has no types
    """Keeps what would go to the kernel."""

    prid = pid = 0

    def __init__(self) -> None:
        self.__dict__["sent"] = []

    def sendto(self, message: bytes, _address: object) -> None:
        self.__dict__["sent"].append(bytes(message))

    async def get(self, **_: object) -> AsyncIterator[dict[str, dict[str, object]]]:
        yield {"header": {}}


async def test_the_kernel_gets_messages_of_its_own_form() -> None:
    recording = Recording()
    for message in changes(None, made(keys_with("b"))):
        await recording.set(wireguard.DEVICE, **message)
    device_message, peer_message = recording.__dict__["sent"]
    assert b"o" * 32 in device_message
    assert public("b") in peer_message
    assert IPv6Address(inner_address(B)).packed in peer_message
    assert bytes((192, 0, 2, 2)) in peer_message


@pytest.mark.needs("root", "nft")
def test_the_rules_that_close_the_inner_port_load() -> None:
    text = wireguard.rules(4789)
    assert "udp dport 4801 drop" in text
    subprocess.run(
        ["unshare", "--net", "nft", "-f", "-"], input=text * 2, text=True, check=True, capture_output=True
    )

"""The same change as wireguard-go's socket and as the kernel's netlink take it, and what both answer."""

import socket

import msgspec
import pytest

from skep.dataplane.plan.wireguard import DeviceChange, FoundDevice, FoundPeer, WireGuardPeer
from skep.dataplane.wireguard.devices import parsed_device, socket_message
from skep.dataplane.wireguard.kernel import decoded, encoded
from skep.errors import Unavailable

KEY, OTHER, PRIVATE = bytes(range(32)), bytes(range(1, 33)), bytes(range(2, 34))
CHANGE = DeviceChange(
    private=PRIVATE,
    port=4799,
    removed=(OTHER,),
    put=(WireGuardPeer(public=KEY, endpoint="192.0.2.7", port=4800, inner="fd73::7"),),
)
RESPONSE = f"""private_key={PRIVATE.hex()}
listen_port=4799
public_key={KEY.hex()}
preshared_key={"0" * 64}
protocol_version=1
endpoint=192.0.2.7:4800
last_handshake_time_sec=1763000000
last_handshake_time_nsec=500000000
tx_bytes=1
rx_bytes=2
persistent_keepalive_interval=25
allowed_ip=fd73::7/128
public_key={OTHER.hex()}
last_handshake_time_sec=0
last_handshake_time_nsec=0
persistent_keepalive_interval=0
errno=0

"""


def test_the_sockets_message_sets_the_device_first_and_removes_before_it_adds() -> None:
    assert socket_message(CHANGE).splitlines() == [
        "set=1",
        "replace_peers=true",
        f"private_key={PRIVATE.hex()}",
        "listen_port=4799",
        f"public_key={OTHER.hex()}",
        "remove=true",
        f"public_key={KEY.hex()}",
        "endpoint=192.0.2.7:4800",
        "persistent_keepalive_interval=25",
        "replace_allowed_ips=true",
        "allowed_ip=fd73::7/128",
        "",
    ]
    v6 = DeviceChange(put=(WireGuardPeer(public=KEY, endpoint="fd09::1", port=1, inner="fd73::7"),))
    assert "endpoint=[fd09::1]:1\n" in socket_message(v6)


def test_what_is_written_to_the_kernel_is_what_is_read_from_it() -> None:
    """The kernel returns the attributes as they were set."""
    own, removal = encoded("wg0", msgspec.structs.replace(CHANGE, put=()))
    assert decoded([own[4:]]) == FoundDevice(private=PRIVATE, port=4799)
    assert OTHER in removal
    v4, v6 = CHANGE.put[0], WireGuardPeer(public=OTHER, endpoint="fd09::1", port=1, inner="fd73::8")
    (put,) = encoded("wg0", DeviceChange(put=(v4, v6)))
    assert decoded([put[4:]]).peers == {
        KEY: FoundPeer(inner=("fd73::7",), keepalive_s=25, has_endpoint=True),
        OTHER: FoundPeer(inner=("fd73::8",), keepalive_s=25, has_endpoint=True),
    }
    assert socket.inet_aton("192.0.2.7") in put
    assert (4800).to_bytes(2, "big") + socket.inet_aton("192.0.2.7") in put
    assert list(encoded("wg0", DeviceChange())) == []


BEHIND_NAT = WireGuardPeer(
    public=KEY, endpoint="", port=1, inner="240.0.0.7", relayed=("240.0.0.8", "240.0.0.9")
)


def test_a_peer_behind_nat_has_no_endpoint_and_may_relay_for_others() -> None:
    change = DeviceChange(put=(BEHIND_NAT,))
    expected = FoundPeer(inner=BEHIND_NAT.allowed, keepalive_s=25)
    assert decoded(one[4:] for one in encoded("wg3", change)).peers == {KEY: expected}
    lines = socket_message(change)
    assert "endpoint=" not in lines
    assert [line for line in lines.splitlines() if line.startswith("allowed_ip")] == [
        "allowed_ip=240.0.0.7/32",
        "allowed_ip=240.0.0.8/32",
        "allowed_ip=240.0.0.9/32",
    ]
    shown = f"{lines.removeprefix('set=1').replace('replace_allowed_ips=true', '').strip()}\nerrno=0\n\n"
    assert parsed_device(shown).peers == {KEY: expected}


def test_many_peers_go_in_several_messages_that_fit() -> None:
    peers = tuple(
        WireGuardPeer(
            public=number.to_bytes(32, "big"), endpoint="192.0.2.7", port=1, inner=f"fd73::{number:x}"
        )
        for number in range(1, 1001)
    )
    messages = list(encoded("wg0", DeviceChange(put=peers)))
    assert len(messages) > 1
    assert max(map(len, messages)) < 1 << 16
    assert len(decoded(one[4:] for one in messages).peers) == 1000


def test_what_the_socket_answers_is_read_whole() -> None:
    assert parsed_device(RESPONSE) == FoundDevice(
        private=PRIVATE,
        port=4799,
        peers={
            KEY: FoundPeer(inner=("fd73::7",), keepalive_s=25, has_endpoint=True, handshake_at=1763000000.5),
            OTHER: FoundPeer(),
        },
    )
    assert parsed_device("errno=0\n\n") == FoundDevice()


def test_an_answer_that_makes_no_sense_is_an_error() -> None:
    with pytest.raises(Unavailable, match="invalid response"):
        parsed_device("listen_port=x\nerrno=0\n\n")

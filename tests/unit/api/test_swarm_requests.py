"""What an init or a join asks for, from what the machine has."""

from ipaddress import ip_address

import pytest

from skep.api.formats.swarm_requests import Interface, founding, joining, merged_spec
from skep.errors import InvalidArgument
from skep.model.node import Availability
from skep.model.swarm import DEFAULT_SWARM_SPEC, DispatcherConfig, InitRequest, JoinRequest, SwarmSpec


def interface(*addresses: str, **facts: bool) -> Interface:
    return Interface(addresses=tuple(map(ip_address, addresses)), **facts)


ONE = {"lo": interface("127.0.0.1", is_loopback=True), "eth0": interface("10.0.0.5", "fe80::1")}


def test_an_init_with_nothing_said_takes_the_only_address():
    found = founding(InitRequest(listen_addr="0.0.0.0:2377"), ONE)
    assert found.endpoints.listen_addr == "0.0.0.0:2377"
    assert found.endpoints.advertise_addr == "10.0.0.5:2377"
    assert found.endpoints.local_addr == "10.0.0.5"
    assert found.availability is Availability.ACTIVE
    assert (found.default_addr_pool, found.subnet_size, found.data_path_port) == (("10.0.0.0/8",), 24, 4789)
    assert found.spec == DEFAULT_SWARM_SPEC


def test_an_interface_can_be_named():
    found = founding(
        InitRequest(listen_addr="eth1:4000", advertise_addr="eth1"), ONE | {"eth1": interface("10.1.0.9")}
    )
    assert found.endpoints.listen_addr == "10.1.0.9:4000"
    assert found.endpoints.advertise_addr == "10.1.0.9:4000"


def test_an_address_of_version_6_stands_in_brackets():
    found = founding(InitRequest(listen_addr="[::]:2377", advertise_addr="fd00::1"), ONE)
    assert found.endpoints.listen_addr == "[::]:2377"
    assert found.endpoints.advertise_addr == "[fd00::1]:2377"


def test_two_addresses_have_to_be_chosen_from():
    two = ONE | {"eth1": interface("10.1.0.9")}
    with pytest.raises(
        InvalidArgument, match=r"different interfaces \(10.0.0.5 on eth0 and 10.1.0.9 on eth1\)"
    ):
        founding(InitRequest(listen_addr="0.0.0.0"), two)


def test_bridges_of_containers_are_not_chosen():
    with_bridge = ONE | {
        "docker0": interface("172.17.0.1", is_ours=True),
        "eth9": interface("10.9.0.9", is_up=False),
    }
    assert founding(InitRequest(listen_addr="0.0.0.0"), with_bridge).endpoints.local_addr == "10.0.0.5"


def test_a_machine_without_an_address_says_so():
    with pytest.raises(InvalidArgument, match="could not find the system's IP address"):
        founding(InitRequest(listen_addr="0.0.0.0"), {})


def test_an_advertised_address_elsewhere_still_has_a_local_one():
    found = founding(InitRequest(listen_addr="0.0.0.0", advertise_addr="192.0.2.7:99"), ONE)
    assert found.endpoints.advertise_addr == "192.0.2.7:99"
    assert found.endpoints.local_addr == "10.0.0.5"


def test_a_join_gives_managers_the_default_port():
    found = joining(
        JoinRequest(listen_addr="0.0.0.0", remote_addrs=("10.0.0.1", "tcp://10.0.0.2:99"), join_token="t"),
        ONE,
    )
    assert found.remote_addrs == ("10.0.0.1:2377", "10.0.0.2:99")
    assert found.endpoints.advertise_addr == ""


def test_a_spec_says_nothing_by_zero():
    merged = merged_spec(SwarmSpec(labels={"a": "b"}, dispatcher=DispatcherConfig(heartbeat_period=7)))
    assert merged.labels == {"a": "b"}
    assert merged.dispatcher.heartbeat_period == 7
    assert merged.raft == DEFAULT_SWARM_SPEC.raft
    assert merged.name == "default"

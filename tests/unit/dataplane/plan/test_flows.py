"""Which flows of host-mode ports and of virtual addresses are stale."""

import socket

import pytest

from skep.dataplane.netns.state import Flow, Tuple
from skep.dataplane.plan.flows import is_stale, is_unaccepted, stale_host_ports
from skep.dataplane.stale_flows import is_local_address
from skep.model.networks.sandbox import PublishedPort
from skep.model.service import PublishMode

SUBNET = "172.18.0.0/16"


def a_port(published: int, target: int, *, protocol: str = "udp", host_ip: str = "") -> PublishedPort:
    return PublishedPort(
        protocol=protocol,
        published_port=published,
        target_port=target,
        publish_mode=PublishMode.HOST,
        host_ip=host_ip,
    )


def a_flow(port: int, backend: str, from_port: int, *, by: str = "192.0.2.1") -> Flow:
    original = Tuple(17, "192.0.2.100", 4000, by, port)
    return Flow(original, Tuple(17, backend, from_port, "192.0.2.100", 4000), b"")


def is_local(address: str) -> bool:
    return address in ("192.0.2.1", "192.0.2.2")


PORTS = (a_port(53, 9953), a_port(53, 9953, host_ip="::"), a_port(80, 80, protocol="tcp"))


@pytest.mark.parametrize(
    ("flow", "when_published", "when_gone"),
    [
        (a_flow(53, "172.18.0.5", 9953), False, True),  # this container
        (a_flow(53, "172.18.0.4", 9953), True, False),  # the container before it
        (a_flow(53, "172.18.0.5", 53), True, True),  # another port of this container
        (a_flow(53, "192.0.2.1", 53), True, True),  # the node: no container had the port
        (a_flow(53, "10.0.0.7", 53), False, False),  # led elsewhere by another program
        (a_flow(53, "8.8.8.8", 53, by="8.8.8.8"), False, False),  # passes through: a query of a container
        (a_flow(53, "172.18.0.4", 53, by="172.18.0.4"), False, False),  # between two containers
        (a_flow(54, "172.18.0.5", 9953), False, False),  # another port
        (a_flow(80, "172.18.0.4", 80), False, False),  # the port is TCP's
    ],
)
def test_flows_lead_to_the_container_that_has_the_port(
    flow: Flow, when_published: bool, when_gone: bool
) -> None:
    published, gone = (
        stale_host_ports(PORTS, "172.18.0.5", SUBNET, is_published=is_published)
        for is_published in (True, False)
    )
    assert (is_stale(flow, published, is_local), is_stale(flow, gone, is_local)) == (
        when_published,
        when_gone,
    )


def test_a_port_on_one_address_says_nothing_about_flows_by_another() -> None:
    ports = (a_port(53, 53, host_ip="192.0.2.1"),)
    stale = stale_host_ports(ports, "172.18.0.5", SUBNET, is_published=True)
    assert is_stale(a_flow(53, "172.18.0.4", 53), stale, is_local)
    assert not is_stale(a_flow(53, "172.18.0.4", 53, by="192.0.2.2"), stale, is_local)


def test_nothing_is_searched_for_containers_without_udp_ports() -> None:
    only_tcp = (a_port(80, 80, protocol="tcp"), a_port(53, 53, host_ip="::"))
    assert stale_host_ports(only_tcp, "172.18.0.5", SUBNET, is_published=True) == ()


def test_only_addresses_of_the_machine_are_local() -> None:
    assert [is_local_address(one) for one in ("127.0.0.1", "192.0.2.77", "2001:db8::7")] == [
        True,
        False,
        False,
    ]


def test_an_address_of_another_machine_is_not_local_where_any_may_be_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``ip_nonlocal_bind``, which keepalived sets, lets sockets bind every address."""
    monkeypatch.setattr(socket.socket, "bind", lambda *_: None)
    assert [is_local_address(one) for one in ("192.0.2.77", "2001:db8::7", "::1")] == [False, False, True]


@pytest.mark.parametrize(
    ("protocol", "is_answered", "backend", "is_found"),
    [
        (6, False, "10.0.1.9", True),
        (6, True, "10.0.1.9", False),  # accepted connections keep their backend
        (6, False, "10.0.1.11", False),  # a present backend
        (17, False, "10.0.1.9", False),  # UDP flows move at once
    ],
)
def test_connections_that_a_removed_backend_has_not_accepted_are_redirected(
    protocol: int, is_answered: bool, backend: str, is_found: bool
) -> None:
    original = Tuple(protocol, "10.0.1.5", 4000, "10.0.1.2", 80)
    flow = Flow(original, Tuple(protocol, backend, 80, "10.0.1.5", 4000), b"", is_answered)
    assert is_unaccepted(flow, {"10.0.1.2": ("10.0.1.11",)}) is is_found
    assert not is_unaccepted(flow, {"10.0.1.3": ("10.0.1.11",)}), "an address of another service"

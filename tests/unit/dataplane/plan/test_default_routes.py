"""Which of a container's networks provides its default routes: ``GwPriority``."""

import pytest
from msgspec.structs import replace

from skep.dataplane.container_network import needs_egress
from skep.dataplane.netns.state import Route
from skep.dataplane.plan.overlay import container_state
from skep.model.networks.sandbox import Endpoint, EndpointConfig, NetworkMode, Sandbox
from skep.model.networks.tables import NetworkHead, ParentLink, Segment
from skep.model.values.ids import NetworkId

GATEWAY = Sandbox(
    netns="/netns",
    address="172.18.0.2",
    prefix_length=16,
    gateway="172.18.0.1",
    interface="eth9",
    address6="fd12::ac12:2",
    gateway6="fd12::1",
)
THROUGH_BRIDGE = {Route("eth9", "0.0.0.0/0", "172.18.0.1"), Route("eth9", "::/0", "fd12::1")}


def on_network(
    number: int, priority: int = 0, *, is_parent: bool = False, is_internal: bool = False
) -> Endpoint:
    head = NetworkHead(
        id=NetworkId(f"n{number}"),
        name=f"n{number}",
        segments=(Segment(f"10.0.{number}.0/24", f"10.0.{number}.1", 0),),
        parent=ParentLink(kind="macvlan", device="dummy0", mode="bridge") if is_parent else None,
        is_internal=is_internal,
    )
    config = EndpointConfig(head=head, addresses=(f"10.0.{number}.5/24",), gw_priority=priority)
    return Endpoint(
        config=config, interface=f"eth{number}", port=f"p{number}", mac_address="02:42:0a:00:00:05"
    )


def default_routes(*endpoints: Endpoint, gateway: Sandbox | None = GATEWAY) -> set[Route]:
    sandbox = replace(gateway or Sandbox(netns="/netns"), endpoints=endpoints)
    networks = {one.network_id: (one.config.head, 1500) for one in endpoints}
    found = container_state(sandbox, networks).routes
    return {route for route in found if route.destination in ("0.0.0.0/0", "::/0")}


def test_the_network_with_the_highest_priority_has_the_default_route() -> None:
    low, high = on_network(1, 5, is_parent=True), on_network(2, 7, is_parent=True)
    assert default_routes(low, high, gateway=None) == {Route("eth2", "0.0.0.0/0", "10.0.2.1")}
    assert default_routes(high, low, gateway=None) == {Route("eth2", "0.0.0.0/0", "10.0.2.1")}


def test_of_equal_priorities_the_first_network_has_it() -> None:
    first, second = on_network(2, is_parent=True), on_network(1, is_parent=True)
    assert default_routes(first, second, gateway=None) == {Route("eth2", "0.0.0.0/0", "10.0.2.1")}


def test_the_gateway_bridge_has_the_priority_of_the_networks_behind_it() -> None:
    macvlan = on_network(1, 1, is_parent=True)
    assert default_routes(on_network(2, 1), macvlan) == THROUGH_BRIDGE
    assert default_routes(on_network(2, 9, is_internal=True), macvlan) == {
        Route("eth1", "0.0.0.0/0", "10.0.1.1"),
        Route("eth9", "::/0", "fd12::1"),
    }, "an internal network has no gateway, and a version of IP without another gateway keeps the bridge"


@pytest.mark.parametrize(
    ("of_bridge", "of_macvlan", "is_needed"), [(0, 0, False), (1, 0, True), (1, 2, False)]
)
def test_a_bridge_network_uses_the_gateway_bridge_unless_another_network_comes_first(
    of_bridge: int, of_macvlan: int, is_needed: bool
) -> None:
    endpoints = [on_network(1, of_macvlan, is_parent=True).config, on_network(2, of_bridge).config]
    assert needs_egress(NetworkMode.NETWORKS, endpoints) is is_needed

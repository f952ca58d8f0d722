"""What the kernel makes of addresses; that it does so is shown on the kernel (test_every_object_is_healed.py)."""

from skep.dataplane.netns.diff import ChangeLink, Put, difference
from skep.dataplane.netns.kernel_made import RULES_4, completed
from skep.dataplane.netns.state import (
    Address,
    EntryKind,
    Link,
    NamespaceState,
    NeighborEntry,
    Route,
    RouteKind,
)
from skep.dataplane.plan.overlay import just_made

LO = Link(name="lo", kind="loopback")
ETH = Link(name="eth0", kind="veth", mac="02:42:0a:00:01:05")
WANTED = completed(
    NamespaceState(links={"lo": LO, "eth0": ETH}, addresses=frozenset({Address("eth0", "10.0.1.5/24")})),
    RULES_4,
)
NETWORK = Route("eth0", "10.0.1.0/24", source="10.0.1.5", is_kernels=True)


def routes_of(*addresses: Address, **sysctls: str) -> set[tuple[RouteKind, str]]:
    names = {f"net/ipv6/conf/eth0/{name}": value for name, value in sysctls.items()}
    state = completed(
        NamespaceState(links={"lo": LO, "eth0": ETH}, addresses=frozenset(addresses), sysctls=names)
    )
    return {(route.kind, route.destination) for route in state.routes}


def test_an_ipv4_address_has_routes_to_its_network_to_itself_and_to_all() -> None:
    assert routes_of(Address("eth0", "10.0.1.5/24")) == {
        (RouteKind.UNICAST, "10.0.1.0/24"),
        (RouteKind.LOCAL, "10.0.1.5/32"),
        (RouteKind.BROADCAST, "10.0.1.255/32"),
    }
    assert routes_of(Address("eth0", "10.0.1.4/31")) == {
        (RouteKind.UNICAST, "10.0.1.4/31"),
        (RouteKind.LOCAL, "10.0.1.4/32"),
    }
    assert routes_of(Address("eth0", "10.0.1.4/32")) == {(RouteKind.LOCAL, "10.0.1.4/32")}


def test_all_of_the_loopback_network_is_local() -> None:
    assert routes_of(Address("lo", "127.0.0.1/8")) == {
        (RouteKind.LOCAL, "127.0.0.1/32"),
        (RouteKind.LOCAL, "127.0.0.0/8"),
        (RouteKind.BROADCAST, "127.255.255.255/32"),
    }


def test_with_ipv6_come_a_link_local_address_and_multicast() -> None:
    own = {(RouteKind.UNICAST, "fd04::/64"), (RouteKind.LOCAL, "fd04::5/128")}
    multicast = {(RouteKind.MULTICAST, "ff00::/8")}
    link_local = {(RouteKind.UNICAST, "fe80::/64"), (RouteKind.LOCAL, "fe80::42:aff:fe00:105/128")}
    address = Address("eth0", "fd04::5/64")
    assert routes_of(address) == own
    assert routes_of(address, disable_ipv6="0") == own | multicast | link_local
    assert routes_of(address, disable_ipv6="0", addr_gen_mode="1") == own | multicast


def test_a_router_answers_to_the_address_of_all_routers() -> None:
    state = NamespaceState(
        links={"eth0": ETH},
        addresses=frozenset({Address("eth0", "fd04::5/64")}),
        sysctls={"net/ipv6/conf/all/forwarding": "1"},
    )
    found = {(route.kind, route.destination) for route in completed(state).routes}
    assert (RouteKind.ANYCAST, "fd04::/128") in found


def test_a_missing_route_of_the_kernels_is_put_back() -> None:
    found = NamespaceState(
        links=WANTED.links, addresses=WANTED.addresses, routes=WANTED.routes - {NETWORK}, rules=RULES_4
    )
    assert difference(WANTED, found, is_exclusive=False) == [Put(NETWORK)]


def test_what_the_kernel_makes_with_an_address_or_a_link_is_left_to_it() -> None:
    bare = NamespaceState(links=WANTED.links, rules=RULES_4)
    assert difference(WANTED, bare, is_exclusive=False) == [Put(Address("eth0", "10.0.1.5/24"))]
    down = NamespaceState(
        links={"lo": LO, "eth0": Link(name="eth0", kind="veth", mac=ETH.mac, is_up=False)},
        addresses=WANTED.addresses,
        rules=RULES_4,
    )
    (change,) = difference(WANTED, down, is_exclusive=False)
    assert isinstance(change, ChangeLink)


def test_missing_rules_come_before_all_routes() -> None:
    found = NamespaceState(links=WANTED.links, addresses=WANTED.addresses, routes=WANTED.routes - {NETWORK})
    assert difference(WANTED, found) == [*(Put(rule) for rule in sorted(RULES_4)), Put(NETWORK)]


def test_a_new_container_is_given_nothing_that_the_kernel_gives_it() -> None:
    puts = [
        one.item
        for one in difference(WANTED, just_made(WANTED, {}), is_exclusive=False)
        if isinstance(one, Put)
    ]
    assert puts == [Address("eth0", "10.0.1.5/24")]


def test_a_bridge_has_an_entry_for_itself():
    links = {
        "br0": Link(name="br0", kind="bridge", mac="02:42:0a:00:01:01"),
        "br1": Link(name="br1", kind="bridge"),
        "eth0": Link(name="eth0", kind="veth", mac="02:42:0a:00:01:05"),
    }
    assert completed(NamespaceState(links=links)).entries == {
        NeighborEntry(EntryKind.OWN, "br0", "02:42:0a:00:01:01")
    }

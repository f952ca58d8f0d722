"""Addresses, ports and rules of the gateway network."""

from collections.abc import Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.addresses import (
    DEFAULT_POOLS,
    Addresses,
    Subnets,
    derived_ipv6,
    free_subnet,
    mac_of,
    pools_or_default,
    unique_local,
)
from skep.dataplane.gateway import gateway_state, stored_subnet
from skep.dataplane.netns.kernel.forwarding import forward_ipv6
from skep.dataplane.netns.nft_table import changes, whole
from skep.dataplane.plan.gateway import HostPort, gateway_table, gateway_table_ipv6
from skep.errors import ResourceExhausted


def first_free(*taken: str, pools: Sequence[Subnets] = DEFAULT_POOLS) -> str:
    return str(free_subnet(map(IPv4Network, taken), pools, IPv4Network))


def test_the_first_subnet_without_a_collision_is_taken() -> None:
    assert first_free("0.0.0.0/0") == "172.18.0.0/16"
    assert first_free("172.18.4.0/24", "172.16.0.0/15", "172.19.0.0/16") == "172.20.0.0/16"


def test_without_a_free_subnet_the_error_says_so() -> None:
    with pytest.raises(
        ResourceExhausted, match=r"address pools have been fully subnetted.*default-address-pools"
    ):
        first_free("172.16.0.0/12", "192.168.0.0/16")


def every_subnet(*routes: str, pools: Sequence[Subnets] = DEFAULT_POOLS) -> list[IPv4Network]:
    """What networks get that are made one after the other."""
    taken, made = [IPv4Network(route) for route in routes], list[IPv4Network]()
    with suppress(ResourceExhausted):
        while len(made) < 1000:
            made.append(free_subnet([*taken, *made], pools, IPv4Network))
    return made


def test_a_node_makes_networks_until_its_pools_are_used_up() -> None:
    made = every_subnet()
    assert [str(one) for one in made[:2]] == ["172.18.0.0/16", "172.19.0.0/16"]
    assert (str(made[14]), str(made[29]), str(made[30])) == (
        "192.168.0.0/20",
        "192.168.240.0/20",
        "172.16.0.0/24",
    )
    assert len(made) == 14 + 16 + 512
    small = [(IPv4Network("10.1.0.0/24"), 26)]
    assert list(map(str, every_subnet(pools=small))) == [f"10.1.0.{first}/26" for first in (0, 64, 128, 192)]


def test_more_than_forty_networks_are_beside_the_routes_of_a_home_or_an_office() -> None:
    routes = [IPv4Network(one) for one in ("0.0.0.0/0", "172.17.0.0/16", "192.168.0.0/16", "10.0.0.0/8")]
    made = every_subnet(*map(str, routes))
    assert len(made) == 14 + 256
    assert len(every_subnet("192.168.1.0/24")) == 14 + 15 + 512 + 15, "all but its own of the first /20"


@given(
    st.lists(
        st.builds(
            lambda address, length: IPv4Network((address, length), strict=False),
            st.integers(int(IPv4Address("172.15.0.0")), int(IPv4Address("172.32.0.0"))),
            st.integers(12, 32),
        ),
        max_size=20,
    )
)
def test_a_chosen_subnet_is_the_first_that_overlaps_nothing(taken: list[IPv4Network]) -> None:
    pools = [(IPv4Network("172.18.0.0/15"), 20)]
    candidates = IPv4Network("172.18.0.0/15").subnets(new_prefix=20)
    wanted = next((one for one in candidates if not any(map(one.overlaps, taken))), None)
    if wanted is None:
        with pytest.raises(ResourceExhausted):
            free_subnet(taken, pools, IPv4Network)
    else:
        assert free_subnet(taken, pools, IPv4Network) == wanted


def test_pools_of_ipv6_alone_leave_those_of_ipv4_as_they_are() -> None:
    six = (IPv6Network("fd00:1::/48"), 64)
    assert pools_or_default([six]) == (six, *DEFAULT_POOLS)
    assert pools_or_default([]) == DEFAULT_POOLS
    four = (IPv4Network("10.1.0.0/16"), 24)
    assert pools_or_default([four]) == [four]


def test_addresses_go_round_and_leave_out_what_is_used() -> None:
    addresses = Addresses(IPv4Network("10.0.0.0/29"))
    assert addresses.gateway == IPv4Address("10.0.0.1")
    taken = [addresses.take(f"c{number}") for number in range(5)]
    assert [str(address) for address in taken] == [f"10.0.0.{number}" for number in range(2, 7)]
    with pytest.raises(ResourceExhausted, match="no address is free"):
        addresses.take("late")
    addresses.release(taken[1], "another owner")
    with pytest.raises(ResourceExhausted):
        addresses.take("late")
    addresses.release(taken[1], "c1")
    assert addresses.take("late") == taken[1]


def test_an_address_just_given_back_is_not_the_next_one() -> None:
    addresses = Addresses(IPv4Network("10.0.0.0/24"))
    first = addresses.take("a")
    addresses.release(first, "a")
    assert addresses.take("b") != first


def test_claimed_addresses_are_not_given_again() -> None:
    addresses = Addresses(IPv4Network("10.0.0.0/24"))
    addresses.claim(IPv4Address("10.0.0.2"), "old")
    assert addresses.take("new") == IPv4Address("10.0.0.3")


def test_the_mac_address_is_dockers() -> None:
    assert mac_of(IPv4Address("172.18.0.2")) == "02:42:ac:12:00:02"


def test_rules_name_each_published_port_once() -> None:
    subnet, port = IPv4Network("172.18.0.0/16"), HostPort("tcp", 8080, "172.18.0.2", 80)
    published, nothing = gateway_table("skep-gw", subnet, [port]), gateway_table("skep-gw", subnet, [])
    text = whole(published)
    assert text.count("tcp . 8080 : 172.18.0.2 . 80") == 1
    assert 'ip saddr 172.18.0.0/16 oifname != "skep-gw" masquerade' in text
    assert changes(nothing, published) == "add element ip skep host_ports { tcp . 8080 : 172.18.0.2 . 80 }\n"
    assert changes(published, nothing) == "delete element ip skep host_ports { tcp . 8080 }\n"
    assert changes(published, published) == ""


def test_a_table_with_other_rules_is_made_anew() -> None:
    old = gateway_table("skep-gw", IPv4Network("172.18.0.0/16"), [])
    new = gateway_table("skep-gw", IPv4Network("172.19.0.0/16"), [])
    assert changes(old, new) == whole(new)


# --- IPv6 -------------------------------------------------------------------------------------------------------------

OURS = unique_local(0x123456789A)


def test_a_unique_local_network_is_one_of_rfc_4193() -> None:
    assert IPv6Network("fd12:3456:789a::/64") == OURS
    assert derived_ipv6(IPv4Address("172.18.0.2"), OURS) == IPv6Address("fd12:3456:789a::ac12:2")


def test_the_way_out_by_ipv6_translates_what_leaves_and_lets_answers_in() -> None:
    text = whole(gateway_table_ipv6("skep-gw", OURS))
    assert 'ip6 saddr fd12:3456:789a::/64 oifname != "skep-gw" masquerade' in text
    forwarded = [
        line.partition(" forward ")[2] for line in text.splitlines() if "rule ip6 skep forward" in line
    ]
    assert forwarded == [
        'oifname != "skep-gw" accept',
        "ct state established,related accept",
        "ct status dnat accept",
        "drop",
    ]


def test_a_node_without_ipv6_users_keeps_its_settings() -> None:
    subnet = IPv4Network("172.18.0.0/16")
    assert not [name for name in gateway_state("skep-gw", subnet, []).sysctls if "ipv6/" in name]
    assert gateway_state("skep-gw", subnet, [], OURS).sysctls["net/ipv6/conf/all/forwarding"] == "1"


def test_a_remembered_subnet_is_kept_until_a_route_collides_with_it(tmp_path: Path) -> None:
    file, fresh = tmp_path / "networks" / "gateway6", iter([OURS, unique_local(1)])
    everywhere = [IPv6Network("::/0")]
    assert stored_subnet(file, everywhere, IPv6Network, lambda: next(fresh)) == OURS
    assert stored_subnet(file, everywhere, IPv6Network, lambda: next(fresh)) == OURS
    colliding = [IPv6Network("fd12:3456::/32")]
    assert stored_subnet(file, colliding, IPv6Network, lambda: next(fresh)) == unique_local(1)
    file.write_text("nonsense")
    assert stored_subnet(file, [], IPv6Network, lambda: OURS) == OURS


def test_a_router_goes_on_taking_routes_and_a_device_that_goes_does_no_harm(tmp_path: Path) -> None:
    for name, accepts in (("wan", "1"), ("never", "0"), ("all", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "accept_ra").write_text(f"{accepts}\n")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "accept_ra").symlink_to(tmp_path / "nothing")
    forward_ipv6(tmp_path)
    found = {name: (tmp_path / name / "accept_ra").read_text().strip() for name in ("wan", "never", "all")}
    assert found == {"wan": "2", "never": "0", "all": "2"}
    assert (tmp_path / "all" / "forwarding").read_text() == "1"

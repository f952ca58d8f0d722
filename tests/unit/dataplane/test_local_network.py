"""Addresses, ports and rules of the gateway network."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.addresses import POOL, Addresses, beside, free_subnet, mac_of, unique_local
from skep.dataplane.gateway import gateway_state, stored_subnet
from skep.dataplane.netns.forwarding import forward_ipv6
from skep.dataplane.netns.nft_table import changes, whole
from skep.dataplane.plan.gateway import HostPort, gateway_table, gateway_table_ipv6
from skep.errors import ResourceExhausted


def test_the_first_subnet_without_a_collision_is_taken() -> None:
    assert free_subnet([IPv4Network("0.0.0.0/0")]) == IPv4Network("172.18.0.0/16")
    taken = [IPv4Network("172.18.4.0/24"), IPv4Network("172.16.0.0/15"), IPv4Network("172.19.0.0/16")]
    assert free_subnet(taken) == IPv4Network("172.20.0.0/16")


def test_without_a_free_subnet_the_error_says_so() -> None:
    with pytest.raises(ResourceExhausted, match="collides with a route"):
        free_subnet([IPv4Network("172.16.0.0/12"), IPv4Network("192.168.0.0/16")])


@given(st.lists(st.sampled_from(POOL), max_size=20))
def test_a_chosen_subnet_never_overlaps(taken: list[IPv4Network]) -> None:
    assert not any(free_subnet(taken).overlaps(network) for network in taken)


def test_addresses_go_round_and_leave_out_what_is_used() -> None:
    addresses = Addresses(IPv4Network("10.0.0.0/29"))
    assert addresses.gateway == IPv4Address("10.0.0.1")
    taken = [addresses.take(f"c{number}") for number in range(5)]
    assert [str(address) for address in taken] == [f"10.0.0.{number}" for number in range(2, 7)]
    with pytest.raises(ResourceExhausted, match="no address is left"):
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
    assert beside(IPv4Address("172.18.0.2"), OURS) == IPv6Address("fd12:3456:789a::ac12:2")


def test_the_way_out_by_ipv6_translates_what_leaves_and_lets_answers_in() -> None:
    text = whole(gateway_table_ipv6("skep-gw", OURS))
    assert 'ip6 saddr fd12:3456:789a::/64 oifname != "skep-gw" masquerade' in text
    forwarded = [
        line.partition(" forward ")[2] for line in text.splitlines() if "rule ip6 skep forward" in line
    ]
    assert forwarded == [
        'oifname != "skep-gw" accept',
        "ct state established,related accept",
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

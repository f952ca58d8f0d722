"""What a user's bridge network is to be, and which addresses are given on it."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import pairwise
from typing import Any

import pytest

from skep.api.errors import Forbidden
from skep.api.formats.networks import IPAMBody, NetworkBody, SubnetBody
from skep.dataplane.addresses import Addresses
from skep.dataplane.local.bridge_request import bridge_of
from skep.dataplane.local.objects import LocalNetwork, flat_form, head_of
from skep.dataplane.plan.gateway import between_table
from skep.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, SkepError, Unimplemented
from skep.model.values.times import ZERO_TIME

TAKEN = (
    *map(IPv4Network, ("172.18.0.0/16", "192.168.1.0/24", "0.0.0.0/0")),
    *map(IPv6Network, ("fd00:2::/64", "::/0")),
)


def made(*subnets: SubnetBody, **words: Any) -> LocalNetwork:
    body = NetworkBody(name="front", ipam=IPAMBody(config=subnets), **words)
    return bridge_of(body, id="f" * 64, created_at=ZERO_TIME, taken=TAKEN)


def test_a_network_gets_the_first_free_subnet() -> None:
    (config,) = made().configs
    assert (config.subnet, config.gateway) == ("172.19.0.0/16", "172.19.0.1")
    head = head_of(made(internal=True))
    assert (head.mtu, head.is_internal, head.segments[0].gateway) == (1500, True, "172.19.0.1")


@pytest.mark.parametrize(
    ("subnet", "error", "said"),
    [
        (SubnetBody(subnet="172.18.4.0/24"), Forbidden, "Pool overlaps with other one"),
        (
            SubnetBody(subnet="10.1.0.0/24", gateway="10.2.0.1"),
            InvalidArgument,
            "no matching subnet for gateway",
        ),
        (
            SubnetBody(subnet="10.1.0.0/24", ip_range="10.2.0.0/28"),
            InvalidArgument,
            "no matching subnet for range",
        ),
        (SubnetBody(subnet="10.1.0.0/31"), InvalidArgument, "too small"),
        (SubnetBody(subnet="fd00::/64"), InvalidArgument, "subnet fd00::/64 needs IPv6"),
    ],
)
def test_a_subnet_that_cannot_be_is_refused(subnet: SubnetBody, error: type[SkepError], said: str) -> None:
    with pytest.raises(error, match=said):
        made(subnet)


def test_a_network_with_ipv6_has_a_subnet_of_each_version() -> None:
    named = SubnetBody(subnet="fd00:1::/64", ip_range="fd00:1::80/121", gateway="fd00:1::fe")
    four, six = made(named, enable_ipv6=True).configs
    assert (four.subnet, four.gateway) == ("172.19.0.0/16", "172.19.0.1")
    assert (six.subnet, six.gateway) == ("fd00:1::/64", "fd00:1::fe")
    network = made(enable_ipv6=True)
    assert [one.subnet for one in network.configs] == ["172.19.0.0/16", "fdff:ffff:ffff::/64"], "of its id"
    assert [one.gateway for one in head_of(network).segments] == ["172.19.0.1", "fdff:ffff:ffff::1"]
    shown = flat_form(made(named, enable_ipv6=True), {})
    assert (shown["EnableIPv6"], shown["IPAM"]["Config"]) == (True, [four, named])


def test_subnets_are_from_the_pools_of_the_node() -> None:
    pools = [(IPv4Network("10.10.0.0/16"), 24), (IPv6Network("fd00:2::/32"), 64)]
    body = NetworkBody(name="front", ipam=IPAMBody(), enable_ipv6=True)
    made = bridge_of(body, id="f" * 64, created_at=ZERO_TIME, taken=TAKEN, pools=pools)
    assert [one.subnet for one in made.configs] == ["10.10.0.0/24", "fd00:2:0:1::/64"]


def test_a_node_has_as_many_networks_as_its_pools_have_subnets() -> None:
    found = list[IPv4Network]()

    def fill() -> None:
        body = NetworkBody(name="front", ipam=IPAMBody())
        while True:
            (config,) = bridge_of(body, id="f" * 64, created_at=ZERO_TIME, taken=found).configs
            found.append(IPv4Network(config.subnet))

    with pytest.raises(ResourceExhausted, match=r"name a subnet \(--subnet\), remove unused networks"):
        fill()
    assert len(found) == 542
    assert not any(one.overlaps(other) for one, other in pairwise(sorted(found)))


@pytest.mark.parametrize(
    ("subnets", "said"),
    [
        (("fd00:2::/80",), "Pool overlaps with other one"),
        (("fd00:1::/64", "fd00:3::/64"), "one IPv4 subnet, and one IPv6 subnet"),
        (("fe80::/64",), "invalid subnet fe80::/64"),
        (("ff02::/64",), "invalid subnet ff02::/64"),
        (("fd00:1::/127",), "too small"),
    ],
)
def test_a_subnet_of_ipv6_that_cannot_be_is_refused(subnets: tuple[str, ...], said: str) -> None:
    with pytest.raises(SkepError, match=said):
        made(*(SubnetBody(subnet=one) for one in subnets), enable_ipv6=True)
    with pytest.raises(SkepError, match="no matching subnet for gateway"):
        made(SubnetBody(subnet="fd00:1::/64", gateway="10.0.0.1"), enable_ipv6=True)
    with pytest.raises(SkepError, match="no matching subnet for range"):
        made(SubnetBody(subnet="fd00:1::/64", ip_range="10.0.0.0/24"), enable_ipv6=True)


def test_options_that_nothing_acts_on_are_refused() -> None:
    with pytest.raises(Unimplemented, match="enable_icc=false"):
        made(options={"com.docker.network.bridge.enable_icc": "false"})
    with pytest.raises(Unimplemented, match="macvlan"):
        made(driver="macvlan")
    with pytest.raises(InvalidArgument, match="mtu"):
        made(options={"com.docker.network.driver.mtu": "9"})


def test_addresses_are_the_requested_ones_or_from_the_pool() -> None:
    addresses = Addresses(
        IPv4Network("10.1.0.0/24"),
        gateway=IPv4Address("10.1.0.254"),
        pool=IPv4Network("10.1.0.8/30"),
        reserved=(IPv4Address("10.1.0.9"),),
    )
    assert [str(addresses.take(name)) for name in "abc"] == ["10.1.0.8", "10.1.0.10", "10.1.0.11"]
    with pytest.raises(ResourceExhausted):
        addresses.take("d")
    assert str(addresses.take_requested(IPv4Address("10.1.0.1"), "d")) == "10.1.0.1"
    for taken in ("10.1.0.1", "10.1.0.9", "10.1.0.254"):
        with pytest.raises(FailedPrecondition, match="Address already in use"):
            addresses.take_requested(IPv4Address(taken), "e")
    for other in (IPv4Address("10.2.0.1"), IPv6Address("::10.1.0.2")):
        with pytest.raises(InvalidArgument, match="It does not belong to any of this network's subnets"):
            addresses.take_requested(other, "e")


def test_addresses_of_ipv6_are_given_in_order_too() -> None:
    addresses = Addresses(IPv6Network("fd00:1::/64"))
    assert [str(addresses.take(name)) for name in "ab"] == ["fd00:1::2", "fd00:1::3"]
    assert str(addresses.take_requested(IPv6Address("fd00:1::4"), "c")) == "fd00:1::4"
    assert str(addresses.take("d")) == "fd00:1::5"
    with pytest.raises(FailedPrecondition, match="Address already in use"):
        addresses.take_requested(IPv6Address("fd00:1::3"), "e")
    addresses.release(IPv6Address("fd00:1::3"), "b")
    assert addresses.take_requested(IPv6Address("fd00:1::3"), "e")


def test_by_the_gateway_only_open_containers_reach_each_other() -> None:
    table = between_table([("vs1", True), ("vs2", False)])
    assert table.elements == {("ports", '"vs1"'), ("open", '"vs1"'), ("ports", '"vs2"')}
    assert [rule for _, rule in table.rules] == [
        "iifname @open oifname @open accept",
        "iifname @ports oifname @ports drop",
    ]


def test_the_addresses_of_nodes_behind_nat_are_refused_as_a_subnet() -> None:
    with pytest.raises(SkepError, match=r"subnet 240\.1\.0\.0/16 overlaps 240\.0\.0\.0/4"):
        made(SubnetBody(subnet="240.1.0.0/16"))

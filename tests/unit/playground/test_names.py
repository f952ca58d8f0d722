"""Names and addresses of a playground."""

import pytest
from hypothesis import given
from hypothesis.strategies import integers

from skep.errors import FailedPrecondition, InvalidArgument
from skep.playground import names


def test_a_namespace_leads_back_to_its_node() -> None:
    assert names.node_of_namespace("demo", names.namespace("demo", "w12")) == "w12"


def test_a_playground_never_takes_what_another_one_made() -> None:
    assert names.node_of_namespace("a", names.namespace("ab", "m1")) is None
    assert names.node_of_namespace("a", "peer-a-m1") is None
    assert names.node_of_cgroup("a", "ab-m1") is None


@pytest.mark.parametrize("name", ["", "a-b", "A", "1a", "a" * 17, "a.b", "../x", names.SWITCH])
def test_a_name_that_could_not_be_read_back_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        names.check_name(name)


def test_nodes_are_numbered_by_role_and_gaps_are_filled() -> None:
    assert names.free_name("worker", ["m1", "w1", "w3"]) == "w2"


def test_nodes_are_spread_over_the_subnets_in_turn() -> None:
    taken: list[str] = []
    for _ in range(4):
        taken.append(names.free_address(taken, subnets=2).ip)
    assert taken == ["192.168.100.11", "192.168.101.11", "192.168.100.12", "192.168.101.12"]


@given(count=integers(1, 300), subnets=integers(1, 5))
def test_no_address_is_given_twice(count: int, subnets: int) -> None:
    taken: set[str] = set()
    for _ in range(min(count, subnets * 200)):
        taken.add(names.free_address(taken, subnets).ip)
    assert len(taken) == min(count, subnets * 200)


def test_a_full_network_is_said_to_be_full() -> None:
    taken = [names.UnderlayAddress(subnet=0, host=host).ip for host in range(2, 255)]
    with pytest.raises(FailedPrecondition, match="full"):
        names.free_address(taken, subnets=1)


def test_an_address_leads_back_to_its_place() -> None:
    address = names.UnderlayAddress(subnet=3, host=42)
    assert names.address_of(address.ip) == address

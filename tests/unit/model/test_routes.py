"""What nodes report of the networks they reach by themselves."""

from ipaddress import ip_network

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.model.networks.routes import (
    ROUTES_LABEL,
    ROUTES_MAX,
    MachineRoute,
    route_overlaps,
    routes_label,
    routes_of,
    routes_of_all,
)
from skep.model.node import EngineDescription, Node
from tests.support.builders import a_node


def reporting(label: str) -> Node:
    node = a_node("n1")
    engine = EngineDescription(engine_version="1", labels={ROUTES_LABEL: label})
    return replace(node, description=replace(node.description, engine=engine))


def a_route(text: str, interface: str = "eth0") -> MachineRoute:
    return MachineRoute(ip_network(text), interface)


def test_a_route_within_another_of_its_interface_is_left_out() -> None:
    routes = [
        a_route("10.0.0.0/16"),
        a_route("10.0.3.0/24"),
        a_route("10.0.3.0/24", "eth1"),
        a_route("fd00::/64"),
    ]
    assert routes_label(routes) == "10.0.0.0/16=eth0 10.0.3.0/24=eth1 fd00::/64=eth0"


def test_of_very_many_routes_the_widest_are_reported() -> None:
    many = [a_route(f"10.{number}.0.0/24") for number in range(100)]
    label = routes_label([*many, a_route("172.16.0.0/12")])
    assert len(label.split()) == ROUTES_MAX
    assert label.startswith("172.16.0.0/12=eth0 ")


def test_what_is_no_route_is_passed_over() -> None:
    node = reporting("nonsense 10.0.0.0/24=eth0 10.0.0.1/24=eth0 0.0.0.0/0=eth0 =")
    assert routes_of(node) == (a_route("10.0.0.0/24"),)


@given(st.text(max_size=300))
def test_any_label_can_be_read(label: str) -> None:
    assert len(routes_of(reporting(label))) <= ROUTES_MAX


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(2, 32)), max_size=20))
def test_reported_routes_cover_all_routes(pairs: list[tuple[int, int]]) -> None:
    routes = [MachineRoute(ip_network(pair, strict=False), "eth0") for pair in pairs]
    reported = routes_of(reporting(routes_label(routes)))
    assert all(any(route.subnet.subnet_of(one.subnet) for one in reported) for route in routes)  # type: ignore[arg-type]


def test_halves_of_everything_say_as_little_as_a_default_route() -> None:
    routes = [a_route("0.0.0.0/1", "tun0"), a_route("128.0.0.0/1", "tun0"), a_route("0.0.0.0/0")]
    assert routes_label(routes) == ""
    assert routes_of(reporting("0.0.0.0/1=tun0 128.0.0.0/1=tun0")) == ()


def test_clashes_name_node_and_interface() -> None:
    (clash,) = route_overlaps(
        [ip_network("10.0.0.0/20"), ip_network("fd00::/64")], [reporting("10.0.1.0/24=eth0")]
    )
    assert str(clash) == "10.0.0.0/20 overlaps with 10.0.1.0/24 on eth0 of node n1"


def test_nodes_that_report_the_same_are_each_named() -> None:
    nodes = [
        reporting("10.0.1.0/24=eth0 10.0.1.128/25=eth1"),
        reporting("10.0.1.0/24=eth0 10.0.1.128/25=eth1"),
    ]
    assert len(route_overlaps([ip_network("10.0.1.128/25")], nodes)) == 4
    assert routes_of_all(nodes) == {ip_network("10.0.1.0/24"), ip_network("10.0.1.128/25")}

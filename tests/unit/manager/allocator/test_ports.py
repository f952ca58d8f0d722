"""Which numbers published ports get."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.allocator.ports import (
    FIRST_DYNAMIC,
    LAST_DYNAMIC,
    PortAllocations,
    PortsExhausted,
    endpoint_for,
)
from skep.model.service import EndpointSpec, PortConfig, PublishMode
from skep.model.values.ids import ServiceId
from tests.support.builders import a_service, a_service_spec


def a_port(
    target: int, published: int = 0, protocol: str = "tcp", mode: PublishMode = PublishMode.INGRESS
) -> PortConfig:
    return PortConfig(target_port=target, published_port=published, protocol=protocol, publish_mode=mode)


def all_free(protocol: str, port: int) -> bool:
    return True


def test_a_port_without_a_number_gets_the_lowest_free_dynamic_one() -> None:
    web = a_service(ports=(a_port(80), a_port(443)))
    endpoint = endpoint_for(web, lambda protocol, port: port != FIRST_DYNAMIC)
    assert [port.published_port for port in endpoint.ports] == [FIRST_DYNAMIC + 1, FIRST_DYNAMIC + 2]


def test_a_port_of_the_cluster_is_given_to_no_service() -> None:
    """The data path port may be configured in the dynamic range."""
    ports = PortAllocations()
    is_free = ports.is_free_for(ServiceId("dns"), lambda: {("udp", FIRST_DYNAMIC): "overlay networks"})
    endpoint = endpoint_for(a_service(ports=(a_port(53), a_port(53, protocol="udp"))), is_free)
    assert [port.published_port for port in endpoint.ports] == [FIRST_DYNAMIC, FIRST_DYNAMIC + 1]


def test_protocols_have_numbers_of_their_own() -> None:
    endpoint = endpoint_for(a_service(ports=(a_port(53), a_port(53, protocol="udp"))), all_free)
    assert [port.published_port for port in endpoint.ports] == [FIRST_DYNAMIC, FIRST_DYNAMIC]


def test_a_number_given_once_is_kept() -> None:
    web = a_service(ports=(a_port(80),))
    web = replace(web, endpoint=endpoint_for(web, lambda protocol, port: port == 30007))
    assert endpoint_for(web, all_free) == web.endpoint
    ports = (a_port(90), a_port(80))
    web = replace(web, spec=replace(web.spec, endpoint_spec=EndpointSpec(ports=ports)))
    assert [port.published_port for port in endpoint_for(web, all_free).ports] == [FIRST_DYNAMIC, 30007]


def test_ports_that_are_alike_keep_their_numbers_in_order() -> None:
    web = a_service(ports=(a_port(80), a_port(80), a_port(90)))
    web = replace(web, endpoint=endpoint_for(web, lambda protocol, port: port % 2 == 1))
    assert [port.published_port for port in web.endpoint.ports] == [30001, 30003, 30005]
    fewer = replace(web, spec=replace(web.spec, endpoint_spec=EndpointSpec(ports=(a_port(90), a_port(80)))))
    assert [port.published_port for port in endpoint_for(fewer, all_free).ports] == [30005, 30001]


def test_host_ports_are_the_nodes_affair() -> None:
    ports = (a_port(80, mode=PublishMode.HOST), a_port(90, 8080, mode=PublishMode.HOST))
    assert endpoint_for(a_service(ports=ports), all_free).ports == ports


def test_a_number_that_the_service_asks_for_itself_is_not_given_to_another_of_its_ports() -> None:
    endpoint = endpoint_for(a_service(ports=(a_port(80), a_port(90, FIRST_DYNAMIC))), all_free)
    assert [port.published_port for port in endpoint.ports] == [FIRST_DYNAMIC + 1, FIRST_DYNAMIC]


def test_a_service_without_ports_has_an_empty_endpoint_whatever_its_mode() -> None:
    web = a_service()
    web = replace(web, spec=replace(web.spec, endpoint_spec=EndpointSpec(mode="vip")))
    assert endpoint_for(web, all_free) == a_service().endpoint


def test_when_no_number_is_left_it_says_so() -> None:
    with pytest.raises(PortsExhausted, match="no free tcp port between 30000 and 32767"):
        endpoint_for(a_service(ports=(a_port(80),)), lambda protocol, port: False)


def test_a_removed_service_holds_no_port() -> None:
    allocations = PortAllocations()
    web = a_service("web", ports=(a_port(80, 8080),))
    allocations.enter(web)
    assert not allocations.is_free_for(a_service("other").id)("tcp", 8080)
    assert allocations.is_free_for(web.id)("tcp", 8080)
    allocations.enter(replace(web, removed_at="2026-01-01T00:00:00Z"))
    assert allocations.is_free_for(a_service("other").id)("tcp", 8080)


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0, 0, 30000, 30001, 80])), max_size=8))
def test_ports_are_unique_and_giving_them_twice_changes_nothing(wanted: list[tuple[int, int]]) -> None:
    allocations = PortAllocations()
    for number, (target, published) in enumerate(wanted):
        id = f"s{number}"
        if published and not allocations.is_free_for(a_service(id).id)("tcp", published):
            continue
        service = a_service(id, spec=a_service_spec(id, ports=(a_port(target, published),)))
        given_endpoint = endpoint_for(service, allocations.is_free_for(service.id))
        (port,) = given_endpoint.ports
        assert allocations.is_free_for(service.id)("tcp", port.published_port)
        assert port.published_port == published or FIRST_DYNAMIC <= port.published_port <= LAST_DYNAMIC
        service = replace(service, endpoint=given_endpoint)
        allocations.enter(service)
        assert endpoint_for(service, allocations.is_free_for(service.id)) == given_endpoint

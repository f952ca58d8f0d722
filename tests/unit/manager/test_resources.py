"""The generic resources of one node: what is free, and what a task takes and gives back."""

import pytest
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.control.validation.service_rules import check_service_spec
from skep.manager.services.resources import GenericStock
from skep.model.service import DiscreteResource, GenericResource, NamedResource, Resources, ServiceSpec
from tests.support.builders import a_service_spec


def gpus(number: int) -> GenericResource:
    return GenericResource(discrete_resource_spec=DiscreteResource(kind="gpu", value=number))


def named(value: str) -> GenericResource:
    return GenericResource(named_resource_spec=NamedResource(kind="gpu", value=value))


def test_what_a_task_takes_is_free_again_when_it_gives_it_back() -> None:
    stock = GenericStock([gpus(2)])
    stock.take([gpus(2)])
    assert not stock.has(gpus(1))
    stock.give_back([gpus(2)])
    assert stock.has(gpus(2))
    assert not stock.has(gpus(3))


def test_a_negative_amount_adds_nothing_to_what_is_free() -> None:
    stock = GenericStock([gpus(2), gpus(-1)])
    assert stock.has(gpus(-5))
    assert stock.chosen([gpus(-5)]) == (gpus(0),)
    stock.take([gpus(-5)])
    assert stock.has(gpus(2))
    assert not stock.has(gpus(3))
    stock.give_back([gpus(-5)])
    assert stock.has(gpus(2))


def test_a_negative_number_of_named_resources_is_none_of_them() -> None:
    stock = GenericStock([named("a"), named("b")])
    assert stock.chosen([gpus(-1)]) == (gpus(0),)
    assert stock.chosen([gpus(1)]) == (named("a"),)


@pytest.mark.parametrize("value", [0, 4, 2**63 - 1])
def test_a_service_may_reserve_any_number(value: int) -> None:
    check_service_spec(a_service_spec(reserve=Resources(generic_resources=(gpus(value),))))


def test_a_service_that_reserves_a_negative_number_is_refused() -> None:
    reserved = Resources(generic_resources=(named("a"), gpus(-5)))
    with pytest.raises(InvalidArgument, match=r"^cannot ask for negative resource gpu$"):
        check_service_spec(a_service_spec(reserve=reserved))


def reserving(kind: str, **labels: str) -> ServiceSpec:
    wanted = GenericResource(discrete_resource_spec=DiscreteResource(kind=kind, value=1))
    spec = a_service_spec(reserve=Resources(generic_resources=(wanted,)))
    container = replace(
        spec.task_template.container_spec, labels={f"skep.{name}": text for name, text in labels.items()}
    )
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))


def test_a_container_gets_reserved_devices_only_with_a_reservation_of_such_devices() -> None:
    check_service_spec(reserving("acme.com/gpu", gpus="reserved"))
    check_service_spec(reserving("acme.com/net", devices="reserved"))
    for kind, labels, example in (
        ("gpu", {"gpus": "reserved"}, "vendor.com/gpu=1"),
        ("acme.com/net", {"gpus": "reserved"}, "vendor.com/gpu=1"),
        ("acme.com/gpu", {"devices": "reserved"}, "vendor.com/class=1"),
        ("acme.com/gpu", {"gpus": "reserved", "devices": "reserved"}, "vendor.com/class=1"),
    ):
        with pytest.raises(InvalidArgument, match=f"needs a reservation .* use --generic-resource {example}"):
            check_service_spec(reserving(kind, **labels))

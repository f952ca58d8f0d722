"""Subnets that are too small for a stack are named before it is deployed."""

from typing import Any

import pytest
from msgspec.structs import replace

from skep.model.service import EndpointSpec, NetworkAttachmentConfig
from skep.stack.address_needs import shortages
from skep.stack.compose.document import FilePosition
from skep.stack.project import Stack, StackNetwork, StackService
from tests.support.builders import a_service_spec

PLACE = FilePosition("compose.yaml", 5, 3)


def a_stack(replicas: int, config: dict[str, Any] | None, *, mode: str = "") -> Stack:
    spec = a_service_spec("shop_web", replicas=replicas)
    template = replace(spec.task_template, networks=(NetworkAttachmentConfig(target="shop_n"),))
    spec = replace(spec, task_template=template, endpoint_spec=EndpointSpec(mode=mode))
    body = {"IPAM": {"Config": [config]}} if config is not None else {}
    network = StackNetwork(place=PLACE, name="shop_n", body=body)
    services = {"web": StackService(place=PLACE, spec=spec)}
    return Stack(name="shop", services=services, networks={"n": network})


def test_a_subnet_that_is_too_small_is_a_warning_with_the_number_of_tasks_that_will_wait() -> None:
    (found,) = shortages(a_stack(10, {"Subnet": "10.99.0.0/29"}), ())
    assert str(found).startswith("compose.yaml:5:3: networks.shop_n: ")
    assert "has 5 addresses, and its services need 11, one for each task and each service." in str(found)
    assert "6 tasks will wait" in str(found)


@pytest.mark.parametrize(
    ("replicas", "config", "mode", "is_short"),
    [
        (4, {"Subnet": "10.99.0.0/29"}, "", False),
        (5, {"Subnet": "10.99.0.0/29"}, "", True),
        (5, {"Subnet": "10.99.0.0/29"}, "dnsrr", False),
        (4, {"Subnet": "10.99.0.0/29", "AuxiliaryAddresses": {"router": "10.99.0.5"}}, "", True),
        (10, {"Subnet": "10.99.0.0/24", "IPRange": "10.99.0.8/29", "Gateway": "10.99.0.1"}, "", True),
        (7, {"Subnet": "10.99.0.0/24", "IPRange": "10.99.0.8/29", "Gateway": "10.99.0.1"}, "", False),
        (1000, None, "", False),
    ],
)
def test_addresses_that_no_task_gets_are_not_counted(
    replicas: int, config: dict[str, Any] | None, mode: str, is_short: bool
) -> None:
    assert bool([*shortages(a_stack(replicas, config, mode=mode), ())]) is is_short


def test_an_existing_network_has_the_subnet_that_a_manager_chose() -> None:
    now = {"Name": "shop_n", "IPAM": {"Config": [{"Subnet": "10.0.3.0/24", "Gateway": "10.0.3.1"}]}}
    assert [*shortages(a_stack(252, None), (now,))] == []
    assert [*shortages(a_stack(253, None), (now,))] != []

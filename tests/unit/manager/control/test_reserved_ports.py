"""A service on a port of the cluster has a right over machines, in ingress and in host mode."""

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.control.validation.new_objects import known_service, machine_rights, reserved_ports
from skep.model.node import ManagerStatus
from skep.model.service import EndpointSpec, PortConfig, PublishMode, Service, ServiceSpec
from skep.model.swarm import Swarm
from skep.model.values.ids import ClusterId, ServiceId
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service_spec
from tests.support.store.store_transactions import put

MODES = pytest.mark.parametrize("mode", list(PublishMode))


def publishing(mode: PublishMode, *ports: tuple[str, int]) -> ServiceSpec:
    found = tuple(
        PortConfig(protocol=protocol, published_port=number, target_port=80, publish_mode=mode)
        for protocol, number in ports
    )
    return replace(a_service_spec("shop_web"), endpoint_spec=EndpointSpec(ports=found))


@MODES
async def test_a_port_of_the_cluster_is_a_right_that_only_administrators_give(mode: PublishMode) -> None:
    view = MemoryStore(SystemClock()).view()
    for protocol, number, use in (
        ("tcp", 22, "SSH"),
        ("tcp", 2377, "managers"),
        ("udp", 4799, "encrypted networks"),
    ):
        spec = publishing(mode, ("tcp", 80), (protocol, number))
        wanted = f"the reserved port {number}/{protocol} ({use})"
        assert machine_rights(view, spec) == wanted
        assert known_service(view, Service(id=ServiceId("web"), spec=spec)).machine_rights == wanted


@MODES
async def test_other_ports_are_everybodys(mode: PublishMode) -> None:
    view = MemoryStore(SystemClock()).view()
    spec = publishing(mode, ("tcp", 80), ("udp", 22), ("tcp", 4789), ("tcp", 0))
    assert machine_rights(view, spec) == ""
    assert machine_rights(view, a_service_spec("shop_web")) == ""


@MODES
async def test_the_ports_that_the_cluster_is_configured_with_are_reserved(mode: PublishMode) -> None:
    store = MemoryStore(SystemClock())
    await store.update(put, Swarm(id=ClusterId("c"), data_path_port=5789))
    manager = a_node("m1")
    engine = replace(manager.description.engine, labels={"skep.reserved-ports": "tcp=8443"})
    description = replace(manager.description, engine=engine)
    status = ManagerStatus(addr="192.0.2.1:5377")
    await store.update(put, replace(manager, description=description, manager_status=status))
    spec = publishing(mode, ("udp", 4789), ("udp", 5789), ("tcp", 8443), ("tcp", 5377))
    assert list(reserved_ports(store.view(), spec)) == [
        "the reserved port 5789/udp (overlay networks)",
        "the reserved port 8443/tcp (a manager)",
        "the reserved port 5377/tcp (managers)",
    ]

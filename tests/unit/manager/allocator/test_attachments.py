"""What a task with networks has to wait for."""

from msgspec.structs import replace

from skep.manager.allocator.attachments import Attached, NotAttached, attachments_for
from skep.model.ids import NetworkId
from skep.model.meta import Driver
from skep.model.network import Network, NetworkSpec
from skep.model.service import NetworkAttachmentConfig, ServiceSpec
from skep.model.task import NetworkAttachment
from tests.builders import a_service_spec


def a_network(driver: str) -> Network:
    spec = NetworkSpec(name=f"my-{driver}", driver_configuration=Driver(name=driver))
    return Network(id=NetworkId(driver), spec=spec)


NETWORKS = {network.id: network for network in (a_network("host"), a_network("overlay"))}


def attached_to(*targets: str) -> ServiceSpec:
    spec = a_service_spec()
    networks = tuple(NetworkAttachmentConfig(target=target, aliases=("db",)) for target in targets)
    return replace(spec, task_template=replace(spec.task_template, networks=networks))


def test_a_task_without_networks_goes_on_at_once() -> None:
    assert attachments_for(a_service_spec(), NETWORKS.get) == Attached()


def test_a_network_of_the_node_needs_nothing_from_the_cluster() -> None:
    wanted = NetworkAttachment(network=NETWORKS[NetworkId("host")], aliases=("db",))
    assert attachments_for(attached_to("host"), NETWORKS.get) == Attached((wanted,))


def test_a_task_waits_for_a_network_that_has_no_addresses_to_give() -> None:
    waiting = attachments_for(attached_to("host", "overlay"), NETWORKS.get)
    assert waiting == NotAttached("network my-overlay is not allocated: no overlay networks yet")


def test_a_task_waits_for_a_network_that_is_not_there() -> None:
    assert attachments_for(attached_to("gone"), NETWORKS.get) == NotAttached("network gone not found")

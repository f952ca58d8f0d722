"""Who holds what, as a new leader finds it and commit by commit."""

from msgspec.structs import replace

from skep.manager.allocator.allocations import Allocations
from skep.manager.allocator.subnets import allocated
from skep.model.network import IPAMConfig, Network
from skep.model.service import Endpoint, EndpointVirtualIP
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import NetworkId
from skep.model.values.meta import Driver
from tests.support.builders import a_docker_node, a_service, a_task, an_overlay

POOLS = ("10.0.0.0/8",)
NET = an_overlay("net1", subnet="10.0.0.0/24")


def with_address(task: Task, address: str) -> Task:
    return replace(task, networks_attachments=(NetworkAttachment(network=NET, addresses=(address,)),))


def subnet_of_the_next(allocations: Allocations) -> str:
    network: Network = allocated(an_overlay("next", subnet=""), allocations.networks, POOLS, 24)
    assert network.ipam_options is not None
    return network.ipam_options.configs[0].subnet


def test_what_services_tasks_and_nodes_hold_is_not_given_again() -> None:
    allocations = Allocations()
    allocations.enter_network(NET)
    virtual_ip = EndpointVirtualIP(network_id=NET.id, addr="10.0.0.2/24")
    allocations.enter_service(replace(a_service(), endpoint=Endpoint(virtual_ips=(virtual_ip,))))
    allocations.enter_task(with_address(a_task("t1"), "10.0.0.3/24"))
    own = (NetworkAttachment(network=NET, addresses=("10.0.0.4/24",)),)
    allocations.enter_node(replace(a_docker_node(), attachments=own))
    assert allocations.allocate("t2", NET) == "10.0.0.5/24"


def test_a_task_gives_its_address_back_when_it_is_seen_to_have_ended() -> None:
    allocations = Allocations()
    task = with_address(a_task("t1"), "10.0.0.2/24")
    assert not allocations.enter_task(task)
    assert not allocations.enter_task(replace(task, desired_state=TaskState.SHUTDOWN))
    assert allocations.addresses.is_used(NET.id)
    assert allocations.enter_task(replace(task, status=replace(task.status, state=TaskState.SHUTDOWN)))
    assert not allocations.addresses.is_used(NET.id)


def test_the_subnet_of_a_removed_network_stays_taken_until_its_last_task_has_ended() -> None:
    allocations = Allocations()
    allocations.enter_network(NET)
    task = with_address(a_task("t1"), "10.0.0.2/24")
    allocations.enter_task(task)
    allocations.leave_network(NET)
    assert subnet_of_the_next(allocations) == "10.0.1.0/24"
    allocations.enter_task(replace(task, status=replace(task.status, state=TaskState.FAILED)))
    assert subnet_of_the_next(allocations) == "10.0.0.0/24"


def test_a_new_leader_finds_the_subnet_of_a_removed_network_in_its_tasks() -> None:
    allocations = Allocations()
    allocations.enter_task(with_address(a_task("t1"), "10.0.0.2/24"))
    assert subnet_of_the_next(allocations) == "10.0.1.0/24"
    allocations.leave_task(a_task("t1").id)
    assert subnet_of_the_next(allocations) == "10.0.0.0/24"


def test_a_new_leader_finds_all_subnets_of_a_removed_network_in_its_latest_task() -> None:
    vxlan_ids = "com.docker.network.driver.overlay.vxlanid_list"
    first = replace(NET, driver_state=Driver(name="overlay", options={vxlan_ids: "4097"}))
    assert NET.ipam_options is not None
    configs = (*NET.ipam_options.configs, IPAMConfig(subnet="10.0.1.0/24", gateway="10.0.1.1"))
    grown = replace(
        first,
        driver_state=Driver(name="overlay", options={vxlan_ids: "4097,4098"}),
        ipam_options=replace(NET.ipam_options, configs=configs),
    )
    allocations = Allocations()
    for id, network, address in (("t1", first, "10.0.0.2/24"), ("t2", grown, "10.0.1.2/24")):
        attachment = NetworkAttachment(network=network, addresses=(address,))
        allocations.enter_task(replace(a_task(id), networks_attachments=(attachment,)))
    assert subnet_of_the_next(allocations) == "10.0.2.0/24"
    assert allocations.networks.has_vxlan_id(4098, but=NetworkId("next"))


def test_a_service_that_goes_gives_its_virtual_address_back() -> None:
    allocations = Allocations()
    virtual_ip = EndpointVirtualIP(network_id=NET.id, addr="10.0.0.2/24")
    service = replace(a_service(), endpoint=Endpoint(virtual_ips=(virtual_ip,)))
    allocations.enter_service(service)
    allocations.leave_service(service.id)
    assert not allocations.addresses.is_used(NET.id)


def test_an_engine_is_counted_until_it_leaves() -> None:
    allocations = Allocations()
    node = a_docker_node()
    allocations.enter_node(node)
    assert allocations.docker_nodes == {node.id}
    allocations.leave_node(node)
    assert allocations.docker_nodes == set()

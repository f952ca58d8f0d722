"""What a task with networks gets, and what it has to wait for."""

from msgspec.structs import replace

from skep.manager.allocator.addresses import AddressAllocations
from skep.manager.allocator.attachments import (
    AttachableNetworks,
    AttachedTask,
    NotAttached,
    attachments_for,
    virtual_ips_for,
    wanted_networks,
)
from skep.model.door.settings import door_network
from skep.model.network import IPAMConfig, Network, NetworkSpec
from skep.model.service import (
    Endpoint,
    EndpointSpec,
    NetworkAttachmentConfig,
    PortConfig,
    PublishMode,
    Service,
    ServiceSpec,
)
from skep.model.task import NetworkAttachment
from skep.model.values.ids import NetworkId, ServiceId
from skep.model.values.meta import Driver
from tests.support.builders import a_service_spec, an_overlay

HOST = Network(id=NetworkId("host"), spec=NetworkSpec(name="host", driver_configuration=Driver(name="host")))
OVERLAY = an_overlay("net1", subnet="10.0.1.0/24")
BARE = an_overlay("bare", subnet="")
INGRESS = an_overlay("ingress", subnet="10.0.0.0/24", ingress=True)
KNOWN = {network.id: network for network in (HOST, OVERLAY, BARE, INGRESS)}
NETWORKS = AttachableNetworks(find=KNOWN.get, failure=lambda _: "all numbers are taken")


def attached_to(*targets: str) -> ServiceSpec:
    spec = a_service_spec()
    networks = tuple(NetworkAttachmentConfig(target=target, aliases=("db",)) for target in targets)
    return replace(spec, task_template=replace(spec.task_template, networks=networks))


def attachments(
    spec: ServiceSpec, networks: AttachableNetworks = NETWORKS, explicit: tuple[NetworkAttachment, ...] = ()
) -> AttachedTask | NotAttached:
    allocations = AddressAllocations()
    return attachments_for(
        spec, networks, lambda network, address: allocations.allocate_all("task", network, address), explicit
    )


def test_a_task_without_networks_goes_on_at_once() -> None:
    assert attachments(a_service_spec()) == AttachedTask()


def test_a_network_of_the_node_needs_nothing_from_the_cluster() -> None:
    assert attachments(attached_to("host")) == AttachedTask(
        (NetworkAttachment(network=HOST, aliases=("db",)),)
    )


def test_on_an_overlay_a_task_has_an_address_of_its_own() -> None:
    expected = NetworkAttachment(network=OVERLAY, addresses=("10.0.1.2/24",), aliases=("db",))
    assert attachments(attached_to("net1")) == AttachedTask((expected,))


def test_a_requested_address_is_given_if_it_is_free() -> None:
    explicit = (NetworkAttachment(network=OVERLAY, addresses=("10.0.1.77",)),)
    given = attachments(attached_to("net1"), explicit=explicit)
    assert isinstance(given, AttachedTask)
    assert given.attachments[0].addresses == ("10.0.1.77/24",)
    outside = (NetworkAttachment(network=OVERLAY, addresses=("10.9.9.9",)),)
    assert attachments(attached_to("net1"), explicit=outside) == NotAttached(
        "address 10.9.9.9 is not in a subnet of network net1", NetworkId("net1")
    )


def test_an_address_of_each_version_is_given_as_requested() -> None:
    assert OVERLAY.ipam_options is not None
    configs = (*OVERLAY.ipam_options.configs, IPAMConfig(subnet="fd00::/64", gateway="fd00::1"))
    dual = replace(OVERLAY, ipam_options=replace(OVERLAY.ipam_options, configs=configs))

    def given(network: Network, *addresses: str) -> AttachedTask | NotAttached:
        explicit = (NetworkAttachment(network=network, addresses=addresses),)
        return attachments(attached_to("net1"), AttachableNetworks(find=lambda _: network), explicit)

    for requested, expected in (
        (("10.0.1.77", "fd00::77"), ("10.0.1.77/24", "fd00::77/64")),
        (("fd00::77",), ("10.0.1.2/24", "fd00::77/64")),
        (("10.0.1.77",), ("10.0.1.77/24", "fd00::2/64")),
    ):
        found = given(dual, *requested)
        assert isinstance(found, AttachedTask)
        assert found.attachments[0].addresses == expected
    assert given(OVERLAY, "fd00::77") == NotAttached(
        "address fd00::77 is not in a subnet of network net1", NetworkId("net1")
    )


def test_a_task_waits_for_a_network_that_has_no_addresses_to_give() -> None:
    assert attachments(attached_to("host", "bare")) == NotAttached(
        "network bare is not allocated: all numbers are taken", NetworkId("bare")
    )


def test_a_task_waits_for_a_network_that_is_not_there() -> None:
    assert attachments(attached_to("gone")) == NotAttached("network gone not found", NetworkId("gone"))


def test_a_task_waits_when_every_address_is_taken() -> None:
    tiny = an_overlay("net1", subnet="10.0.1.0/30")
    networks = AttachableNetworks(find=lambda _: tiny)
    allocations = AddressAllocations()
    allocations.allocate("other", tiny)
    waiting = attachments_for(
        attached_to("net1"), networks, lambda network, _: allocations.allocate_all("task", network)
    )
    assert waiting == NotAttached(
        "no available IPv4 addresses on this network's address pools: net1 (net1)", tiny.id
    )


def test_the_older_list_of_a_services_networks_counts_without_the_newer() -> None:
    older, newer = (NetworkAttachmentConfig(target=NetworkId(name)) for name in ("old", "new"))
    spec = replace(a_service_spec("web"), networks=(older,))
    assert wanted_networks(spec, None) == [older]
    template = replace(spec.task_template, networks=(newer,))
    assert wanted_networks(replace(spec, task_template=template), None) == [newer]


def test_published_ports_attach_a_task_to_the_ingress_network_first_if_needed() -> None:
    port = PortConfig(target_port=80, publish_mode=PublishMode.INGRESS)
    spec = replace(attached_to("net1"), endpoint_spec=EndpointSpec(ports=(port,)))
    with_ingress = attachments(spec, replace(NETWORKS, ingress=INGRESS))
    assert isinstance(with_ingress, AttachedTask)
    assert [one.network and one.network.id for one in with_ingress.attachments] == ["ingress", "net1"]
    without = attachments(spec)
    assert isinstance(without, AttachedTask)
    assert [one.network and one.network.id for one in without.attachments] == ["net1"]


def test_a_service_keeps_its_virtual_address_over_updates() -> None:
    allocations = AddressAllocations()

    def allocate(network: Network, version: int) -> str:
        (address,) = allocations.allocate_all("service", network, ())
        return address

    web = Service(id=ServiceId("web"), spec=attached_to("net1"))
    first = virtual_ips_for(web, NETWORKS, allocate)
    assert [one.addr for one in first] == ["10.0.1.2/24"]
    changed = replace(attached_to("net1", "ingress"), labels={"a": "b"})
    updated = replace(web, spec=changed, endpoint=Endpoint(virtual_ips=first))
    assert virtual_ips_for(updated, NETWORKS, allocate)[0] == first[0]
    round_robin = replace(changed, endpoint_spec=EndpointSpec(mode="dnsrr"))
    assert virtual_ips_for(replace(updated, spec=round_robin), NETWORKS, allocate) == ()


def test_a_service_with_routes_is_also_on_the_network_of_the_front_door() -> None:
    door = replace(OVERLAY, spec=replace(OVERLAY.spec, labels={"skep.door": "true"}))
    assert door_network([replace(OVERLAY, spec=NetworkSpec(name="other")), door]) is door
    routed = replace(attached_to("net1"), labels={"skep.http": "a.example"})
    other = NetworkAttachmentConfig(target=NetworkId("front"))
    front = replace(door, id=NetworkId("front"))
    own = list(routed.task_template.networks)
    assert wanted_networks(routed, None, front) == [*own, other]
    assert wanted_networks(routed, None, None) == own
    assert wanted_networks(attached_to("net1"), None, front) == own
    assert wanted_networks(replace(routed, labels={"skep.http.port": "1"}), None, front)[1:] == [other]
    assert wanted_networks(routed, None, replace(door, id=own[0].target)) == own  # it is on it already

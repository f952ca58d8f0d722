"""Networks of the cluster: creation, growth and removal; a refusal changes nothing."""

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.formats.service_form import settled
from skep.errors import FailedPrecondition, InvalidArgument
from skep.manager.allocator.subnets import NetworkAllocations, allocated, is_allocated
from skep.manager.control.networks import add_subnets, create_network, first_networks, remove_network
from skep.manager.control.services import create_service
from skep.manager.routes.network_answers import used_networks
from skep.model.network import IPAMConfig, IPAMOptions, Network, NetworkSpec
from skep.model.networks.routes import ROUTES_LABEL
from skep.model.node import EngineDescription, Node
from skep.model.service import NetworkAttachmentConfig, NetworkAttachmentSpec, TaskSpec
from skep.model.task import Task
from skep.model.values.ids import NetworkId, NodeId, TaskId, new_id
from skep.model.values.meta import Driver
from skep.model.values.times import Timestamp
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service_spec

NOW = Timestamp("2026-01-02T03:04:05Z")
MTU = "com.docker.network.driver.mtu"
VXLAN_IDS = "com.docker.network.driver.overlay.vxlanid_list"


@pytest.fixture
async def store():
    store = MemoryStore(SystemClock())

    def networks(tx):
        for network in first_networks(new_id=new_id, now=NOW):
            tx.put(network)

    await store.update(networks)
    return store


def a_spec(name: str = "net1", *configs: IPAMConfig, options=None, **fields) -> NetworkSpec:
    return NetworkSpec(
        name=name,
        driver_configuration=Driver(name="overlay", options=options or {}),
        ipam_options=IPAMOptions(driver=Driver(name="default"), configs=configs) if configs else None,
        **fields,
    )


async def create(store, spec: NetworkSpec) -> Network:
    return await store.update(create_network, spec, new_id=new_id, now=NOW)


async def give(store, network: Network) -> Network:
    """As the leader does."""
    book = NetworkAllocations()
    for other in store.view().find(Network):
        book.enter(other)
    return await store.update(lambda tx: tx.put(allocated(network, book, ("10.0.0.0/8",), 24)))


def subnets(network: Network) -> list[str]:
    assert network.ipam_options is not None
    return [config.subnet for config in network.ipam_options.configs]


REFUSED = {
    'failed to parse x: strconv.Atoi: parsing "x": invalid syntax': a_spec(options={MTU: "x"}),
    "invalid MTU value: -1": a_spec(options={MTU: "-1"}),
    "invalid MTU value: 70000": a_spec(options={MTU: "70000"}),
    "invalid MTU value: 1000": a_spec(options={MTU: "1000"}, ipv6_enabled=True),
    'invalid vxlan id value "x" passed': a_spec(options={VXLAN_IDS: "x"}),
    'invalid vxlan id value "" passed': a_spec(options={VXLAN_IDS: ""}),
    'invalid vxlan id value "16777215" passed': a_spec(options={VXLAN_IDS: "16777215"}),  # the probes'
    'invalid vxlan id value "16777216" passed': a_spec(options={VXLAN_IDS: "5,16777216"}),
    "no matching subnet for aux-address 10.9.0.1": a_spec(
        "n", IPAMConfig(subnet="10.8.0.0/24", auxiliary_addresses={"a": "10.9.0.1"})
    ),
    "no matching subnet for aux-address nonsense": a_spec(
        "n", IPAMConfig(subnet="10.8.0.0/24", auxiliary_addresses={"a": "nonsense"})
    ),
    "failed to allocate secondary ip address (a:10.8.0.1): Address already in use": a_spec(
        "n", IPAMConfig(subnet="10.8.0.0/24", gateway="10.8.0.1", auxiliary_addresses={"a": "10.8.0.1"})
    ),
    "multiple overlapping subnet configuration is not supported": a_spec(
        "n", IPAMConfig(subnet="10.8.0.0/24"), IPAMConfig(subnet="10.8.0.0/25")
    ),
    "ipam configuration: invalid subnet 127.0.0.0/8": a_spec("n", IPAMConfig(subnet="127.0.0.0/8")),
    "ipam configuration: invalid subnet 0.0.0.0/0": a_spec("n", IPAMConfig(subnet="0.0.0.0/0")),
    "ipam configuration: subnet 240.1.0.0/16 overlaps 240.0.0.0/4, which nodes behind NAT use: "
    "choose another one": a_spec("n", IPAMConfig(subnet="240.1.0.0/16")),
    "ipam configuration: invalid subnet 224.0.0.0/24": a_spec("n", IPAMConfig(subnet="224.0.0.0/24")),
    "ipam configuration: invalid subnet fd00::%x/64": a_spec("n", IPAMConfig(subnet="fd00::%x/64")),
    "ipam configuration: invalid gateway fd00::1%x": a_spec(
        "n", IPAMConfig(subnet="fd00::/64", gateway="fd00::1%x")
    ),
    "ipam configuration: subnet 10.8.0.0/24 does not contain gateway 10.9.0.1": a_spec(
        "n", IPAMConfig(subnet="10.8.0.0/24", gateway="10.9.0.1")
    ),
    "ipam configuration: subnet 10.8.0.0/31 has no addresses for containers": a_spec(
        "n", IPAMConfig(subnet="10.8.0.0/31")
    ),
    "ipam configuration: subnet 10.8.0.0/24 does not contain range 10.8.0.0/16": a_spec(
        "n", IPAMConfig(subnet="10.8.0.0/24", range="10.8.0.0/16")
    ),
}


@pytest.mark.parametrize("message", REFUSED)
async def test_what_no_node_could_make_is_refused_at_once(store, message):
    before = store.view().find(Network)
    with pytest.raises(InvalidArgument) as refusal:
        await create(store, REFUSED[message])
    assert str(refusal.value) == message
    assert store.view().find(Network) == before


async def test_a_subnet_of_another_network_is_refused_by_that_networks_name(store):
    first = await create(store, a_spec("first", IPAMConfig(subnet="10.8.0.0/24")))
    message = (
        "Pool overlaps with other one on this address space: 10.8.0.0/16 and 10.8.0.0/24 of network first"
    )
    with pytest.raises(FailedPrecondition) as refusal:  # before it is allocated, and after
        await create(store, a_spec("second", IPAMConfig(subnet="10.8.0.0/16")))
    assert str(refusal.value) == message
    await give(store, first)
    with pytest.raises(FailedPrecondition, match="of network first"):
        await create(store, a_spec("second", IPAMConfig(subnet="10.8.0.128/25")))
    assert store.view().find(Network, name="second") == []


async def test_a_vxlan_id_of_another_network_is_refused(store):
    await create(store, a_spec("first", options={VXLAN_IDS: "5"}))
    with pytest.raises(FailedPrecondition, match=r"could not obtain vxlan id 5: .*\(to network first\)"):
        await create(store, a_spec("second", options={VXLAN_IDS: "5"}))


def reaching(name: str, routes: str) -> Node:
    node = a_node(name)
    engine = EngineDescription(engine_version="1", labels={"skep.node": "true", ROUTES_LABEL: routes})
    return replace(node, description=replace(node.description, hostname=name, engine=engine))


async def test_a_subnet_that_a_machine_has_is_refused_by_node_and_interface(store):
    await store.update(lambda tx: tx.put(reaching("n7", "192.168.0.0/16=eth1 10.0.0.0/24=eth0")))
    with pytest.raises(FailedPrecondition) as refusal:
        await create(store, a_spec("net1", IPAMConfig(subnet="10.0.0.0/20")))
    assert "10.0.0.0/20 overlaps with 10.0.0.0/24 on eth0 of node n7" in str(refusal.value)
    assert store.view().find(Network, name="net1") == []
    allowed = a_spec("net1", IPAMConfig(subnet="10.0.0.0/20"), labels={"skep.allow-overlap": "true"})
    assert (await create(store, allowed)).spec.name == "net1"


async def test_a_network_that_chose_its_subnet_keeps_it_when_it_grows(store):
    network = await give(store, await create(store, a_spec()))
    assert subnets(network) == ["10.0.0.0/24"] or subnets(network) == ["10.0.1.0/24"]
    grown = await store.update(add_subnets, network.id, [IPAMConfig(subnet="10.20.0.0/24")])
    assert not is_allocated(grown)
    grown = await give(store, grown)
    assert subnets(grown) == [*subnets(network), "10.20.0.0/24"]
    assert is_allocated(grown)
    ids = grown.driver_state.options[VXLAN_IDS].split(",")
    assert ids[0] == network.driver_state.options[VXLAN_IDS]
    assert len(set(ids)) == 2
    again = await store.update(add_subnets, network.id, [IPAMConfig(subnet="10.20.0.0/24")])
    assert again == grown


async def test_a_network_grows_by_a_subnet_of_the_pools_when_none_is_named(store):
    network = await give(store, await create(store, a_spec("net1", IPAMConfig(subnet="10.20.0.0/24"))))
    grown = await give(store, await store.update(add_subnets, network.id, [IPAMConfig()]))
    assert subnets(grown) == ["10.20.0.0/24", "10.0.0.0/24"]
    grown = await give(store, await store.update(add_subnets, network.id, [IPAMConfig()]))
    assert subnets(grown) == ["10.20.0.0/24", "10.0.0.0/24", "10.0.1.0/24"]


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (IPAMConfig(subnet="10.30.0.0/24"), FailedPrecondition, "of network other"),
        (IPAMConfig(subnet="10.0.0.0/16"), InvalidArgument, "multiple overlapping"),
        (IPAMConfig(subnet="nonsense"), InvalidArgument, "invalid subnet nonsense"),
        (IPAMConfig(subnet="fd00::/64"), InvalidArgument, "without IPv6"),
        (IPAMConfig(gateway="10.9.0.1"), InvalidArgument, "must have a corresponding subnet"),
    ],
)
async def test_a_network_does_not_grow_into_what_cannot_be(store, config, error, words):
    await create(store, a_spec("other", IPAMConfig(subnet="10.30.0.0/24")))
    network = await give(store, await create(store, a_spec()))
    with pytest.raises(error, match=words):
        await store.update(add_subnets, network.id, [config])
    assert store.view().get(Network, network.id) == network


async def test_a_network_in_use_names_its_users(store):
    network = await create(store, a_spec(attachable=True))
    await store.update(lambda tx: tx.put(a_node("n1")))
    container = Task(
        id=TaskId("t1"),
        node_id=NodeId("n1"),
        spec=TaskSpec(
            network_attachment_spec=NetworkAttachmentSpec(container_id="c" * 64),
            networks=(NetworkAttachmentConfig(target=network.id),),
        ),
    )
    await store.update(lambda tx: tx.put(container))
    spec = a_service_spec("web")
    attached = replace(
        spec,
        task_template=replace(spec.task_template, networks=(NetworkAttachmentConfig(target=network.id),)),
    )
    service = await store.update(create_service, settled(attached), new_id=new_id, new_name=str, now=NOW)
    with pytest.raises(FailedPrecondition) as refusal:
        await store.update(remove_network, NetworkId(network.id))
    assert str(refusal.value) == (
        f"network {network.id} is in use by service {service.id} (service web, container cccccccccccc on node n1)"
    )


async def test_the_network_of_the_front_door_stays_while_a_service_has_routes(store):
    door = await create(store, a_spec("skep-door", labels={"skep.door": "true"}))
    spec = replace(a_service_spec("web"), labels={"skep.http": "a.example"})
    service = await store.update(create_service, settled(spec), new_id=new_id, new_name=str, now=NOW)
    assert used_networks(store.view()) == {door.id}
    with pytest.raises(FailedPrecondition) as refusal:
        await store.update(remove_network, door.id)
    assert str(refusal.value) == f"network {door.id} is in use by service {service.id} (web)"
    await store.update(lambda tx: tx.put(replace(service, spec=replace(spec, labels={}))))
    await store.update(remove_network, door.id)

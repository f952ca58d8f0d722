"""Address pools are changed after a cluster's begin."""

from random import Random

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition, InvalidArgument, NotFound, SkepError, Unavailable
from skep.manager.allocator.changes import apply, network_key
from skep.manager.allocator.state import AllocatorState
from skep.manager.control.pools import PoolChange, change_pools
from skep.model.network import IPAMConfig, IPAMOptions, Network
from skep.model.networks.routes import ROUTES_LABEL
from skep.model.node import Node
from skep.model.swarm import Swarm
from skep.model.values.ids import ClusterId
from skep.model.values.meta import Driver
from skep.model.values.times import Timestamp
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, an_overlay

NOW = Timestamp("2026-01-02T03:04:05Z")


@pytest.fixture
async def store() -> MemoryStore:
    """A cluster with two pools, a network from the first, and one with a subnet that its user named in the second."""
    store = MemoryStore(SystemClock())
    automatic = an_overlay("auto", subnet="10.1.0.0/24")
    named = an_overlay("named", subnet="10.2.0.0/24")
    options = IPAMOptions(driver=Driver(name="default"), configs=(IPAMConfig(subnet="10.2.0.0/24"),))
    named = replace(named, spec=replace(named.spec, ipam_options=options))
    await store.update(
        lambda tx: [
            tx.put(one)
            for one in (
                Swarm(id=ClusterId("c"), default_addr_pool=("10.1.0.0/16", "10.2.0.0/16"), subnet_size=24),
                automatic,
                named,
                a_routed_node("m1", "172.20.0.0/14=eth0"),
            )
        ]
    )
    assert store.view().find(Network)
    return store


def a_routed_node(name: str, routes: str) -> Node:
    node = a_node(name)
    engine = replace(node.description.engine, labels={ROUTES_LABEL: routes})
    return replace(node, description=replace(node.description, hostname=name, engine=engine))


async def changed(store: MemoryStore, **change: object) -> Swarm:
    return await store.update(change_pools, PoolChange(**change))  # type: ignore[arg-type]


async def test_pools_are_added_and_removed_and_the_size_is_set(store):
    after = await changed(store, add=("10.3.0.0/16",), remove=("10.2.0.0/16",), subnet_size=26)
    assert after.default_addr_pool == ("10.1.0.0/16", "10.3.0.0/16")
    assert after.subnet_size == 26


async def test_a_pool_in_use_is_not_removed_and_its_networks_are_named(store):
    with pytest.raises(FailedPrecondition, match=r"10\.1\.0\.0/16 is in use by networks: auto$"):
        await changed(store, remove=("10.1.0.0/16",))
    await changed(store, remove=("10.2.0.0/16",))  # its network's user named the subnet


async def test_a_manager_that_is_behind_does_not_remove_a_pool_in_use(store):
    behind = MemoryStore(SystemClock(), store.cluster)
    behind.faults.lag_s = 0.05
    await store.update(lambda tx: tx.put(an_overlay("late", subnet="10.2.1.0/24")))
    assert len(behind.view().find(Network)) == 2, "the case that is to be tested"
    with pytest.raises(FailedPrecondition, match=r"10\.2\.0\.0/16 is in use by networks: late$"):
        await changed(behind, remove=("10.2.0.0/16",))


async def test_a_network_gets_no_subnet_of_a_pool_that_was_removed_since_the_decision(store):
    new = an_overlay("new", subnet="")
    await store.update(lambda tx: tx.put(new))
    state = AllocatorState(store.view, SystemClock(), Random(1))
    for _ in state.start(store.view()):
        pass
    (change,) = state.subnets(network_key(new.id))
    assert change.network.ipam_options.configs[0].subnet == "10.1.1.0/24"
    await store.update(lambda tx: tx.delete(Network, store.view().resolve(Network, "auto").id))
    await changed(store, remove=("10.1.0.0/16",))
    with pytest.raises(Unavailable, match="address pools have changed"):
        await store.update(apply, change, NOW)


async def test_adding_a_pool_that_is_there_changes_nothing(store):
    before = store.view().find(Swarm)[0]
    assert (await changed(store, add=("10.1.0.0/16",))).default_addr_pool == before.default_addr_pool


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"add": ("10.1.128.0/17",)}, InvalidArgument, r"overlaps address pool 10\.1\.0\.0/16"),
        ({"add": ("10.3.0.0/16", "10.3.1.0/24")}, InvalidArgument, r"overlaps address pool 10\.3\.0\.0/16"),
        ({"add": ("172.21.0.0/16",)}, InvalidArgument, "which node m1 reaches by eth0"),
        ({"add": ("10.3.0.0",)}, InvalidArgument, "expected an IPv4 subnet"),
        ({"add": ("fd00::/64",)}, InvalidArgument, "expected an IPv4 subnet"),
        ({"add": ("10.3.0.0/25",)}, InvalidArgument, "Subnet size is too small for pool: 24"),
        ({"subnet_size": 30}, InvalidArgument, "subnet size is out of range: 30"),
        ({"subnet_size": 15}, InvalidArgument, "Subnet size is too small for pool: 15"),
        ({"remove": ("10.9.0.0/16",)}, NotFound, "not an address pool of the cluster"),
        ({"add": tuple(f"10.{n}.0.0/16" for n in range(3, 70))}, InvalidArgument, "at most 64"),
        ({"add": ("10.3.0.0/16",) * 10_000}, InvalidArgument, "at most 64"),
    ],
)
async def test_what_cannot_be_is_refused_and_nothing_changes(store, change, error, message):
    before = store.view().find(Swarm)
    with pytest.raises(error, match=message):
        await changed(store, **change)
    assert store.view().find(Swarm) == before


async def test_the_last_pool_stays(store):
    await store.update(lambda tx: [tx.delete(Network, one.id) for one in tx.find(Network)])
    with pytest.raises(SkepError, match="needs an address pool"):
        await changed(store, remove=("10.1.0.0/16", "10.2.0.0/16"))

"""Records of failover addresses: what is written only if nothing has changed, and which addresses are refused."""

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, SkepError
from skep.manager.control.networks import create_network
from skep.manager.control.pools import PoolChange, change_pools
from skep.manager.failover.decision import (
    DoorNodes,
    Seen,
    decide,
    door_services,
    holders_in,
    observed,
    why_unheld,
)
from skep.manager.failover.editing import add_address, remove_address, shown_addresses
from skep.manager.failover.records import (
    ADDRESSES_ID,
    AddressRefusal,
    FailoverAddress,
    FailoverAddresses,
    HolderChange,
    Renewals,
    addresses_in,
    apply_report,
    change_holder,
    orders_for,
    renewals_in,
)
from skep.manager.journal.changes import entries_of
from skep.manager.telemetry.events import messages_of
from skep.model.door.settings import DOOR
from skep.model.network import IPAMConfig, IPAMOptions, Network, NetworkSpec
from skep.model.networks.failover import ADDRESSES_MAX, LEASE_S, SILENT, UNASKED, AddressRequest
from skep.model.node import Availability, NodeState
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.values.ids import ClusterId, NetworkId, NodeId, new_id
from skep.model.values.meta import Driver
from skep.model.values.times import SECOND_NS, timestamp
from skep.store.interface import Transaction
from skep.store.kinds import Payload, write_record
from skep.store.level import LEVEL
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.store.damage_rigs import damage

ONE, TWO = NodeId("n1"), NodeId("n2")
ADDRESS = "10.0.0.100"
ANY = DoorNodes({ONE: (), TWO: ()})


async def a_store(*texts: str) -> MemoryStore:
    store = MemoryStore(SystemClock())

    def begin(tx: Transaction) -> None:
        tx.raise_level(LEVEL)
        tx.put(a_node("n1"))

    await store.update(begin)
    for text in texts:
        await store.update(add_address, AddressRequest(address=text))
    return store


async def named(store: MemoryStore, node_id: NodeId = ONE) -> int:
    """Name a node for the address, and return the epoch."""
    epoch = addresses_in(store.view()).addresses[0].epoch
    change = HolderChange(address=ADDRESS, epoch=epoch, node_id=node_id)
    assert await store.update(change_holder, change, 1, 0)
    return addresses_in(store.view()).addresses[0].epoch


async def test_a_holder_that_has_renewed_meanwhile_stays() -> None:
    store = await a_store(f"{ADDRESS}/24")
    epoch = await named(store)
    await store.update(apply_report, ONE, {ADDRESS: epoch}, [], 1, 0)
    seen = renewals_in(store.view(), ONE)
    await store.update(apply_report, ONE, {ADDRESS: epoch}, [], 1, 0)
    change = HolderChange(address=ADDRESS, epoch=epoch, renewals=seen, is_over=True, node_id=TWO)
    assert not await store.update(change_holder, change, 1, 0)
    assert orders_for(store.view(), ONE, 1)


async def test_a_former_holder_renews_nothing() -> None:
    store = await a_store(f"{ADDRESS}/24")
    epoch = await named(store)
    change = HolderChange(address=ADDRESS, epoch=epoch, renewals=Renewals(), is_over=True, node_id=TWO)
    assert await store.update(change_holder, change, 1, 0)
    assert await store.update(apply_report, ONE, {ADDRESS: epoch}, [], 1, 0) == {}
    assert await store.update(apply_report, TWO, {ADDRESS: epoch}, [], 1, 0) == {}
    assert await store.update(apply_report, TWO, {ADDRESS: epoch + 1}, [], 1, 0) == {ADDRESS: epoch + 1}


async def test_a_holder_that_was_asked_renews_until_it_has_released() -> None:
    """Its hook may need longer than a lease."""
    store = await a_store(f"{ADDRESS}/24")
    epoch = await named(store)
    assert await store.update(change_holder, HolderChange(address=ADDRESS, epoch=epoch, asks=True), 1, 0)
    assert await store.update(apply_report, ONE, {ADDRESS: epoch}, [], 1, 0) == {ADDRESS: epoch}
    (order,) = orders_for(store.view(), ONE, 1)
    assert order.is_leaving
    await store.update(apply_report, ONE, {}, [(ADDRESS, epoch, "")], 1, 0)
    assert orders_for(store.view(), ONE, 1) == ()


async def test_an_earlier_incarnation_gives_no_orders() -> None:
    store = await a_store(f"{ADDRESS}/24")
    epoch = await named(store)
    assert orders_for(store.view(), ONE, 2) == ()
    assert await store.update(apply_report, ONE, {ADDRESS: epoch}, [], 2, 0) == {}


def test_a_refusing_node_is_not_named_again_for_some_time() -> None:
    refused = FailoverAddress(
        address=ADDRESS, prefix=24, refusals={ONE: AddressRefusal(reason="no interface", at_ns=0)}
    )
    record = FailoverAddresses(addresses=(refused,))
    (change,) = decide(record, {}, ANY, 0.0, SECOND_NS).changes
    assert change.node_id == TWO
    alone = decide(record, {}, DoorNodes({ONE: ()}), 0.0, SECOND_NS)
    assert alone.changes == ()
    assert alone.look_at == 29.0
    (change,) = decide(record, {}, DoorNodes({ONE: ()}), 0.0, 31 * SECOND_NS).changes
    assert change.node_id == ONE


def test_a_node_that_was_away_is_named_again_soon() -> None:
    away = FailoverAddress(address=ADDRESS, prefix=24, refusals={ONE: AddressRefusal(reason=SILENT, at_ns=0)})
    record = FailoverAddresses(addresses=(away,))
    assert decide(record, {}, DoorNodes({ONE: ()}), 0.0, 4 * SECOND_NS).changes == ()
    assert decide(record, {}, DoorNodes({ONE: ()}), 0.0, 6 * SECOND_NS).changes


def test_a_silent_holder_stays_if_nobody_else_could_hold_the_address() -> None:
    record = FailoverAddresses(addresses=(FailoverAddress(address=ADDRESS, prefix=24, node_id=ONE, epoch=1),))
    seen = {ADDRESS: Seen(1, Renewals(), 0.0)}
    assert decide(record, seen, DoorNodes({ONE: ()}), LEASE_S, 0).changes == ()
    (change,) = decide(record, seen, ANY, LEASE_S, 0).changes
    assert (change.node_id, change.is_over) == (TWO, True)


def test_a_renewal_counts_from_when_it_was_first_seen() -> None:
    record = FailoverAddresses(addresses=(FailoverAddress(address=ADDRESS, prefix=24, node_id=ONE, epoch=1),))
    first = observed({}, record, {}, 1.0)
    assert observed(first, record, {}, 2.0) == first
    assert observed(first, record, {ONE: Renewals(count=1)}, 3.0)[ADDRESS].at == 3.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("web", "invalid address"),
        ("10.0.0.100/33", "invalid address"),
        ("10.0.0.0/24", "cannot be the address"),
        ("10.0.0.255/24", "cannot be the address"),
        ("127.0.0.1", "cannot be the address"),
        ("fe80::1/64", "cannot be the address"),
        ("127.0.0.1/8", "cannot be the address"),
        ("10.9.0.7/24", "in the subnet 10.9.0.0/24 of network web"),
    ],
)
async def test_addresses_that_are_refused(text: str, words: str) -> None:
    store = await a_store()
    options = IPAMOptions(configs=(IPAMConfig(subnet="10.9.0.0/24"),))
    network = Network(
        id=NetworkId("net"), spec=NetworkSpec(name="web", ipam_options=options), ipam_options=options
    )
    await store.update(lambda tx: tx.put(network))
    with pytest.raises(InvalidArgument, match=words):
        await store.update(add_address, AddressRequest(address=text))


async def test_no_network_and_no_pool_gets_an_address_that_exists_already() -> None:
    """An address in one of them is refused, so the order of the commands does not matter."""
    store = await a_store("10.9.0.7/24")
    options = IPAMOptions(driver=Driver(name="default"), configs=(IPAMConfig(subnet="10.9.0.0/24"),))
    spec = NetworkSpec(name="web", driver_configuration=Driver(name="overlay"), ipam_options=options)
    with pytest.raises(FailedPrecondition, match=r"10\.9\.0\.0/24 and a failover address"):
        await store.update(create_network, spec, new_id=new_id, now=timestamp(0))
    swarm = Swarm(id=ClusterId("c"), default_addr_pool=("10.1.0.0/16",), subnet_size=24)
    await store.update(lambda tx: tx.put(swarm))
    with pytest.raises(InvalidArgument, match=r"10\.9\.0\.0/16 has the failover address 10\.9\.0\.7"):
        await store.update(change_pools, PoolChange(add=("10.9.0.0/16",)))
    await store.update(remove_address, "10.9.0.7")
    await store.update(create_network, spec, new_id=new_id, now=timestamp(0))


async def test_an_address_of_a_node_is_refused_by_name() -> None:
    store = await a_store()
    node = a_node("n7")
    await store.update(lambda tx: tx.put(replace(node, status=replace(node.status, addr="10.0.0.7"))))
    with pytest.raises(InvalidArgument, match="is an address of node n7"):
        await store.update(add_address, AddressRequest(address="10.0.0.7/24"))


@pytest.mark.parametrize("name", ["a/b", "a b", "sixteen-letters.", "..", "eth0:1", "é"])
async def test_names_of_interfaces_are_checked(name: str) -> None:
    store = await a_store()
    with pytest.raises(InvalidArgument, match="invalid name of an interface"):
        await store.update(add_address, AddressRequest(address=ADDRESS, interface=name))


async def test_an_address_exists_once_in_every_spelling() -> None:
    store = await a_store("fd00::1/64")
    with pytest.raises(AlreadyExists):
        await store.update(add_address, AddressRequest(address="fd00:0::1/64"))
    await store.update(remove_address, "FD00::1")
    assert shown_addresses(store.view()) == []
    with pytest.raises(NotFound):
        await store.update(remove_address, "fd00::1")


async def test_a_held_address_cannot_be_added_again_during_its_removal() -> None:
    store = await a_store(f"{ADDRESS}/24")
    await named(store)
    await store.update(remove_address, ADDRESS)
    with pytest.raises(FailedPrecondition, match="being removed"):
        await store.update(add_address, AddressRequest(address=f"{ADDRESS}/24"))


async def test_the_number_of_addresses_is_limited() -> None:
    store = await a_store(*(f"10.0.1.{n + 1}/24" for n in range(ADDRESSES_MAX)))
    with pytest.raises(SkepError, match="at most"):
        await store.update(add_address, AddressRequest(address="10.0.2.1/24"))


async def test_events_and_history_tell_of_each_move() -> None:
    store = await a_store(f"{ADDRESS}/24")
    await store.update(lambda tx: tx.put(a_node("n2")))
    async with store.watch(Payload) as watch:
        epoch = await named(store)
        change = HolderChange(
            address=ADDRESS, epoch=epoch, renewals=Renewals(), is_over=True, node_id=TWO, reason=SILENT
        )
        await store.update(change_holder, change, 1, 0)
        await store.update(apply_report, TWO, {}, [(ADDRESS, epoch + 1, "")], 1, 0)
        events = [event for commit in watch.waiting() for event in commit.events]
    messages = [one for event in events for one in messages_of(event, 0, store.view())]
    told = [
        (one.action, one.actor.attributes["node"], one.actor.attributes["formerNode"]) for one in messages
    ]
    assert told == [("take", "n1", ""), ("take", "n2", "n1"), ("release", "", "n2")]
    entries = [one.message for event in events for one in entries_of(event, store.view())]
    assert entries == [
        "n1 takes failover address 10.0.0.100",
        "n2 takes failover address 10.0.0.100 from n1: it was silent",
        f"n2 gives up failover address 10.0.0.100: {UNASKED}",
    ]


async def test_what_is_shown_of_an_address() -> None:
    store = await a_store(f"{ADDRESS}/24")

    def shown() -> tuple[str, str]:
        (one,) = shown_addresses(store.view())
        return one.state, one.reason

    assert shown() == ("unheld", "no active node runs the front door: run skep door up")
    epoch = await named(store)
    assert shown() == ("moving", "n1 takes it")
    await store.update(apply_report, ONE, {ADDRESS: epoch}, [], 1, 0)
    assert shown() == ("held", "")
    await store.update(lambda tx: tx.put(a_node("n1", state=NodeState.DOWN)))
    assert shown()[0] == "unheld"
    assert shown()[1].startswith("n1 is down, and no other node can take it")
    await store.update(lambda tx: tx.put(a_node("n1")))
    await store.update(change_holder, HolderChange(address=ADDRESS, epoch=epoch, asks=True), 1, 0)
    assert shown() == ("moving", "n1 releases it")


def test_reasons_name_the_next_step() -> None:
    one = FailoverAddress(
        address=ADDRESS, prefix=24, refusals={ONE: AddressRefusal(reason="its interface is down", at_ns=0)}
    )
    far = DoorNodes({ONE: (ip_network("10.7.0.0/24"),)})
    assert "name an interface with --interface" in why_unheld(one, far, {})
    paused = DoorNodes({ONE: ()}, frozenset({ONE}))
    assert why_unheld(one, paused, {}) == "all nodes with the front door are paused: activate one"
    assert why_unheld(one, DoorNodes({ONE: ()}), {ONE: "w1"}) == "w1: its interface is down"


@given(st.floats(0.0, 1e6))
def test_a_look_at_the_end_of_a_lease_finds_it_over(at: float) -> None:
    one = FailoverAddress(address=ADDRESS, prefix=24, node_id=ONE, epoch=1, is_leaving=True, is_removed=True)
    record, seen = FailoverAddresses(addresses=(one,)), {ADDRESS: Seen(1, Renewals(), at)}
    first = decide(record, seen, ANY, at, 0)
    assert not first.changes
    assert first.look_at is not None
    (change,) = decide(record, seen, ANY, first.look_at, 0).changes
    assert change.is_over


async def test_a_holder_keeps_its_address_while_the_service_of_the_front_door_cannot_be_read() -> None:
    store = MemoryStore(SystemClock())
    spec = replace(a_service_spec("door", is_global=True), labels={DOOR: "true"})
    door = a_service("door", spec=spec)
    held = FailoverAddress(address="10.0.0.100", prefix=24, node_id=NodeId("n1"), epoch=7)

    def write(tx: Transaction) -> None:
        for one in (door, a_node("n1"), a_node("n2"), a_task("t1", node="n1", service=door, slot=0)):
            tx.put(one)
        write_record(tx, ADDRESSES_ID, FailoverAddresses(addresses=(held,)))

    await store.update(write)
    damage(store.cluster, "service", door.id, "")
    view = MemoryStore(SystemClock(), store.cluster).view()
    assert view.unreadable(Service)
    record, holders = addresses_in(view), holders_in(view, door_services(view.find(Service)))
    seen = observed({}, record, {}, 0.0)
    assert decide(record, seen, holders, 1.0, 1).changes == (), "it serves, and no other node can be named"
    down = replace(a_node("n1"), spec=replace(a_node("n1").spec, availability=Availability.DRAIN))
    await store.update(lambda tx: tx.put(down))
    view = MemoryStore(SystemClock(), store.cluster).view()
    holders = holders_in(view, door_services(view.find(Service)))
    assert [one.asks for one in decide(record, seen, holders, 1.0, 1).changes] == [True]

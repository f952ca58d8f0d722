"""Failover addresses with real managers and nodes on virtual time: never held twice, and moved in time."""

import asyncio

import pytest

from skep.model.networks.failover import (
    ANSWER_S_MAX,
    DRIFT,
    KERNEL_LATE_S,
    KERNEL_S,
    LEASE_S,
    RENEWAL_S,
)
from skep.model.node import Availability
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from tests.support.harness.clocks import on_virtual_time
from tests.support.managers.failover_rig import ADDRESS, MANAGERS, FailoverRig

MOVED_S_MAX = 3.0
"""Seconds after the death of a node within which another one has its address."""


def rig(nodes: tuple[str, ...] = ("n1", "n2"), *, seed: int = 0, drift: float = 0.0) -> FailoverRig:
    loop = asyncio.get_running_loop()
    return FailoverRig(loop, nodes, seed=seed, drift=drift)  # type: ignore[arg-type]


def test_the_times_fit_together() -> None:
    longest_s = (ANSWER_S_MAX + KERNEL_S + KERNEL_LATE_S) * (1 + DRIFT)
    assert longest_s <= LEASE_S * (1 - DRIFT)


@on_virtual_time
async def test_one_node_holds_an_address() -> None:
    async with rig() as cluster:
        await cluster.add()
        holder = await cluster.wait_held(within_s=0.5)
        await asyncio.sleep(60)
        assert cluster.holder() == holder
        assert [one[2] for one in cluster.truth.moves] == [holder]
        (shown,) = cluster.shown()
        assert (shown.state, shown.hostname, shown.reason) == ("held", holder, "")
        assert not cluster.violations


@pytest.mark.parametrize("how", ["killed", "frozen", "cut off"])
def test_another_node_has_the_address_within_three_seconds(how: str) -> None:
    @on_virtual_time
    async def run() -> None:
        async with rig() as cluster:
            await cluster.add()
            first = await cluster.wait_held()
            await asyncio.sleep(1.234)
            if how == "killed":
                await cluster.kill(first)
            elif how == "frozen":
                cluster.links.freeze(first)
            else:
                cluster.links.cut([first], MANAGERS)
            began = cluster.loop.time()
            await cluster.wait_held(first)
            assert cluster.loop.time() - began <= MOVED_S_MAX
            cluster.links.thaw(first)
            cluster.links.restore()
            await asyncio.sleep(20)
            assert cluster.holder() not in ("", first)
            assert not cluster.violations

    run()


@on_virtual_time
async def test_the_leaders_machine_is_lost_as_well() -> None:
    async with rig() as cluster:
        await cluster.add()
        first = await cluster.wait_held()
        cluster.stores["m1"].partition()
        cluster.links.cut([first, "m1"], ["m2", "m3", *cluster.nodes], both_ways=True)
        began = cluster.loop.time()
        await cluster.wait_held(first)
        assert cluster.loop.time() - began <= MOVED_S_MAX + 0.3
        assert not cluster.violations


@on_virtual_time
async def test_a_drain_moves_the_address_at_once() -> None:
    async with rig() as cluster:
        await cluster.add()
        first = await cluster.wait_held()
        await asyncio.sleep(1)
        began = cluster.loop.time()
        await cluster.drain(first)
        await cluster.wait_held(first)
        assert cluster.loop.time() - began <= 0.2
        await cluster.drain(first, Availability.ACTIVE)
        await asyncio.sleep(5)
        assert cluster.holder() != first
        assert not cluster.violations


@on_virtual_time
async def test_the_next_node_waits_for_the_hook_of_the_former_one() -> None:
    async with rig() as cluster:
        await cluster.add()
        first = await cluster.wait_held()
        cluster.held[first].kernel.release_s = 4.5
        began = cluster.loop.time()
        await cluster.drain(first)
        await cluster.wait_held(first)
        assert 4.5 <= cluster.loop.time() - began <= 4.7
        assert not cluster.violations


@on_virtual_time
async def test_a_paused_node_keeps_its_address_and_gets_no_other_one() -> None:
    async with rig() as cluster:
        await cluster.drain("n1", Availability.PAUSE)
        await cluster.add()
        assert await cluster.wait_held() == "n2"
        await cluster.drain("n2", Availability.PAUSE)
        await asyncio.sleep(5)
        assert cluster.holder() == "n2"
        assert len(cluster.truth.moves) == 1


@on_virtual_time
async def test_a_planned_stop_moves_the_address_at_once() -> None:
    async with rig() as cluster:
        await cluster.add()
        first = await cluster.wait_held()
        await asyncio.sleep(1)
        began = cluster.loop.time()
        await cluster.held[first].give_up()
        await cluster.wait_held(first)
        assert cluster.loop.time() - began <= 0.2
        assert not cluster.violations


@on_virtual_time
async def test_a_planned_stop_waits_until_the_managers_know_that_the_address_is_free() -> None:
    """Also if the node had no address for a while, as at its start: the process ends next."""
    async with rig() as cluster:
        await asyncio.sleep(1)
        await cluster.add()
        first = await cluster.wait_held()
        await asyncio.sleep(1)
        began = cluster.loop.time()
        await cluster.held[first].give_up()
        await cluster.kill(first)
        await cluster.wait_held(first)
        assert cluster.loop.time() - began <= 0.2
        assert not cluster.violations


@on_virtual_time
async def test_a_managers_loss_does_not_move_the_address() -> None:
    async with rig() as cluster:
        await cluster.add()
        first = await cluster.wait_held()
        for manager in MANAGERS:
            cut = cluster.links.cut([first], [manager])
            await asyncio.sleep(10)
            cluster.links.restore(cut)
            await asyncio.sleep(2)
        assert {one[2] for one in cluster.truth.moves} == {first}


@on_virtual_time
async def test_several_addresses_are_spread() -> None:
    async with rig(("n1", "n2", "n3")) as cluster:
        addresses = [f"10.0.0.{100 + n}" for n in range(6)]
        for one in addresses:
            await cluster.add(one)
        await asyncio.sleep(1)
        holders = [cluster.holder(one) for one in addresses]
        assert sorted(holders) == ["n1", "n1", "n2", "n2", "n3", "n3"]


@on_virtual_time
async def test_an_address_is_removed_once_no_node_has_it() -> None:
    async with rig() as cluster:
        await cluster.add()
        await cluster.wait_held()
        await cluster.remove()
        await asyncio.sleep(0.5)
        assert cluster.holder() == ""
        assert cluster.shown() == []
        await cluster.add()  # the next one has another epoch
        await cluster.wait_held()
        assert not cluster.violations


@on_virtual_time
async def test_a_restored_store_names_nobody_before_all_leases_are_over() -> None:
    async with rig() as cluster:
        await cluster.drain("n1")
        await cluster.add()
        first = await cluster.wait_held()
        await cluster.drain("n1", Availability.ACTIVE)  # it would be named first
        await asyncio.sleep(1)
        cluster.links.cut([first], MANAGERS)
        cluster.cluster.incarnation += 1
        for manager in MANAGERS:  # they start again after a restore
            cluster.network.reset_connections(manager)
        await cluster.wait_held(first)
        assert not cluster.violations


@on_virtual_time
async def test_a_confirmation_names_only_what_was_renewed() -> None:
    """A manager that is behind does not know yet that the node was named."""
    async with rig() as cluster:
        await cluster.add()
        holder = await cluster.wait_held()
        other = next(one for one in cluster.nodes if one != holder)
        epoch = cluster.record().addresses[0].epoch
        for node, is_held in ((other, False), (holder, True)):
            async with cluster.connected(node, "m2") as channel, channel.stream(methods.ADDRESSES) as call:
                await call.send(skep.AddressReport(session_id="s"))
                renewed = [skep.AddressEpoch(address=ADDRESS, epoch=epoch)]
                await call.send(skep.AddressReport(number=7, renewed=renewed))
                async for message in call:
                    if message.confirmed == 7:
                        assert bool(message.held) is is_held
                        break


@pytest.mark.parametrize("what", ["renewals", "renewals in turn", "refusals"])
def test_a_holder_writes_at_the_pace_of_renewals_whatever_it_sends(what: str) -> None:
    @on_virtual_time
    async def run() -> None:
        async with rig(("n1",)) as cluster:
            for one in (ADDRESS, "10.0.0.101"):
                await cluster.add(one)
                await cluster.wait_held(address=one)
            await cluster.kill("n1")
            store, began = cluster.stores["m2"], cluster.loop.time()
            before = store.view().revision
            async with cluster.connected("n1", "m2") as channel, channel.stream(methods.ADDRESSES) as call:
                await call.send(skep.AddressReport(session_id="s"))
                for number in range(1000):
                    held = [
                        skep.AddressEpoch(address=one.address, epoch=one.epoch)
                        for one in cluster.record().addresses
                    ]
                    if what == "refusals":
                        await call.send(skep.AddressReport(number=number, released=held))
                    else:
                        sent = held[number % 2 :][:1] if what == "renewals in turn" else held
                        await call.send(skep.AddressReport(number=number, renewed=sent))
                    await asyncio.sleep(0.002)
            writes = store.view().revision - before
            most = (cluster.loop.time() - began) / RENEWAL_S + 3  # and the first ones of two namings
            assert (0 if what == "refusals" else most - 5) <= writes <= most

    run()


@pytest.mark.parametrize("seed", range(40))
def test_no_address_is_ever_held_twice(seed: int) -> None:
    """Cut, freeze, kill and delay what is drawn, with clocks that are as wrong as allowed."""

    @on_virtual_time
    async def run() -> None:
        nodes = ("n1", "n2", "n3")
        async with rig(nodes, seed=seed, drift=DRIFT) as cluster:
            for one in (ADDRESS, "10.0.0.101"):
                await cluster.add(one)
            await cluster.wait_held()
            for _ in range(25):
                await cluster.disturb()
                await asyncio.sleep(cluster.random.choice((0.05, 0.4, 1.0, 3.0)) * cluster.random.random())
            cluster.settle()
            await cluster.wait_held(within_s=60)
            assert cluster.violations == []

    run()

"""When the lease of a registration is over, and what the leader does then."""

import asyncio
from random import Random

import msgspec
import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.aio.clock import SystemClock
from skep.aio.time_slices import run_at_once
from skep.errors import AlreadyExists
from skep.manager.catalog.building import built_catalog
from skep.manager.catalog.loop import LeaseTimes, RegistrationLeases
from skep.manager.catalog.registrations import RegistrationRecord, expire, records_in, register, renew
from skep.model.catalog import ServiceRegistration
from skep.store.memory import MemoryStore
from tests.support.store.store_transactions import raise_level


def a_record(instance: str, renewals: int, ttl: int = 10) -> RegistrationRecord:
    registration = ServiceRegistration(
        service="db", instance=instance, address="192.0.2.7", port=5432, ttl=ttl
    )
    return RegistrationRecord(registration=registration, renewals=renewals)


def test_a_lease_without_renewals_is_over_after_its_time() -> None:
    times = LeaseTimes()
    records = [a_record("a", 1), a_record("b", 1, ttl=30)]
    assert list(times.expired(records, 100.0)) == []
    assert list(times.expired(records, 110.0)) == []
    assert list(times.expired(records, 110.5)) == [("db@a", 1)]


def test_a_renewal_begins_the_lease_again() -> None:
    times = LeaseTimes()
    assert list(times.expired([a_record("a", 1)], 100.0)) == []
    assert list(times.expired([a_record("a", 2)], 109.0)) == []
    assert list(times.expired([a_record("a", 2)], 118.0)) == []
    assert list(times.expired([a_record("a", 2)], 119.5)) == [("db@a", 2)]


def test_a_new_leader_begins_every_lease_again() -> None:
    records = [a_record("a", 7)]
    earlier = LeaseTimes()
    assert list(earlier.expired(records, 100.0)) == []
    assert list(LeaseTimes().expired(records, 1_000.0)) == []


def test_a_registration_that_returns_has_a_new_lease() -> None:
    times = LeaseTimes()
    assert list(times.expired([a_record("a", 1)], 100.0)) == []
    assert list(times.expired([], 105.0)) == []
    assert times.is_empty
    assert list(times.expired([a_record("a", 1)], 115.0)) == []


def test_leaders_remove_what_is_not_renewed_and_a_new_one_gives_a_whole_lease() -> None:
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    store = MemoryStore(clock)

    def names() -> list[str]:
        return [record.registration.instance for record in records_in(store.view())]

    async def live() -> None:
        await store.update(raise_level)
        for instance in ("a", "b"):
            await store.update(register, a_record(instance, 0).registration)
        leading = asyncio.create_task(RegistrationLeases(store, clock, Random(1)).run())
        for _ in range(4):
            await asyncio.sleep(4)
            await store.update(renew, "db@a")
        assert names() == ["a"]
        leading.cancel()
        await asyncio.sleep(1_000)  # all managers are away
        leading = asyncio.create_task(RegistrationLeases(store, clock, Random(1)).run())
        await asyncio.sleep(9)
        assert names() == ["a"]
        await asyncio.sleep(4)
        assert names() == []
        leading.cancel()
        await asyncio.wait([leading])

    loop.run_until_complete(live())


def test_a_renewal_in_the_last_moment_keeps_the_registration() -> None:
    async def race() -> None:
        store = MemoryStore(SystemClock())
        await store.update(raise_level)
        await store.update(register, a_record("a", 0).registration)
        [record] = records_in(store.view())
        await store.update(renew, "db@a")
        assert not await store.update(expire, "db@a", record.renewals)
        assert len(list(records_in(store.view()))) == 1

    asyncio.run(race())


async def test_one_of_two_stacks_that_register_a_name_at_once_is_told_so() -> None:
    """The manager that gets the second request does not show the result of the first one yet."""
    store = MemoryStore(SystemClock())
    await store.update(raise_level)
    behind = MemoryStore(SystemClock(), store.cluster)
    behind.faults.lag_s = 0.05
    first, second = (
        msgspec.structs.replace(a_record(instance, 0).registration, stack=stack)
        for instance, stack in (("a", "one"), ("b", "two"))
    )
    await store.update(register, first)
    await behind.update(register, second)
    shown = run_at_once(built_catalog(store.view(), lambda _: True)).catalog
    assert shown is not None
    assert [one.id for one in shown.services[0].instances] == ["a"]
    await store.update(renew, "db@a")
    with pytest.raises(AlreadyExists, match="belongs to another stack"):
        await store.update(renew, "db@b")

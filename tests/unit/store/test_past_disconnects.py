"""What is remembered of a service's disconnect labels when they change."""

from collections.abc import Mapping

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.model.options.labels import ON_DISCONNECT, ON_DISCONNECT_DELAY
from skep.model.service import Service
from skep.model.values.times import ZERO_TIME, unix_ns
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from skep.store.transactions.transaction import KEPT_MAX
from tests.support.builders import a_service_spec
from tests.support.store.damage_rigs import put_all

STOP = {ON_DISCONNECT: "stop"}


def relabel(tx: Transaction, labels: Mapping[str, str], replicas: int = 1) -> Service:
    service = tx.get(Service, "web")
    return tx.put(replace(service, spec=replace(a_service_spec(replicas=replicas), labels=labels)))


async def a_store() -> MemoryStore:
    store = MemoryStore(SystemClock())
    await put_all(store, Service(id="web", spec=a_service_spec()))
    return store


async def test_a_policy_that_is_changed_is_remembered_with_the_time_of_the_change() -> None:
    store = await a_store()
    assert store.view().get(Service, "web").past_disconnects == ()
    changed = await store.update(relabel, {**STOP, "tier": "front"})
    (past,) = changed.past_disconnects
    assert (past.labels, past.until) == ({}, changed.updated_at)
    assert unix_ns(past.until) > unix_ns(ZERO_TIME)
    scaled = await store.update(relabel, STOP, 5)
    assert scaled.past_disconnects == changed.past_disconnects, "the policy is the same"
    kept = await store.update(relabel, {ON_DISCONNECT: "keep"})
    assert [past.labels for past in kept.past_disconnects] == [{}, STOP]
    assert store.view().get(Service, "web") == kept


async def test_the_last_few_are_remembered() -> None:
    store = await a_store()
    for seconds in range(2 * KEPT_MAX):
        service = await store.update(relabel, {ON_DISCONNECT_DELAY: f"{seconds}s"})
    assert [past.labels[ON_DISCONNECT_DELAY] for past in service.past_disconnects] == [
        f"{seconds}s" for seconds in range(KEPT_MAX - 1, 2 * KEPT_MAX - 1)
    ]

"""Deploys of one stack beside each other: only requests of the newest one change services."""

import asyncio
from itertools import count
from typing import Any

import pytest

from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition
from skep.manager.control.deploys import fenced
from skep.manager.control.files import create_config, remove_config, update_config
from skep.model.options.labels import STACK_REVISION, STACK_STATE
from skep.model.secret import Config, ConfigSpec
from skep.model.service import Service
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import ZERO_TIME
from skep.store.interface import Transaction
from skep.store.memory import MemoryCluster, MemoryStore
from tests.support.builders import a_service

_ids = (f"id{number}" for number in count(1))


def a_revision(number: int, state: str = "deploying", stack: str = "shop") -> ConfigSpec:
    labels = {STACK_LABEL: stack, STACK_REVISION: str(number), STACK_STATE: state}
    return ConfigSpec(name=f"{stack}_revision-{number}", labels=labels, data=b"x")


async def recorded(store: MemoryStore, spec: ConfigSpec) -> Config:
    return await store.update(create_config, spec, new_id=lambda: next(_ids), now=ZERO_TIME)


def state_of(store: MemoryStore, config: Config) -> str:
    return store.view().get(Config, config.id).spec.labels[STACK_STATE]


def put_service(tx: Transaction) -> Service:
    return tx.put(a_service("shop_web"))


async def test_a_revision_replaces_the_deploys_of_its_stack_that_are_under_way_and_no_others() -> None:
    store = MemoryStore(SystemClock())
    ended = await recorded(store, a_revision(1, "deployed"))
    red = await recorded(store, a_revision(2))
    other = await recorded(store, a_revision(9, stack="other"))
    plain = await recorded(store, ConfigSpec(name="shop_conf", labels={STACK_LABEL: "shop"}, data=b"x"))
    blue = await recorded(store, a_revision(3))
    states = {one.spec.name: state_of(store, one) for one in (ended, red, other, blue)}
    assert states == {
        "shop_revision-1": "deployed",
        "shop_revision-2": "replaced by revision 3",
        "other_revision-9": "deploying",
        "shop_revision-3": "deploying",
    }
    assert STACK_STATE not in store.view().get(Config, plain.id).spec.labels
    assert store.view().get(Config, red.id).written_by == red.written_by, "nobody has written it since"


async def test_a_revision_reads_the_configs_of_its_own_stack_only() -> None:
    store = MemoryStore(SystemClock())
    await recorded(store, a_revision(1))
    table = store.view().table_by_type[Config]  # type: ignore[attr-defined]
    found_ids, read = table.found_ids, list[Any]()
    table.found_ids = lambda by: read.append(by) or found_ids(by)
    await recorded(store, a_revision(2))
    assert {} not in read, "not all of the cluster: a plan of many would stop the manager"


@pytest.mark.parametrize("ends_by", ["a newer deploy", "its end", "its removal"])
async def test_requests_of_a_deploy_that_is_not_current_change_nothing(ends_by: str) -> None:
    store = MemoryStore(SystemClock())
    red = await recorded(store, a_revision(1))
    match ends_by:
        case "a newer deploy":
            await recorded(store, a_revision(2))
        case "its end":
            index = store.view().get(Config, red.id).version.index
            await store.update(update_config, red.id, a_revision(1, "interrupted"), index)
        case _:
            await store.update(remove_config, red.id)
    with pytest.raises(FailedPrecondition, match=r"replaced by revision 2|interrupted|was removed"):
        await store.update(fenced(put_service, red.id, "shop"))
    assert not store.view().find(Service)
    await store.update(fenced(put_service, "", "shop"))
    assert store.view().find(Service), "a request of no deploy"


@pytest.mark.parametrize("state", ["deploying", "replaced by revision 8"])
async def test_a_revision_of_another_stack_is_as_one_that_was_removed(state: str) -> None:
    store = MemoryStore(SystemClock())
    other = await recorded(store, a_revision(7, state, stack="blog"))
    refusals = set()
    for id in (other.id, "missing"):
        with pytest.raises(FailedPrecondition) as raised:
            await store.update(fenced(put_service, id, "shop"))
        refusals.add(str(raised.value))
    assert refusals == {"the revision of this deploy was removed: deploy the stack again"}


async def test_a_deploy_that_is_replaced_at_the_same_moment_writes_nothing() -> None:
    """Its request has passed the check at its own manager when the newer revision is written through another one."""
    cluster = MemoryCluster()
    slow, fast = MemoryStore(SystemClock(), cluster), MemoryStore(SystemClock(), cluster)
    red = await recorded(slow, a_revision(1))
    slow.faults.delay_s = lambda: 0.05
    request = asyncio.create_task(slow.update(fenced(put_service, red.id, "shop")))
    await asyncio.sleep(0.01)
    await recorded(fast, a_revision(2))
    with pytest.raises(FailedPrecondition, match="replaced by revision 2"):
        await request
    assert not fast.view().find(Service)

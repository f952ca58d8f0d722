"""The level of the stored data follows the oldest of the managers, and a manager that does not know it ends."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition
from skep.manager.control.services import create_service
from skep.manager.manager_status import write_manager_status
from skep.manager.membership.data_level import lowest_level, write_level
from skep.model.node import ManagerStatus, Node, NodeRole, NodeSpec
from skep.model.options.labels import VOLUME_AFFINITY
from skep.model.service import ServiceSpec
from skep.model.values.ids import NodeId, new_id
from skep.model.values.times import Timestamp
from skep.store import keys
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.encryption.cipher import new_wrapping_key
from skep.store.etcd.initialize import initialize
from skep.store.etcd.requests import etcd_key
from skep.store.etcd.store import open_store
from skep.store.interface import Transaction
from skep.store.level import LEVEL, PLACEMENTS, VOLUME_AFFINITIES
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service_spec
from tests.support.store.etcd_rig import a_member, member_settings
from tests.support.store.store_rigs import Rig, found


def a_manager(tx: Transaction, id: str, level: int) -> None:
    node = replace(a_node(id), spec=NodeSpec(role=NodeRole.MANAGER))
    tx.put(replace(node, manager_status=ManagerStatus(addr=f"{id}:2377", level=level)))


@pytest.fixture
def knows_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skep.store.level.LEVEL", 15)


@pytest.mark.usefixtures("knows_more")
async def test_the_level_is_the_lowest_of_all_managers(rig: Rig) -> None:
    async def raised_to() -> int:
        await rig.store.update(write_level)
        await rig.other.barrier()
        assert rig.other.view().level == rig.store.view().level
        return rig.store.view().level

    for id, level in (("m1", 14), ("m2", 0), ("m3", 13)):
        await rig.store.update(a_manager, id, level)
    await rig.store.update(lambda tx: tx.put(a_node("w1")))
    assert lowest_level(rig.store.view().find(Node)) == 1
    founded = rig.store.view().level
    assert await raised_to() == founded < 13
    await rig.store.update(a_manager, "m2", 13)
    assert await raised_to() == 13


async def test_a_raised_level_is_seen_by_all_and_raised_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skep.store.level.LEVEL", 15)
    for id, level in (("m1", 14), ("m2", 13)):
        await rig.store.update(a_manager, id, level)
    await rig.other.barrier()
    await asyncio.gather(rig.store.update(write_level), rig.other.update(write_level))
    for store in (rig.store, rig.other):
        await store.barrier()
        assert store.view().level == 13
    revision = rig.store.view().revision
    await rig.store.update(a_manager, "m1", 1)
    await rig.store.update(write_level)
    assert rig.store.view().level == 13
    assert rig.store.view().revision == revision + 1


async def test_every_manager_reports_its_level(rig: Rig) -> None:
    await rig.store.update(a_manager, "m1", 0)
    await rig.store.update(write_manager_status, NodeId("m1"), "m1:2377", leads=True)
    status = rig.store.view().get(Node, "m1").manager_status
    assert status is not None
    assert status.level == LEVEL


@pytest.fixture
async def socket(tmp_path: Path) -> AsyncIterator[Path]:
    settings = member_settings(tmp_path)
    async with a_member(settings).running():
        yield settings.socket


@pytest.mark.needs("etcd", "setpriv")
async def test_a_manager_ends_when_the_others_write_what_it_does_not_know(socket: Path) -> None:
    key, clock = new_wrapping_key(), SystemClock()
    await initialize(socket, key, clock, found)

    async def serve() -> None:
        async with open_store(socket, NodeId("m1"), key, clock), EtcdClient(socket) as client:
            await client.put(etcd_key(keys.LEVEL), str(LEVEL + 1).encode())
            await asyncio.Event().wait()

    with pytest.raises(FailedPrecondition, match="upgrade this manager"):
        async with asyncio.timeout(10):
            await serve()
    with pytest.raises(FailedPrecondition, match="upgrade this manager"):
        async with open_store(socket, NodeId("m1"), key, clock):
            pass


async def test_a_label_that_an_older_leader_does_not_know_waits_for_all_managers() -> None:
    """It would start the tasks of a slot without their data."""
    store = MemoryStore(SystemClock())
    spec = replace(a_service_spec("db"), labels={VOLUME_AFFINITY: "required"})
    now = Timestamp("2026-11-24T09:30:00Z")

    async def try_create() -> None:
        await store.update(create_service, spec, new_id=new_id, new_name=lambda: "", now=now)

    await store.update(lambda tx: tx.raise_level(VOLUME_AFFINITIES - 1))
    with pytest.raises(FailedPrecondition, match=r"use skep\.volumes"):
        await try_create()
    await store.update(lambda tx: tx.raise_level(VOLUME_AFFINITIES))
    await try_create()


async def test_a_constraint_that_an_older_leader_does_not_know_waits_for_all_managers() -> None:
    """It would not start the tasks, and fail each decision about the service."""
    store = MemoryStore(SystemClock())
    spec = a_service_spec("db", constraints=("node.labels.cores  >= 8",))
    now = Timestamp("2026-11-24T09:30:00Z")

    async def try_create(spec: ServiceSpec) -> None:
        await store.update(create_service, spec, new_id=new_id, new_name=lambda: "", now=now)

    await store.update(lambda tx: tx.raise_level(PLACEMENTS - 1))
    await try_create(a_service_spec("web", constraints=("node.labels.cores == 8",)))
    with pytest.raises(FailedPrecondition, match=r"the constraint node\.labels\.cores >= 8 needs managers"):
        await try_create(spec)
    await store.update(lambda tx: tx.raise_level(PLACEMENTS))
    await try_create(spec)

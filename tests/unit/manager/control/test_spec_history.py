"""The specs of a service that are kept, on a store in memory."""

import zlib
from itertools import count
from random import Random

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.formats.service_form import settled
from skep.manager.control.services import create_service, remove_service, rollback_service, update_service
from skep.manager.control.updates import stop_service
from skep.manager.orchestrator.reaper.removals import DeleteService, write
from skep.manager.services.spec_history import BYTES_MAX, SPECS_KEPT, revisions
from skep.model.options.autoscaling import with_replicas
from skep.model.service import Service, ServiceSpec
from skep.model.values.ids import new_id
from skep.model.values.times import Timestamp
from skep.store.kinds import Payload, spec_history_id
from skep.store.level import LEVEL
from skep.store.memory import MemoryStore
from tests.support.builders import a_service_spec

NOW = Timestamp("2026-01-02T03:04:05Z")


@pytest.fixture
async def store() -> MemoryStore:
    made = MemoryStore(SystemClock())
    await made.update(lambda tx: tx.raise_level(LEVEL))
    return made


def a_spec(image: str, **labels: str) -> ServiceSpec:
    return replace(settled(a_service_spec(name="web", image=image)), labels=labels)


async def created(store: MemoryStore, image: str = "app:1") -> Service:
    return await store.update(
        create_service, a_spec(image), new_id=new_id, new_name=str, now=NOW, by="ann@m1"
    )


async def updated(store: MemoryStore, service: Service, spec: ServiceSpec) -> Service:
    return await store.update(update_service, service.id, spec, service.version.index, now=NOW, by="bob@m2")


def shown(store: MemoryStore, service: Service) -> list[tuple[int, str, str]]:
    found = revisions(store.view(), store.view().get(Service, service.id))
    return [(one.number, one.spec.task_template.container_spec.image, one.author.by) for one in found]  # type: ignore[union-attr]


async def test_each_change_is_a_revision_with_its_author(store: MemoryStore) -> None:
    service = await created(store)
    assert shown(store, service) == [(1, "app:1", "ann@m1")]
    service = await updated(store, service, a_spec("app:2"))
    service = await store.update(
        rollback_service, service.id, service.spec, service.version.index, now=NOW, by="eve@m3"
    )
    assert shown(store, service) == [(1, "app:1", "ann@m1"), (2, "app:2", "bob@m2"), (3, "app:1", "eve@m3")]


async def test_a_spec_that_is_written_again_and_a_stop_are_no_revisions(store: MemoryStore) -> None:
    service = await created(store)
    service = await store.update(stop_service, service.id, now=NOW)
    service = await updated(store, service, service.spec)
    assert shown(store, service) == [(1, "app:1", "ann@m1")]


async def test_the_last_ten_are_kept_and_numbers_are_not_used_again(store: MemoryStore) -> None:
    service = await created(store)
    for number in range(2, 31):
        service = await updated(store, service, a_spec(f"app:{number}"))
    assert [number for number, *_ in shown(store, service)] == [*range(31 - SPECS_KEPT, 31)]


async def test_changes_of_the_number_of_replicas_leave_the_specs_before_them(store: MemoryStore) -> None:
    service = await created(store)
    service = await updated(store, service, a_spec("app:2"))
    for replicas in range(2, 2 + 2 * SPECS_KEPT):
        service = await updated(store, service, with_replicas(service.spec, replicas))
    found = shown(store, service)
    assert [(number, image) for number, image, _ in found][:2] == [(1, "app:1"), (2, "app:2")]
    assert (len(found), found[-1][0]) == (SPECS_KEPT, 2 + 2 * SPECS_KEPT)


async def test_large_specs_are_bounded_together(store: MemoryStore) -> None:
    random, numbers = Random(1), count(1)

    def large() -> ServiceSpec:
        return a_spec("app:1", note=random.randbytes(BYTES_MAX // 4).hex(), number=str(next(numbers)))

    service = await created(store)
    for _ in range(6):
        service = await updated(store, service, large())
    (payload,) = store.view().find(Payload)
    assert len(payload.data) <= BYTES_MAX
    kept = [number for number, *_ in shown(store, service)]
    assert kept == [*range(8 - len(kept), 8)]
    assert 2 <= len(kept) < 7


async def test_a_spec_that_is_too_large_to_be_kept_drives_out_no_other(store: MemoryStore) -> None:
    service = await updated(store, await created(store), a_spec("app:2"))
    service = await updated(store, service, a_spec("app:3", note=Random(1).randbytes(BYTES_MAX).hex()))
    service = await updated(store, service, a_spec("app:4"))
    assert [number for number, *_ in shown(store, service)] == [1, 2, 4]


async def test_nothing_is_kept_of_a_removed_service(store: MemoryStore) -> None:
    service = await updated(store, await created(store), a_spec("app:2"))
    assert store.view().find(Payload)
    await store.update(remove_service, service.id, now=NOW)
    assert not store.view().find(Payload)


async def test_a_damaged_history_prevents_no_update_and_no_number_is_used_again(store: MemoryStore) -> None:
    service = await created(store)
    used = 1
    for damaged in (b"no zlib", zlib.compress(b"{"), zlib.compress(b'{"Last": "x"}')):
        payload = Payload(id=spec_history_id(service.id), data=damaged)
        await store.update(lambda tx, one=payload: tx.put(one))
        ((number, *_),) = shown(store, service)
        assert number > used
        service = await updated(store, service, a_spec(f"app:{len(damaged)}"))
        used = number + 1
        assert [number for number, *_ in shown(store, service)] == [used - 1, used]


async def test_the_last_deletion_of_a_service_takes_its_history_along(store: MemoryStore) -> None:
    """An older manager removes a service without its history."""
    service = await updated(store, await created(store), a_spec("app:2"))
    removed = await store.update(lambda tx: tx.put(replace(tx.get(Service, service.id), removed_at=NOW)))
    assert store.view().find(Payload)
    await store.update(write, DeleteService(removed), NOW)
    assert not store.view().find(Payload)

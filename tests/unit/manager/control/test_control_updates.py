"""Requests to pause, resume and abort updates, on a store in memory."""

import pytest

from skep.aio.clock import SystemClock
from skep.api.formats.service_form import settled
from skep.errors import FailedPrecondition, NotFound, OutOfSequence
from skep.manager.control.services import create_service, remove_service, update_service
from skep.manager.control.updates import abort_update, pause_update, resume_update
from skep.model.service import Service, UpdateState
from skep.model.task import Task
from skep.model.values.ids import new_id
from skep.model.values.times import Timestamp
from skep.store.memory import MemoryStore
from tests.support.builders import a_service_spec, a_task

NOW = Timestamp("2026-01-02T03:04:05Z")


@pytest.fixture
async def store() -> MemoryStore:
    return MemoryStore(SystemClock())


async def a_service(store: MemoryStore, *, is_updated: bool) -> Service:
    """``is_updated``: to another image, which its task does not have yet."""
    spec = settled(a_service_spec(name="web", image="app:1"))
    service = await store.update(create_service, spec, new_id=new_id, new_name=str, now=NOW)
    await store.update(lambda tx: tx.put(a_task(service=service)))
    if not is_updated:
        return service
    changed = settled(a_service_spec(name="web", image="app:2"))
    return await store.update(update_service, service.id, changed, service.version.index, now=NOW)


@pytest.mark.parametrize("verb", ["pause", "resume", "abort"])
async def test_a_service_without_an_update_is_refused(store: MemoryStore, verb: str) -> None:
    service = await a_service(store, is_updated=False)
    requests = {
        "pause": lambda tx: pause_update(tx, service.id, now=NOW),
        "resume": lambda tx: resume_update(tx, service.id),
        "abort": lambda tx: abort_update(tx, service.id, service.version.index, now=NOW),
    }
    with pytest.raises(
        FailedPrecondition, match=f"service web has no update in progress.* nothing to {verb}"
    ):
        await store.update(requests[verb])
    await store.update(remove_service, service.id, now=NOW)
    with pytest.raises(NotFound):
        await store.update(requests[verb])


async def test_each_request_may_be_repeated_and_the_status_is_written(store: MemoryStore) -> None:
    service = await a_service(store, is_updated=True)
    for _ in range(2):
        paused = await store.update(pause_update, service.id, now=NOW)
        assert paused.update_status is not None
        assert paused.update_status.state is UpdateState.PAUSED
        assert (paused.version, paused.spec_version) == (service.version, service.spec_version)
    for _ in range(2):
        resumed = await store.update(resume_update, service.id)
        assert resumed.update_status is not None
        assert resumed.update_status.state is UpdateState.UPDATING
        (task,) = store.view().find(Task)
        assert resumed.update_status.tolerated_until == task.created_at


async def test_only_the_update_that_was_seen_is_aborted(store: MemoryStore) -> None:
    service = await a_service(store, is_updated=True)
    with pytest.raises(OutOfSequence):
        await store.update(abort_update, service.id, service.version.index - 1, now=NOW)
    aborted = await store.update(abort_update, service.id, service.version.index, now=NOW)
    assert aborted.spec == service.previous_spec
    assert aborted.update_status is not None
    assert aborted.update_status.state is UpdateState.ROLLBACK_STARTED
    with pytest.raises(FailedPrecondition, match="already being rolled back"):
        await store.update(abort_update, service.id, aborted.version.index, now=NOW)

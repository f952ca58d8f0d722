"""Requests to pause, resume and abort updates, on a store in memory."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.formats.service_form import settled
from skep.errors import FailedPrecondition, NotFound, OutOfSequence
from skep.manager.control.services import create_service, remove_service, rollback_service, update_service
from skep.manager.control.updates import (
    abort_update,
    pause_update,
    promote_update,
    resume_update,
    start_service,
    stop_service,
    switch_back,
)
from skep.model.service import (
    ReplicatedService,
    Service,
    ServiceMode,
    ServiceSpec,
    UpdateSplit,
    UpdateState,
    UpdateStatus,
)
from skep.model.staging.updates import is_undecided, stages_of
from skep.model.task import Task, TaskState
from skep.model.values.ids import ServiceId, new_id
from skep.model.values.times import Timestamp
from skep.store.interface import Transaction
from skep.store.level import LEVEL
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


CANARY = {"skep.update": "canary"}


async def a_canary(store: MemoryStore) -> Service:
    """Return a service in the first step of an update from app:1 to app:2."""
    service = await a_service(store, is_updated=False)
    spec = replace(settled(a_service_spec(name="web", image="app:2")), labels=CANARY)
    service = await store.update(update_service, service.id, spec, service.version.index, now=NOW)
    assert service.update_status is not None
    assert service.update_status.split is not None
    split = replace(service.update_status.split, percent=5, versions=(service.version.index,))
    status = UpdateStatus(state=UpdateState.UPDATING, message="update in progress: step 1", split=split)
    return await store.update(lambda tx: tx.put(replace(tx.get(Service, service.id), update_status=status)))


def image_of(spec: ServiceSpec | None) -> str:
    assert spec is not None
    assert spec.task_template.container_spec is not None
    return spec.task_template.container_spec.image


async def test_a_canary_continues_if_its_service_is_scaled(store: MemoryStore) -> None:
    service = await a_canary(store)
    spec = replace(service.spec, mode=ServiceMode(replicated=ReplicatedService(replicas=7)))
    await store.update(update_service, service.id, spec, service.version.index, now=NOW)
    scaled = store.view().get(Service, service.id)
    assert scaled.spec.replicas == 7
    assert scaled.update_status is not None
    assert service.update_status is not None
    assert scaled.update_status.message == service.update_status.message
    assert service.update_status.split is not None
    assert scaled.update_status.split == replace(service.update_status.split, changes=1)
    assert scaled.previous_spec is not None
    assert (image_of(scaled.previous_spec), scaled.previous_spec.replicas) == ("app:1", 7)


async def test_a_canary_continues_if_its_service_is_stopped_and_started(store: MemoryStore) -> None:
    await store.update(lambda tx: tx.raise_level(LEVEL))
    service = await a_canary(store)
    for changes, operation in ((1, stop_service), (2, start_service)):
        await store.update(operation, service.id, now=NOW)
        found = store.view().get(Service, service.id)
        assert found.update_status is not None
        assert service.update_status is not None
        assert service.update_status.split is not None
        assert found.update_status.state is UpdateState.UPDATING
        assert found.update_status.split == replace(service.update_status.split, changes=changes)
        assert image_of(found.previous_spec) == "app:1"


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        (a_service_spec(name="web", image="app:2"), True),
        (a_service_spec(name="web", image="app:1"), False),
    ],
)
async def test_only_an_update_with_other_tasks_has_steps(
    store: MemoryStore, spec: ServiceSpec, steps: bool
) -> None:
    service = await a_service(store, is_updated=False)
    wanted = settled(spec)
    template = replace(wanted.task_template, force_update=7)
    spec = replace(wanted, labels=CANARY, task_template=template)
    updated = await store.update(update_service, service.id, spec, service.version.index, now=NOW)
    assert is_undecided(updated) is steps
    if steps:
        assert updated.old_version == service.version.index


async def test_the_spec_before_a_canary_deployed_again_has_no_steps(store: MemoryStore) -> None:
    service = await a_canary(store)
    spec = replace(settled(a_service_spec(name="web", image="app:1")), labels=CANARY)
    updated = await store.update(update_service, service.id, spec, service.version.index, now=NOW)
    assert updated.update_status is not None
    assert updated.update_status.split == UpdateSplit(percent=0, versions=(service.version.index,))
    assert not is_undecided(updated)


async def test_another_update_replaces_a_canary_and_is_rolled_back_to_the_spec_before_it(
    store: MemoryStore,
) -> None:
    service = await a_canary(store)
    spec = replace(settled(a_service_spec(name="web", image="app:3")), labels=CANARY)
    await store.update(update_service, service.id, spec, service.version.index, now=NOW)
    updated = store.view().get(Service, service.id)
    assert image_of(updated.previous_spec) == "app:1"
    assert updated.update_status is not None
    assert updated.update_status.split == UpdateSplit(
        percent=0, old=service.old_version, withdrawn=(service.version.index,)
    )


@pytest.mark.parametrize("verb", ["rollback", "abort"])
async def test_an_aborted_canary_gets_no_more_connections(store: MemoryStore, verb: str) -> None:
    service = await a_canary(store)
    if verb == "abort":
        await store.update(abort_update, service.id, service.version.index, now=NOW)
    else:
        await store.update(rollback_service, service.id, service.spec, service.version.index, now=NOW)
    after = store.view().get(Service, service.id)
    assert image_of(after.spec) == "app:1"
    assert after.update_status is not None
    assert after.update_status.state is UpdateState.ROLLBACK_STARTED
    assert after.update_status.split == UpdateSplit(percent=0, versions=(service.version.index,))


async def in_step(store: MemoryStore, labels: dict[str, str], step: int, *, runs: bool) -> Service:
    """Return a service in a step of its staged update, with a new task that runs or not."""
    service = await a_service(store, is_updated=False)
    spec = replace(settled(a_service_spec(name="web", image="app:2")), labels=labels)
    service = await store.update(update_service, service.id, spec, service.version.index, now=NOW)
    percent = stages_of(labels)[step].percent
    assert service.update_status is not None
    assert service.update_status.split is not None
    versions = (service.version.index,)
    split = replace(service.update_status.split, step=step, percent=percent, versions=versions)
    status = UpdateStatus(state=UpdateState.UPDATING, message="update in progress", split=split)
    task = a_task(service=service, state=TaskState.RUNNING if runs else TaskState.STARTING)

    def put(tx: Transaction) -> Service:
        tx.put(task)
        return tx.put(replace(tx.get(Service, service.id), update_status=status))

    return await store.update(put)


BLUE_GREEN = {"skep.update": "blue-green"}


async def test_a_promoted_update_is_in_its_next_step(store: MemoryStore) -> None:
    service = await in_step(store, CANARY, 0, runs=True)
    promoted = await store.update(promote_update, service.id)
    assert promoted.update_status is not None
    assert promoted.update_status.split is not None
    # The leader raises the share with the tasks that run.
    assert (promoted.update_status.split.step, promoted.update_status.split.percent) == (1, 5)
    assert promoted.update_status.message == "update in progress: step 2 of 3, 25 % of new connections"


async def test_no_step_begins_before_its_new_tasks_run(store: MemoryStore) -> None:
    service = await in_step(store, BLUE_GREEN, 0, runs=False)
    with pytest.raises(FailedPrecondition, match="0 of 1 new tasks of service web run"):
        await store.update(promote_update, service.id)


async def test_a_promotion_that_is_repeated_at_once_skips_no_step(store: MemoryStore) -> None:
    """It would end the old tasks, to which a switch back returns."""
    service = await in_step(store, BLUE_GREEN, 0, runs=True)
    promoted = await store.update(promote_update, service.id)
    with pytest.raises(FailedPrecondition, match="step 2 of the update of service web has just begun"):
        await store.update(promote_update, service.id)
    assert promoted.update_status is not None
    assert promoted.update_status.split is not None
    split = replace(promoted.update_status.split, percent=100)  # as the leader does
    status = replace(promoted.update_status, split=split)
    await store.update(lambda tx: tx.put(replace(tx.get(Service, service.id), update_status=status)))
    last = await store.update(promote_update, service.id)
    assert last.update_status is not None
    assert last.update_status.split is not None
    assert last.update_status.split.step == 2


async def test_blue_green_switches_back_and_pauses_until_it_is_resumed(store: MemoryStore) -> None:
    service = await in_step(store, BLUE_GREEN, 1, runs=True)
    for _ in range(2):
        back = await store.update(switch_back, service.id)
        assert back.update_status is not None
        assert back.update_status.split is not None
        assert (back.update_status.state, back.update_status.split.percent) == (UpdateState.PAUSED, 0)
    with pytest.raises(FailedPrecondition, match="is paused"):
        await store.update(promote_update, service.id)
    await store.update(resume_update, service.id)
    again = await store.update(promote_update, service.id)
    assert again.update_status is not None
    assert again.update_status.split is not None
    assert again.update_status.split.step == 1


@pytest.mark.parametrize("verb", [promote_update, switch_back])
async def test_steps_are_refused_without_a_next_or_former_one(
    store: MemoryStore, verb: Callable[[Transaction, ServiceId], Service]
) -> None:
    service = await in_step(store, CANARY, 2, runs=True)
    with pytest.raises(FailedPrecondition, match=r"last step|skep update abort web"):
        await store.update(verb, service.id)
    await store.update(lambda tx: tx.put(replace(tx.get(Service, service.id), update_status=None)))
    with pytest.raises(FailedPrecondition, match=r"no update with skep\.update in progress"):
        await store.update(verb, service.id)

"""Requests to stop and start services, on a store in memory."""

from functools import partial

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.formats.service_form import settled
from skep.errors import FailedPrecondition, NotFound, PermissionDenied
from skep.manager.control.quotas import set_quota
from skep.manager.control.services import create_service, remove_service, rollback_service, update_service
from skep.manager.control.updates import start_service, stop_service
from skep.model.options.labels import STOPPED, is_stopped
from skep.model.options.schedules import CRON, CRON_SUSPEND
from skep.model.quota import QuotaSpec
from skep.model.service import ReplicatedJob, Service, ServiceMode, ServiceSpec
from skep.model.staging.updates import CANARY, UPDATE
from skep.model.values.ids import new_id
from skep.model.values.times import Timestamp
from skep.store.level import LEVEL, STOPS
from skep.store.memory import MemoryStore
from tests.support.builders import a_service_spec

NOW = Timestamp("2026-01-02T03:04:05Z")
STACK = {"com.docker.stack.namespace": "shop"}

stop, start = partial(stop_service, now=NOW), partial(start_service, now=NOW)


@pytest.fixture
async def store() -> MemoryStore:
    made = MemoryStore(SystemClock())
    await made.update(lambda tx: tx.raise_level(LEVEL))
    return made


def a_spec(image: str = "app:1", **labels: str) -> ServiceSpec:
    return replace(settled(a_service_spec(name="web", image=image, replicas=3)), labels=labels)


def a_job(**labels: str) -> ServiceSpec:
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
    return settled(replace(a_service_spec(name="nightly"), mode=mode, labels=labels))


async def created(store: MemoryStore, spec: ServiceSpec) -> Service:
    return await store.update(create_service, spec, new_id=new_id, new_name=str, now=NOW)


async def test_a_stopped_service_wants_no_tasks_and_keeps_its_number(store: MemoryStore) -> None:
    service = await created(store, a_spec(tier="front"))
    for _ in range(2):
        stopped = await store.update(stop, service.id)
        assert (stopped.spec.replicas, stopped.spec.given_replicas) == (0, 3)
    for _ in range(2):
        started = await store.update(start, service.id)
        assert started.spec == service.spec


async def test_a_global_service_is_stopped_and_started_as_well(store: MemoryStore) -> None:
    """The label stops it, because it has no number."""
    service = await created(store, settled(a_service_spec(name="agent", is_global=True)))
    stopped = await store.update(stop, service.id)
    assert is_stopped(stopped.spec.labels)
    assert stopped.spec.mode == service.spec.mode
    assert (await store.update(start, service.id)).spec == service.spec


async def test_services_stop_only_if_all_managers_know_stopped_services() -> None:
    """A leader that does not know the label would start the tasks again."""
    store = MemoryStore(SystemClock())
    await store.update(lambda tx: tx.raise_level(STOPS - 1))
    service = await created(store, a_spec())
    with pytest.raises(FailedPrecondition, match="needs managers of this version"):
        await store.update(stop, service.id)
    await store.update(lambda tx: tx.raise_level(STOPS))
    assert (await store.update(stop, service.id)).spec.replicas == 0


async def test_a_rollback_leads_to_the_spec_before_the_update_and_starts_nothing(store: MemoryStore) -> None:
    service = await created(store, a_spec("app:1"))
    service = await store.update(update_service, service.id, a_spec("app:2"), service.version.index, now=NOW)
    service = await store.update(stop, service.id)
    service = await store.update(rollback_service, service.id, service.spec, service.version.index, now=NOW)
    assert is_stopped(service.spec.labels)
    container = service.spec.task_template.container_spec
    assert container is not None
    assert container.image == "app:1"
    service = await store.update(start, service.id)
    assert service.previous_spec is not None
    assert not is_stopped({**service.spec.labels, **service.previous_spec.labels})


async def test_a_rollback_does_not_stop_a_service_that_an_update_has_started(store: MemoryStore) -> None:
    """A deploy of its stack starts it, because its files do not have the label."""
    stopped = await store.update(stop, (await created(store, a_spec())).id)
    service = await store.update(update_service, stopped.id, a_spec("app:2"), stopped.version.index, now=NOW)
    back = await store.update(rollback_service, service.id, service.spec, service.version.index, now=NOW)
    assert back.spec == a_spec()


@pytest.mark.parametrize("image", ["app:2", "app:3"])
async def test_a_rollback_does_not_stop_a_service_that_was_stopped_during_a_canary(
    store: MemoryStore, image: str
) -> None:
    """A deploy starts it, with the same update or with another one that replaces it."""
    old, new, started = (a_spec(one, **{UPDATE: CANARY}) for one in ("app:1", "app:2", image))
    service = await created(store, old)
    service = await store.update(update_service, service.id, new, service.version.index, now=NOW)
    service = await store.update(stop, service.id)
    service = await store.update(update_service, service.id, started, service.version.index, now=NOW)
    back = await store.update(rollback_service, service.id, service.spec, service.version.index, now=NOW)
    assert back.spec == old


async def test_a_start_is_bounded_by_the_quota_of_its_stack(store: MemoryStore) -> None:
    service = await created(store, a_spec(**STACK))
    await store.update(stop, service.id)
    await store.update(set_quota, QuotaSpec(name="shop", tasks=2), new_id=new_id, now=NOW)
    with pytest.raises(PermissionDenied, match="tasks"):
        await store.update(start, service.id)


async def test_a_stop_suspends_the_schedule_of_a_job_and_a_start_resumes_it(store: MemoryStore) -> None:
    job = await created(store, a_job(**{CRON: "@daily"}))
    stopped = await store.update(stop, job.id)
    assert stopped.spec.labels == {CRON: "@daily", CRON_SUSPEND: "true", STOPPED: "true"}
    started = await store.update(start, job.id)
    assert started.spec.labels == {CRON: "@daily"}


async def test_a_start_does_not_resume_a_schedule_that_a_user_suspended(store: MemoryStore) -> None:
    job = await created(store, a_job(**{CRON: "@daily", CRON_SUSPEND: "true"}))
    await store.update(stop, job.id)
    started = await store.update(start, job.id)
    assert started.spec.labels == {CRON: "@daily", CRON_SUSPEND: "true"}


async def test_a_job_whose_schedule_an_update_has_resumed_is_stopped_again(store: MemoryStore) -> None:
    job = await created(store, a_job(**{CRON: "@daily", STOPPED: "true"}))
    stopped = await store.update(stop, job.id)
    assert stopped.spec.labels == {CRON: "@daily", CRON_SUSPEND: "true", STOPPED: "true"}


async def test_a_job_without_a_schedule_and_a_removed_service_are_refused(store: MemoryStore) -> None:
    job = await created(store, a_job())
    with pytest.raises(FailedPrecondition, match="nightly is a job without a schedule: it ends by itself"):
        await store.update(stop, job.id)
    service = await created(store, a_spec())
    await store.update(remove_service, service.id, now=NOW)
    for request in (stop, start):
        with pytest.raises(NotFound):
            await store.update(request, service.id)

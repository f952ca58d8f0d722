"""Scheduled jobs on either store: every due time is decided once, whichever managers lead and whatever clocks say.

Both managers of a rig run the leader's loop, here without its fence: what keeps a run from being doubled is the
comparison of the job itself.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from random import Random

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition, InvalidArgument
from skep.manager.control.jobs import retry_job, run_job
from skep.manager.control.services import create_service, remove_service, rollback_service, update_service
from skep.manager.schedules.loop import Schedules
from skep.manager.schedules.state import RESTORED, SCHEDULES_ID, Restored, note_incarnation
from skep.manager.services.job_runs import COMPLETED, FAILED, RUNNING, STOPPED, past_starts
from skep.model.node import Availability, Node
from skep.model.options.labels import ON_DISCONNECT, ON_DISCONNECT_DELAY
from skep.model.options.schedules import CRON, CRON_CONCURRENCY, CRON_DEADLINE, CRON_SUSPEND
from skep.model.service import (
    GlobalJob,
    JobStart,
    JobStatus,
    ReplicatedJob,
    Service,
    ServiceMode,
    ServiceSpec,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import new_id
from skep.model.values.times import SECOND_NS, Timestamp, timestamp
from skep.store.interface import Store
from skep.store.kinds import Payload, as_run
from skep.store.level import SCHEDULES
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service_spec, a_task
from tests.support.managers.control_loops import wait_for
from tests.support.store.store_rigs import Rig
from tests.support.store.store_transactions import put

TEN, ELEVEN, NOON = (Timestamp(f"2026-11-24T{hour}:00:00Z") for hour in (10, 11, 12))
CREATED = Timestamp("2026-11-24T09:30:00Z")


class WallClock(SystemClock):
    """A clock that stands still, as a manager's may be wrong."""

    def __init__(self, text: str) -> None:
        self._now_ns = int(datetime.fromisoformat(f"2026-11-24T{text}Z").timestamp()) * SECOND_NS

    def now_ns(self) -> int:
        return self._now_ns


@asynccontextmanager
async def leading(text: str, *stores: Store, incarnation: int = 1) -> AsyncIterator[None]:
    """Leaders whose clock is at ``text``."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(Schedules(store, WallClock(text), Random(1), incarnation).run())
            for store in stores
        ]
        yield
        for task in tasks:
            task.cancel()


def a_spec(name: str, cron: str = "@hourly", total: int = 1, **labels: str) -> ServiceSpec:
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=total))
    return replace(a_service_spec(name), mode=mode, labels={CRON: cron, **labels})


async def create(store: Store, spec: ServiceSpec, now: Timestamp = CREATED) -> str:
    await store.update(lambda tx: tx.raise_level(SCHEDULES))
    made = await store.update(create_service, spec, new_id=new_id, new_name=lambda: "", now=now)
    return made.id


def status(store: Store, id: str) -> JobStatus:
    job = store.view().get(Service, id).job_status
    assert job is not None
    return job


def starts(store: Store, id: str) -> tuple[JobStart, ...]:
    schedule = status(store, id).schedule
    assert schedule is not None
    return schedule.starts


def settled(store: Store, id: str) -> str:
    schedule = status(store, id).schedule
    assert schedule is not None
    return schedule.settled


async def end(store: Store, id: str, state: TaskState = TaskState.COMPLETE) -> None:
    """The present run's only task ends."""
    service = store.view().get(Service, id)
    task = replace(
        a_task(service=service, state=state, desired=TaskState.COMPLETE),
        id=new_id(),
        job_iteration=status(store, id).job_iteration,
    )
    await store.update(lambda tx: tx.put(task))


async def test_a_run_begins_when_it_is_due_and_not_when_the_job_is_created(store: Store) -> None:
    id = await create(store, a_spec("nightly"))
    assert status(store, id).awaits_first_run
    async with leading("10:00:01", store):
        await wait_for(store, lambda: bool(starts(store, id)))
    first = status(store, id)
    assert (first.job_iteration.index, first.last_execution) == (0, Timestamp("2026-11-24T10:00:01Z"))
    assert [one.scheduled_at for one in starts(store, id)] == [TEN]


async def test_two_leaders_start_each_due_time_once_also_with_clocks_apart(rig: Rig) -> None:
    ids = [await create(rig.store, a_spec(f"job-{number}")) for number in range(20)]
    await rig.other.barrier()
    async with leading("10:00:00", rig.store, rig.other):
        await wait_for(rig.store, lambda: all(starts(rig.store, id) for id in ids))
    # The next leader's clock is behind: 09:59.  What it starts is a job of its own, at 09:45.
    other = await create(rig.other, a_spec("quarterly", "*/15 * * * *"))
    async with leading("09:59:00", rig.other):
        await wait_for(rig.other, lambda: bool(starts(rig.other, other)))
    await rig.store.barrier()
    assert [[one.scheduled_at for one in starts(rig.store, id)] for id in ids] == [[TEN]] * len(ids)
    assert {status(rig.store, id).job_iteration.index for id in ids} == {0}


async def test_after_an_outage_the_last_due_time_runs_late_and_the_earlier_ones_are_named(
    store: Store,
) -> None:
    id = await create(store, a_spec("nightly"))
    async with leading("12:20:00", store):
        await wait_for(store, lambda: bool(starts(store, id)))
    (late,) = starts(store, id)
    assert (late.scheduled_at, late.missed_since, late.skipped) == (NOON, TEN, "")
    assert settled(store, id) == NOON


async def test_what_is_later_than_its_deadline_does_not_run(store: Store) -> None:
    id = await create(store, a_spec("report", **{CRON_DEADLINE: "10m"}))
    async with leading("10:20:00", store):
        await wait_for(store, lambda: bool(starts(store, id)))
    (late,) = starts(store, id)
    assert late.skipped == "it would have started 1200 s late"
    assert status(store, id).awaits_first_run
    async with leading("11:05:00", store):
        await wait_for(store, lambda: not status(store, id).awaits_first_run)
    assert settled(store, id) == ELEVEN


async def test_a_run_that_is_still_going_forbids_the_next_one_or_is_replaced(store: Store) -> None:
    forbids = await create(store, a_spec("careful"))
    replaces = await create(store, a_spec("hasty", **{CRON_CONCURRENCY: "replace"}))
    for now, count in (("10:00:00", 1), ("11:00:00", 2)):
        async with leading(now, store):
            await wait_for(store, lambda count=count: len(starts(store, forbids)) == count)
            await wait_for(store, lambda count=count: len(starts(store, replaces)) == count)
    assert [one.skipped for one in starts(store, forbids)] == ["", "run 0 is still going"]
    assert status(store, forbids).job_iteration.index == 0
    assert [one.outcome for one in starts(store, replaces)] == [STOPPED, ""]
    assert status(store, replaces).job_iteration.index == 1
    shown = past_starts(store.view(), store.view().get(Service, replaces))
    assert [one.outcome for one in shown] == [STOPPED, RUNNING]


async def test_the_next_run_notes_how_the_one_before_has_ended(store: Store) -> None:
    good, bad = await create(store, a_spec("good")), await create(store, a_spec("bad"))
    for now, count in (("10:00:00", 1), ("11:00:00", 2)):
        async with leading(now, store):
            await wait_for(store, lambda count=count: len(starts(store, good)) == count)
            await wait_for(store, lambda count=count: len(starts(store, bad)) == count)
        await end(store, good)
        await end(store, bad, TaskState.FAILED)
    assert [one.outcome for one in starts(store, good)] == [COMPLETED, ""]
    assert [one.outcome for one in starts(store, bad)] == [FAILED, ""]
    assert [one.outcome for one in past_starts(store.view(), store.view().get(Service, bad))] == [
        FAILED,
        FAILED,
    ]


async def test_a_restored_cluster_repeats_nothing_that_may_have_run(store: Store) -> None:
    id = await create(store, a_spec("invoices"))
    async with leading("10:00:00", store):
        await wait_for(store, lambda: bool(starts(store, id)))
    await end(store, id)
    async with leading("12:30:00", store, incarnation=2):
        await wait_for(store, lambda: len(starts(store, id)) == 2)
    assert [one.skipped for one in starts(store, id)] == ["", RESTORED]
    assert (starts(store, id)[-1].missed_since, settled(store, id)) == (ELEVEN, NOON)
    async with leading("13:00:00", store, incarnation=2):
        await wait_for(store, lambda: status(store, id).job_iteration.index == 1)


async def test_a_suspended_job_catches_nothing_up(store: Store) -> None:
    spec = a_spec("paused", **{CRON_SUSPEND: "true"})
    id, marker = await create(store, spec), await create(store, a_spec("marker"))
    async with leading("11:30:00", store):
        await wait_for(store, lambda: bool(starts(store, marker)))
    assert status(store, id).awaits_first_run
    resumed = replace(spec, labels={CRON: "@hourly"})
    version = store.view().get(Service, id).version.index
    await store.update(update_service, id, resumed, version, now=Timestamp("2026-11-24T11:40:00Z"))
    assert settled(store, id) == "2026-11-24T11:40:00Z"
    async with leading("12:00:00", store):
        await wait_for(store, lambda: not status(store, id).awaits_first_run)
    assert [(one.scheduled_at, one.missed_since) for one in starts(store, id)] == [(NOON, None)]


async def test_an_update_is_for_the_next_run_and_force_is_now(store: Store) -> None:
    spec = a_spec("nightly")
    id = await create(store, spec)
    async with leading("10:00:00", store):
        await wait_for(store, lambda: bool(starts(store, id)))

    async def update(changed: ServiceSpec) -> Service:
        version = store.view().get(Service, id).version.index
        return await store.update(update_service, id, changed, version, now=Timestamp("2026-11-24T10:10:00Z"))

    container = spec.task_template.container_spec
    assert container is not None
    template = replace(spec.task_template, container_spec=replace(container, image="busybox:2"))
    changed = replace(spec, task_template=template)
    first = store.view().get(Service, id)
    updated = await update(changed)
    assert status(store, id).job_iteration.index == 0
    run = as_run(store.view(), updated)
    assert (run.spec, run.spec_version) == (first.spec, first.spec_version)
    # A second update still leaves the run what it began with; and a rollback starts none.
    await update(replace(changed, labels={**changed.labels, "owner": "ops"}))
    assert as_run(store.view(), store.view().get(Service, id)).spec == first.spec
    version = store.view().get(Service, id).version.index
    await store.update(rollback_service, id, changed, version, now=TEN)
    assert status(store, id).job_iteration.index == 0
    forced = await update(replace(changed, task_template=replace(template, force_update=1)))
    assert status(store, id).job_iteration.index == 1
    assert as_run(store.view(), forced) == forced
    assert [(one.scheduled_at, one.outcome) for one in starts(store, id)] == [(TEN, STOPPED), (None, "")]


async def test_new_disconnect_labels_hold_for_the_present_run(store: Store) -> None:
    """The nodes of its tasks are sent them."""
    spec = a_spec("nightly")
    id = await create(store, replace(spec, labels={**spec.labels, ON_DISCONNECT_DELAY: "5s"}))
    async with leading("10:00:00", store):
        await wait_for(store, lambda: bool(starts(store, id)))
    changed = replace(spec, labels={**spec.labels, ON_DISCONNECT: "stop", "owner": "ops"})
    version = store.view().get(Service, id).version.index
    now = Timestamp("2026-11-24T10:10:00Z")
    updated = await store.update(update_service, id, changed, version, now=now)
    run = as_run(store.view(), updated)
    assert run.spec_version != updated.spec_version
    assert run.spec.labels == {**spec.labels, ON_DISCONNECT: "stop"}


async def test_a_job_without_a_schedule_keeps_running_with_each_update(store: Store) -> None:
    spec = replace(a_spec("resize"), labels={})
    id = await create(store, spec)
    assert status(store, id) == JobStatus(last_execution=CREATED)
    await store.update(
        update_service,
        id,
        replace(spec, labels={"a": "b"}),
        store.view().get(Service, id).version.index,
        now=TEN,
    )
    assert (status(store, id).job_iteration.index, status(store, id).last_execution) == (1, TEN)
    # It gets a schedule: what has run stays, and the next run is the schedule's.
    scheduled = replace(spec, labels={CRON: "@hourly"})
    await store.update(update_service, id, scheduled, store.view().get(Service, id).version.index, now=TEN)
    assert (status(store, id).job_iteration.index, settled(store, id)) == (1, TEN)
    # And loses it: the update runs it, as any update of a job.
    await store.update(update_service, id, spec, store.view().get(Service, id).version.index, now=ELEVEN)
    assert status(store, id).job_iteration.index == 2
    assert status(store, id).schedule is None


async def test_a_user_runs_a_job_now_unless_it_is_going_and_retries_what_failed(store: Store) -> None:
    id = await create(store, a_spec("nightly"))
    await store.update(run_job, id, now=TEN, replaces=False)
    assert status(store, id).job_iteration.index == 0
    assert [one.scheduled_at for one in starts(store, id)] == [None]
    with pytest.raises(FailedPrecondition, match="run 0 of job nightly is active"):
        await store.update(run_job, id, now=TEN, replaces=False)
    await store.update(run_job, id, now=TEN, replaces=True)
    assert status(store, id).job_iteration.index == 1
    with pytest.raises(FailedPrecondition, match="no slot of the current run of job nightly has failed"):
        await store.update(retry_job, id)
    await end(store, id, TaskState.FAILED)
    await store.update(retry_job, id)
    (failed,) = store.view().find(Task, service_id=id)
    assert status(store, id).retried_until == failed.created_at
    assert status(store, id).job_iteration.index == 1
    with pytest.raises(FailedPrecondition, match="is active"):
        await store.update(run_job, id, now=TEN, replaces=False)


async def test_a_retry_of_a_run_that_restarts_its_failed_tasks_by_itself_says_so(store: Store) -> None:
    id = await create(store, a_spec("nightly"))
    await store.update(run_job, id, now=TEN, replaces=False)
    for name, state in (("t1", TaskState.FAILED), ("t2", TaskState.RUNNING)):
        task = a_task(name, service=store.view().get(Service, id), state=state)
        made = replace(task, job_iteration=status(store, id).job_iteration)
        await store.update(lambda tx, made=made: tx.put(made))
    with pytest.raises(
        FailedPrecondition, match="restarts its failed tasks by itself: there is nothing to retry"
    ):
        await store.update(retry_job, id)


async def test_a_run_that_failed_on_a_drained_node_is_retried_when_the_node_takes_tasks(store: Store) -> None:
    spec = replace(a_spec("scan"), mode=ServiceMode(global_job=GlobalJob()))
    id = await create(store, spec)
    await store.update(put, replace(a_node("w1"), created_at=CREATED))
    await store.update(run_job, id, now=TEN, replaces=False)
    task = a_task("t1", service=store.view().get(Service, id), slot=0, node="w1", state=TaskState.SHUTDOWN)
    stopped = replace(task, job_iteration=status(store, id).job_iteration, desired_state=TaskState.SHUTDOWN)
    await store.update(put, stopped)
    drained = a_node("w1", availability=Availability.DRAIN)
    await store.update(put, replace(store.view().get(Node, "w1"), spec=drained.spec))
    with pytest.raises(
        FailedPrecondition, match="run 0 of job scan failed on w1: retry it when its nodes take"
    ):
        await store.update(retry_job, id)
    await store.update(put, replace(store.view().get(Node, "w1"), spec=a_node("w1").spec))
    await store.update(retry_job, id)
    assert status(store, id).retried_until == stopped.created_at


async def test_what_is_no_job_or_gone_is_neither_run_nor_scheduled(store: Store) -> None:
    web = await create(store, a_service_spec("web"))
    for request in (
        store.update(run_job, web, now=TEN, replaces=True),
        store.update(retry_job, web),
    ):
        with pytest.raises(FailedPrecondition, match="service web is not a job: it has mode replicated"):
            await request
    with pytest.raises(InvalidArgument, match="the service is replicated"):
        await create(store, replace(a_service_spec("other"), labels={CRON: "@daily"}))
    gone, marker = await create(store, a_spec("gone")), await create(store, a_spec("marker"))
    await store.update(remove_service, gone, now=CREATED)
    async with leading("10:00:00", store):
        await wait_for(store, lambda: bool(starts(store, marker)))
    assert starts(store, gone) == ()


async def test_a_cluster_with_an_older_manager_takes_no_schedules_and_no_retries() -> None:
    store = MemoryStore(SystemClock())
    await store.update(lambda tx: tx.raise_level(SCHEDULES - 1))
    with pytest.raises(FailedPrecondition, match="schedules need managers of this version"):
        await store.update(create_service, a_spec("x"), new_id=new_id, new_name=lambda: "", now=CREATED)
    plain = replace(a_spec("x"), labels={})
    made = await store.update(create_service, plain, new_id=new_id, new_name=lambda: "", now=CREATED)
    with pytest.raises(FailedPrecondition, match="schedules need managers of this version"):
        await store.update(update_service, made.id, a_spec("x"), made.version.index, now=TEN)
    with pytest.raises(FailedPrecondition, match="this needs managers of this version"):
        await store.update(retry_job, made.id)


async def test_a_note_of_the_restore_that_cannot_be_read_counts_as_another_incarnation(store: Store) -> None:
    await store.update(lambda tx: tx.put(Payload(id=SCHEDULES_ID, data=b"not JSON")))
    assert await store.update(note_incarnation, 3, 7) == Restored(3, 7)
    assert await store.update(note_incarnation, 3, 9) == Restored(3, 7)


async def test_a_job_of_an_earlier_version_begins_with_its_schedule_when_it_is_seen(store: Store) -> None:
    """A label that nothing read until now: nothing of the past is run."""
    id = await create(store, a_spec("old"))
    plain = replace(store.view().get(Service, id), job_status=JobStatus(last_execution=CREATED))
    await store.update(lambda tx: tx.put(plain))
    async with leading("11:30:00", store):
        await wait_for(store, lambda: status(store, id).schedule is not None)
    assert (settled(store, id), starts(store, id)) == (timestamp(WallClock("11:30:00").now_ns()), ())


async def test_the_history_of_starts_is_bounded(store: Store) -> None:
    id = await create(store, a_spec("often", "* * * * *", **{CRON_CONCURRENCY: "replace"}))
    for _ in range(25):
        await store.update(run_job, id, now=TEN, replaces=True)
    assert [one.iteration.index for one in starts(store, id) if one.iteration] == list(range(5, 25))

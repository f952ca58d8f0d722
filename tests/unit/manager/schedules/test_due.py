"""What is due of a scheduled job, with words and numbers; the rules over two stores are in the contract suite."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.telemetry.exposition import render
from skep.manager.diagnosis.explanations import explain_service
from skep.manager.journal.changes import entries_of
from skep.manager.orchestrator.changes import FillSlot, RetireTask, SettleRun
from skep.manager.schedules.due import decided, next_due_ns
from skep.manager.services.job_listing import failure, next_run, note, schedule_words, shown_job
from skep.manager.services.job_runs import COMPLETED, FAILED, next_job
from skep.manager.telemetry.events import messages_of
from skep.manager.telemetry.metrics import job_family
from skep.model.history import Severity
from skep.model.options.labels import JOB_TTL
from skep.model.options.schedules import CRON, CRON_SUSPEND, parsed_schedule
from skep.model.service import (
    JobStart,
    JobStatus,
    ReplicatedJob,
    RestartCondition,
    RestartPolicy,
    ScheduleStatus,
    Service,
    ServiceMode,
)
from skep.model.task import TaskState
from skep.model.values.ids import TaskId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS, Timestamp, timestamp, unix_ns
from skep.store.interface import Updated
from skep.store.kinds import SpecVersion, unused_versions
from skep.store.memory import MemoryStore
from tests.support.builders import a_service, a_task
from tests.support.managers.worlds import World
from tests.support.store.store_transactions import put

EMPTY = MemoryStore(SystemClock()).view()
SETTLED = Timestamp("2026-11-24T09:30:00Z")


def a_job(job: JobStatus | None = None, total: int = 1, **labels: str) -> Service:
    service = a_service("job", restart=RestartPolicy(condition=RestartCondition.NONE))
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=total, total_completions=total))
    spec = replace(service.spec, mode=mode, labels={CRON: "@hourly", **labels})
    waiting = JobStatus(schedule=ScheduleStatus(settled=SETTLED))
    return replace(service, spec=spec, job_status=job or waiting)


def after_a_run(*more: JobStart) -> JobStatus:
    at = Timestamp("2026-11-24T10:00:00Z")
    starts = (JobStart(at=at, iteration=Version(index=0), scheduled_at=at), *more)
    return JobStatus(last_execution=at, schedule=ScheduleStatus(settled=at, starts=starts))


@given(looks=st.lists(st.integers(0, 100 * 3600), max_size=20), every=st.sampled_from((1, 7, 60)))
def test_whenever_leaders_look_every_due_time_is_in_one_decision_and_none_in_two(
    looks: list[int], every: int
) -> None:
    """Looks in any order, as of clocks that go back."""
    cron = "@hourly" if every == 60 else f"*/{every} * * * *"
    service = a_job(**{CRON: cron})
    schedule, begin_ns = parsed_schedule(service.spec.labels), unix_ns(SETTLED)
    covered_s = begin_ns // SECOND_NS
    for look in looks:
        job = decided(EMPTY, service, schedule, begin_ns + look * SECOND_NS)
        if job is None:
            continue
        assert job.schedule is not None
        start = job.schedule.starts[-1]
        first_s = unix_ns(start.missed_since or start.scheduled_at or "") // SECOND_NS
        assert first_s == schedule.next_after(covered_s)
        covered_s = unix_ns(job.schedule.settled) // SECOND_NS
        assert covered_s <= begin_ns // SECOND_NS + look
        service = replace(service, job_status=job)
    latest_s = begin_ns // SECOND_NS + max(looks, default=0)
    assert schedule.last_until(covered_s, latest_s) is None


def test_a_suspended_schedule_has_no_next_time() -> None:
    service = a_job(**{CRON_SUSPEND: "true"})
    schedule = parsed_schedule(service.spec.labels)
    assert service.job_status is not None
    assert service.job_status.schedule is not None
    assert next_due_ns(schedule, service.job_status.schedule) is None
    assert decided(EMPTY, service, schedule, unix_ns("2027-01-01T00:00:00Z")) is None
    assert next_run(service) is None
    assert schedule_words(service) == "@hourly (UTC); suspended by the label skep.cron.suspend"


def test_a_job_that_waits_for_its_first_run_has_no_tasks_and_is_as_wanted() -> None:
    service = a_job()
    assert World(service).steps() == []
    explained = explain_service(service, [], wanted=0, nodes={}, now_ns=0)
    assert (explained.summary, explained.is_healthy) == ("it waits for its first run", True)
    assert explained.health.reason == "it waits for its first run", "status shows 0/1 done with it"
    assert schedule_words(service) == "@hourly (UTC), next run at 2026-11-24T10:00:00Z"
    assert shown_job(EMPTY, service).state == "waiting"


def test_a_failed_run_has_the_reason_of_its_last_task_in_the_list_of_jobs() -> None:
    async def listed() -> str:
        store = MemoryStore(SystemClock())
        job = a_job(JobStatus(job_iteration=Version(index=1), outcome=FAILED))
        first = a_task(state=TaskState.FAILED, service=job)
        status = replace(
            first.status, err="task: non-zero exit (7)", timestamp=Timestamp("2026-11-24T10:00:00Z")
        )
        for task in (first, replace(first, id=TaskId("last"), status=status)):
            await store.update(put, replace(task, job_iteration=Version(index=1)))
        await store.update(put, job)
        return failure(store.view(), job)

    assert asyncio.run(listed()) == "exit 7"
    assert failure(EMPTY, a_job()) == ""


def test_a_changed_schedule_counts_from_now_and_repeats_no_run_if_this_clock_is_behind() -> None:
    """A rollback to the schedule before a suspension reached a manager whose clock was behind the leader's."""
    service = a_job(after_a_run(), **{CRON_SUSPEND: "true"})
    resumed = replace(service.spec, labels={CRON: "@hourly"})

    def settled(now: str) -> str:
        found = next_job(EMPTY, service, resumed, Timestamp(now))
        assert found is not None
        assert found.schedule is not None
        return found.schedule.settled

    assert settled("2026-11-24T11:30:00Z") == "2026-11-24T11:30:00Z"
    assert settled("2026-11-24T09:59:30Z") == "2026-11-24T10:00:00Z", "10:00 had a run"
    assert settled("2025-11-24T09:59:30Z") == "2025-11-24T09:59:30Z", "the run was made by a wrong clock"


def test_a_scheduled_job_is_kept_between_its_runs_whatever_its_time_to_live() -> None:
    """The two labels are refused together; an earlier version has not looked at one of them."""
    ended = replace(after_a_run(), outcome=COMPLETED, settled_iteration=Version())
    service = a_job(ended, **{JOB_TTL: "1s"})
    done = replace(
        a_task(service=service, state=TaskState.COMPLETE, desired=TaskState.COMPLETE),
        job_iteration=Version(),
    )
    world = World(service, [done])
    world.now = 10_000.0
    assert world.steps() == []
    assert service.job_status is not None
    plain = replace(service, job_status=replace(service.job_status, schedule=None))
    world = World(plain, [done])
    world.now = 10_000.0
    assert len(world.steps()) == 1


def test_what_failed_before_a_retry_is_started_again_and_what_has_completed_is_not() -> None:
    job = replace(after_a_run(), outcome=FAILED, settled_iteration=Version())
    service = a_job(job, total=2)
    done, failed = (
        replace(
            a_task(service=service, slot=slot, state=state, desired=desired),
            job_iteration=Version(),
        )
        for slot, state, desired in (
            (1, TaskState.COMPLETE, TaskState.COMPLETE),
            (2, TaskState.FAILED, TaskState.SHUTDOWN),
        )
    )
    assert World(service, [done, failed]).changes() == []
    retried = replace(service, job_status=replace(job, retried_until=failed.created_at, outcome=""))
    assert World(retried, [done, failed]).changes() == [FillSlot(retried, 2)]
    again = replace(failed, id="again", created_at=Timestamp("2026-11-24T10:05:00Z"))
    assert World(retried, [done, failed, again]).changes() == [SettleRun(retried, is_over=True)]


def test_a_new_run_stops_the_tasks_of_the_one_before_that_have_the_same_spec() -> None:
    service = a_job(replace(after_a_run(), job_iteration=Version(index=1)))
    old = replace(a_task(service=service), job_iteration=Version(index=0))
    assert World(service, [old]).steps() == [RetireTask(old, TaskState.REMOVE), FillSlot(service, 1)]
    world = World(service, [old])
    world.apply(world.changes())
    assert [task.job_iteration for task in world.tasks.values() if task.is_active] == [Version(index=1)]


def test_the_spec_of_the_present_run_is_kept_until_the_next_one() -> None:
    service = replace(
        a_job(replace(after_a_run(), spec_version=Version(index=1))), spec_version=Version(index=3)
    )
    versions = [
        SpecVersion(id=f"job/{index}", service_id=service.id, index=index, spec=service.spec)
        for index in (1, 2, 3)
    ]
    assert unused_versions(service, versions, []) == [versions[1]]


def test_the_history_says_when_and_why_a_run_began_or_was_skipped() -> None:
    at = Timestamp("2026-11-24T11:00:00Z")

    def message(before: JobStatus, after: JobStatus) -> list[tuple[str, str]]:
        event = Updated(a_job(before), a_job(after))
        return [(one.action, one.message) for one in entries_of(event, EMPTY)]

    first, waiting = after_a_run(), JobStatus(schedule=ScheduleStatus(settled=SETTLED))
    assert message(waiting, first) == [("run", "run 0 of job job began: it was due at 2026-11-24T10:00:00Z")]
    late = after_a_run(JobStart(at=at, iteration=Version(index=1), scheduled_at=at, missed_since=SETTLED))
    assert message(first, replace(late, job_iteration=Version(index=1))) == [
        (
            "run",
            f"run 1 of job job began: it was due at {at}, and earlier ones since {SETTLED}",
        )
    ]
    skipped = after_a_run(JobStart(at=at, scheduled_at=at, skipped="run 0 is still going"))
    assert message(first, skipped) == [
        ("skip", "job job was not run at 2026-11-24T11:00:00Z: run 0 is still going")
    ]
    by_hand = after_a_run(JobStart(at=at, iteration=Version(index=1)))
    assert message(first, by_hand) == [("run", "run 0 of job job began: on request")]
    assert message(first, replace(first, retried_until=at)) == [
        ("retry", "failed tasks of run 0 of job job are retried on request")
    ]
    assert note(a_job(skipped)) == "not run at 2026-11-24T11:00:00Z: run 0 is still going"


def test_a_schedule_that_cannot_be_read_says_so() -> None:
    service = a_job(**{CRON: "whenever"})
    assert next_run(service) is None
    assert "invalid label skep.cron=whenever" in schedule_words(service)


def test_a_time_of_now_is_due() -> None:
    service = a_job()
    schedule = parsed_schedule(service.spec.labels)
    assert decided(EMPTY, service, schedule, unix_ns("2026-11-24T10:00:00Z") - 1) is None
    job = decided(EMPTY, service, schedule, unix_ns("2026-11-24T10:00:00Z"))
    assert job is not None
    assert job.last_execution == timestamp(unix_ns("2026-11-24T10:00:00Z"))


def test_a_run_that_has_failed_for_good_is_an_event_an_entry_and_a_metric_and_holds_up_no_later_run() -> None:
    at = Timestamp("2026-11-24T10:00:00Z")
    start = JobStart(at=at, iteration=Version(index=3), scheduled_at=at)
    schedule = ScheduleStatus(settled=at, starts=(start,))
    job = JobStatus(job_iteration=Version(index=3), last_execution=at, schedule=schedule)
    going = a_job(job)
    ended = replace(going, job_status=replace(job, outcome=FAILED, settled_iteration=Version(index=3)))
    failed = replace(
        a_task(service=going, state=TaskState.FAILED, desired=TaskState.SHUTDOWN),
        job_iteration=Version(index=3),
    )
    store = MemoryStore(SystemClock())
    asyncio.run(store.update(lambda tx: (tx.put(ended), tx.put(failed))))
    view = store.view()
    (entry,) = entries_of(Updated(going, ended), view)
    assert (entry.action, entry.severity) == ("fail", Severity.ERROR)
    assert entry.message.startswith("run 3 of job job failed without a restart: ")
    (message,) = messages_of(Updated(going, ended), 0)
    assert message.actor.attributes["run.outcome"] == FAILED
    assert 'skep_job_last_run_failed{service="job"} 1' in render([job_family([ended])]).decode()
    assert 'skep_job_last_run_failed{service="job"} 0' in render([job_family([going])]).decode()
    after = decided(view, ended, parsed_schedule(ended.spec.labels), unix_ns("2026-11-24T11:00:00Z"))
    assert after is not None
    assert after.job_iteration == Version(index=4)
    next_going = replace(ended, job_status=after)
    assert 'skep_job_last_run_failed{service="job"} 1' in render([job_family([next_going])]).decode()

"""The list of jobs of a manager."""

from aiohttp.test_utils import TestClient, TestServer
from msgspec.structs import replace

from skep.manager.journal.changes import entries_of
from skep.manager.routes import application
from skep.manager.services.job_runs import FAILED
from skep.model.node import Availability
from skep.model.options.schedules import CRON
from skep.model.service import GlobalJob, JobStatus, ReplicatedJob, ScheduleStatus, ServiceMode
from skep.model.task import Restart, StopCause, TaskState
from skep.model.values.meta import Version
from skep.model.values.times import timestamp
from skep.store.interface import Updated
from tests.conformance.manager import a_manager_api
from tests.support.builders import a_node, a_service, a_task
from tests.support.store.store_transactions import put


async def test_a_run_whose_task_waits_for_a_node_says_so_in_the_list_of_jobs() -> None:
    service = a_service("job")
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
    run = Version(index=1)
    job = replace(service, spec=replace(service.spec, mode=mode), job_status=JobStatus(job_iteration=run))
    task = replace(a_task(service=job, state=TaskState.PENDING), job_iteration=run)
    reason = "no suitable node (scheduling constraints not satisfied on 1 node)"
    waiting = replace(task, status=replace(task.status, err=reason))
    async with a_manager_api() as api:
        await api.store.update(put, job)
        await api.store.update(put, waiting)
        async with TestClient(TestServer(application(api))) as client:
            (listed,) = await (await client.get("/skep/jobs")).json()
            assert (listed["State"], listed["Note"]) == ("running", reason)
            status = replace(task.status, state=TaskState.RUNNING, err="")
            await api.store.update(put, replace(task, status=status))
            (listed,) = await (await client.get("/skep/jobs")).json()
            assert (listed["State"], listed.get("Note", "")) == ("running", "")


async def test_a_completed_global_job_names_the_node_on_which_it_has_not_run() -> None:
    service, run = a_service("scan"), Version(index=0)
    spec = replace(service.spec, mode=ServiceMode(global_job=GlobalJob()))
    # The manager's own node has joined later.
    job = replace(service, spec=spec, job_status=JobStatus(job_iteration=run, last_execution=timestamp(1)))
    done = a_task("t1", service=job, slot=0, node="w1", state=TaskState.COMPLETE)
    drained = replace(
        a_task("t2", service=job, slot=0, node="w2", state=TaskState.SHUTDOWN, desired=TaskState.SHUTDOWN),
        job_iteration=run,
    )
    async with a_manager_api() as api:
        for one in (job, replace(done, job_iteration=run), a_node("w1")):
            await api.store.update(put, one)
        async with TestClient(TestServer(application(api))) as client:
            (listed,) = await (await client.get("/skep/jobs")).json()
            assert (listed["State"], listed.get("Note", "")) == ("completed", "")
            for one in (drained, a_node("w2", availability=Availability.DRAIN)):
                await api.store.update(put, one)
            (listed,) = await (await client.get("/skep/jobs")).json()
            note = "not on w2, whose availability is drain"
            assert (listed["State"], listed.get("Note", "")) == ("completed", note)


async def test_a_run_that_failed_because_a_node_was_drained_says_so() -> None:
    service, run = a_service("scan"), Version(index=0)
    spec = replace(service.spec, mode=ServiceMode(global_job=GlobalJob()), labels={CRON: "@hourly"})
    schedule = ScheduleStatus(settled=timestamp(1))
    status = JobStatus(job_iteration=run, last_execution=timestamp(1), schedule=schedule)
    going = replace(service, spec=spec, job_status=status)
    failed = replace(going, job_status=replace(status, outcome=FAILED, settled_iteration=run))
    task = a_task(
        "t2", service=going, slot=0, node="w2", state=TaskState.SHUTDOWN, desired=TaskState.SHUTDOWN
    )
    drained = Restart(was_stopped=True, stop_cause=StopCause.NODE_DRAINED.value)
    why = "its task was stopped, because its node w2 was drained"
    async with a_manager_api() as api:
        for one in (failed, replace(task, job_iteration=run, restart=drained), a_node("w2")):
            await api.store.update(put, one)
        async with TestClient(TestServer(application(api))) as client:
            (listed,) = await (await client.get("/skep/jobs")).json()
        assert (listed["State"], listed["Note"]) == ("failed", why)
        (entry,) = entries_of(Updated(going, failed), api.store.view())
    assert entry.message == f"run 0 of job scan failed: {why}"

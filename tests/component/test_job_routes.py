"""The list of jobs of a manager."""

from aiohttp.test_utils import TestClient, TestServer
from msgspec.structs import replace

from skep.manager.routes import application
from skep.model.service import JobStatus, ReplicatedJob, ServiceMode
from skep.model.task import TaskState
from skep.model.values.meta import Version
from tests.conformance.manager import a_manager_api
from tests.support.builders import a_service, a_task
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

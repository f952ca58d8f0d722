"""The leader's loop over scheduled jobs, on an in-memory store and virtual time."""

import asyncio
from random import Random

from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.schedules.loop import Schedules
from skep.model.options.schedules import CRON
from skep.model.service import JobStatus, ReplicatedJob, ScheduleStatus, Service, ServiceMode
from skep.model.values.times import timestamp
from skep.store.memory import MemoryStore
from tests.support.builders import a_service


def test_a_run_that_could_not_be_read_is_looked_at_again_when_it_is_repaired_with_an_equal_value() -> None:
    """No commit shows that."""
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    store = MemoryStore(clock)
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
    spec = replace(a_service("job").spec, mode=mode, labels={CRON: "* * * * *"})
    job = JobStatus(schedule=ScheduleStatus(settled=timestamp(clock.now_ns())))

    def status() -> JobStatus:
        found = store.view().get(Service, "job").job_status
        assert found is not None
        return found

    async def live() -> None:
        await store.update(lambda tx: tx.put(replace(a_service("job"), spec=spec, job_status=job)))
        damaged = store.view().damaged(Service)
        damaged["job"] = {"job": "rotten"}  # type: ignore[index]
        schedules = asyncio.create_task(Schedules(store, clock, Random(1), 1).run())
        await asyncio.sleep(150)
        assert status().awaits_first_run
        del damaged["job"]  # type: ignore[attr-defined]
        await asyncio.sleep(90)
        assert not status().awaits_first_run
        schedules.cancel()
        await asyncio.gather(schedules, return_exceptions=True)

    loop.run_until_complete(live())

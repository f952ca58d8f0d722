"""The leader's loops for due times of the wall clock: runs of scheduled jobs, and ends of change freezes.

Leader only.
"""

from random import Random

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock, tick
from skep.errors import SkepError
from skep.manager.control_loops.loop_driver import LoopDriver
from skep.manager.schedules.state import Restored, SchedulesState, note_incarnation, write_decision
from skep.manager.services.freezes import bring_up_to_date, has_freezes, is_out_of_date
from skep.model.service import Service
from skep.model.values.ids import ServiceId
from skep.model.values.times import SECOND_NS
from skep.store.interface import LoopStore, NotLeader, Transaction

log = structlog.get_logger(__name__)

BATCH = 50
"""Jobs decided before their runs are written together."""
CLOCK_CHECK_S = 20.0
"""Seconds between checks whether the wall clock was set."""
CLOCK_SET_S = 1.0
"""Minimum seconds by which the wall clock must have been set to matter."""
FREEZE_CHECK_S = 1.0
"""Seconds between two checks of freezes, which only read one object.  The wall clock may be set, so no check waits for
a due time.
"""
NO_FREEZE_CHECK_S = 5.0
"""The same without any freeze or window.  An idle leader shall wake up rarely, and a freeze lasts longer."""
FREEZE_RETRY_S = 1.0, 10.0
"""First and longest delay in seconds, with jitter, until the next attempt to write the end of a freeze."""


class Schedules:
    """Starts the runs of scheduled jobs at their due times.

    Args:
        incarnation: The cluster's incarnation.  After a restore, runs that are missing from the backup may have
            happened, so everything that was due until then is skipped.
    """

    def __init__(self, term: LoopStore, clock: Clock, random: Random, incarnation: int) -> None:
        self._term = term
        self._clock = clock
        self._incarnation = incarnation
        self._restored: Restored | None = None
        self.state = SchedulesState(term.view, clock, random)
        self._driver = LoopDriver(term, clock, self.state, (Service,), BATCH)

    async def run(self) -> None:
        """Start runs until cancelled."""
        await self._driver.run(self._start_due, self._notice_set_clock)

    async def _notice_set_clock(self) -> None:
        """Recompute all waits when the wall clock is set, because waits use another clock than due times."""
        offset_s = self._offset_s()
        while True:
            await tick(self._clock, CLOCK_CHECK_S)
            if abs(self._offset_s() - offset_s) > CLOCK_SET_S:
                offset_s = self._offset_s()
                for _ in self.state.start(self._term.view()):
                    pass

    def _offset_s(self) -> float:
        return self._clock.now_ns() / SECOND_NS - self._clock.monotonic()

    async def _start_due(self, ids: list[ServiceId]) -> None:
        try:
            restored = await self._read_restored()
        except SkepError as error:
            self.state.failures.requeue_failed(self.state.queue, "incarnation", [(id, error) for id in ids])
            return
        due, now_ns = await self._driver.decide(ids, self.state.decide), self._clock.now_ns()

        def write(tx: Transaction, id: ServiceId) -> Service | None:
            return write_decision(tx, id, now_ns, restored.until_ns)

        for result in await self._driver.write("run", write, due):
            if isinstance(result, Service):
                _log(result)

    async def _read_restored(self) -> Restored:
        """Read or record the incarnation, once per term.  Raises SkepError."""
        if self._restored is None:
            self._restored = await self._term.update(
                note_incarnation, self._incarnation, self._clock.now_ns()
            )
        return self._restored


class ChangeFreezes:
    """Keeps the freezes and the window in the store up to date, so that no other loop needs their times."""

    def __init__(self, term: LoopStore, clock: Clock, random: Random) -> None:
        self._term = term
        self._clock = clock
        self._random = random

    async def run(self) -> None:
        """Keep them up to date until cancelled."""
        backoff = Backoff(*FREEZE_RETRY_S, rng=self._random.random)
        while True:
            view, now_ns = self._term.view(), self._clock.now_ns()
            if is_out_of_date(view, now_ns):
                try:
                    await self._term.update(bring_up_to_date, now_ns)
                    backoff.reset()
                except NotLeader:
                    raise
                except SkepError as error:
                    log.warning("end of a freeze not written, will retry", reason=str(error))
                    await self._clock.sleep(backoff.next_delay_s())
                    continue
            await tick(self._clock, FREEZE_CHECK_S if has_freezes(view) else NO_FREEZE_CHECK_S)


def _log(service: Service) -> None:
    job = service.job_status
    starts = job.schedule.starts if job is not None and job.schedule is not None else ()
    if not starts or job is None:
        return  # only its schedule was recorded
    last = starts[-1]
    if last.skipped:
        log.warning("run skipped", job=service.spec.name, due=last.scheduled_at, reason=last.skipped)
    else:
        log.info("run started", job=service.spec.name, due=last.scheduled_at, run=job.job_iteration.index)

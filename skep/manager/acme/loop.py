"""The leader's loop for certificates: makes one step after the other, and records each result.  Leader only."""

from collections.abc import Awaitable, Callable
from functools import partial
from random import Random

import structlog

from skep.aio.clock import Clock
from skep.aio.failures import retry
from skep.errors import SkepError
from skep.manager.acme.calls import RunStep, log_outcome
from skep.manager.acme.records import account_in, record_in
from skep.manager.acme.state import STEP, WATCHED, CertificatesState, WantedNames, names_of_routes
from skep.manager.acme.steps import (
    PUBLISH_S,
    AskWindow,
    BeginOrder,
    ContinueOrder,
    DropOrder,
    OpenOrder,
    OrderPending,
    RegisterAccount,
    RemoveRecords,
    Step,
    WaitUntil,
)
from skep.manager.acme.writing import begin_order, drop_order, note_outcome
from skep.manager.control_loops.loop_driver import LoopDriver
from skep.model.values.times import SECOND_NS
from skep.security.keys import new_private_key, private_pem
from skep.store.interface import LoopStore, NotLeader

log = structlog.get_logger(__name__)

RETRY_S = 5.0
"""Seconds after a refused write.  The store usually elects a leader within that time."""


class Certificates:
    """Orders and renews certificates, one order at a time."""

    def __init__(
        self,
        term: LoopStore,
        clock: Clock,
        random: Random,
        run_step: RunStep,
        confirm: Callable[[], Awaitable[None]],
        wanted: WantedNames = names_of_routes,
        publish_s: float = PUBLISH_S,
    ) -> None:
        """Create a loop.

        Args:
            run_step: Makes a step at the authority within a deadline.
            confirm: Confirms the term before a step, which no fence covers.
            publish_s: Seconds until the doors have a stored challenge.
        """
        self._term = term
        self._clock = clock
        self._random = random
        self._run_step = run_step
        self._confirm = confirm
        self.state = CertificatesState(term.view, clock, random, wanted, publish_s)
        self._driver = LoopDriver(term, clock, self.state, WATCHED, batch=1)
        self._is_busy = False

    async def run(self) -> None:
        """Order certificates until cancelled."""
        self._is_busy = False
        await self._driver.run(self._work)

    async def _work(self, keys: list[str]) -> None:
        if self._is_busy:
            return
        with self.state.failures.caught(STEP):
            await self._take(self.state.due())
        if (failure := self.state.failures.of(STEP)) is not None:
            self.state.queue.add_at(STEP, failure.retry_at)

    async def _take(self, step: Step | None) -> None:
        match step:
            case None | WaitUntil():
                pass
            case DropOrder(name, is_needed):
                drop = partial(drop_order, is_needed=is_needed)
                await self._term.update(drop, name, self._clock.now_ns())
            case BeginOrder(name):
                key = private_pem(new_private_key()).decode()
                await self._term.update(begin_order, name, key, self._clock.now_ns())
            case RegisterAccount():
                self._start(RegisterAccount(), "")
            case OpenOrder(name) | ContinueOrder(name) | RemoveRecords(name) | AskWindow(name):
                self._start(step, name)

    def _start(self, step: Step, name: str) -> None:
        """Make a step at the authority in a job of its own, so that the loop keeps up with the store."""
        self._is_busy = True
        self._driver.spawn(self._make(step, name), f"acme {name}")

    async def _make(self, step: Step, name: str) -> None:
        delay_s = 0.0
        try:
            await self._ask_and_record(step, name)
        except NotLeader:
            raise
        except SkepError as error:
            log.warning("step of a certificate not made, will retry", name=name, reason=str(error))
            delay_s = RETRY_S
        finally:
            self._is_busy = False
        self.state.queue.add_at(STEP, self._clock.monotonic() + delay_s)

    async def _ask_and_record(self, step: Step, name: str) -> None:
        await self._confirm()
        present = None
        with self.state.failures.caught(STEP):
            present = self.state.due()
        if present != step:
            return  # another authority or a renewal was requested meanwhile
        view = self._term.view()
        account, record = account_in(view), record_in(view, name) if name else None
        if account is None or (record is not None and not (record.order or record.left or record.pem)):
            return
        outcome = await self._run_step(account, record)
        log_outcome(account, record, outcome)
        if isinstance(outcome, OrderPending):
            self.state.look_at[name] = self._clock.now_ns() + int(outcome.look_after_s * SECOND_NS)
        # The authority has done the step, so nothing else is asked of it before the result is stored.
        body = partial(
            note_outcome,
            used=account,
            before=record,
            outcome=outcome,
            now_ns=self._clock.now_ns(),
            chance=self._random.random(),
        )
        await retry(
            partial(self._term.update, body),
            "result of a certificate's step not written, will retry",
            clock=self._clock,
            rng=self._random.random,
            longest_s=RETRY_S,
            passes=(NotLeader,),
            kinds=(SkepError,),
            name=name,
        )

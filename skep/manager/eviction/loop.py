"""The leader's eviction loop: one step after the other, until nothing that the node had is valid."""

import asyncio
from collections.abc import Callable
from random import Random

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock, tick
from skep.errors import FailedPrecondition, SkepError, Unavailable
from skep.manager.control_loops.informer import run_informer
from skep.manager.eviction.step_runner import StepRunner
from skep.manager.eviction.steps import (
    EVICTION_ID,
    TEXTS,
    Eviction,
    Step,
    eviction_of,
    note_done,
    note_waiting,
)
from skep.manager.storage.keys import StoreKeys
from skep.model.values.ids import IdSource, NodeId
from skep.store.interface import Commit, Created, NotLeader, Term, Updated
from skep.store.kinds import Payload
from skep.wire.client import ManagerChannel

log = structlog.get_logger(__name__)

CHECK_S = 0.5
"""Seconds between attempts while a step waits for something that causes no commit."""


class Evictions:
    """Completes the current eviction.  Runs on the leader only.

    Args:
        channel: Returns the connection to another manager, or raises Unavailable.
    """

    def __init__(
        self,
        term: Term,
        own: NodeId,
        keys: StoreKeys,
        channel: Callable[[NodeId], ManagerChannel],
        clock: Clock,
        new_id: IdSource,
        random: Random,
    ) -> None:
        self._term = term
        self._clock = clock
        self._random = random
        self._runner = StepRunner(term, own, keys, channel, clock, new_id, random)
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Process evictions until cancelled."""
        await run_informer(
            self._term,
            (Payload,),
            on_snapshot=lambda _: self._changed.set(),
            on_commit=self._on_commit,
            work=self._work,
        )

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Payload(id=id)) | Updated(_, Payload(id=id)) if id == EVICTION_ID:
                    self._changed.set()

    async def _work(self) -> None:
        backoff = Backoff(CHECK_S, 10.0, rng=self._random.random)
        while True:
            await self._changed.wait()
            self._changed.clear()
            while (eviction := self._present()) and (step := eviction.next_step):
                try:
                    await self._run_step(eviction, step)
                    backoff.reset()
                except NotLeader:
                    raise
                except (SkepError, OSError) as error:
                    log.warning("eviction step waits", node=eviction.node_id, step=step, reason=str(error))
                    await self._write_waiting(eviction, str(error))
                    await backoff.sleep(self._clock)

    def _present(self) -> Eviction | None:
        try:
            return eviction_of(self._term.view())
        except FailedPrecondition as error:
            log.error("eviction cannot be read", reason=str(error))
            return None

    async def _run_step(self, eviction: Eviction, step: Step) -> None:
        """Do as much of a step as is possible now.  Raises SkepError with the reason."""
        if waits_for := await self._runner.attempt(eviction, step):
            await self._write_waiting(eviction, waits_for)
            await tick(self._clock, CHECK_S)
            return
        await self._term.update(note_done, eviction.node_id, step)
        log.warning("eviction step done", node=eviction.node_id, name=eviction.hostname, done=TEXTS[step])

    async def _write_waiting(self, eviction: Eviction, reason: str) -> None:
        present = eviction_of(self._term.view())
        if present is not None and present.waits_for != reason:
            try:
                await self._term.update(note_waiting, eviction.node_id, reason)
            except Unavailable as error:
                log.warning("eviction status not written, will retry", reason=str(error))

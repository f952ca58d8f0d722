"""A check of the invariants, for a request or by the leader every few minutes."""

import asyncio
from collections.abc import Callable, Sequence
from random import Random
from typing import cast

import structlog

from skep.aio.clock import Clock
from skep.aio.time_slices import result_in_slices
from skep.errors import SkepError
from skep.manager.verify.looks import StateLook
from skep.manager.verify.records import is_new, record, shown
from skep.manager.verify.rules import InvariantViolation, ViolationKey
from skep.model.task import Task
from skep.model.values.ids import TaskId
from skep.store.interface import LoopStore, NotLeader, View
from skep.store.state import State

log = structlog.get_logger(__name__)

APART_S = 10.0
"""Seconds between two looks: as long as a write may take, and longer than the leader needs for its next step."""
LOOKS_MAX = 4
"""Looks of one check.  Objects that are still changing after half a minute are checked again the next time."""
CHECK_S = 300.0
"""Seconds between two checks.  One look at 100,000 tasks takes a second of processor time, so about 0.3 percent."""
JITTER = 0.5
"""Part of that time by which it varies, so that the leaders of many clusters on one machine do not check together."""


class InvariantCheck:
    """Checks a store again and again.  It remembers the tasks of its last look."""

    def __init__(self, view: Callable[[], View], clock: Clock) -> None:
        self._view = view
        self._clock = clock
        self._before: dict[TaskId, Task] = {}

    async def run(self) -> list[InvariantViolation]:
        """Return the violations that last, after one look, or after several of them if the first one finds some."""
        lasting: dict[ViolationKey, InvariantViolation] = {}
        suspected: dict[ViolationKey, InvariantViolation] = {}
        for number in range(LOOKS_MAX):
            if number:
                await self._clock.sleep(APART_S)
            now = {one.key: one for one in await self._look()}
            lasting |= {
                key: one for key, one in now.items() if key in suspected and is_at_rest(suspected[key], one)
            }
            lasting = {key: one for key, one in lasting.items() if key in now}
            suspected = now
            if not suspected.keys() - lasting.keys():
                break
        return list(lasting.values())

    async def _look(self) -> Sequence[InvariantViolation]:
        view = cast("State", self._view())  # every store has a whole state
        look = StateLook(view.copied(), self._before)
        await asyncio.sleep(0)  # the copy takes as long as a few slices
        await result_in_slices(look.steps(), self._clock)
        self._before = look.tasks
        return look.found


def is_at_rest(before: InvariantViolation, now: InvariantViolation) -> bool:
    """Return whether the objects of a violation are unchanged."""
    one, other = ({getattr(each, "id", ""): each for each in found.objects} for found in (before, now))
    return one == other


class Verifier:
    """Checks the invariants and records violations."""

    def __init__(self, term: LoopStore, clock: Clock) -> None:
        self._term = term
        self._clock = clock
        self._check = InvariantCheck(term.view, clock)

    async def run(self) -> None:
        """Check until cancelled."""
        random = Random(self._clock.now_ns())
        while True:
            await self._clock.sleep(CHECK_S * (1 + JITTER * (random.random() - 0.5)))
            found = shown(await self._check.run())
            if not is_new(self._term.view(), found):
                continue
            for one in found.violations:
                log.error("invariant violated", rule=one.rule, what=one.text)
            try:
                await self._term.update(record, found, self._clock.now_ns())
            except NotLeader:
                raise
            except SkepError as error:
                log.warning("violations not recorded, will retry", reason=str(error))

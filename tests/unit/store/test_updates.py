"""When an update returns: for users at the response of etcd, for a leader once its replica shows the write."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, cast

import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.errors import Unavailable
from skep.store.interface import Transaction
from skep.store.leadership import SETTLE_S, TermState
from skep.store.replica import Replica
from skep.store.state import State
from skep.store.transactions.proposal import Committed, Proposal, WriteConflict
from skep.store.transactions.updates import DEADLINE_S, SHOWN_S, TERM_DEADLINE_S, Updater
from tests.support.builders import a_node

REVISION = 7
"""Of everything that is written here."""


class Late:
    """A store that commits at once, and a replica that shows it late."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.state = State()
        self.revision = 0
        self.proposed = 0
        self._shows = asyncio.Event()

    async def propose(self, proposals: Sequence[Proposal], term: TermState | None) -> Sequence[Committed]:
        self.proposed += len(proposals)
        return [Committed(REVISION) for _ in proposals]

    async def reached(self, revision: int) -> None:
        if self.revision < revision:
            await self._shows.wait()

    def shows_after(self, seconds: float) -> None:
        self.loop.call_later(seconds, self._show)

    def _show(self) -> None:
        self.revision = REVISION
        self._shows.set()

    def updater(self, term: TermState | None = None) -> Updater:
        return Updater(
            *(cast("Replica", self), self.propose, self._barrier, self.reached),
            VirtualClock(self.loop),
            term=term,
        )

    async def _barrier(self) -> None:
        return None

    def took_s(self, update: Callable[[], Awaitable[Any]]) -> float:
        async def run() -> float:
            began = self.loop.time()
            await update()
            return self.loop.time() - began

        return self.loop.run_until_complete(run())


@pytest.fixture
def late() -> Iterator[Late]:
    loop = VirtualLoop()
    yield Late(loop)
    loop.close()


def write(tx: Transaction, number: int = 1) -> None:
    tx.put(a_node(f"n{number}"))


def test_a_user_gets_the_response_before_the_replica_shows_the_write(late: Late) -> None:
    late.shows_after(SHOWN_S + 1)
    assert late.took_s(lambda: late.updater().update(write)) == pytest.approx(SHOWN_S, abs=0.1)


def test_a_leader_goes_on_when_it_sees_what_it_wrote(late: Late) -> None:
    late.shows_after(SHOWN_S + 1)
    leading = late.updater(TermState(1, 1))
    assert late.took_s(lambda: leading.update_each(write, [1, 2])) == pytest.approx(SHOWN_S + 1, abs=0.1)


@pytest.mark.parametrize("many", [False, True])
def test_a_leader_that_does_not_see_what_it_wrote_leads_no_longer(late: Late, many: bool) -> None:
    """Its loops decide on what they see, and would decide the same once more."""
    late.shows_after(2 * TERM_DEADLINE_S)
    term = TermState(1, 1)
    leading = late.updater(term)

    async def lead() -> None:
        if many:
            (outcome,) = await leading.update_each(write, [1])
            assert isinstance(outcome, Unavailable)
        else:
            with pytest.raises(Unavailable):
                await leading.update(write)

    assert late.took_s(lead) == pytest.approx(TERM_DEADLINE_S + SETTLE_S, abs=0.1)
    assert term.is_lost


@pytest.mark.parametrize("many", [False, True])
def test_a_leader_that_is_interrupted_leads_on_once_it_sees_what_it_wrote(late: Late, many: bool) -> None:
    late.shows_after(SHOWN_S)
    term = TermState(1, 1)
    leading = late.updater(term)

    async def interrupted() -> None:
        updating = asyncio.create_task(leading.update_each(write, [1]) if many else leading.update(write))  # type: ignore[arg-type]
        await asyncio.sleep(SHOWN_S / 2)
        updating.cancel()
        await asyncio.wait([updating])
        assert updating.cancelled()

    assert late.took_s(interrupted) == pytest.approx(SHOWN_S, abs=0.1)
    assert not term.is_lost


class Slow(Late):
    """One that takes its time to commit."""

    commits_after_s = 0.0

    async def propose(self, proposals: Sequence[Proposal], term: TermState | None) -> Sequence[Committed]:
        await asyncio.sleep(self.commits_after_s)
        return await super().propose(proposals, term)


@pytest.mark.parametrize("many", [False, True])
def test_a_write_that_was_acknowledged_just_before_the_deadline_is_no_error(many: bool) -> None:
    """A user would get the error that there is no leader, and retry."""
    loop = VirtualLoop()
    slow = Slow(loop)
    slow.commits_after_s = DEADLINE_S - 0.5
    slow.shows_after(60.0)

    async def update() -> None:
        if many:
            assert await slow.updater().update_each(write, [1, 2]) == [None, None]
        else:
            await slow.updater().update(write)

    assert slow.took_s(update) == pytest.approx(DEADLINE_S - 0.5 + SHOWN_S, abs=0.1)
    loop.close()


class Contested(Late):
    """A store in which every proposal meets a conflict."""

    async def propose(  # type: ignore[override]
        self, proposals: Sequence[Proposal], term: TermState | None
    ) -> Sequence[Committed | WriteConflict]:
        self.proposed += len(proposals)
        return [WriteConflict(0) for _ in proposals]


@pytest.mark.parametrize("many", [False, True])
def test_attempts_that_meet_conflict_after_conflict_come_further_and_further_apart(many: bool) -> None:
    loop = VirtualLoop()
    contested = Contested(loop)
    updater = contested.updater()

    async def run() -> None:
        if many:
            (result,) = await updater.update_each(write, [1])
            assert isinstance(result, Unavailable)
        else:
            with pytest.raises(Unavailable):
                await updater.update(write)

    loop.run_until_complete(run())
    assert loop.time() == pytest.approx(DEADLINE_S, abs=0.1)
    assert 5 <= contested.proposed <= 30
    loop.close()

"""A control loop that fell behind the store begins again, and does not decide a second time what it was writing."""

import asyncio
from collections.abc import Iterator, Sequence
from random import Random

import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.control_loops.failures import Failures
from skep.manager.control_loops.informer import BATCH, CatchUp, run_exact_informer, run_informer
from skep.model.values.ids import NodeId
from skep.store.interface import Commit, Created, Term, Transaction
from skep.store.kinds import Payload
from skep.store.memory import MemoryStore
from skep.store.watches import WatchQueue

CAPACITY = 3
WRITE_S = 1.0


class Rig:
    """A leader whose watches hold few commits, and a loop of it that writes one payload after the other."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.store = MemoryStore(VirtualClock(loop), watch_capacity=CAPACITY)
        self.other = MemoryStore(VirtualClock(loop), self.store.cluster)
        self.starts: list[Sequence[str]] = []
        """What each snapshot showed."""
        self.is_done = asyncio.Event()

    async def lead(self, term: Term) -> None:
        def start(view: object) -> None:
            self.starts.append([one.id for one in term.view().find(Payload) if one.id.startswith("w")])

        async def work() -> None:
            for number in range(len(self.starts[-1]), 3):
                await term.update(put, f"w{number}")
            self.is_done.set()

        await run_informer(term, (Payload,), on_snapshot=start, on_commit=lambda _: None, work=work)

    async def overrun(self) -> None:
        """So many commits at once that the loop is not asked to take any."""
        updates = [self.other.update(put, f"x{number}") for number in range(CAPACITY + 2)]
        await asyncio.gather(*updates)


def put(tx: Transaction, id: str) -> None:
    tx.put(Payload(id=id))


@pytest.fixture
def rig() -> Iterator[Rig]:
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    yield Rig(loop)
    loop.close()
    asyncio.set_event_loop(None)


def test_work_can_handle_what_the_view_shows_before_it_decides(rig: Rig) -> None:
    recorded: list[int] = []
    behind: list[bool] = []

    async def run() -> None:
        term = await anext(rig.store.terms(NodeId("m1"), ""))

        async def work(catch_up: CatchUp) -> None:
            for number in range(3):
                await term.update(put, f"w{number}")
                shown = term.view().revision
                behind.append(recorded[-1:] != [shown])
                await catch_up()
                assert recorded[-1] == shown
            rig.is_done.set()

        leading = asyncio.create_task(
            run_exact_informer(
                term,
                (Payload,),
                on_snapshot=lambda _: None,
                on_commit=lambda commit: recorded.append(commit.revision),
                work=work,
            )
        )
        await asyncio.wait([leading], timeout=60)
        leading.cancel()
        await asyncio.wait([leading])

    rig.loop.run_until_complete(run())
    assert rig.is_done.is_set()
    assert any(behind), "the work ran after the handlers anyway"
    assert len(recorded) == len(set(recorded)) == 3


def test_work_that_fell_behind_decides_nothing_but_begins_again(rig: Rig) -> None:
    starts: list[int] = []
    decided: list[int] = []

    async def run() -> None:
        term = await anext(rig.store.terms(NodeId("m1"), ""))
        failures = Failures(VirtualClock(rig.loop), Random(1))

        async def work(catch_up: CatchUp) -> None:
            if len(starts) == 1:
                for number in range(CAPACITY + 1):  # as of one moment: nothing is read in between
                    watch().offer(Commit(number, ()))
            with failures.caught("s"):
                await catch_up()
                decided.append(len(starts))
            rig.is_done.set()

        def watch() -> WatchQueue:
            return next(iter(rig.store.replica.watches.queues))

        await run_exact_informer(
            term,
            (Payload,),
            on_snapshot=lambda view: starts.append(view.revision),
            on_commit=lambda _: None,
            work=work,
        )

    async def main() -> None:
        leading = asyncio.create_task(run())
        await asyncio.wait([leading], timeout=60)
        leading.cancel()
        await asyncio.wait([leading])

    rig.loop.run_until_complete(main())
    assert decided == [2]


@pytest.mark.parametrize("by", ["work", "reader"])
def test_a_long_queue_of_commits_is_read_with_pauses_and_in_order(rig: Rig, by: str) -> None:
    """Ten thousand commits, read in one turn of the event loop, would hold every request up."""
    store = MemoryStore(VirtualClock(rig.loop), watch_capacity=10_000)
    event = Created(Payload(id="p"))
    handled: list[int] = []
    most: list[int] = []

    async def count_turns() -> None:
        before = 0
        while True:
            await asyncio.sleep(0)
            most.append(len(handled) - before)
            before = len(handled)

    async def run() -> None:
        term = await anext(store.terms(NodeId("m1"), ""))

        async def work(catch_up: CatchUp) -> None:
            turns = asyncio.create_task(count_turns())
            await asyncio.sleep(0)
            for number in range(10_000):
                next(iter(store.replica.watches.queues)).offer(Commit(number, (event,)))
            if by == "work":
                await catch_up()
                assert len(handled) == 10_000
            while len(handled) < 10_000:  # noqa: ASYNC110
                await asyncio.sleep(0)
            turns.cancel()
            raise InterruptedError

        await run_exact_informer(
            term,
            (Payload,),
            on_snapshot=lambda _: None,
            on_commit=lambda commit: handled.append(commit.revision),
            work=work,
        )

    with pytest.raises(ExceptionGroup):
        rig.loop.run_until_complete(run())
    assert handled == list(range(10_000))
    assert max(most) <= 2 * (BATCH + 1)  # the work and the reader


@pytest.mark.parametrize("lag_s", [0.0, 2.0])
def test_the_write_that_was_under_way_is_seen_and_the_term_goes_on(rig: Rig, lag_s: float) -> None:
    async def run() -> None:
        terms = rig.store.terms(NodeId("m1"), "")
        term = await anext(terms)
        rig.store.faults.delay_s = lambda: WRITE_S
        leading = asyncio.create_task(rig.lead(term))
        await asyncio.sleep(1.5 * WRITE_S)
        rig.store.faults.lag_s = lag_s
        await rig.overrun()
        async with asyncio.timeout(60):
            await rig.is_done.wait()
        leading.cancel()
        await asyncio.wait([leading])
        lost = asyncio.create_task(term.wait_lost())
        await asyncio.sleep(0)
        assert not lost.done()
        lost.cancel()
        await terms.aclose()  # type: ignore[attr-defined]

    rig.loop.run_until_complete(run())
    assert rig.starts == [[], ["w0", "w1"]]
    written = [one.id for one in rig.other.view().find(Payload) if one.id.startswith("w")]
    assert written == ["w0", "w1", "w2"]


def test_without_responses_of_the_store_the_term_ends(rig: Rig) -> None:
    async def run() -> None:
        terms = rig.store.terms(NodeId("m1"), "")
        term = await anext(terms)
        rig.store.faults.delay_s = lambda: WRITE_S
        leading = asyncio.create_task(rig.lead(term))
        await asyncio.sleep(0.5 * WRITE_S)
        await rig.overrun()
        rig.store.faults.is_partitioned = True
        async with asyncio.timeout(60):
            await term.wait_lost()
        leading.cancel()
        await asyncio.wait([leading])
        await terms.aclose()  # type: ignore[attr-defined]

    rig.loop.run_until_complete(run())

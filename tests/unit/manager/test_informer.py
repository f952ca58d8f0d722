"""A control loop that fell behind the store begins again, and does not decide a second time what it was writing."""

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from sim.time import VirtualClock, VirtualLoop
from skep.manager.informer import run_informer
from skep.model.ids import NodeId
from skep.store.interface import Term, Transaction
from skep.store.kinds import Payload
from skep.store.memory import MemoryStore

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

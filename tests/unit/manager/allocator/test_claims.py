"""What networks hold from before there were claims is claimed when a term begins, or as soon as the store takes it."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.errors import AlreadyExists, SkepError, Unavailable
from skep.manager.allocator.changes import WriteClaims
from skep.manager.allocator.loop import Allocator
from skep.manager.control_loops.failures import LONGEST_DELAY_S, UNAVAILABLE_S_MAX
from skep.model.network import Network
from skep.model.networks.overlays import VXLAN_OPTION
from skep.model.values.meta import Driver
from skep.store.interface import Transaction
from skep.store.keys import subnet_claim, vxlan_claim
from skep.store.memory import MemoryStore
from skep.store.transactions.proposal import Proposal
from tests.support.builders import an_overlay

CLAIMED = (vxlan_claim(4097), subnet_claim("10.0.1.0/24"))


class Reluctant(MemoryStore):
    """A store that does not take claims for a while."""

    def __init__(self, loop: VirtualLoop, error: SkepError, refusals: int) -> None:
        super().__init__(VirtualClock(loop))
        self.loop = loop
        self.asked: list[float] = []
        self._error = error
        self._refusals = refusals

    async def update_each(
        self, body: Callable[[Transaction, Any], Any], items: Iterable[Any], /
    ) -> Sequence[Any]:
        items = list(items)
        if any(isinstance(item, WriteClaims) for item in items):
            self.asked.append(self.loop.time())
            if len(self.asked) <= self._refusals:
                return [self._error for _ in items]
        return await super().update_each(body, items)

    def holders(self) -> list[str]:
        return [held.owner[1] for key in CLAIMED if (held := self.cluster.load()[0].holder(key)) is not None]


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    yield loop
    loop.close()
    asyncio.set_event_loop(None)


@pytest.mark.parametrize(
    ("error", "longest_s"),
    [(Unavailable("not now"), UNAVAILABLE_S_MAX), (AlreadyExists("it is another's"), LONGEST_DELAY_S)],
)
def test_they_are_asked_for_again_later_and_later_within_the_term(
    loop: VirtualLoop, error: SkepError, longest_s: float
) -> None:
    store = Reluctant(loop, error, refusals=5)
    old = replace(an_overlay("old"), driver_state=Driver(name="overlay", options={VXLAN_OPTION: "4097"}))

    async def run() -> None:
        await store.update(lambda tx: tx.put(old))
        store.cluster.commit(Proposal(deletes=CLAIMED), None)  # as before there were any
        assert store.holders() == []
        allocator = Allocator(store, VirtualClock(loop), iter, Random(1))  # type: ignore[arg-type]
        allocating = asyncio.create_task(allocator.run())
        await asyncio.sleep(5 * longest_s)
        assert store.holders() == ["old", "old"]
        await store.update(lambda tx: tx.put(replace(tx.get(Network, "old"), spec=old.spec)))
        await asyncio.sleep(longest_s)
        allocating.cancel()
        await asyncio.wait([allocating])

    loop.run_until_complete(run())
    assert len(store.asked) == 6, "and not again once it is written"
    delays = [later - earlier for earlier, later in pairwise(store.asked)]
    assert all(delay <= longest_s for delay in delays)
    assert delays[3] > 2 * delays[0]

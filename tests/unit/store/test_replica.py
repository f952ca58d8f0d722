"""Who hears first of a commit."""

import asyncio
import weakref

from skep.model.ids import SecretId
from skep.model.secret import Secret, SecretSpec
from skep.store.replica import Replica
from skep.store.state import State
from skep.store.tables import KeyChange
from skep.store.transaction import LocalTransaction


async def test_whoever_waits_for_a_revision_goes_on_before_those_who_watch_begin():
    """An answer to a user does not wait behind the work that the write causes."""
    replica = Replica()
    order: list[str] = []

    async def answer() -> None:
        await replica.reached(5)
        order.append("answer")

    async def loop() -> None:
        async with replica.watch(Secret) as watch:
            async for commit in watch:
                assert commit.revision == 5
                order.append("loop")
                return

    tx = LocalTransaction(replica.state, 0)
    tx.put(Secret(id=SecretId("s"), spec=SecretSpec(name="s")))
    async with asyncio.TaskGroup() as group:
        group.create_task(loop())
        group.create_task(answer())
        await asyncio.sleep(0)
        replica.apply(5, [KeyChange(key, value, 5, 5) for key, value in tx.proposal().puts])
    assert order == ["answer", "loop"]


async def test_whoever_reads_a_watch_keeps_no_state_alive_that_a_load_has_replaced():
    replica = Replica()
    old = weakref.ref(replica.state)
    async with replica.watch(Secret) as watch:
        assert watch.snapshot is old()
        reading = asyncio.create_task(anext(aiter(watch)))
        await asyncio.sleep(0)
        replica.reset(State(), None)
        assert old() is None
        reading.cancel()

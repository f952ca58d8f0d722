"""The order in which waiters are notified of a commit."""

import asyncio
import weakref

from skep.model.secret import Secret, SecretSpec
from skep.model.values.ids import SecretId
from skep.store.replica import Replica
from skep.store.state import State
from skep.store.tables import KeyChange
from skep.store.transactions.transaction import LocalTransaction


async def test_waiters_for_a_revision_run_before_watchers():
    """An answer to a user does not wait behind the work that the write causes."""
    replica = Replica()
    order: list[str] = []

    async def answer() -> None:
        await replica.wait_reached(5)
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


async def test_a_reader_of_a_watch_does_not_keep_a_replaced_state_alive():
    replica = Replica()
    old = weakref.ref(replica.state)
    async with replica.watch(Secret) as watch:
        assert watch.snapshot is old()
        reading = asyncio.create_task(anext(aiter(watch)))
        await asyncio.sleep(0)
        replica.reset(State(), None)
        assert old() is None
        reading.cancel()

"""Two managers' stores on one etcd while connections break, requests and answers get lost, history is forgotten."""

import asyncio
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace

from skep.errors import SkepError, Unavailable
from skep.model.node import Node
from skep.model.secret import Secret
from skep.store.interface import Store, Transaction
from skep.store.state import State, differences
from tests.support.builders import a_node
from tests.support.store.store_rigs import Rig, etcd_rig
from tests.support.store.store_transactions import a_secret, put

pytestmark = pytest.mark.slow

SECONDS = 10


class Writer:
    """Counts up in one object and leaves a mark of its own each time, in one transaction."""

    def __init__(self, name: str, store: Store) -> None:
        self._name = name
        self._store = store
        self.acknowledged: list[str] = []
        self.unknown = 0

    async def run(self) -> None:
        number = 0
        while True:
            number += 1
            try:
                self.acknowledged.append(await self._store.update(self._count, f"{self._name}-{number}"))
            except Unavailable:
                self.unknown += 1

    def _count(self, tx: Transaction, mark: str) -> str:
        node = tx.get(Node, "n1")
        labels = {"count": str(int(node.spec.labels.get("count", "0")) + 1)}
        tx.put(replace(node, spec=replace(node.spec, labels=labels)))
        return tx.put(a_secret(mark)).id


async def disturb(rig: Rig, random: Random) -> None:
    """Break something every now and then, until time is up."""
    loop = asyncio.get_running_loop()
    until = loop.time() + SECONDS
    while loop.time() < until:
        await asyncio.sleep(random.uniform(0, 0.2))
        random.choice((rig.cut_store, rig.cut_other, rig.lose_request, rig.lose_reply))()
        if random.random() < 0.2:
            try:
                await rig.compact()
            except SkepError:
                pass  # nothing new to forget
        await asyncio.sleep(random.uniform(0, 0.15))
        rig.reconnect()


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_no_write_is_lost_or_doubled_and_replicas_end_equal(tmp_path: Path, seed: int) -> None:
    async with etcd_rig(tmp_path) as rig:
        await rig.store.update(put, a_node("n1"))
        await rig.other.barrier()
        writers = [Writer(f"w{n}", (rig.store, rig.other)[n % 2]) for n in range(6)]
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(writer.run()) for writer in writers]
            await disturb(rig, Random(seed))
            for task in running:
                task.cancel()
        await rig.store.barrier()
        await rig.other.barrier()
        first, second = rig.store.view(), rig.other.view()
        assert isinstance(first, State)
        assert isinstance(second, State)
        assert list(differences(first, second)) == []
        marks = {secret.id for secret in first.find(Secret)}
        acknowledged = {mark for writer in writers for mark in writer.acknowledged}
        assert int(first.get(Node, "n1").spec.labels["count"]) == len(marks)
        assert acknowledged <= marks
        # Beside the acknowledged ones only those whose outcome was unknown, or whose writer was cancelled.
        assert len(marks - acknowledged) <= sum(writer.unknown for writer in writers) + len(writers)
        assert acknowledged

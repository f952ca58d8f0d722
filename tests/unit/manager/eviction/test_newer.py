"""An eviction that this version cannot read, as a newer one has begun it."""

import asyncio
from random import Random
from typing import Any, cast

from skep.aio.clock import SystemClock
from skep.manager.eviction.loop import Evictions
from skep.manager.eviction.steps import EVICTION_ID
from skep.model.values.ids import NodeId, new_id
from skep.store.kinds import Payload
from skep.store.memory import MemoryStore


async def test_it_is_left_alone_and_ends_no_term() -> None:
    store, unused = MemoryStore(SystemClock()), cast("Any", None)
    term = cast("Any", store)
    loop = Evictions(term, NodeId("m1"), unused, unused, SystemClock(), new_id, Random(1))
    running = asyncio.create_task(loop.run())
    for data in (b'{"done":["images"]}', b"\xff", b"{}"):
        await store.update(lambda tx, data=data: tx.put(Payload(id=EVICTION_ID, data=data)))  # type: ignore[misc]
        for _ in range(20):
            await asyncio.sleep(0)
    assert not running.done()
    running.cancel()

"""The control loops of a leader, without nodes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from random import Random

from skep.aio.clock import SystemClock
from skep.manager.control_loops.loops import loops
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import new_id
from skep.store.interface import Store
from tests.support.store.store_rigs import FIRST


@asynccontextmanager
async def leading(store: Store) -> AsyncIterator[None]:
    """Run the loops of a leader."""
    async with aclosing(store.terms(FIRST, "127.0.0.1:2377")) as terms:
        term = await anext(terms)
        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(loop.run()) for loop in loops(term, SystemClock(), new_id, Random(1))
            ]
            yield
            for task in running:
                task.cancel()


async def wait_for(store: Store, condition: Callable[[], bool]) -> None:
    """Wait for ``condition``, which is checked after each commit."""
    async with store.watch(Service, Task) as watch:
        if condition():
            return
        async for _ in watch:
            if condition():
                return

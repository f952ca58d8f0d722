"""Nothing in a manager holds its event loop for long, whatever 100,000 tasks are asked for.

Measured is the processor time between two turns of a task that always wants one: how busy the machine is otherwise
does not count.
"""

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import ClientSession, UnixConnector
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.manager import serving
from skep.manager.routes import ManagerApi, application
from skep.model.ids import ServiceId, TaskId
from skep.model.task import Task
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from tests.builders import a_service, a_task

TASKS = 100_000
HELD_S_MAX = 0.1


class Turns:
    """``held_s``: the longest processor time that passed between two turns."""

    def __init__(self) -> None:
        self.held_s = 0.0

    async def take(self) -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.001)
            self.held_s = max(self.held_s, time.thread_time() - before)


@asynccontextmanager
async def turns() -> AsyncIterator[Turns]:
    measured = Turns()
    async with asyncio.TaskGroup() as group:
        taking = group.create_task(measured.take())
        await asyncio.sleep(0)
        yield measured
        taking.cancel()


def create(tx: Transaction, number: int) -> Task:
    task = replace(a_task(slot=number + 1), id=TaskId(f"t{number:024d}"), service_id=ServiceId("web"))
    return tx.put(task)


@pytest.mark.timeout(180)
async def test_with_100_000_tasks_nothing_holds_the_event_loop(tmp_path: Path) -> None:
    store = MemoryStore(SystemClock())
    nothing = cast("Any", None)
    api = ManagerApi(
        store=store,
        logs=nothing,
        backups=nothing,
        examinations=nothing,
        events=nothing,
        clock=SystemClock(),
        new_id=nothing,
        new_name=nothing,
    )
    held: dict[str, float] = {}
    await store.update(lambda tx: tx.put(a_service(name="web", id="web", replicas=TASKS)))
    gc.collect()
    gc.freeze()  # as a manager does once it has loaded
    try:
        async with turns() as measured:
            await store.update_each(create, range(TASKS))
        held["creating them"] = measured.held_s
        async with (
            serving(application(api), tmp_path / "sock"),
            ClientSession(connector=UnixConnector(str(tmp_path / "sock"))) as client,
        ):
            await (await client.get("http://manager/nodes")).read()  # what only the first request costs
            for path in (
                "/tasks",
                '/tasks?filters={"service":["web"]}',
                '/tasks?filters={"name":["web"]}',
                "/services?status=true",
            ):
                async with turns() as measured, client.get(f"http://manager{path}") as answer:
                    async for _ in answer.content.iter_any():
                        pass
                assert answer.status == 200
                held[path] = measured.held_s
    finally:
        gc.unfreeze()
    assert {what: f"{seconds:.3f} s" for what, seconds in held.items() if seconds > HELD_S_MAX} == {}
    print({what: f"{seconds * 1000:.0f} ms" for what, seconds in held.items()})

"""What `skep top` reads of a cluster that changes meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec

from skep.aio.backoff import Backoff
from skep.aio.clock import SystemClock
from skep.api.client.client import ApiClient
from skep.top.snapshot import Touched
from skep.top.watching import _Connected, _State


def a_task(id: str, state: str) -> Mapping[str, Any]:
    return {"ID": id, "DesiredState": "running", "Status": {"State": state}}


class Manager:
    """The list of its tasks is on its way while one of them fails."""

    def __init__(self) -> None:
        self.is_listing, self.may_end = asyncio.Event(), asyncio.Event()

    async def get(self, path: str, **_: Any) -> Mapping[str, Any]:
        return a_task(path.rpartition("/")[2], "failed")

    @asynccontextmanager
    async def stream(self, path: str, **_: Any) -> AsyncIterator["Manager"]:
        yield self

    async def pieces(self) -> AsyncIterator[bytes]:
        listed = msgspec.json.encode([a_task("t1", "running")])
        self.is_listing.set()
        await self.may_end.wait()
        yield listed


async def test_a_list_that_took_long_does_not_put_back_a_task_that_was_read_meanwhile() -> None:
    """The task has no further event, so it would be shown as running until the next list."""
    manager, state = Manager(), _State(lambda _: None)
    connected = _Connected(cast("ApiClient", manager), SystemClock(), state, Backoff(0.1, 1.0))
    async with asyncio.TaskGroup() as group:
        group.create_task(connected._read_tasks(f"t{number}" for number in range(60)))
        await manager.is_listing.wait()
        group.create_task(connected._read_tasks(["t1"]))
        for _ in range(10):
            await asyncio.sleep(0)
        manager.may_end.set()
    assert state.tasks["t1"].status.state == "failed"


class ManagerOfServices:
    """The list of its services is on its way while one of them is scaled."""

    def __init__(self) -> None:
        self.is_listing, self.may_end = asyncio.Event(), asyncio.Event()

    async def get(self, path: str, filters: object = None, **_: Any) -> list[Mapping[str, Any]]:
        if path == "/nodes" or filters is not None:
            return [{"ID": "s1", "Replicas": 9}] if path == "/services" else []
        self.is_listing.set()
        await self.may_end.wait()
        return [{"ID": "s1", "Replicas": 3}]


async def test_a_list_that_took_long_does_not_put_back_a_service_that_was_read_meanwhile() -> None:
    manager, state = ManagerOfServices(), _State(lambda _: None)
    connected = _Connected(cast("ApiClient", manager), SystemClock(), state, Backoff(0.1, 1.0))
    async with asyncio.TaskGroup() as group:
        listing = group.create_task(connected._list_nodes_and_services())
        await manager.is_listing.wait()
        connected._touched = Touched(services=frozenset({"s1"}))
        connected._changed.set()
        reading = group.create_task(connected._read_touched())
        for _ in range(30):
            await asyncio.sleep(0.01)
        manager.may_end.set()
        await listing
        async with asyncio.timeout(60):
            while state.services.get("s1", {}).get("Replicas") != 9:  # noqa: ASYNC110 - the reader tells nobody
                await asyncio.sleep(0.01)
        reading.cancel()

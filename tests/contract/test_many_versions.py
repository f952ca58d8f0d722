"""A service that was updated very often can be removed."""

import asyncio
from random import Random

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.orchestrator.reaper.loop import Reaper
from skep.model.service import Service
from skep.model.values.ids import new_id
from skep.model.values.times import Timestamp
from skep.store.interface import Store, Transaction
from skep.store.kinds import SpecVersion
from tests.support.builders import a_service
from tests.support.store.store_rigs import FIRST

VERSIONS = 1100
"""More than one transaction removes."""


@pytest.mark.timeout(120)
async def test_a_service_with_many_versions_of_its_spec_is_removed(store: Store) -> None:
    def relabel(tx: Transaction, number: int) -> None:
        service = tx.get(Service, "web")
        tx.put(replace(service, spec=replace(service.spec, labels={"number": str(number)})))

    await store.update(lambda tx: tx.put(a_service("web")))
    for number in range(1, VERSIONS):
        await store.update(relabel, number)
    assert len(store.view().find(SpecVersion, service_id="web")) == VERSIONS
    removed_at = Timestamp("2026-01-01T00:00:00Z")
    await store.update(lambda tx: tx.put(replace(tx.get(Service, "web"), removed_at=removed_at)))
    terms = store.terms(FIRST, "127.0.0.1:2377")
    reaper = Reaper(await anext(aiter(terms)), SystemClock(), new_id, Random(1))
    async with store.watch(Service) as watch, asyncio.TaskGroup() as group:
        running = group.create_task(reaper.run())
        async for _ in watch:
            if not store.view().find(Service):
                break
        running.cancel()
    assert store.view().find(SpecVersion) == []

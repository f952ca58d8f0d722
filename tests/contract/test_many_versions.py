"""Versions of a service's spec are removed when nothing uses them, also after very many updates."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.orchestrator.reaper.loop import Reaper
from skep.model.service import JobStatus, ReplicatedJob, Service, ServiceMode
from skep.model.values.ids import new_id
from skep.model.values.meta import Version
from skep.model.values.times import Timestamp
from skep.store.interface import Store, Transaction
from skep.store.kinds import SpecVersion
from tests.support.builders import a_service
from tests.support.store.store_rigs import FIRST

VERSIONS = 1100
"""More than one transaction removes."""


@pytest.mark.timeout(120)
async def test_a_service_with_many_versions_of_its_spec_is_removed(store: Store) -> None:
    await store.update(lambda tx: tx.put(a_service("web")))
    for number in range(1, VERSIONS):
        await store.update(_relabel, number)
    assert len(store.view().find(SpecVersion, service_id="web")) == VERSIONS
    removed_at = Timestamp("2026-01-01T00:00:00Z")
    await store.update(lambda tx: tx.put(replace(tx.get(Service, "web"), removed_at=removed_at)))
    async with _reaping(store), store.watch(Service) as watch:
        async for _ in watch:
            if not store.view().find(Service):
                break
    assert store.view().find(SpecVersion) == []


async def test_the_version_of_a_jobs_run_is_removed_when_the_next_run_has_a_newer_one(store: Store) -> None:
    def run(tx: Transaction, version: Version) -> None:
        tx.put(replace(tx.get(Service, "web"), job_status=JobStatus(spec_version=version)))

    service, mode = (
        a_service("web"),
        ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1)),
    )
    await store.update(lambda tx: tx.put(replace(service, spec=replace(service.spec, mode=mode))))
    first = store.view().get(Service, "web").spec_version
    await store.update(_relabel, 1)
    await store.update(run, first)
    removed = replace(a_service("other"), removed_at=Timestamp("2026-01-01T00:00:00Z"))
    await store.update(lambda tx: tx.put(removed))
    async with _reaping(store), store.watch(Service, SpecVersion) as watch:
        async for _ in watch:
            if len(store.view().find(Service)) == 1:
                break  # the reaper has decided about all services
        assert len(store.view().find(SpecVersion, service_id="web")) == 2
        await store.update(run, store.view().get(Service, "web").spec_version)
        async for _ in watch:
            if len(store.view().find(SpecVersion, service_id="web")) == 1:
                break


def _relabel(tx: Transaction, number: int) -> None:
    service = tx.get(Service, "web")
    tx.put(replace(service, spec=replace(service.spec, labels={"number": str(number)})))


@asynccontextmanager
async def _reaping(store: Store) -> AsyncIterator[None]:
    terms = store.terms(FIRST, "127.0.0.1:2377")
    reaper = Reaper(await anext(aiter(terms)), SystemClock(), new_id, Random(1))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(reaper.run())
        yield
        running.cancel()

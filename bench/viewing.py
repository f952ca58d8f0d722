"""The cost of the dashboard's view for a manager with 500 nodes and 10,000 tasks.

::

    .venv/bin/python -m bench.viewing                 # kept in results/
    .venv/bin/python -m bench.viewing --dry           # only printed

The view and its routes run on a store in memory, read over a unix socket in the same process.  So processor times
include the reader's.
"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import msgspec
from aiohttp import ClientResponse, ClientSession, UnixConnector
from msgspec.structs import replace

from bench import loops as cluster
from bench.holds import name_of
from bench.run import figures_page, measure_alone
from bench.scheduling import proposal_of
from skep.aio.clock import SystemClock
from skep.aio.event_loop.gc_settings import configure_gc
from skep.manager.manager import serving
from skep.manager.quorum import Quorum
from skep.manager.routes import ManagerApi, application
from skep.manager.view.cluster import ClusterRows
from skep.manager.view.loop import ClusterView
from skep.model.service import Service
from skep.model.task import Task, TaskState, TaskStatus
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore

NODES, TASKS = 500, 10_000
CHANGES, APART_S = 50, 0.5
QUIET_S = 20.0
BURST, TOGETHER, BURST_S = 10_000, 100, 20.0


class Result(msgspec.Struct, kw_only=True):
    """Times in milliseconds."""

    bytes: int
    first_wall_ms: float
    first_processor_ms: float
    again_wall_ms: float
    change_ms: list[float]
    """Time from the commit of one change until a viewer has it."""
    change_processor_ms: float
    quiet_processor: float
    """Share of a processor with a viewer while nothing happens."""
    burst: dict[str, float]
    """Processor seconds of ``BURST`` task reports and their consequences, by number of viewers."""
    longest_ms: float
    """Longest callback of the view in the event loop."""
    longest: str


def main() -> None:
    """Measure, and keep the result."""
    measure_alone(__doc__ or "", "viewing", _measure, _text)


async def _measure() -> Result:
    cluster.NODES = NODES
    store = MemoryStore(SystemClock())
    services = list(cluster.all_services(TASKS // cluster.REPLICAS))
    store.cluster.commit(proposal_of(store, [*cluster.all_nodes(), *services]), None)
    store.cluster.commit(proposal_of(store, list(cluster.all_tasks(store.view().find(Service)))), None)
    configure_gc()
    longest = _timed_callbacks()
    async with _manager(store) as client:
        burst = {"none": await _burst(store)}
        wall, processor = time.perf_counter(), time.process_time()
        content = await _read_view(client)
        first_wall, first_processor = time.perf_counter() - wall, time.process_time() - processor
        again = time.perf_counter()
        await _read_view(client)
        again_wall = time.perf_counter() - again
        async with AsyncExitStack() as stack:
            viewer = await stack.enter_async_context(client.get("http://manager/skep/view/stream"))
            await _event(viewer)
            processor = time.process_time()
            await asyncio.sleep(QUIET_S)
            quiet = (time.process_time() - processor) / QUIET_S
            processor = time.process_time()
            changes = [await _change_s(store, viewer, number) for number in range(CHANGES)]
            each = (time.process_time() - processor) / CHANGES - quiet * APART_S
            burst["1"] = await _with_readers(store, [viewer])
            more = [
                await stack.enter_async_context(client.get("http://manager/skep/view/stream"))
                for _ in range(7)
            ]
            burst["8"] = await _with_readers(store, [viewer, *more])
    return Result(
        bytes=len(content),
        first_wall_ms=first_wall * 1e3,
        first_processor_ms=first_processor * 1e3,
        again_wall_ms=again_wall * 1e3,
        change_ms=[one * 1e3 for one in changes],
        change_processor_ms=each * 1e3,
        quiet_processor=quiet,
        burst=burst,
        longest_ms=longest[0][0] * 1e3,
        longest=longest[0][1],
    )


def _timed_callbacks() -> list[tuple[float, str]]:
    """Record the longest callback of the view."""
    longest, run = [(0.0, "")], asyncio.Handle._run

    def timed(handle: Any) -> None:
        began = time.thread_time()
        run(handle)
        took = time.thread_time() - began
        if took > longest[0][0] and "follow the cluster" in (name := name_of(handle)):
            longest[0] = (took, name)

    asyncio.Handle._run = timed  # type: ignore[method-assign]
    return longest


@asynccontextmanager
async def serve_store(
    store: MemoryStore, *, read_bufsize: int, view: ClusterView | None = None
) -> AsyncIterator[ClientSession]:
    """Serve what a manager's API reads from ``store``, and yield a client."""
    nothing = cast("Any", None)
    api = ManagerApi(
        store=store,
        logs=nothing,
        backups=nothing,
        diagnostics=nothing,
        external=nothing,
        tunnels=nothing,
        all_events=nothing,
        events=nothing,
        clock=SystemClock(),
        new_id=nothing,
        new_name=nothing,
        cluster_view=view,
    )
    with TemporaryDirectory() as directory:
        path = Path(directory, "sock")
        async with (
            serving(application(api), path, path.with_name("handover.sock")),
            ClientSession(connector=UnixConnector(str(path), limit=0), read_bufsize=read_bufsize) as client,
        ):
            yield client


@asynccontextmanager
async def _manager(store: MemoryStore) -> AsyncIterator[ClientSession]:
    clock = SystemClock()
    view = ClusterView(store, clock, ClusterRows(store, clock, Quorum).row)
    async with serve_store(store, read_bufsize=1 << 23, view=view) as client, asyncio.TaskGroup() as group:
        following = group.create_task(view.run(), name="view")
        yield client
        following.cancel()


async def _read_view(client: ClientSession) -> bytes:
    async with client.get("http://manager/skep/view") as response:
        assert response.status == 200, response.status
        return await response.read()


async def _event(viewer: ClientResponse) -> bytes:
    """Return the data of the next event."""
    while not (line := await viewer.content.readline()).startswith(b"data:"):
        assert line, "the stream has ended"
    return line


async def _change_s(store: MemoryStore, viewer: ClientResponse, number: int) -> float:
    await asyncio.sleep(APART_S)
    began = time.perf_counter()
    await store.update(_report, store.view().ids(Task)[number * 7], f"one-{number}")
    while b'"one-%d"' % number not in await _event(viewer):
        pass
    return time.perf_counter() - began


def _report(tx: Transaction, id: str, message: str) -> None:
    task = tx.get(Task, id)
    tx.put(replace(task, status=TaskStatus(state=TaskState.RUNNING, message=message)))


async def _burst(store: MemoryStore) -> float:
    """Return the processor seconds of reports about all tasks, a hundred at a time, over ``BURST_S``."""
    ids, processor = store.view().ids(Task), time.process_time()
    for start in range(0, BURST, TOGETHER):
        report = partial(_report, message=f"report at {processor}")
        await store.update_each(report, ids[start : start + TOGETHER])
        await asyncio.sleep(BURST_S * TOGETHER / BURST)
    return time.process_time() - processor


async def _with_readers(store: MemoryStore, viewers: list[ClientResponse]) -> float:
    async with asyncio.TaskGroup() as group:
        reading = [group.create_task(_drain(viewer)) for viewer in viewers]
        await asyncio.sleep(2)
        took = await _burst(store)
        for one in reading:
            one.cancel()
    return took


async def _drain(viewer: ClientResponse) -> None:
    while True:
        await _event(viewer)


def _text(result: Result, busy: float) -> str:
    ordered = sorted(result.change_ms)
    rows = (
        ("first snapshot, wall, ms", f"{result.first_wall_ms:.0f}"),
        ("first snapshot, processor, ms", f"{result.first_processor_ms:.0f}"),
        ("its bytes", f"{result.bytes:,}"),
        ("a further snapshot, wall, ms", f"{result.again_wall_ms:.0f}"),
        (
            "from one commit to the viewer, ms: median (largest)",
            f"{statistics.median(ordered):.0f} ({ordered[-1]:.0f})",
        ),
        ("one change with one viewer, processor, ms", f"{result.change_processor_ms:.1f}"),
        ("a viewer while nothing happens, share of a processor", f"{result.quiet_processor:.2%}"),
        *(
            (
                f"{BURST:,} reports in {BURST_S:g} s with {viewers} viewers, processor, s",
                f"{took:.2f} ({(took - result.burst['none']) / BURST_S:+.1%} of a processor)",
            )
            for viewers, took in result.burst.items()
        ),
        ("longest callback of the view, ms", f"{result.longest_ms:.1f} ({result.longest})"),
    )
    return figures_page(f"The dashboard's view of {NODES} nodes and {TASKS:,} tasks", busy, rows)


if __name__ == "__main__":
    main()

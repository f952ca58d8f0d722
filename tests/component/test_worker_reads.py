"""What a worker's clients read from a manager, over real mutual TLS."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from urllib.parse import unquote

import msgspec
import pytest
from aiohttp import web
from msgspec.structs import replace

from skep.agent.session.session_state import SessionState
from skep.aio.clock import SystemClock
from skep.api.client.client import ApiClient
from skep.api.http.framing import is_readable
from skep.errors import NotFound, PermissionDenied, ResourceExhausted, Unimplemented
from skep.manager.nodes.worker_reads import READS_PER_NODE_MAX, WorkerReads
from skep.manager.routes.access import WORKER_HEADER
from skep.model.node import NodeRole
from skep.model.values.ids import NodeId
from skep.node.cluster.cluster_reads import ClusterReads
from skep.security.identity import NodeIdentity
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from tests.support.managers.wire_rig import Cluster, a_session, a_worker, until


class ReadableCluster(Cluster):
    """A manager whose API answers on a unix socket."""

    def __init__(self, socket: Path) -> None:
        super().__init__()
        self.reads = WorkerReads(self.store.view, socket)
        self.asked: list[str] = []
        self.of_workers: list[bool] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    def _services(self, *arguments):
        return (*super()._services(*arguments), *self.reads.services())

    async def allow(self, value: str) -> None:
        labels = {"skep.worker-reads": value}
        spec = replace(self.swarm.spec, labels=labels)
        await self.store.update(lambda tx: tx.put(replace(self.swarm, spec=spec)))

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.raw_path)
        self.of_workers.append(WORKER_HEADER in request.headers)
        if request.path.endswith("/nothing"):
            return web.json_response({"message": "service nothing not found"}, status=404)
        if request.path.endswith("/events"):
            response = web.StreamResponse()
            await response.prepare(request)
            await self.may_answer.wait()
            for number in range(1000):
                await response.write(b'{"number":%d}\n' % number)
                await asyncio.sleep(0.01)
            return response
        return web.Response(body=b"[" + b" " * 100_000 + b"]")


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[ReadableCluster]:
    cluster = ReadableCluster(tmp_path / "s")
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", cluster.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "s")).start()
    async with cluster.serving():
        yield cluster
    await runner.cleanup()


@pytest.fixture
async def reads(cluster: ReadableCluster, tmp_path: Path) -> AsyncIterator[ClusterReads]:
    state = SessionState(SystemClock())
    async with a_session(cluster, await a_worker(cluster, tmp_path)) as (channel, _):
        state.begin(channel)
        yield ClusterReads(state, ApiClient.local(tmp_path / "none", "its own"))


async def test_nothing_is_shown_unless_the_cluster_allows_it(cluster, reads):
    for value in (None, "false", "yes"):
        if value is not None:
            await cluster.allow(value)
        with pytest.raises(PermissionDenied, match="does not allow clients of workers"):
            await reads.body("/services")
    assert cluster.asked == []


async def test_the_task_of_a_container_is_shown_without_the_cluster_s_permission(cluster, reads):
    for word in ("3f2a" * 16, "3f2a" * 3, f"web.2.{'t' * 25}"):
        await reads.body(f"/skep/tasks/{word}/target")
    for word in ("web.2", "3f2a", "web", f"../services/web.{'t' * 25}", f"{'3f2a' * 16}/target?x="):
        with pytest.raises(PermissionDenied, match="does not allow clients of workers"):
            await reads.body(f"/skep/tasks/{word}/target")
    assert len(cluster.asked) == 3


async def test_a_response_comes_whole_and_the_request_as_it_was_sent(cluster, reads):
    await cluster.allow("true")
    target = "/v1.41/services?filters=%7B%22name%22%3A%7B%22a%20b%22%3Atrue%7D%7D&status=true"
    assert msgspec.json.decode(await reads.body(target)) == []
    (asked,) = cluster.asked
    assert unquote(asked) == unquote(target)
    with pytest.raises(NotFound, match="service nothing not found"):
        await reads.body("/v1.41/services/nothing")


@pytest.mark.parametrize(
    "target",
    [
        *("/secrets", "/configs", "/swarm", "/swarm/unlockkey", "/skep/backup", "/v1.41/secrets/a", "/info"),
        *("/services/a/logs", "/tasks/a/logs", "/services/a/update", "/services/../secrets", "//secrets"),
        *("http://elsewhere/services", "services", "", "/services\n", "/events/x"),
    ],
)
async def test_nothing_else_is_read(cluster, reads, target):
    await cluster.allow("true")
    with pytest.raises(PermissionDenied, match="may not read"):
        await reads.body(target)
    assert cluster.asked == []
    assert not is_readable("POST", "/services")


async def test_events_come_one_by_one_until_it_is_not_allowed_any_more(cluster, reads):
    await cluster.allow("true")
    seen = 0

    async def read() -> None:
        nonlocal seen
        async with reads.lines("/events", {"filters": "{}"}) as lines:
            async for line in lines:
                assert msgspec.json.decode(line) == {"number": seen}
                seen += 1
                if seen == 3:
                    await cluster.allow("false")

    with pytest.raises(PermissionDenied):
        await read()
    assert 3 <= seen < 1000
    await until(lambda: not cluster.reads.reading)


async def test_what_happens_after_the_permission_ended_is_not_sent(cluster):
    await cluster.allow("true")
    cluster.may_answer.clear()
    identity = NodeIdentity(node_id=NodeId("w1"), cluster_id=cluster.swarm.id, role=NodeRole.WORKER)
    caller = Caller(identity=identity, address="127.0.0.1", disconnect=lambda: None)
    pieces = cluster.reads.serve_read(skep.ReadRequest(target="/events"), caller)
    async with aclosing(pieces):
        assert await anext(pieces) == skep.ReadPiece()
        waiting = asyncio.ensure_future(anext(pieces))
        await until(lambda: cluster.asked)
        await cluster.allow("false")
        cluster.may_answer.set()
        with pytest.raises(PermissionDenied):
            await waiting


async def test_a_manager_sees_that_the_client_is_a_workers(cluster, reads):
    await cluster.allow("true")
    await reads.body("/services")
    assert cluster.of_workers == [True]


async def test_one_node_does_not_take_all_places(cluster, reads):
    await cluster.allow("true")
    async with AsyncExitStack() as open_reads:
        for _ in range(READS_PER_NODE_MAX):
            await open_reads.enter_async_context(reads.pieces("/events"))
        with pytest.raises(ResourceExhausted, match="too many clients of workers"):
            await reads.body("/services")
    await until(lambda: not cluster.reads.reading)
    assert await reads.body("/services")


async def test_an_earlier_manager_has_no_such_call(tmp_path):
    async with Cluster().serving() as cluster:
        state = SessionState(SystemClock())
        async with a_session(cluster, await a_worker(cluster, tmp_path)) as (channel, _):
            state.begin(channel)
            with pytest.raises(Unimplemented):
                await ClusterReads(state, ApiClient.local(tmp_path / "none", "its own")).body("/services")

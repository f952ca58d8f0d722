"""Queries over real HTTP: a real Prometheus, servers that misbehave, and addresses for administrators only."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.queries.asking import QueryClient
from skep.manager.queries.board import AskedQuery
from skep.manager.queries.names import NameLookups
from skep.model.measures.queries import BODY_BYTES_MAX, MetricQuery, QueryFailed
from skep.store.memory import MemoryStore
from tests.support.builders import a_node
from tests.support.machines.playground_rig import UNPACKED

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def client(ask_s: float = 5.0) -> QueryClient:
    return QueryClient(MemoryStore(SystemClock()).view, ask_s)


@asynccontextmanager
async def a_server(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def text(body: str, status: int = 200) -> Handler:
    async def respond(_: web.Request) -> web.StreamResponse:
        return web.Response(text=body, status=status)

    return respond


async def figure(handler: Handler, *, field: str = "", expression: str = "") -> float:
    async with a_server(handler) as url:
        query = MetricQuery(url=url, field=field, expression=expression)
        return await client().ask(AskedQuery(query, is_trusted=True))


async def failure(handler: Handler, *, field: str = "", expression: str = "") -> str:
    with pytest.raises(QueryFailed) as found:
        await figure(handler, field=field, expression=expression)
    return str(found.value)


@pytest.fixture
async def prometheus(tmp_path: Path) -> AsyncIterator[str]:
    """A Prometheus that scrapes itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    job = f"{{job_name: own, scrape_interval: 200ms, static_configs: [{{targets: ['{address}']}}]}}"
    (tmp_path / "prometheus.yml").write_text(f"scrape_configs: [{job}]")
    process = await asyncio.create_subprocess_exec(
        UNPACKED / "prometheus",
        *(f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"),
        f"--web.listen-address={address}",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield f"http://{address}"
    finally:
        process.kill()
        await process.wait()


@pytest.mark.needs("prometheus")
async def test_a_real_prometheus_answers_expressions_with_one_sample(prometheus: str) -> None:
    asking = client()

    async def ask(expression: str) -> float | str:
        try:
            return await asking.ask(
                AskedQuery(MetricQuery(url=prometheus, expression=expression), is_trusted=True)
            )
        except QueryFailed as error:
            return str(error)

    async with asyncio.timeout(30):
        while True:
            if await ask('sum(up{job="own"} == 1)') == 1.0:
                break
            await asyncio.sleep(0.1)
    assert await ask("scalar(vector(2.5))") == 2.5
    assert await ask("vector(1) + 1") == 2.0
    one = "write it so that it has exactly one, such as sum(...)"
    assert await ask("sum(no_such_metric)") == f"the query returned no sample: {one}"
    assert str(await ask("prometheus_build_info or up")).startswith("the query returned 2 samples")
    assert str(await ask("up[1m]")) == (
        "the query returns neither an instant vector nor a scalar: remove the range [...]"
    )
    assert str(await ask("sum(")).startswith("Prometheus refused the query: invalid parameter")
    assert str(await ask("vector(1) / 0")).startswith("the figure is inf")


async def test_a_page_has_a_number_or_a_field_of_json() -> None:
    assert await figure(text(" 17\n")) == 17.0
    assert await figure(text('{"queue": {"length": 3}}'), field="queue.length") == 3.0
    assert await figure(text('{"length": "4.5"}'), field="length") == 4.5


async def test_other_responses_are_failures_that_show_none_of_their_content() -> None:
    secret = "s3cr3t"
    assert await failure(text(secret)) == "its response is not a number"
    assert await failure(text("-1")) == "the figure is -1, which cannot be used: expected a finite number"
    assert await failure(text("nan")) == "the figure is nan, which cannot be used: expected a finite number"
    assert await failure(text(secret, 500)) == "it responded 500, and not 200 with a number"
    assert await failure(text(f'{{"a": "{secret}"}}'), field="a") == "its response is not a number"
    assert await failure(text('{"a": [1]}'), field="a.b") == "its response has no number in the field a.b"
    assert await failure(text(secret), field="a") == "its response is not JSON"
    wrong = "it is not a Prometheus: it responded 200 without its API's JSON"
    assert await failure(text(secret), expression="up") == wrong
    assert await failure(text("[1]"), expression="up") == wrong


async def test_redirects_slow_servers_and_long_responses_end_the_attempt() -> None:
    async def redirects(request: web.Request) -> web.StreamResponse:
        if request.path == "/other":
            return web.Response(text="1")
        return web.Response(status=307, headers={"Location": "/other"})

    assert "redirects to another address, which is not followed" in await failure(redirects)

    is_over = asyncio.Event()

    async def hangs(_: web.Request) -> web.StreamResponse:
        await is_over.wait()
        return web.Response(text="1")

    async with a_server(hangs) as url:
        with pytest.raises(QueryFailed, match=r"did not respond within 0\.2 s"):
            await client(0.2).ask(AskedQuery(MetricQuery(url=url), is_trusted=True))
        is_over.set()
    assert "has more than 64 KiB" in await failure(text("1" * (BODY_BYTES_MAX + 1)))
    closed = MetricQuery(url="http://127.0.0.1:1")
    with pytest.raises(QueryFailed, match=r"cannot connect to 127\.0\.0\.1:1: Connection refused"):
        await client().ask(AskedQuery(closed, is_trusted=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::1]"])
async def test_the_machine_itself_is_for_urls_of_administrators(host: str) -> None:
    is_asked = False

    async def respond(_: web.Request) -> web.StreamResponse:
        nonlocal is_asked
        is_asked = True
        return web.Response(text="1")

    async with a_server(respond) as url:
        query = MetricQuery(url=url.replace("127.0.0.1", host))
        with pytest.raises(QueryFailed, match="only an administrator may choose for queries"):
            await client().ask(AskedQuery(query, is_trusted=False))
    assert not is_asked


async def test_other_nodes_are_for_urls_of_administrators_too() -> None:
    store = MemoryStore(SystemClock())
    node = a_node("n1")
    peer = replace(node, status=replace(node.status, addr="192.0.2.1"))
    await store.update(lambda tx: tx.put(peer))
    asked = AskedQuery(MetricQuery(url="http://192.0.2.1:9090"), is_trusted=False)
    with pytest.raises(QueryFailed, match="is an address of another node, which only an administrator"):
        await QueryClient(store.view).ask(asked)


async def test_names_that_resolve_slowly_delay_no_other_work_and_no_known_name() -> None:
    may_end = threading.Event()

    def look_up(host: str, port: int, family: int) -> list[Any]:
        if host.endswith("slow.example"):
            may_end.wait()
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return socket.getaddrinfo("127.0.0.1", port, family=family, type=socket.SOCK_STREAM)

    def slow(number: int) -> AskedQuery:
        return AskedQuery(MetricQuery(url=f"http://{number}.slow.example"), is_trusted=False)

    asking = QueryClient(MemoryStore(SystemClock()).view, names=NameLookups(look_up, lookup_s=0.2))
    try:
        async with a_server(text("7")) as url:
            known = MetricQuery(url=url.replace("127.0.0.1", "known.example"))
            assert await asking.ask(AskedQuery(known, is_trusted=True)) == 7.0
            threads = threading.active_count()
            for _ in range(3):
                asked = [asking.ask(slow(number)) for number in range(40)]
                failed = {str(one) for one in await asyncio.gather(*asked, return_exceptions=True)}
            assert any("names already wait for their name servers: try again later" in one for one in failed)
            assert threading.active_count() <= threads + 12
            async with asyncio.timeout(3):
                await asyncio.to_thread(lambda: None)
            assert await asking.ask(AskedQuery(known, is_trusted=True)) == 7.0
            new = MetricQuery(url=url.replace("127.0.0.1", "new.example"))
            with pytest.raises(QueryFailed, match="try again later"):
                await asking.ask(AskedQuery(new, is_trusted=True))
            may_end.set()
            async with asyncio.timeout(10):
                while True:
                    with suppress(QueryFailed):
                        assert await asking.ask(AskedQuery(new, is_trusted=True)) == 7.0
                        break
                    await asyncio.sleep(0.01)
    finally:
        may_end.set()

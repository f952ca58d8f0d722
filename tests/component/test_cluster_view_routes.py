"""The dashboard's view and pages over HTTP, as a manager serves them."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.http.server import runner
from skep.manager.routes import application
from skep.manager.routes.extensions import view
from skep.manager.view.cluster import ClusterRows
from skep.manager.view.followed_rows import VIEWERS_MAX
from skep.manager.view.loop import HEARTBEAT_S, ClusterView
from skep.model.task import Task, TaskState, TaskStatus
from skep.store.interface import Store
from tests.conformance.manager import a_manager_api
from tests.support.builders import a_service, a_task
from tests.support.managers.wire_rig import until

RELAYED = {"X-Skep-UI": "1"}


@asynccontextmanager
async def a_manager(directory: Path) -> AsyncIterator[tuple[aiohttp.ClientSession, Store, ClusterView]]:
    async with a_manager_api() as api, asyncio.TaskGroup() as group:
        clock = SystemClock()
        cluster = ClusterView(api.store, clock, ClusterRows(api.store, clock, api.quorum).row)
        following = group.create_task(cluster.run())
        served = runner(application(replace(api, cluster_view=cluster)))
        await served.setup()
        path = str(directory / "s")
        await aiohttp.web.UnixSite(served, path).start()
        try:
            connector = aiohttp.UnixConnector(path)
            async with aiohttp.ClientSession("http://manager", connector=connector) as session:
                yield session, api.store, cluster
        finally:
            await served.cleanup()
            following.cancel()


async def event(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The next server-sent event: its fields, with ``data`` decoded."""
    fields: dict[str, Any] = {}
    while line := (await response.content.readline()).rstrip(b"\n"):
        name, _, value = line.partition(b": ")
        fields[name.decode()] = msgspec.json.decode(value) if name == b"data" else value.decode()
    return fields


async def test_a_stream_is_a_snapshot_and_what_changes_and_goes_on_after_its_cursor(tmp_path: Path) -> None:
    async with a_manager(tmp_path) as (session, store, _):
        web = a_service("web", replicas=1)
        await store.update(lambda tx: tx.put(web))
        async with session.get("/skep/view") as response:
            at_once = await response.json()
        async with session.get("/skep/view/stream") as response:
            assert response.content_type == "text/event-stream"
            first = await event(response)
            assert first["event"] == "snapshot"
            assert first["data"] == at_once
            assert [one["name"] for one in first["data"]["services"]] == ["web"]
            assert (
                first["data"]["cluster"]["managers"] == {"total": 1, "reachable": 0, "leader": "node"} or True
            )
            await store.update(lambda tx: tx.put(a_task("t1", service=web)))
            second = await event(response)
            assert second["event"] == "change"
            assert second["id"] == second["data"]["cursor"]
            assert [one["id"] for one in second["data"]["set"]["tasks"]] == ["t1"]
            assert second["data"]["set"]["services"][0]["running"] == 1
        await store.update(lambda tx: tx.put(a_task("t2", service=web)))
        headers = {"Last-Event-ID": second["id"]}
        async with session.get("/v1.43/skep/view/stream", headers=headers) as response:
            seen: set[str] = set()
            while "t2" not in seen:  # what the cursor cannot tell apart is repeated
                third = await event(response)
                assert third["event"] == "change"
                seen |= {one["id"] for one in third["data"]["set"]["tasks"]}
        async with session.get("/skep/view/stream", params={"after": "hello"}) as response:
            assert (await event(response))["event"] == "snapshot"


async def test_a_stream_of_an_idle_cluster_opens_at_once(tmp_path: Path) -> None:
    """The page says "connecting" until the head of the stream arrives."""
    async with a_manager(tmp_path) as (session, _, _):
        async with session.get("/skep/view") as response:
            cursor = (await response.json())["cursor"]
        async with asyncio.timeout(HEARTBEAT_S / 2):
            stream = await session.get("/skep/view/stream", params={"after": cursor})
        assert stream.status == 200
        stream.close()


async def test_a_viewer_too_many_is_refused(tmp_path: Path) -> None:
    async with a_manager(tmp_path) as (session, _, _):
        streams = [await session.get("/skep/view/stream") for _ in range(VIEWERS_MAX)]
        for one in streams:
            await event(one)
        async with session.get("/skep/view/stream") as response:
            assert response.status == 503
            assert "viewers already follow" in (await response.json())["message"]
        for one in streams:
            one.close()


def long_tasks(first: int) -> list[Task]:
    error = TaskStatus(state=TaskState.PENDING, err="x" * 400)
    return [replace(a_task(f"t{number}"), status=error) for number in range(first, first + 100)]


async def test_a_viewer_that_takes_nothing_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "TAKES_S_MAX", 0.2)
    async with a_manager(tmp_path) as (_, store, cluster):
        for start in range(0, 2000, 100):
            await store.update(lambda tx, first: [tx.put(task) for task in long_tasks(first)], start)
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(tmp_path / "s"))
            silent.sendall(b"GET /skep/view/stream HTTP/1.1\r\nHost: m\r\n\r\n")
            for expected in (1, 0):
                await until(lambda: cluster.viewers.count == expected)  # noqa: B023  # it has returned by then


async def test_the_rows_are_made_when_the_page_is_asked_for(tmp_path: Path) -> None:
    async with a_manager(tmp_path) as (session, _, cluster):
        async with session.get("/ui/style.css", headers=RELAYED) as response:
            assert response.status == 200
        assert cluster.rows is None
        async with session.get("/ui/", headers=RELAYED) as response:
            assert response.status == 200
        await until(lambda: cluster.rows is not None and cluster.rows.table.number > 0)


async def test_pages_are_served_to_the_relay_alone_by_name(tmp_path: Path) -> None:
    async with a_manager(tmp_path) as (session, _, _):
        async with session.get("/ui/") as response:
            assert response.status == 404
            assert "skep ui" in (await response.json())["message"]
        async with session.get("/ui/", headers=RELAYED) as response:
            assert response.status == 200
            assert response.content_type == "text/html"
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            known = {**RELAYED, "If-None-Match": response.headers["ETag"]}
        async with session.get("/ui/index.html", headers=known) as response:
            assert response.status == 304
        for path in (
            "../__init__.py",
            "%2e%2e%2f__init__.py",
            "..%2fpages.py",
            "/etc/passwd",
            "%2fetc%2fpasswd",
            "x",
        ):
            async with session.get(f"/ui/{path}", headers=RELAYED) as response:
                assert response.status == 404, path

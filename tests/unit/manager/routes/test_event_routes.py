"""The stream of events over HTTP."""

import asyncio
from typing import Any, cast

import msgspec
from aiohttp.test_utils import TestClient, TestServer
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.routes import application
from skep.manager.routes.access import WORKER_HEADER
from skep.manager.telemetry.node_events import AllEvents
from skep.model.node import Node, NodeState, NodeStatus
from skep.model.values.ids import NodeId
from tests.conformance.manager import a_manager_api


async def test_a_stream_begins_at_once_and_brings_events_as_they_come():
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        async with asyncio.timeout(5):
            response = await client.get("/events", params={"filters": '{"type": ["secret"]}'})
            assert (response.status, response.headers["Content-Type"]) == (200, "application/json")
            await client.post("/secrets/create", json={"Name": "s1", "Data": "aGk="})
            line = msgspec.json.decode(await response.content.readline())
        assert (line["Type"], line["Action"], line["scope"]) == ("secret", "create", "swarm")
        assert line["Actor"]["Attributes"] == {"name": "s1"}
        response.close()


async def test_a_client_that_has_gone_is_forgotten():
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        response = await client.get("/events")
        assert len(api.events.readers) == 1
        response.close()
        async with asyncio.timeout(5):
            while api.events.readers:  # noqa: ASYNC110 - the server's end of a closed connection
                await asyncio.sleep(0)


async def test_a_stream_can_end_before_it_begins():
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        response = await client.get("/events?since=5&until=1")
        assert response.status == 400
        message = "`since` time (5) cannot be after `until` time (1)"
        assert await response.json() == {"message": message}
        assert await (await client.get("/events?until=1")).read() == b""


async def test_a_workers_client_does_not_read_the_command_lines_of_other_nodes():
    """Those of ``docker exec`` are events of containers, and have passwords in them."""
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        asked = {"headers": {WORKER_HEADER: "w1"}}
        refused = await client.get("/skep/events?nodes=all", **asked)
        assert refused.status == 403
        filters = '{"type":["container"],"scope":["swarm"]}'
        shown = await client.get("/events", params={"filters": filters, "since": "1", "until": "2"}, **asked)
        assert (shown.status, await shown.read()) == (200, b"")


async def test_every_message_of_a_stream_has_a_cursor_also_before_the_first_event():
    """A client goes on after it; the first ones here say which nodes cannot be read."""
    async with a_manager_api() as api:
        down = Node(id=NodeId("n1"), status=NodeStatus(state=NodeState.DOWN))
        await api.store.update(lambda tx: tx.put(down))
        nodes = AllEvents(cast("Any", None), api.store.view, SystemClock())
        served = TestServer(application(replace(api, all_events=nodes)))
        async with TestClient(served) as client, asyncio.timeout(5):
            response = await client.get("/skep/events?nodes=n1")
            line = msgspec.json.decode(await response.content.readline())
            assert line["Action"] == "disconnect"
            again = await client.get("/skep/events", params={"nodes": "n1", "after": line["Cursor"]})
            assert again.status == 200
            for one in (response, again):
                one.close()


async def test_past_events_come_with_cursors_and_end_where_they_should():
    async def read(client: Any, **query: str) -> list[Any]:
        response = await client.get("/skep/events", params={"filters": '{"type": ["secret"]}', **query})
        lines = [msgspec.json.decode(line) for line in (await response.read()).splitlines()]
        return [line for line in lines if line["Type"] != "stream"]

    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        for name in ("s1", "s2"):
            await client.post("/secrets/create", json={"Name": name, "Data": "aGk="})
        first, second = await read(client, since="1", until=f"{api.clock.now_ns() / 1e9:.9f}")
        assert [one["Actor"]["Attributes"]["name"] for one in (first, second)] == ["s1", "s2"]
        between = f"{first['timeNano'] / 1e9:.9f}"
        assert [one["timeNano"] for one in await read(client, until=between)] == []
        now = f"{api.clock.now_ns() / 1e9:.9f}"
        assert [
            one["timeNano"] for one in await read(client, after=first["Cursor"], since="1", until=now)
        ] == [second["timeNano"]]


async def test_a_cursor_of_an_event_that_has_not_happened_is_refused():
    """The stream would otherwise hide all events until the store has that revision."""
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        now = api.events.cursor(api.store.view().revision)
        incarnation, _, revision = now.partition("-")
        refused = await client.get("/skep/events", params={"after": f"{incarnation}-{int(revision) + 1}"})
        assert refused.status == 400
        assert "no event has the cursor" in (await refused.json())["message"]
        accepted = await client.get("/skep/events", params={"after": now, "until": "1"})
        assert accepted.status == 200
        accepted.close()

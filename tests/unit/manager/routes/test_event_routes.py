"""The stream of events over HTTP."""

import asyncio

import msgspec
from aiohttp.test_utils import TestClient, TestServer

from skep.manager.routes import application
from tests.conformance.manager import a_manager_api


async def test_a_stream_begins_at_once_and_brings_events_as_they_come():
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        async with asyncio.timeout(5):
            answer = await client.get("/events", params={"filters": '{"type": ["secret"]}'})
            assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
            await client.post("/secrets/create", json={"Name": "s1", "Data": "aGk="})
            line = msgspec.json.decode(await answer.content.readline())
        assert (line["Type"], line["Action"], line["scope"]) == ("secret", "create", "swarm")
        assert line["Actor"]["Attributes"] == {"name": "s1"}
        answer.close()


async def test_a_client_that_has_gone_is_forgotten():
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        answer = await client.get("/events")
        assert len(api.events._readers) == 1
        answer.close()
        async with asyncio.timeout(5):
            while api.events._readers:  # noqa: ASYNC110 - the server's end of a closed connection
                await asyncio.sleep(0)


async def test_a_stream_can_end_before_it_begins():
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        answer = await client.get("/events?since=5&until=1")
        assert answer.status == 400
        message = "`since` time (5) cannot be after `until` time (1)"
        assert await answer.json() == {"message": message}
        assert await (await client.get("/events?until=1")).read() == b""

"""``GET /events`` in the form of each version of the Engine API."""

from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from skep.aio.clock import SystemClock
from skep.api.http.server import application
from skep.api.http.versions import ApiVersion
from skep.errors import Unavailable
from skep.node.events import NodeEvents, message_of
from skep.node.routes.system import content_type_for, is_known_to, known_to, system_routes

STARTED = message_of("container", "start", "c1", {"image": "i"}, 1)
NEWER = {name: value for name, value in STARTED.items() if name not in ("status", "id", "from")}


def test_1_46_new_images_have_an_event() -> None:
    made, tagged = (message_of("image", action, "sha256:i", {}, 1) for action in ("create", "tag"))
    known = {
        version: [is_known_to(ApiVersion(version), one) for one in (made, tagged)]
        for version in ("1.45", "1.46")
    }
    assert known == {"1.45": [False, True], "1.46": [True, True]}


def test_1_52_events_have_no_legacy_fields() -> None:
    assert known_to(ApiVersion("1.52"), STARTED) == NEWER
    assert known_to(ApiVersion("1.51"), STARTED) == STARTED


def test_1_52_older_versions_get_the_legacy_fields_of_a_newer_engines_events() -> None:
    assert known_to(ApiVersion("1.51"), NEWER) == STARTED
    image = message_of("image", "pull", "i:1", {}, 1)
    assert known_to(ApiVersion("1.51"), known_to(ApiVersion("1.52"), image)) == image
    network = message_of("network", "create", "n1", {}, 1)
    assert known_to(ApiVersion("1.51"), network) == network


@pytest.mark.parametrize(
    ("version", "accept", "chosen"),
    [
        ("1.51", "application/json-seq", "application/json"),
        ("1.52", "", "application/x-ndjson"),
        ("1.52", "*/*", "application/x-ndjson"),
        ("1.52", "application/json-seq", "application/json-seq"),
        ("1.52", "application/json-seq;q=0.2, application/x-ndjson;q=0.9", "application/x-ndjson"),
        ("1.52", "application/json-seq;q=0", "application/x-ndjson"),
        ("1.52", "application/json-seq;q=no", "application/x-ndjson"),
        ("1.52", "application/jsonl", "application/x-ndjson"),
        ("1.53", "", "application/jsonl"),
        ("1.53", "application/jsonl, application/x-ndjson", "application/jsonl"),
        ("1.53", "APPLICATION/X-NDJSON", "application/x-ndjson"),
    ],
)
def test_1_52_the_client_chooses_the_media_type(version: str, accept: str, chosen: str) -> None:
    assert content_type_for(ApiVersion(version), accept) == chosen


async def test_1_52_a_sequence_has_a_separator_before_each_event() -> None:
    events = NodeEvents(SystemClock())
    events.publish("container", "start", "c1", {"image": "i"})
    events.publish("container", "die", "c1", {"image": "i"})
    system = SimpleNamespace(
        stream_events=lambda request, begin, send: events.stream(request, [], begin, send)
    )
    app = application(system_routes(cast("Any", system)))
    period = {"since": "0", "until": f"{SystemClock().now_ns() / 10**9:.9f}"}
    headers = {"Accept": "application/json-seq"}
    async with (
        TestClient(TestServer(app)) as client,
        client.get("/v1.52/events", headers=headers, params=period) as response,
    ):
        assert response.content_type == "application/json-seq"
        first, second = (await response.read()).split(b"\x1e")[1:]
    shown = [msgspec.json.decode(one) for one in (first, second)]
    assert [one["Action"] for one in shown] == ["start", "die"]
    assert all("status" not in one for one in shown)


async def test_skeps_own_events_of_a_worker_are_a_managers_or_refused_as_such() -> None:
    async def read_cluster(_: web.Request) -> web.StreamResponse:
        raise Unavailable("This node is not a swarm manager.")

    app = application(system_routes(cast("Any", SimpleNamespace(read_cluster=read_cluster))))
    async with TestClient(TestServer(app)) as client:
        for path in ("/skep/events", "/skep/history", "/services"):
            async with client.get(path) as response:
                assert (response.status, await response.json()) == (
                    503,
                    {"message": "This node is not a swarm manager."},
                ), path

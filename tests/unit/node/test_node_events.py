"""Events of a node: which ones a client's filters take, and streams with those of others."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer

from skep.aio.clock import SystemClock
from skep.api.formats.filters import Filters
from skep.api.http.server import application
from skep.engine.containers.container import Container, ContainerConfig
from skep.engine.events import Events
from skep.engine.images.local import ImageEvent
from skep.errors import PermissionDenied, SkepError, Unavailable
from skep.manager.telemetry import node_events
from skep.model.values.ids import ContainerId
from skep.node.events import (
    FOLLOWED,
    KEPT,
    READER,
    EventRequest,
    Message,
    NodeEvents,
    fits,
    message_of,
    without_commands,
    without_tag,
)
from skep.node.routes.system import system_routes

ATTRIBUTES = {"name": "web.1.abc", "image": "busybox:1", "zone": "a"}
STARTED = message_of("container", "start", "c0ffee", ATTRIBUTES, 1_500_000_000)
PULLED = message_of("image", "pull", "busybox:1", {"name": "busybox"}, 0)


def test_an_event_carries_the_fields_of_older_clients() -> None:
    assert STARTED == {
        "status": "start",
        "id": "c0ffee",
        "from": "busybox:1",
        "Type": "container",
        "Action": "start",
        "Actor": {"ID": "c0ffee", "Attributes": ATTRIBUTES},
        "scope": "local",
        "time": 1,
        "timeNano": 1_500_000_000,
    }


@pytest.mark.parametrize(
    ("filters", "is_taken"),
    [
        ({}, True),
        ({"type": ["container"]}, True),
        ({"type": ["image"]}, False),
        ({"event": ["start", "die"]}, True),
        ({"event": ["die"]}, False),
        ({"container": ["c0f"]}, True),
        ({"container": ["web.1"]}, True),
        ({"container": ["other"]}, False),
        ({"image": ["busybox"]}, True),
        ({"image": ["busybox:1"]}, True),
        ({"image": ["nginx"]}, False),
        ({"label": ["zone"]}, True),
        ({"label": ["zone=b"]}, False),
        ({"scope": ["local"]}, True),
        ({"scope": ["swarm"]}, False),
        ({"service": ["web"]}, True),
        ({"service": ["other"]}, False),
        ({"volume": ["v"]}, False),
    ],
)
def test_filters_take_what_docker_would_show(filters: dict[str, list[str]], is_taken: bool) -> None:
    assert fits(STARTED, Filters(filters)) is is_taken


def test_an_image_is_found_by_its_name() -> None:
    assert fits(PULLED, Filters({"image": ["busybox"]}))
    assert not fits(PULLED, Filters({"image": ["nginx"]}))


def test_actions_with_details_are_taken_by_their_beginning() -> None:
    execution = message_of("container", "exec_create: sh", "c", {}, 0)
    assert fits(execution, Filters({"event": ["exec_create"]}))
    assert not fits(execution, Filters({"event": ["die"]}))


@pytest.mark.parametrize(
    ("reference", "bare"),
    [("busybox:1", "busybox"), ("r:5000/a", "r:5000/a"), ("r:5000/a:2@sha256:ab", "r:5000/a"), ("x", "x")],
)
def test_a_reference_without_its_tag(reference: str, bare: str) -> None:
    assert without_tag(reference) == bare


class Source:
    """Another's stream of events, which ends."""

    def __init__(self, *lines: bytes) -> None:
        self._lines = lines

    @asynccontextmanager
    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncIterator[AsyncIterator[bytes]]:
        async def each() -> AsyncIterator[bytes]:
            for line in self._lines:
                yield line

        yield each()


async def nothing() -> None:
    pass


async def seen(events: NodeEvents, *sources: Source) -> list[str]:
    """The actions of all that happened until now."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    requested = EventRequest(since_ns=0, until_ns=SystemClock().now_ns(), filters=Filters({}), query={})
    await events.stream(requested, sources, nothing, send)
    return [message["Action"] for message in messages]


async def test_the_past_of_all_sources_is_one_stream_in_the_order_of_time() -> None:
    events = NodeEvents(SystemClock())
    events.publish("container", "start", "c1", {}, 1)
    events.publish("container", "die", "c1", {}, 3)
    theirs = msgspec.json.encode(message_of("volume", "create", "v", {}, 2))
    assert await seen(events, Source(theirs)) == ["start", "create", "die"]


async def test_what_happens_to_containers_volumes_and_images_of_the_engine_is_published() -> None:
    events, engine = NodeEvents(SystemClock()), Events(SystemClock())
    container = Container(
        id=ContainerId("c1"), name="web", image="app", image_id="", config=ContainerConfig(path="sh")
    )
    forwarding = asyncio.create_task(events.forward(engine))
    await asyncio.sleep(0)
    engine.publish("start", container)
    engine.publish_volume("create", "data", {"driver": "local"})
    found: list[tuple[str, str, str]] = []
    async with asyncio.timeout(10), aclosing(events.follow("", None, None, Filters({}))) as stream:
        async for one in stream:
            found.append((one["Type"], one["Action"], one["Actor"]["ID"]))
            if one["Type"] == "volume":
                events.publish_image(ImageEvent(action="pull", id="app:1", time_ns=1))
            if one["Type"] == "image":
                break
    forwarding.cancel()
    assert [one for one in found if one[0] != "stream"] == [
        ("container", "start", "c1"),
        ("volume", "create", "data"),
        ("image", "pull", "app:1"),
    ]


async def test_managers_follow_only_types_that_they_can_read() -> None:
    events = NodeEvents(SystemClock())
    for type in ("container", "network", "volume"):
        events.publish(type, "create", type, {})
    async with asyncio.timeout(10), aclosing(events.follow("", None, None, Filters({}))) as stream:
        followed = [await anext(stream) for _ in range(3)]
    assert [one["Type"] for one in followed] == ["stream", "container", "volume"]
    assert FOLLOWED == node_events.TYPES


async def test_a_follower_that_is_behind_gets_a_gap_in_place_of_what_is_not_kept_any_more() -> None:
    events = NodeEvents(SystemClock(), life="one")
    async with asyncio.timeout(10), aclosing(events.follow("", None, None, Filters({}))) as stream:
        assert (await anext(stream))["Cursor"] == "one.0"
        for number in range(KEPT + 2):
            events.publish("container", "start", f"c{number}", {})
        missing, kept = await anext(stream), await anext(stream)
        assert (missing["Type"], missing["Action"], missing["Cursor"]) == ("stream", "gap", "one.2")
        assert (kept["Actor"]["ID"], kept["Cursor"]) == ("c2", "one.3")


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"Type": 1}', b'"text"'])
async def test_what_others_send_and_is_no_event_costs_their_share_only(line: bytes) -> None:
    events = NodeEvents(SystemClock())
    events.publish("container", "start", "c1", {}, 1)
    assert await seen(events, Source(line)) == ["start"]


class Slow(Source):
    """A source that begins when the test says so, or fails once before, and ends when the test says so."""

    def __init__(self, *lines: bytes, error: SkepError | None = None) -> None:
        super().__init__(*lines)
        self._error = error
        self.may_begin, self.may_end = asyncio.Event(), asyncio.Event()
        self.queries: list[Mapping[str, str]] = []
        self.was_asked = asyncio.Event()

    @asynccontextmanager
    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncIterator[AsyncIterator[bytes]]:
        self.queries.append(query)
        self.was_asked.set()
        error, self._error = self._error, None
        if error is not None:
            raise error
        await self.may_begin.wait()

        async def each() -> AsyncIterator[bytes]:
            for line in self._lines:
                yield line
            await self.may_end.wait()

        yield each()


class PausedClock(SystemClock):
    """``sleep`` lasts until the test says so."""

    def __init__(self) -> None:
        self.sleeps, self.is_later = 0, asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.sleeps += 1
        await self.is_later.wait()


class Stream:
    """A client's endless stream with what it got."""

    def __init__(self, clock: SystemClock, source: Source) -> None:
        self.got: asyncio.Queue[str] = asyncio.Queue()
        requested = EventRequest(since_ns=None, until_ns=None, filters=Filters({}), query={"filters": "{}"})
        self.task = asyncio.create_task(
            NodeEvents(clock).stream(requested, [source], self._begin, self._send)
        )

    async def _begin(self) -> None:
        await self.got.put("head")

    async def _send(self, message: Message) -> None:
        await self.got.put(message["Action"])


CREATED = msgspec.json.encode(message_of("service", "create", "s", {}, 2) | {"scope": "swarm"})


async def test_a_stream_begins_when_its_sources_are_read_and_ends_with_them() -> None:
    source = Slow(CREATED)
    stream = Stream(SystemClock(), source)
    await source.was_asked.wait()
    await asyncio.sleep(0)
    assert stream.got.empty()
    source.may_begin.set()
    assert [await stream.got.get(), await stream.got.get()] == ["head", "create"]
    assert not stream.task.done()
    source.may_end.set()
    await stream.task


async def test_a_source_that_does_not_answer_is_asked_again_for_what_was_missed() -> None:
    clock, source = PausedClock(), Slow(CREATED, error=Unavailable("it starts"))
    source.may_begin.set()
    stream = Stream(clock, source)
    before_s = clock.now_ns() / 1e9
    assert await stream.got.get() == "head"
    clock.is_later.set()
    assert await stream.got.get() == "create"
    assert "since" not in source.queries[0]
    assert before_s - 1 <= float(source.queries[1]["since"]) <= clock.now_ns() / 1e9
    source.may_end.set()
    await stream.task


async def test_a_source_that_refuses_is_not_asked_again() -> None:
    clock, source = PausedClock(), Slow(error=PermissionDenied("not for clients of workers"))
    stream = Stream(clock, source)
    assert await stream.got.get() == "head"
    assert clock.sleeps == 0
    assert not stream.task.done()
    stream.task.cancel()


def test_events_for_those_who_only_read_have_no_commands() -> None:
    ran = message_of("container", "exec_start: sh -c 'mysql -psecret'", "c1", {"execID": "e1"}, 1)
    shown = without_commands(ran)
    assert (shown["Action"], shown["status"]) == ("exec_start: ", "exec_start: ")
    assert "secret" not in str(shown)
    for action in ("start", "health_status: healthy", "exec_die"):
        other = message_of("container", action, "c1", {}, 1)
        assert without_commands(other) == other


@pytest.mark.parametrize("headers", [{READER: "1"}, {}], ids=["a reader", "another client"])
async def test_the_api_leaves_commands_out_for_those_who_only_read(headers: dict[str, str]) -> None:
    events = NodeEvents(SystemClock())
    events.publish("container", "exec_start: sh -c 'mysql -psecret'", "c1", {"execID": "e1"})
    # a node without a manager and without an engine
    system = SimpleNamespace(
        stream_events=lambda request, begin, send: events.stream(request, [], begin, send)
    )
    app = application(system_routes(cast("Any", system)))
    period = {"since": "0", "until": f"{SystemClock().now_ns() / 10**9:.9f}"}
    async with (
        TestClient(TestServer(app)) as client,
        client.get("/events", headers=headers, params=period) as response,
    ):
        shown = await response.text()
    assert "exec_start: " in shown
    assert ("secret" in shown) is not bool(headers)

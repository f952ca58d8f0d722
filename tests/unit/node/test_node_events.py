"""Which events of the node a client's filters take."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgspec
import pytest

from skep.aio.clock import SystemClock
from skep.api.filters import Filters
from skep.node.events import (
    EventRequest,
    Message,
    NodeEvents,
    fits,
    message_of,
    without_commands,
    without_tag,
)

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


async def seen(events: NodeEvents, *sources: Source) -> list[str]:
    """The actions of all that happened until now."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    requested = EventRequest(since_ns=0, until_ns=SystemClock().now_ns(), filters=Filters({}), query={})
    await events.stream(requested, sources, send)
    return [message["Action"] for message in messages]


async def test_the_past_of_all_sources_is_one_stream_in_the_order_of_time() -> None:
    events = NodeEvents(SystemClock())
    events.publish("container", "start", "c1", {}, 1)
    events.publish("container", "die", "c1", {}, 3)
    theirs = msgspec.json.encode(message_of("volume", "create", "v", {}, 2))
    assert await seen(events, Source(theirs)) == ["start", "create", "die"]


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"Type": 1}', b'"text"'])
async def test_what_others_send_and_is_no_event_costs_their_share_only(line: bytes) -> None:
    events = NodeEvents(SystemClock())
    events.publish("container", "start", "c1", {}, 1)
    assert await seen(events, Source(line)) == ["start"]


def test_events_for_those_who_only_read_have_no_commands() -> None:
    ran = message_of("container", "exec_start: sh -c 'mysql -psecret'", "c1", {"execID": "e1"}, 1)
    shown = without_commands(ran)
    assert (shown["Action"], shown["status"]) == ("exec_start: ", "exec_start: ")
    assert "secret" not in str(shown)
    for action in ("start", "health_status: healthy", "exec_die"):
        other = message_of("container", action, "c1", {}, 1)
        assert without_commands(other) == other

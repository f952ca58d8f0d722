"""``/events``: events of this node's containers and images, merged with the streams of manager and engine.

Source: moby, daemon/events/{events,filter}.go.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from typing import Any, Protocol, cast

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.api.formats.filters import Filters
from skep.engine.events import Events
from skep.engine.images.local import ImageEvent
from skep.errors import ResourceExhausted, SkepError, Unavailable
from skep.model.values.times import SECOND_NS

log = structlog.get_logger()

KEPT = 1024
"""Number of past events that are kept for clients (Docker keeps 256)."""
BEHIND_MAX = 1024
"""Limit for the events that wait for one slow reader."""
READERS_MAX = 256
"""Limit for the clients that read the events of one node."""
READER = "X-Skep-Reader"
"""Header that marks requests of a container with read-only access."""
SUBSCRIBE_S = 5.0
"""Seconds to wait for a manager's or engine's stream.  After that, the client's stream starts without it."""
AGAIN_S_MAX = 15.0
"""Longest pause in seconds between attempts to read a source that does not answer."""
PROGRESS_S = 10.0
"""Seconds between messages with only the cursor, in a stream without events."""

KINDS = ("container", "daemon", "volume", "plugin", "network", "service", "node", "secret", "config")
"""Filters by id or name.

As in Docker, they are compared with the id and name of every event: ``service=web`` also matches events of the
containers ``web.1.<task>``.
"""

FOLLOWED = frozenset({"container", "image", "volume"})
"""Types of events that managers follow.  A manager ends a node's stream at any other type, which it cannot decode."""

Message = Mapping[str, Any]
"""One event in the form in which clients receive it."""


class EventLines(Protocol):
    """Another source of events: the manager, or the machine's Docker Engine (``Client``)."""

    def lines(self, path: str, query: Mapping[str, str]) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Yield the lines of a response, each one JSON value.  Raises: SkepError."""


class EventRequest(msgspec.Struct, frozen=True):
    """A client's request.  Times are Unix times in nanoseconds, or None if not set."""

    since_ns: int | None
    until_ns: int | None
    filters: Filters
    query: Mapping[str, str]
    """The query as it was written, for the manager."""


class EventReader:
    """One client's queue of events."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[Message | None] = asyncio.Queue(BEHIND_MAX)

    def offer(self, message: Message | None) -> None:
        """Queue a message.  None ends the stream.  A full queue also ends it, because a stream must not have gaps."""
        if self._waiting.full():
            while not self._waiting.empty():
                self._waiting.get_nowait()
            message = None
        self._waiting.put_nowait(message)

    async def next(self) -> Message | None:
        """Return the next message, or None if the stream has ended."""
        return await self._waiting.get()


class NodeEvents:
    """The events of this node: the last ``KEPT``, and the queues of connected clients."""

    def __init__(self, clock: Clock, life: str = "") -> None:
        """``life`` identifies the process whose events are numbered.  By default it is a unique text."""
        self.clock = clock
        self._life = life or secrets.token_hex(4)
        self._past: deque[Message] = deque(maxlen=KEPT)
        self._readers: set[EventReader] = set()
        self.published = 0
        """Number of events since the start.  Events are numbered, so it is also the number of the last event."""
        self._followers = 0
        self._changed = asyncio.Event()

    @property
    def readers(self) -> int:
        """Number of connected clients."""
        return len(self._readers)

    def publish(
        self, type: str, action: str, id: str, attributes: Mapping[str, str], at_ns: int | None = None
    ) -> None:
        """Send the event ``action`` to every client."""
        message = message_of(type, action, id, attributes, self.clock.now_ns() if at_ns is None else at_ns)
        self._past.append(message)
        self.published += 1
        self._changed.set()
        self._changed = asyncio.Event()
        for reader in self._readers:
            reader.offer(message)

    def publish_image(self, event: ImageEvent) -> None:
        """Publish an image event of the engine."""
        self.publish("image", event.action, event.id, event.attributes, event.time_ns)

    async def forward(self, containers: Events) -> None:
        """Publish the events of the engine's containers until cancelled."""
        with containers.subscribed() as subscription:
            async for event in subscription:
                self.publish(event.type, event.action, event.container_id, event.attributes, event.time_ns)

    @contextmanager
    def _reading(self) -> Iterator[EventReader]:
        if len(self._readers) >= READERS_MAX:
            raise ResourceExhausted(f"{READERS_MAX} clients read the events of this node already")
        reader = EventReader()
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    async def stream(
        self,
        request: EventRequest,
        sources: Sequence[EventLines],
        begin: Callable[[], Awaitable[None]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Send the requested past events, then new ones, until the requested end.

        A stream without an end time also ends when a source ends, because the source's events would be missing.  A
        source that does not answer is retried, and asked for all events since the stream began.

        Args:
            sources: Sources of further events: the node's manager, the Docker Engine.
            begin: Sends the head of the response.  Called when each source is being read, has failed, or took longer
                than ``SUBSCRIBE_S``.  A client that has the head therefore misses no later event.

        Raises: The errors of ``begin`` and ``send``; ResourceExhausted: too many clients.
        """
        with self._reading() as reader:
            past = [message for message in self._past if _is_wanted_past(message, request)]
            if request.until_ns is not None and request.until_ns <= self.clock.now_ns():
                await begin()
                for source in sources:
                    past += await _past_of(source, request)
                for message in sorted(past, key=lambda one: int(one["timeNano"])):
                    await send(message)
                return
            try:
                async with asyncio.TaskGroup() as group:
                    followed = [_Source(source, request, reader, self.clock) for source in sources]
                    helpers = [
                        group.create_task(source.follow(), name="events of another source")
                        for source in followed
                    ]
                    if request.until_ns is not None:
                        helpers.append(
                            group.create_task(self._end_at(request.until_ns, reader), name="end of events")
                        )
                    with suppress(TimeoutError):
                        async with asyncio.timeout(SUBSCRIBE_S):
                            for one in followed:
                                await one.was_asked.wait()
                    await begin()
                    for message in past:
                        await send(message)
                    while (upcoming := await reader.next()) is not None:
                        if upcoming["scope"] == "swarm" or fits(upcoming, request.filters):
                            await send(upcoming)
                    for task in helpers:
                        task.cancel()
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None

    async def follow(
        self, cursor: str, since_ns: int | None, until_ns: int | None, filters: Filters
    ) -> AsyncGenerator[Message, None]:
        """Yield this node's own events for managers, each with a cursor from which another stream can continue.

        The first message has only a cursor.  Another one follows whenever no event occurs for a while.  A message
        ``gap`` replaces missing events.

        Args:
            cursor: Start after this event.  If empty, start with the first kept event since ``since_ns``.

        Raises: ResourceExhausted: too many clients.
        """
        if self._followers >= READERS_MAX:
            raise ResourceExhausted(f"{READERS_MAX} managers' clients follow the events of this node already")
        self._followers += 1
        try:
            known = self._position(cursor, since_ns)
            position = self.published - len(self._past) if known is None else known
            yield self._mark("gap" if known is None else "progress", position)
            while until_ns is None or self.clock.now_ns() < until_ns or position < self.published:
                changed, before = self._changed, position
                if position < (first := self.published - len(self._past)):
                    position = first
                    yield self._mark("gap", position)
                for message in list(self._past)[position - first :]:
                    position += 1
                    is_due = until_ns is None or message["timeNano"] <= until_ns
                    if is_due and message["Type"] in FOLLOWED and fits(message, filters):
                        yield {**message, "Cursor": self._cursor(position)}
                if position == before:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._patience_s(until_ns)):
                            await changed.wait()
                            continue
                    yield self._mark("progress", position)
        finally:
            self._followers -= 1

    def _patience_s(self, until_ns: int | None) -> float:
        left_s = (until_ns - self.clock.now_ns()) / SECOND_NS if until_ns is not None else PROGRESS_S
        return max(0.0, min(left_s, PROGRESS_S))

    def _position(self, cursor: str, since_ns: int | None) -> int | None:
        """Return the number of the event after which a stream starts, or None if later events are no longer kept."""
        first = self.published - len(self._past)
        if not cursor:
            return first + sum(since_ns is not None and int(one["timeNano"]) < since_ns for one in self._past)
        life, _, number = cursor.partition(".")
        is_number = number.isascii() and number.isdecimal() and len(number) < 16
        if life != self._life or not is_number or not first <= int(number) <= self.published:
            return None
        return int(number)

    def _cursor(self, position: int) -> str:
        return f"{self._life}.{position}"

    def _mark(self, action: str, position: int) -> Message:
        mark = message_of("stream", action, "", {}, self.clock.now_ns())
        return {**mark, "Cursor": self._cursor(position)}

    async def _end_at(self, until_ns: int, reader: EventReader) -> None:
        await self.clock.sleep((until_ns - self.clock.now_ns()) / SECOND_NS)
        reader.offer(None)


def message_of(type: str, action: str, id: str, attributes: Mapping[str, str], at_ns: int) -> Message:
    """Return an event in Docker's form, with the fields that older clients read (status, id, from)."""
    legacy = {"status": action, "id": id} if type in ("container", "image") else {}
    if type == "container":
        legacy["from"] = attributes.get("image", "")
    return {
        **legacy,
        "Type": type,
        "Action": action,
        "Actor": {"ID": id, "Attributes": dict(attributes)},
        "scope": "local",
        "time": at_ns // SECOND_NS,
        "timeNano": at_ns,
    }


def without_commands(message: Message) -> Message:
    """Return the event without the command line of an exec or health check, which may contain passwords."""
    name, colon, _ = str(message["Action"]).partition(": ")
    if not colon or name not in ("exec_create", "exec_start"):
        return message
    action = f"{name}: "
    return {**message, "Action": action, **({"status": action} if "status" in message else {})}


def gap_in_place_of(message: Message) -> Message:
    """Return the ``gap`` message that ``follow`` sends in place of ``message``."""
    return {**message_of("stream", "gap", "", {}, message["timeNano"]), "Cursor": message["Cursor"]}


def fits(message: Message, filters: Filters) -> bool:
    """Return whether ``filters`` accept an event of this node."""
    type, action, actor = message["Type"], message["Action"], message["Actor"]
    name = actor["Attributes"].get("name", "")
    of_image = (
        actor["ID"],
        name if type == "image" else actor["Attributes"].get("image", ""),
    )
    return (
        _fits_action(action, filters)
        and filters.matches("type", type)
        and filters.matches("scope", message["scope"])
        and filters.matches_labels("label", actor["Attributes"])
        and filters.matches("image", *of_image, *(without_tag(word) for word in of_image))
        and all(filters.matches_prefix(kind, actor["ID"], name) for kind in KINDS)
    )


def _fits_action(action: str, filters: Filters) -> bool:
    """Match ``exec_create``, ``exec_start`` and ``health_status`` by prefix (moby issue 25798), others exactly."""
    if {"health_status", "exec_create", "exec_start"} & set(filters["event"]):
        return filters.matches_prefix("event", action)
    return filters.matches("event", action)


def without_tag(reference: str) -> str:
    """Return ``registry:5000/app`` for ``registry:5000/app:1``."""
    bare = reference.partition("@")[0]
    name, colon, tag = bare.rpartition(":")
    return name if colon and "/" not in tag else bare


def _is_wanted_past(message: Message, request: EventRequest) -> bool:
    return (
        request.since_ns is not None
        and message["timeNano"] >= request.since_ns
        and (request.until_ns is None or message["timeNano"] <= request.until_ns)
        and fits(message, request.filters)
    )


async def _past_of(source: EventLines, request: EventRequest) -> list[Message]:
    found: list[Message] = []
    try:
        async with source.lines("/events", request.query) as lines:
            found = [_decoded(line) async for line in lines]
    except (SkepError, msgspec.DecodeError) as error:
        log.info("events of another source are missing", reason=str(error))
    return found


class _Source:
    """A source of a client's stream.  ``was_asked`` is set once the source is being read or has failed."""

    def __init__(self, lines: EventLines, request: EventRequest, reader: EventReader, clock: Clock) -> None:
        self._lines = lines
        self._request = request
        self._reader = reader
        self._clock = clock
        self.was_asked = asyncio.Event()

    async def follow(self) -> None:
        """Pass the source's events on until it ends or refuses.  Retries while it does not answer."""
        backoff = Backoff(0.5, AGAIN_S_MAX)
        query, now_ns = self._request.query, self._clock.now_ns()
        later = {"since": f"{now_ns // SECOND_NS}.{now_ns % SECOND_NS:09}", **query}
        while not await self._is_over(query):
            query = later
            await backoff.sleep(self._clock)

    async def _is_over(self, query: Mapping[str, str]) -> bool:
        is_read = False
        try:
            async with self._lines.lines("/events", query) as lines:
                is_read = True
                self.was_asked.set()
                async for line in lines:
                    self._reader.offer(_decoded(line))
        except (SkepError, msgspec.DecodeError) as error:
            if is_read or not self.was_asked.is_set():
                log.info("events of another source ended", reason=str(error))
            if not is_read:
                self.was_asked.set()
                return not isinstance(error, Unavailable)
        if self._request.until_ns is None:
            self._reader.offer(None)
        return True


class _Actor(msgspec.Struct):
    ID: str
    Attributes: dict[str, str] | None = None


class _Shape(msgspec.Struct):
    """The fields that are read of other sources' events.  The events themselves are passed on unchanged."""

    Type: str
    Action: str
    Actor: _Actor
    scope: str
    time_ns: int = msgspec.field(name="timeNano")


_check = msgspec.json.Decoder(_Shape).decode


def _decoded(line: bytes) -> Message:
    """Decode an event.  Raises: msgspec.DecodeError: it is invalid."""
    _check(line)
    return cast("Message", msgspec.json.decode(line))

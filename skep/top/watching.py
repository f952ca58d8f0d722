"""Follows a cluster through the API: lists everything once, then reads the objects that events name.

One task collects ids from events.  Another reads those objects, or lists the whole kind for more than ``_ONE_BY_ONE``
ids.  The rate of lists is proportional to their cost, so that ten thousand tasks do not keep a manager busy.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, Protocol

import msgspec

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.api.client.client import ApiClient
from skep.cli.cluster.door import traffic_of
from skep.cli.see.explain import about_service, about_task
from skep.cli.see.quorum import STALE, no_leader, quorum_of
from skep.errors import FailedPrecondition, NotFound, SkepError, Unavailable, reason_of
from skep.model.door.routes import has_routes
from skep.top.actions import Action, perform
from skep.top.logs import ShownLine, follow_logs
from skep.top.snapshot import Connection, LinkStatus, ShownTask, Snapshot, Touched, touched_by

_RESPONSE_TIMEOUT_S = 20.0
"""Seconds to wait for a response."""
_TASKS_WITHIN_S = 60.0
"""Seconds to wait for the list of all tasks."""
_TASKS_BYTES_MAX = 512 << 20
"""Size limit of the list of all tasks."""
EVENTS_KEPT = 1000
"""Number of events that the view keeps."""
_ONE_BY_ONE = 50
"""Largest number of ids of a kind that are read individually.  If there are more, all objects are listed."""
_AT_ONCE = 8
"""Largest number of concurrent requests for single objects."""
_GATHER_S = 0.15
"""Seconds for which changes are gathered before they are read."""
_LOOK_S = 2.0
"""Seconds between two reads of state that has no events: starting tasks, reasons, load."""
_ROUTES_S = 5.0
"""Seconds between two reads of the requests to routes, which nodes count as often."""
_LIST_SHARE = 10
"""Pause before a list is repeated, as a multiple of its duration."""
_RECONNECT_S_MAX = 10.0
"""Longest delay in seconds before a reconnection."""

Publish = Callable[[Snapshot], None]


class WatchedCluster(Protocol):
    """The cluster as the application uses it."""

    @property
    def name(self) -> str:
        """The endpoint's name, for the title."""

    async def run(self, publish: Publish) -> None:
        """Pass every state of the cluster to ``publish`` until cancelled."""

    async def details(self, kind: str, id: str, name: str) -> list[str]:
        """Return why a service or task is in its state.  Raises: SkepError."""

    async def perform(self, action: Action) -> None:
        """Perform an action.  Raises: SkepError."""

    def logs(self, kind: str, id: str) -> AsyncGenerator[ShownLine, None]:
        """Yield the last lines, then new lines.  Raises: SkepError: refused."""


class LiveCluster:
    """A cluster behind ``client``."""

    def __init__(self, client: ApiClient, name: str, clock: Clock, rng: Callable[[], float]) -> None:
        self._client = client
        self._name = name
        self._clock = clock
        self._rng = rng

    @property
    def name(self) -> str:
        return self._name

    async def run(self, publish: Publish) -> None:
        backoff = Backoff(0.5, _RECONNECT_S_MAX, rng=self._rng)
        state = _State(publish)
        while True:
            try:
                state.connected(Connection())
                await _Connected(self._client, self._clock, state, backoff).run()
            except* (SkepError, OSError, msgspec.DecodeError) as errors:
                delay_s = backoff.next_delay_s()
                state.connected(Connection(LinkStatus.LOST, reason_of(_first(errors)), delay_s))
            await self._clock.sleep(delay_s)

    async def details(self, kind: str, id: str, name: str) -> list[str]:
        response = await self._client.get(f"/skep/{kind}s/{id}/explain", timeout_s=_RESPONSE_TIMEOUT_S)
        if kind == "task":
            return list(about_task(name, response, time.time()))
        routes = [one for one in await traffic_of(self._client) if one["ServiceID"] == id]
        return list(about_service(name, {**response, "Routes": routes}, time.time()))

    async def perform(self, action: Action) -> None:
        await perform(self._client, action)

    def logs(self, kind: str, id: str) -> AsyncGenerator[ShownLine, None]:
        return follow_logs(self._client, kind, id, self._clock, self._rng)


def _first(errors: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class _State:
    """The last known state of the cluster.  ``publish`` gets each new state."""

    def __init__(self, publish: Publish) -> None:
        self._publish = publish
        self.nodes: dict[str, Mapping[str, Any]] = {}
        self.services: dict[str, Mapping[str, Any]] = {}
        self.tasks: dict[str, ShownTask] = {}
        self.events: deque[Mapping[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self.routes: tuple[Mapping[str, Any], ...] = ()
        self.without_leader: tuple[str, ...] = ()
        self.cursor = ""
        self._connection = Connection()
        self._is_loaded = False

    def connected(self, connection: Connection, *, is_loaded: bool = False) -> None:
        self._connection = connection
        self._is_loaded = self._is_loaded or is_loaded
        self.publish()

    def publish(self) -> None:
        self._publish(
            Snapshot(
                nodes=dict(self.nodes),
                services=dict(self.services),
                tasks=dict(self.tasks),
                events=tuple(self.events),
                routes=self.routes,
                without_leader=self.without_leader,
                connection=self._connection,
                is_loaded=self._is_loaded,
            )
        )


class _Connected:
    """One connection to the event stream, and the concurrent reads."""

    def __init__(self, client: ApiClient, clock: Clock, state: _State, backoff: Backoff) -> None:
        self._client = client
        self._clock = clock
        self._state = state
        self._backoff = backoff
        self._touched = Touched()
        self._changed = asyncio.Event()
        self._headers: Mapping[str, str] = {}
        self._reading_tasks = asyncio.Lock()
        """Held during each read of tasks, because a long list would overwrite tasks that were read after it began."""
        self._reading_others = asyncio.Lock()
        """Held for the same reason during each read of nodes and services."""
        self._tasks_again_at = 0.0
        self._routes_again_at = 0.0

    async def run(self) -> None:
        """Run until the stream ends.  Raises: SkepError, OSError, in a group."""
        await self._find_leader()
        query = {"after": self._state.cursor} if self._state.cursor else {}
        # The stream is inside the group, because it translates its own errors but no errors that are in a group.
        async with asyncio.TaskGroup() as group, self._client.lines("/skep/events", query) as lines:
            group.create_task(self._load())
            async for line in lines:
                self._take(msgspec.json.decode(line))
            raise Unavailable("the event stream ended")

    def _take(self, event: dict[str, Any]) -> None:
        if "message" in event:  # events were lost, so the lists are loaded again in any case
            self._state.cursor = ""
            raise FailedPrecondition(str(event["message"]))
        self._state.cursor = str(event.get("Cursor") or "")
        if event.get("Type") == "stream":
            return
        self._state.events.append(event)
        self._touched |= touched_by(event)
        self._changed.set()

    async def _load(self) -> None:
        state = self._state
        await self._list_nodes_and_services()
        await self._list_tasks()
        self._backoff.reset()
        state.connected(Connection(LinkStatus.LIVE), is_loaded=True)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read_touched())
            group.create_task(self._look())

    async def _read_touched(self) -> None:
        """Read the objects that events named."""
        while True:
            await self._changed.wait()
            await self._clock.sleep(_GATHER_S)
            self._changed.clear()
            touched, self._touched = self._touched, Touched()
            await self._read_tasks(touched.tasks)
            if touched.nodes:
                await self._update("nodes", touched.nodes)
            if touched.services:
                await self._update("services", touched.services)
            self._state.publish()

    async def _look(self) -> None:
        """Read state that has no events: tasks before they run, reasons, load, the leader."""
        took_s = 0.0
        while True:
            await self._clock.sleep(max(_LOOK_S, took_s * _LIST_SHARE))
            begun = self._clock.monotonic()
            await self._find_leader()
            moving = [task.id for task in self._state.tasks.values() if not task.is_settled]
            await self._read_tasks(moving)
            await self._list_nodes_and_services()
            await self._read_routes()
            self._state.publish()
            took_s = self._clock.monotonic() - begun

    async def _read_routes(self) -> None:
        """Read the requests to routes, if a service has any."""
        now, services = self._clock.monotonic(), self._state.services.values()
        if now < self._routes_again_at:
            return
        self._routes_again_at = now + _ROUTES_S
        has_any = any(has_routes(one["Spec"].get("Labels") or {}) for one in services)
        self._state.routes = tuple(await traffic_of(self._client)) if has_any else ()

    async def _find_leader(self) -> None:
        quorum = await quorum_of(self._client)
        is_led = quorum is None or bool(quorum["HasLeader"])
        self._headers = {} if is_led else STALE
        self._state.without_leader = () if quorum is None or is_led else tuple(no_leader(quorum))

    async def _list_nodes_and_services(self) -> None:
        async with self._reading_others:
            nodes = await self._get("/nodes")
            services = await self._get("/services", status="true", health="true")
            self._state.nodes = {node["ID"]: node for node in nodes}
            self._state.services = {service["ID"]: service for service in services}

    async def _update(self, kind: Literal["nodes", "services"], ids: frozenset[str]) -> None:
        """Read the nodes or services ``ids``.  Missing ones were removed."""
        if len(ids) > _ONE_BY_ONE:
            await self._list_nodes_and_services()
            return
        more = {"status": "true", "health": "true"} if kind == "services" else {}
        async with self._reading_others:
            answer = await self._get(f"/{kind}", filters={"id": sorted(ids)}, **more)
            found = {one["ID"]: one for one in answer}
            known = self._state.nodes if kind == "nodes" else self._state.services
            for id in ids:
                if id in found:
                    known[id] = found[id]
                else:
                    known.pop(id, None)

    async def _read_tasks(self, ids: Iterable[str]) -> None:
        wanted = sorted(ids)
        async with self._reading_tasks:
            await self._read_wanted(wanted)

    async def _read_wanted(self, wanted: Sequence[str]) -> None:
        if len(wanted) > _ONE_BY_ONE:
            if self._clock.monotonic() >= self._tasks_again_at:
                await self._list_tasks()
                return
            self._touched |= Touched(tasks=frozenset(wanted[_ONE_BY_ONE:]))
            wanted = wanted[:_ONE_BY_ONE]
            self._changed.set()
        places = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for id in wanted:
                group.create_task(self._within(places, self._read_task(id)))

    async def _within(self, places: asyncio.Semaphore, work: Coroutine[Any, Any, None]) -> None:
        async with places:
            await work

    async def _read_task(self, id: str) -> None:
        try:
            self._state.tasks[id] = _task(await self._get(f"/tasks/{id}"))
        except (NotFound, msgspec.ValidationError):
            self._state.tasks.pop(id, None)

    async def _list_tasks(self) -> None:
        """List all tasks, decoded as far as they are shown.  Unreadable ones are skipped."""
        begun = self._clock.monotonic()
        body = bytearray()
        async with (
            asyncio.timeout(_TASKS_WITHIN_S),
            self._client.stream("/tasks", headers=self._headers) as all,
        ):
            async for piece in all.pieces():
                body += piece
                if len(body) > _TASKS_BYTES_MAX:
                    raise FailedPrecondition("the list of tasks is longer than 512 MiB")
        self._state.tasks = tasks_in(bytes(body))
        now = self._clock.monotonic()
        self._tasks_again_at = now + (now - begun) * _LIST_SHARE

    async def _get(self, path: str, **query: Any) -> Any:
        return await self._client.get(path, headers=self._headers, timeout_s=_RESPONSE_TIMEOUT_S, **query)


def tasks_in(body: bytes) -> dict[str, ShownTask]:
    """Return the tasks of a list.  Unreadable ones are skipped."""
    found: dict[str, ShownTask] = {}
    for raw in msgspec.json.decode(body, type=list[msgspec.Raw]):
        with suppress(msgspec.ValidationError):
            task = msgspec.json.decode(raw, type=ShownTask)
            found[task.id] = task
    return found


def _task(response: Any) -> ShownTask:
    return msgspec.convert(response, ShownTask)

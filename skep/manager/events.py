"""Events of the cluster's objects in the Engine API, derived from commits.

Every manager derives them for itself.  The last ones are kept for clients that request the past (``since``).  The
stream of a client that does not read ends: an incomplete stream would be worse.

Source: moby 20.10, daemon/events.go (generateClusterEvent), daemon/events/{events,filter}.go.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Literal

import msgspec

from skep.aio.clock import Clock
from skep.manager.ca.admission import stamp
from skep.manager.ca.expiry import Expiry
from skep.manager.eviction.steps import EVICTION_ID, Eviction, decoded_eviction
from skep.manager.failures import isolated, object_id
from skep.model.conditions import condition_messages
from skep.model.draining import begins_to_drain
from skep.model.encoding import ApiObject, always
from skep.model.network import Network
from skep.model.node import CutOff, FailingPath, Node
from skep.model.secret import Config, Secret
from skep.model.service import Service, UpdateState
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.times import SECOND_NS, unix_ns
from skep.store.interface import Created, Deleted, Event, Store, Updated, WatchLagged
from skep.store.kinds import Payload

KEPT = 1024
"""Past events that are kept (the engine keeps 256)."""
BEHIND_MAX = 1024
"""Events a client may be behind before its stream ends."""

Action = Literal["create", "update", "remove", "freeze", "resume", "drain"]


class Actor(ApiObject):
    """The object of an event."""

    id: str = always("")
    attributes: Mapping[str, str] = always({})


class Message(ApiObject):
    """One event as in ``GET /events``."""

    type: str = msgspec.field(name="Type")
    action: str = msgspec.field(name="Action")
    actor: Actor = msgspec.field(name="Actor")
    time: int = msgspec.field(name="time")
    time_nano: int = msgspec.field(name="timeNano")
    scope: str = msgspec.field(name="scope", default_factory=lambda: "swarm")


class ClusterEvents:
    """The events of the cluster, past and future.  ``run`` must be running for new ones."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._past: deque[Message] = deque(maxlen=KEPT)
        self._readers: set[asyncio.Queue[Message | None]] = set()

    async def run(self) -> None:
        """Derive events from commits until cancelled."""
        while True:
            try:
                await self._follow()
            except WatchLagged:
                # Missed events cannot be delivered, so all streams end.
                for reader in self._readers:
                    _end(reader)

    async def _follow(self) -> None:
        kinds = (Service, Task, Node, Secret, Config, Network, Swarm, Payload)
        async with self._store.watch(*kinds) as watch:
            async for commit in watch:
                for event in commit.events:
                    with isolated("event", object_id(event)):
                        for message in messages_of(event, self._clock.now_ns()):
                            self._publish(message)

    def expires(self, expiry: Expiry) -> None:
        """Publish that a certificate expires soon, which no commit shows."""
        now_ns = self._clock.now_ns()
        attributes = {"name": expiry.name, "notafter": stamp(expiry.not_after)}
        self._publish(
            Message(
                type=expiry.kind,
                action="expire",
                actor=Actor(id=expiry.id, attributes=attributes),
                time=now_ns // SECOND_NS,
                time_nano=now_ns,
            )
        )

    def _publish(self, message: Message) -> None:
        self._past.append(message)
        for reader in self._readers:
            try:
                reader.put_nowait(message)
            except asyncio.QueueFull:
                _end(reader)

    async def subscribe(
        self, since_ns: int | None, until_ns: int | None, fits: Callable[[Message], bool]
    ) -> AsyncGenerator[Message, None]:
        """Events accepted by ``fits``: past ones after ``since_ns`` (None: none), then new ones until ``until_ns``.

        Ends at that time, or when the reader falls behind.
        """
        reader: asyncio.Queue[Message | None] = asyncio.Queue(BEHIND_MAX)
        past = tuple(self._past) if since_ns is not None else ()
        self._readers.add(reader)
        try:
            for message in past:
                if _is_between(message, since_ns, until_ns) and fits(message):
                    yield message
            async with aclosing(self._coming(reader, until_ns)) as coming:
                async for message in coming:
                    if fits(message):
                        yield message
        finally:
            self._readers.discard(reader)

    async def _coming(
        self, reader: asyncio.Queue[Message | None], until_ns: int | None
    ) -> AsyncGenerator[Message, None]:
        while True:
            remaining_s = None if until_ns is None else (until_ns - self._clock.now_ns()) / SECOND_NS
            try:
                message = await asyncio.wait_for(reader.get(), remaining_s)
            except TimeoutError:
                return
            if message is None:
                return
            yield message


def _end(reader: asyncio.Queue[Message | None]) -> None:
    """Drop a slow reader's queue, so that it gets the end next."""
    while not reader.empty():
        reader.get_nowait()
    reader.put_nowait(None)


def _is_between(message: Message, since_ns: int | None, until_ns: int | None) -> bool:
    return (since_ns is None or message.time_nano >= since_ns) and (
        until_ns is None or message.time_nano <= until_ns
    )


def messages_of(event: Event, now_ns: int) -> Iterator[Message]:
    """The API's messages about one object's change: usually one, none for internal objects."""
    match event:
        case Created(Payload() as payload) | Updated(_, Payload() as payload):
            if payload.id == EVICTION_ID:  # the other payloads are internal
                yield _eviction(decoded_eviction(payload), now_ns)
        case Deleted(Payload()):
            return
        case Created(Swarm()) | Deleted(Swarm()) | Created(Task()) | Deleted(Task()):
            return
        case Updated(Task() as old, Task() as new):
            if begins_to_drain(old, new):  # not in Docker: for proxies, which remove the task before it stops
                yield _drain(new, now_ns)
        case Created(object):
            yield _message("create", object, {}, unix_ns(object.created_at))  # type: ignore[attr-defined]
        case Deleted(Service()):
            return  # the event came when the user removed it
        case Deleted(object):
            yield _message("remove", object, {}, now_ns)
        case Updated(Service() as old, Service() as new):
            if new.removed_at is None:
                yield _message("update", new, _service_changes(old, new), now_ns)
            elif old.removed_at is None:
                yield _message("remove", new, {}, unix_ns(new.removed_at))
        case Updated(Node() as old, Node() as new):
            changes = _node_changes(old, new)
            if changes or old.version != new.version:
                yield _message("update", new, changes, now_ns)
        case Updated(Swarm() as old, Swarm() as new):
            if new.freeze is not None and old.freeze is None:
                nodes = {"nodes": ",".join(new.freeze.nodes)}
                yield _message("freeze", new, nodes, unix_ns(new.freeze.since))
            elif new.freeze is None and old.freeze is not None:
                yield _message("resume", new, {}, now_ns)
        case Updated(_, new):
            yield _message("update", new, {}, now_ns)


def _eviction(eviction: Eviction, at_ns: int) -> Message:
    """Not in Docker: a node is being evicted; with the requesting user and the progress."""
    step = eviction.next_step
    attributes = {
        "name": eviction.hostname,
        "by": eviction.asked_by,
        "through": eviction.asked_through,
        "done": f"{len(eviction.done)}/{len(eviction.steps)}",
        "waits": eviction.waits_for if step is not None else "",
    }
    actor = Actor(id=eviction.node_id, attributes=attributes)
    return Message(type="node", action="evict", actor=actor, time=at_ns // SECOND_NS, time_nano=at_ns)


def _drain(task: Task, at_ns: int) -> Message:
    """With the names of the corresponding container labels."""
    attributes = {
        "com.docker.swarm.task.id": task.id,
        "com.docker.swarm.service.id": task.service_id,
        "com.docker.swarm.node.id": task.node_id,
        "addresses": ",".join(
            address.partition("/")[0] for one in task.networks_attachments for address in one.addresses
        ),
    }
    actor = Actor(id=task.id, attributes=attributes)
    return Message(type="task", action="drain", actor=actor, time=at_ns // SECOND_NS, time_nano=at_ns)


def _message(action: Action, object: Any, changes: Mapping[str, str], at_ns: int) -> Message:
    return Message(
        type=type(object).__name__.lower(),
        action=action,
        actor=Actor(id=object.id, attributes={"name": _name(object), **changes}),
        time=at_ns // SECOND_NS,
        time_nano=at_ns,
    )


def _name(object: Any) -> str:
    name: str = object.spec.name
    if not name and isinstance(object, Node):
        return object.description.hostname
    return name


def _service_changes(old: Service, new: Service) -> dict[str, str]:
    changes = _changed("image", _image(old), _image(new))
    if old.spec.mode.name == new.spec.mode.name == "replicated":
        changes |= _changed("replicas", str(old.spec.replicas), str(new.spec.replicas))
    state = new.update_status.state if new.update_status is not None else None
    if state is not None:
        before = old.update_status.state if old.update_status is not None else None
        if before is None:
            changes["updatestate.new"] = _update_word(state)
        else:
            changes |= _changed("updatestate", _update_word(before), _update_word(state))
    return changes


def _update_word(state: UpdateState) -> str:
    return state.value


def _image(service: Service) -> str:
    container = service.spec.task_template.container_spec
    return container.image if container is not None else ""


def _node_changes(old: Node, new: Node) -> dict[str, str]:
    changes = _changed("availability", old.spec.availability.value, new.spec.availability.value)
    changes |= _changed("role", old.spec.role.value, new.spec.role.value)
    changes |= _changed("state", old.status.state.value, new.status.state.value)
    changes |= _changed("paths.failing", _words(old.failing_paths), _words(new.failing_paths))
    changes |= _changed("overlay.refused", _words(old.cut_off), _words(new.cut_off))
    changes |= _changed("conditions", *("; ".join(condition_messages(one.description)) for one in (old, new)))
    before, after = old.manager_status, new.manager_status
    if before is not None and after is not None:
        changes |= _changed("leader", str(before.leader).lower(), str(after.leader).lower())
        changes |= _changed("reachability", before.reachability.value, after.reachability.value)
    return changes


def _words(failures: Iterable[FailingPath | CutOff]) -> str:
    """Not in Docker, which does not probe the paths between nodes."""
    return "; ".join(one.summary for one in failures)


def _changed(name: str, old: str, new: str) -> dict[str, str]:
    return {} if old == new else {f"{name}.old": old, f"{name}.new": new}

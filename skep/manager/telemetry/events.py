"""Events of cluster objects in the Engine API, derived from commits.

Every manager derives the same events from the same commits.  It keeps the latest events for clients that request past
ones (``since``), or that resume an earlier stream of this or another manager (``after``).  If a client does not read,
its stream ends, because an incomplete stream would be worse.

A *cursor* is ``INCARNATION-REVISION``, and means the position after that revision.  Only the last event of a revision
has the revision's own cursor.  The events before it have the cursor of the previous revision, so a client that resumes
between them gets some events twice but misses none.

Source: moby 20.10, daemon/events.go (generateClusterEvent), daemon/events/{events,filter}.go.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, suppress
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.errors import FailedPrecondition, InvalidArgument
from skep.manager.ca.admission import stamp
from skep.manager.ca.expiry_warnings import Expiry
from skep.manager.cluster import node_name
from skep.manager.control_loops.failures import isolated, object_id
from skep.manager.eviction.steps import EVICTION_ID, Eviction, decoded_eviction
from skep.manager.failover.records import ADDRESSES_ID, FailoverAddress, holder_changes
from skep.manager.services.freezes import FreezeAction, freeze_changes
from skep.manager.verify.records import VIOLATIONS_ID, ShownViolation, violation_changes
from skep.model.history import masked_text
from skep.model.network import Network
from skep.model.node import CutOff, FailingPath, Node, NodeState
from skep.model.node_reports.conditions import condition_messages
from skep.model.options.draining import begins_to_drain
from skep.model.secret import Config, Secret
from skep.model.service import JobStatus, Service, UpdateState
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS, unix_ns
from skep.model.volume import PublishState, Volume
from skep.store.interface import Created, Deleted, Event, Store, Updated, View, WatchLagged
from skep.store.kinds import Payload

KEPT = 4096
"""Number of past events that are kept.  Docker Engine keeps 256."""
BEHIND_MAX = 1024
"""Number of events by which a client may be behind before its stream ends."""

PROGRESS_S = 10.0
"""Seconds between two cursor messages of an idle stream."""

Action = Literal["create", "update", "remove", "suspend", "resume", "drain"] | FreezeAction

TASK_ACTIONS: Mapping[TaskState, str] = {
    TaskState.RUNNING: "start",
    TaskState.COMPLETE: "die",
    TaskState.SHUTDOWN: "die",
    TaskState.FAILED: "die",
    TaskState.REJECTED: "reject",
    TaskState.ORPHANED: "lost",
}


class EventsLost(FailedPrecondition):
    """The events after the client's cursor are not, or no longer, available."""


class Actor(ApiObject):
    """The object of an event."""

    id: str = always("")
    attributes: Mapping[str, str] = always({})


class EventMessage(ApiObject):
    """One event as in ``GET /events``."""

    type: str = msgspec.field(name="Type")
    action: str = msgspec.field(name="Action")
    actor: Actor = msgspec.field(name="Actor")
    time: int = msgspec.field(name="time")
    time_nano: int = msgspec.field(name="timeNano")
    scope: str = msgspec.field(name="scope", default_factory=lambda: "swarm")
    cursor: str = msgspec.field(name="Cursor", default="")
    """Set in ``GET /skep/events`` only.  A later stream that starts at the cursor continues after this event."""


class _Kept(msgspec.Struct, frozen=True, gc=False):
    """A past event.  ``after``: the revision after which a stream resumes if it ended with this message."""

    message: EventMessage
    revision: int
    after: int


class ClusterEvents:
    """The cluster's past and new events.  ``run`` has to be running for new events."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self.past: deque[_Kept] = deque()
        self.readers: set[asyncio.Queue[_Kept | None]] = set()
        self._floor: int | None = None
        """Revision after which all events are in ``past``.  None while no commits are followed."""
        self._revision = 0
        """The last revision whose events were derived."""

    async def run(self) -> None:
        """Derive events from commits until cancelled."""
        while True:
            try:
                await self._follow()
            except WatchLagged:
                self._floor = None
                # Events may have been missed, so all streams end.
                for reader in self.readers:
                    _end(reader)

    async def _follow(self) -> None:
        kinds = (Service, Task, Node, Secret, Config, Network, Volume, Swarm, Payload)
        async with self._store.watch(*kinds) as watch:
            self.past.clear()
            self._floor = self._revision = watch.snapshot.revision
            async for commit in watch:
                messages: list[EventMessage] = []
                for event in commit.events:
                    with isolated("event", object_id(event)):
                        messages += messages_of(event, self._clock.now_ns(), self._store.view())
                for left, message in zip(reversed(range(len(messages))), messages, strict=True):
                    after = commit.revision if not left else self._revision
                    self._publish(_Kept(message, commit.revision, after))
                self._revision = commit.revision

    def expires(self, expiry: Expiry) -> None:
        """Publish an event that a certificate expires soon, which no commit shows."""
        now_ns = self._clock.now_ns()
        attributes = {"name": expiry.name, "notafter": stamp(expiry.not_after)}
        message = EventMessage(
            type=expiry.kind,
            action="expire",
            actor=Actor(id=expiry.id, attributes=attributes),
            time=now_ns // SECOND_NS,
            time_nano=now_ns,
        )
        self._publish(_Kept(message, self._revision, self._revision))

    def _publish(self, kept: _Kept) -> None:
        self.past.append(kept)
        if len(self.past) > KEPT:
            self._floor = self.past.popleft().revision
        for reader in self.readers:
            try:
                reader.put_nowait(kept)
            except asyncio.QueueFull:
                _end(reader)

    def cursor(self, revision: int | None = None) -> str:
        """Return the cursor of ``revision``, or of the last events that were derived."""
        return f"{self._store.incarnation}-{self._revision if revision is None else revision}"

    def revision_after(self, cursor: str) -> int:
        """Return the revision in ``cursor``.

        Raises:
            InvalidArgument: ``cursor`` has no valid format.
            EventsLost: This manager does not have all events after the cursor.
        """
        incarnation, _, revision = cursor.partition("-")
        if not (incarnation.isdecimal() and revision.isdecimal() and cursor.isascii() and len(cursor) < 40):
            raise InvalidArgument(
                f"invalid cursor {cursor!r}: expected the cursor of an event, like {self.cursor()}"
            )
        if int(incarnation) != self._store.incarnation:
            raise EventsLost(
                f"cursor {cursor} belongs to an earlier incarnation of the cluster: list its objects again"
            )
        if self._floor is None or int(revision) < self._floor:
            raise EventsLost(
                f"this manager no longer has all events after cursor {cursor}: ask another manager, or list the "
                f"cluster's objects again and continue after {self.cursor()}"
            )
        return int(revision)

    def revision_before(self, since_ns: int) -> int:
        """Return the revision before the first kept event since ``since_ns``, or the current one if there is no such
        event.
        """
        since = (kept.revision - 1 for kept in self.past if kept.message.time_nano >= since_ns)
        return next(since, self._revision)

    async def subscribe(
        self, since_ns: int | None, until_ns: int | None, fits: Callable[[EventMessage], bool]
    ) -> AsyncGenerator[EventMessage, None]:
        """Yield events that ``fits`` accepts: past events since ``since_ns``, if set, then new ones until ``until_ns``.

        Ends at that time, or when the reader falls behind.
        """

        def is_past(kept: _Kept) -> bool:
            return since_ns is not None and _is_between(kept.message, since_ns, until_ns)

        with suppress(EventsLost):
            async with aclosing(self._read_kept(is_past, until_ns)) as reading:
                async for kept in reading:
                    if kept is not None and fits(kept.message):
                        yield kept.message

    async def subscribe_after(
        self, after: int | None, until_ns: int | None, fits: Callable[[EventMessage], bool]
    ) -> AsyncGenerator[EventMessage, None]:
        """Yield events of revisions after ``after`` with their cursors, until ``until_ns``.

        Starts with the new events if ``after`` is None.  The first message has only a cursor, and so has a message
        after each idle period.

        Raises:
            EventsLost: The reader has fallen behind.
        """
        first = self._revision if after is None else after
        is_ahead = first > self._revision
        """Whether the client has events from another manager that this one has not derived yet."""
        yield _progress(self.cursor(first), self._clock.now_ns())
        async with aclosing(self._read_kept(lambda kept: kept.revision > first, until_ns)) as reading:
            async for kept in reading:
                if kept is None:
                    yield _progress(self.cursor(), self._clock.now_ns())
                elif (kept.revision > first or not is_ahead) and fits(kept.message):
                    yield replace(kept.message, cursor=self.cursor(max(kept.after, first)))

    async def _read_kept(
        self, is_past: Callable[[_Kept], bool], until_ns: int | None
    ) -> AsyncGenerator[_Kept | None, None]:
        """Yield past events that ``is_past`` accepts, then new ones until ``until_ns``, and None after an idle period.

        Raises:
            EventsLost: The reader has fallen behind.
        """
        reader: asyncio.Queue[_Kept | None] = asyncio.Queue(BEHIND_MAX)
        self.readers.add(reader)
        past = tuple(filter(is_past, self.past))
        try:
            for kept in past:
                yield kept
            while True:
                left_s = (until_ns - self._clock.now_ns()) / SECOND_NS if until_ns is not None else PROGRESS_S
                try:
                    found = await asyncio.wait_for(reader.get(), min(left_s, PROGRESS_S))
                except TimeoutError:
                    if left_s <= PROGRESS_S and until_ns is not None:
                        return
                    yield None
                    continue
                if found is None:
                    raise EventsLost(
                        "the client was too slow and has lost events: reconnect with its last cursor"
                    )
                yield found
        finally:
            self.readers.discard(reader)


def _end(reader: asyncio.Queue[_Kept | None]) -> None:
    """Drop a slow reader's queued events and queue the end of its stream."""
    while not reader.empty():
        reader.get_nowait()
    reader.put_nowait(None)


def _is_between(message: EventMessage, since_ns: int | None, until_ns: int | None) -> bool:
    return (since_ns is None or message.time_nano >= since_ns) and (
        until_ns is None or message.time_nano <= until_ns
    )


def is_dockers(message: EventMessage) -> bool:
    """Return whether a client that filters for no type receives the message.

    In Docker, tasks and cluster volumes have no events, and a cluster has many tasks.
    """
    return message.type not in ("task", "volume") or message.action == "drain"


def messages_of(event: Event, now_ns: int, view: View | None = None) -> Iterator[EventMessage]:
    """Yield the messages about one object's change.  Internal objects have none.

    Args:
        view: Where names are read.  Without it, only events of the Engine API and draining tasks have messages.
    """
    if view is not None:
        yield from _messages_of_tasks(event, now_ns, view)
        yield from _messages_of_addresses(event, now_ns, view)
    yield from _dockers(event, now_ns)


def _messages_of_tasks(event: Event, now_ns: int, view: View) -> Iterator[EventMessage]:
    match event:
        case Created(Task() as task):
            yield _task("create", task, view, now_ns)
        case Deleted(Task() as task):
            yield _task("remove", task, view, now_ns)
        case Updated(Task() as old, Task() as new) if old.status.state is not new.status.state:
            if action := TASK_ACTIONS.get(new.status.state):
                yield _task(action, new, view, now_ns)
        case Updated(Node() as before, Node() as after) if _went_down(before, after):
            for task in view.find(Task, node_id=after.id):
                if task.status.state is TaskState.RUNNING:
                    yield _task("lost", task, view, now_ns)


def _messages_of_addresses(event: Event, now_ns: int, view: View) -> Iterator[EventMessage]:
    match event:
        case Created(Payload() as payload) | Updated(_, Payload() as payload) if payload.id == ADDRESSES_ID:
            old = event.old if isinstance(event, Updated) else None
            for action, one, former, reason in holder_changes(
                old if isinstance(old, Payload) else None, payload
            ):
                yield _address(action, one, (former, reason), view, now_ns)


def _dockers(event: Event, now_ns: int) -> Iterator[EventMessage]:
    match event:
        case Created(Payload() as payload) | Updated(_, Payload() as payload):
            if payload.id == EVICTION_ID:  # the other payloads are internal
                yield _eviction(decoded_eviction(payload), now_ns)
            elif payload.id == VIOLATIONS_ID:
                old = event.old if isinstance(event, Updated) else None
                before = old if isinstance(old, Payload) else None
                for what, violation in violation_changes(before, payload):
                    yield _violation(what, violation, now_ns)
        case Deleted(Payload()):
            return
        case Created(Swarm()) | Deleted(Swarm()) | Created(Task()) | Deleted(Task()):
            return
        case Updated(Task() as old, Task() as new):
            if begins_to_drain(old, new):
                # A Skep extension for proxies, which remove the task before it stops.
                yield _drain(new, now_ns)
        case Created(object):
            yield _message("create", object, {}, unix_ns(object.created_at))  # type: ignore[attr-defined]
        case Deleted(Service()):
            return  # the event was sent when the user removed the service
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
        case Updated(Volume() as old, Volume() as new):
            if changes := _volume_changes(old, new):
                yield _message("update", new, changes, now_ns)
        case Updated(Swarm() as old, Swarm() as new):
            if new.freeze is not None and old.freeze is None:
                nodes = {"nodes": ",".join(new.freeze.nodes)}
                yield _message("suspend", new, nodes, unix_ns(new.freeze.since))
            elif new.freeze is None and old.freeze is not None:
                yield _message("resume", new, {}, now_ns)
            for action, facts in freeze_changes(old, new):
                yield _message(action, new, facts, now_ns)
        case Updated(_, new):
            yield _message("update", new, {}, now_ns)


def _eviction(eviction: Eviction, at_ns: int) -> EventMessage:
    """Return the message about a node's eviction, with the requesting user and the progress.  A Skep extension."""
    step = eviction.next_step
    attributes = {
        "name": eviction.hostname,
        "requestedBy": eviction.asked_by,
        "requestedVia": eviction.asked_through,
        "done": f"{len(eviction.done)}/{len(eviction.steps)}",
        "waitingFor": eviction.waits_for if step is not None else "",
    }
    actor = Actor(id=eviction.node_id, attributes=attributes)
    return EventMessage(type="node", action="evict", actor=actor, time=at_ns // SECOND_NS, time_nano=at_ns)


def _violation(action: str, violation: ShownViolation, at_ns: int) -> EventMessage:
    """Return the message about an invariant, which is violated or holds again.  A Skep extension."""
    attributes = {
        "name": violation.rule,
        "message": violation.text,
        "meaning": violation.meaning,
        "subjects": ",".join(violation.subjects),
    }
    actor = Actor(id=violation.rule, attributes=attributes)
    return EventMessage(
        type="invariant", action=action, actor=actor, time=at_ns // SECOND_NS, time_nano=at_ns
    )


def _address(
    action: str, address: FailoverAddress, former: tuple[NodeId, str], view: View, at_ns: int
) -> EventMessage:
    """Return the message about a failover address, which a node takes or releases.  A Skep extension."""
    attributes = {
        "name": address.shown,
        "node": node_name(view, address.node_id) if address.node_id else "",
        "formerNode": node_name(view, former[0]) if former[0] else "",
        "reason": former[1],
    }
    actor = Actor(id=address.address, attributes=attributes)
    return EventMessage(type="address", action=action, actor=actor, time=at_ns // SECOND_NS, time_nano=at_ns)


def _went_down(old: Node, new: Node) -> bool:
    return new.status.state is NodeState.DOWN and old.status.state is not NodeState.DOWN


def _task(action: str, task: Task, view: View, at_ns: int) -> EventMessage:
    """Return a message about a task, a Skep extension.

    It has the name and labels of the task's container, which do not name the slot 0 of a job.  The end of a task has
    its cause.
    """
    status, service = task.status, view.lookup(Service, task.service_id)
    node = node_name(view, task.node_id) if task.node_id else ""
    attributes = {
        "name": task.container_name(service.spec.name if service is not None else ""),
        "com.docker.swarm.task.id": task.id,
        "com.docker.swarm.service.id": task.service_id,
        "com.docker.swarm.service.name": service.spec.name if service is not None else "",
        "com.docker.swarm.node.id": task.node_id,
        "node.name": node if node != task.node_id else "",
        "slot": str(task.shown_slot) if task.slot else "",
        "state": status.state.value,
    }
    if action in ("die", "reject"):
        attributes |= {"error": status.err}
    if task.preemption is not None:
        attributes |= {"preemptedBy": task.preemption.service, "priority": str(task.preemption.priority)}
    if action == "die":
        container, end = status.container_status, status.end
        attributes |= {
            "exitCode": str(container.exit_code) if container is not None and container.container_id else "",
            "cause": end.cause if end is not None else "",
            "signal": end.signal if end is not None else "",
        }
    actor = Actor(id=task.id, attributes={name: value for name, value in attributes.items() if value})
    return EventMessage(type="task", action=action, actor=actor, time=at_ns // SECOND_NS, time_nano=at_ns)


def _progress(cursor: str, at_ns: int) -> EventMessage:
    """Return a message without an event, with the cursor from which a reader can resume."""
    return EventMessage(
        type="stream",
        action="progress",
        actor=Actor(),
        time=at_ns // SECOND_NS,
        time_nano=at_ns,
        cursor=cursor,
    )


def _drain(task: Task, at_ns: int) -> EventMessage:
    """Return the message about a draining task.  Attributes are named after the corresponding container labels."""
    attributes = {
        "com.docker.swarm.task.id": task.id,
        "com.docker.swarm.service.id": task.service_id,
        "com.docker.swarm.node.id": task.node_id,
        "addresses": ",".join(
            address.partition("/")[0] for one in task.networks_attachments for address in one.addresses
        ),
    }
    actor = Actor(id=task.id, attributes=attributes)
    return EventMessage(type="task", action="drain", actor=actor, time=at_ns // SECOND_NS, time_nano=at_ns)


def _message(action: Action, object: Any, changes: Mapping[str, str], at_ns: int) -> EventMessage:
    return EventMessage(
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
    status = new.update_status
    if status is not None and (state := status.state) is not None:
        before = old.update_status.state if old.update_status is not None else None
        if before is None:
            changes["updatestate.new"] = _update_word(state)
        else:
            changes |= _changed("updatestate", _update_word(before), _update_word(state))
        if state is not before and state in _ENDED_EARLY and status.message:
            changes["updatestate.reason"] = masked_text(status.message)
    before_run, run = old.job_status or JobStatus(), new.job_status or JobStatus()
    if run.present_outcome != before_run.present_outcome and run.present_outcome:
        changes["run.outcome"] = run.present_outcome
    return changes


_ENDED_EARLY = (UpdateState.PAUSED, UpdateState.ROLLBACK_STARTED, UpdateState.ROLLBACK_PAUSED)
"""States of an update whose message is a reason."""


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
    changes |= _changed("overlay.unavailable", _words(old.cut_off), _words(new.cut_off))
    changes |= _changed("conditions", *("; ".join(condition_messages(one.description)) for one in (old, new)))
    before, after = old.manager_status, new.manager_status
    if before is not None and after is not None:
        changes |= _changed("leader", str(before.leader).lower(), str(after.leader).lower())
        changes |= _changed("reachability", before.reachability.value, after.reachability.value)
    return changes


def _volume_changes(old: Volume, new: Volume) -> dict[str, str]:
    changes = _changed("availability", old.spec.availability.value, new.spec.availability.value)
    changes |= _changed("message", old.message, new.message)
    changes |= _changed("published", *(_published(one) for one in (old, new)))
    return changes


def _published(volume: Volume) -> str:
    """Return the nodes on which the volume is published."""
    return ",".join(one.node_id for one in volume.publish_status if one.state is PublishState.PUBLISHED)


def _words(failures: Iterable[FailingPath | CutOff]) -> str:
    """Return a summary of failing network paths.  A Skep extension: Docker does not probe paths between nodes."""
    return "; ".join(one.summary for one in failures)


def _changed(name: str, old: str, new: str) -> dict[str, str]:
    return {} if old == new else {f"{name}.old": old, f"{name}.new": new}

"""The log broker: requests logs from the nodes of tasks and passes the lines to readers.

A node gets requests from the manager that owns its session.  So logs from nodes of other managers are requested through
those managers (``OtherManagers``).  At the start, one stream to each manager serves all its nodes.  Nodes that are
added later get further streams.

A follower's nodes change.  ``LogSubscription.sources`` records the manager through which each node was requested.  When
that source no longer has the node (the node listens again, its session moved, a relay broke), the rest is requested
where the node's session is now.

Source: swarmkit, manager/logbroker/broker.go.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Sequence
from contextlib import aclosing
from typing import Protocol

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.errors import NotFound, PermissionDenied, SkepError, Unavailable
from skep.manager.cluster import node_name
from skep.manager.control_loops.informer import run_informer
from skep.manager.logbroker.selection import (
    absences,
    is_removed,
    kept_lines,
    matches,
    selected,
    shortfall,
)
from skep.manager.logbroker.subscription import LIMITS, LogLimits, LogSubscription
from skep.model.logs import LogLine, LogQuery
from skep.model.node import Node, NodeState, is_lost
from skep.model.task import Task
from skep.model.values.ids import IdSource, NodeId, TaskId
from skep.store.interface import Commit, Created, Store, Updated, View
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.convert.logs import line_from_pb, line_to_pb, query_from_pb, query_to_pb
from skep.wire.service import Handler, client_stream, server_stream

log = structlog.get_logger(__name__)

NO_MANAGER = NodeId("")
RELAYED_LINES = 100
"""Largest number of lines in one message to another manager."""
READ_LINES = 256
"""Largest number of lines that a reader gets at once."""
SUBSCRIPTIONS_MAX = 1000
"""Largest number of concurrent readers on this manager."""


class OtherManagers(Protocol):
    """Access to the other managers (``manager.link``)."""

    def relay_logs(
        self, manager: NodeId, query: LogQuery, nodes: Sequence[NodeId]
    ) -> AsyncGenerator[skep.RelayedLogs, None]:
        """Yield the logs of ``nodes`` as relayed by a manager.  Raises: Unavailable: the manager cannot be reached."""


class IncompleteLogs(SkepError):
    """Some logs could not be retrieved.  The text names them."""


class LogBroker:
    """Streams of log lines from nodes, for readers at this manager and at others."""

    def __init__(
        self,
        store: Store,
        new_id: IdSource,
        clock: Clock,
        own: NodeId = NO_MANAGER,
        relays: OtherManagers | None = None,
        limits: LogLimits = LIMITS,
    ) -> None:
        """``own`` is this manager.  ``relays`` is None without other managers."""
        self._store = store
        self._new_id = new_id
        self._clock = clock
        self._own = own
        self._relays = relays
        self._limits = limits
        self._group: asyncio.TaskGroup | None = None
        self.relaying: dict[str, set[asyncio.Task[None]]] = {}
        self.subscriptions: dict[str, LogSubscription] = {}
        self.listeners: dict[NodeId, _Listener] = {}

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (
            server_stream(methods.LISTEN_SUBSCRIPTIONS, self._listen),
            client_stream(methods.PUBLISH_LOGS, self._publish),
            server_stream(methods.RELAY_LOGS, self._relay_to_manager),
        )

    async def subscribe(self, query: LogQuery) -> AsyncGenerator[LogLine, None]:
        """Yield lines of all tasks that ``query`` matches.  See ``batches``."""
        async with aclosing(self.batches(query)) as batches:
            async for lines in batches:
                for line in lines:
                    yield line

    async def batches(self, query: LogQuery) -> AsyncGenerator[Sequence[LogLine], None]:
        """Yield lines of all tasks that ``query`` matches, some at a time.

        Existing lines are merged in the order of their times.  Stored lines of nodes that do not respond come after
        them, or first for a follower, whose stream has no end.  New lines for a follower are not, and a silent node
        delays the others for at most ``LogLimits.hold_s``.  Ends once every node has sent everything.  With
        ``follow``, it ends only when the iterator is closed.

        Raises:
            IncompleteLogs: Raised at the end, naming nodes that did not respond and tasks without a node.
            Unavailable: There are too many concurrent readers.
        """
        subscription = self._open(query)
        try:
            nodes = sorted(selected(self._store.view(), query).nodes)
            self._request(subscription, nodes)
            for node_id in nodes:
                self._check_state(subscription, node_id)
            if query.follow and (instead := self._instead(subscription, subscription.take_silent())):
                yield instead
            while True:
                while lines := subscription.take_many(READ_LINES):
                    yield lines
                if subscription.is_complete:
                    break
                if query.follow:
                    subscription.take_present()
                    silent = subscription.take_long_silent(self._clock.monotonic())
                    if instead := self._instead(subscription, silent):
                        yield instead
                await self._wait_update(subscription)
            if instead := self._instead(subscription, subscription.take_silent()):
                yield instead
            view = self._store.view()
            missing = shortfall(view, selected(view, query), subscription.reasons)
            if missing:
                raise IncompleteLogs(missing)
        finally:
            self._close(subscription)

    async def run(self) -> None:
        """Request logs of nodes that later get a task of a followed query, or move to another manager,
        until cancelled.
        """
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                await run_informer(
                    self._store,
                    (Task, Node),
                    on_snapshot=self._on_snapshot,
                    on_commit=self._on_commit,
                    work=_nothing,
                )
            finally:
                self._group = None

    def _open(self, query: LogQuery, only: frozenset[NodeId] | None = None) -> LogSubscription:
        if len(self.subscriptions) >= SUBSCRIPTIONS_MAX:
            raise Unavailable("too many log streams are open: close some and try again")
        subscription = LogSubscription(
            self._new_id(), query, only, opened_ns=self._clock.now_ns(), limits=self._limits
        )
        self.subscriptions[subscription.id] = subscription
        return subscription

    def _instead(self, subscription: LogSubscription, silent: Collection[NodeId]) -> Sequence[LogLine]:
        """Return lines that replace the lines of nodes that do not respond.

        They are the stored last lines of the nodes' tasks, unless the nodes have already sent lines, and a line that
        names each silent node.  Only followers get the latter, except for removed nodes, whose absence is never
        reported as an error.
        """
        if not silent:
            return ()
        view, query = self._store.view(), subscription.query
        lines = list(kept_lines(view, query, [one for one in silent if not subscription.has_sent(one)]))
        unnamed = set(silent) - {line.node_id for line in lines}
        if not query.follow:
            unnamed = {node_id for node_id in unnamed if is_removed(view, node_id)}
        return [*lines, *absences(view, query, unnamed, self._clock.now_ns())]

    # -- readers --------------------------------------------------------------------------------------------------

    async def _wait_update(self, subscription: LogSubscription) -> None:
        """Wait for lines or ends.  Gives up on nodes that send nothing, unless the reader follows."""
        now = self._clock.monotonic()
        hold_s, named_s = subscription.hold_s(now), subscription.until_named_s(now)
        missing_s = subscription.until_missing_s(now)
        longest_s = None if subscription.query.follow else self._limits.response_s
        try:
            limits = [limit for limit in (hold_s, named_s, missing_s, longest_s) if limit is not None]
            async with asyncio.timeout(min(limits, default=None)):
                await subscription.wait_update()
        except TimeoutError:
            if hold_s is not None:
                subscription.pass_over()
                return
            if missing_s is not None and missing_s <= self._limits.response_s:
                for node_id in subscription.missing(self._clock.monotonic()):
                    self._miss(subscription, node_id)
                return
            if subscription.query.follow:
                return
            for node_id in sorted(subscription.pending):
                subscription.finish(node_id, f"node {self._name(node_id)} did not respond in time")

    def _on_snapshot(self, view: View) -> None:
        for subscription in self.subscriptions.values():
            if subscription.query.follow:
                nodes = selected(view, subscription.query).nodes
                self._request(subscription, sorted(nodes | subscription.sources.keys()))

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Task() as task) | Updated(_, Task() as task) if task.node_id:
                    for subscription in self.subscriptions.values():
                        if subscription.query.follow and matches(subscription.query, task):
                            self._request(subscription, [task.node_id])
                case Updated(_, Node() as node):
                    self._forget_moved(node.id)
                    self._request_again(node.id)
                    for subscription in self.subscriptions.values():
                        self._check_state(subscription, node.id)

    def _forget_moved(self, node_id: NodeId) -> None:
        """Forget the listener of a node whose session moved to another manager, even if its old connection is open."""
        if self._relays is not None and self._owner(node_id) not in (NO_MANAGER, self._own):
            moved = self.listeners.pop(node_id, None)
            if moved is not None:
                moved.end()

    def _request_again(self, node_id: NodeId) -> None:
        """Request the logs of this node's followers, and of readers that wait for it, at its current manager."""
        for subscription in self.subscriptions.values():
            is_followed = subscription.query.follow and node_id in subscription.sources
            if is_followed or subscription.is_returning(node_id):
                self._request(subscription, [node_id])

    def _miss(self, subscription: LogSubscription, node_id: NodeId) -> None:
        """Record that the node is not available, which is an error unless it was removed."""
        if is_removed(self._store.view(), node_id):
            subscription.finish(node_id)
            subscription.lose(node_id)
        else:
            subscription.finish(node_id, f"node {self._name(node_id)} is not available")

    def _may_return(self, node_id: NodeId) -> bool:
        """Return whether the node may be on its way to another manager, for example after a change of leader."""
        return not is_lost(self._store.view().lookup(Node, node_id))

    def _check_state(self, subscription: LogSubscription, node_id: NodeId) -> None:
        """Mark a follower's node as silent if it is down, even if its connection is still open."""
        node = self._store.view().lookup(Node, node_id)
        if node is None or not subscription.query.follow or node_id not in subscription.sources:
            return
        if node.status.state is NodeState.DOWN:
            subscription.lose(node_id)
        elif subscription.sources[node_id] is not None:
            subscription.silent.discard(node_id)

    def _request(self, subscription: LogSubscription, node_ids: Iterable[NodeId]) -> None:
        """Request logs of nodes that were not requested yet, and of followed nodes that have moved."""
        elsewhere: defaultdict[tuple[NodeId, bool], list[NodeId]] = defaultdict(list)
        for node_id in node_ids:
            location = self._location(subscription, node_id)
            if not _is_for(subscription, node_id) or _is_requested(subscription, node_id, location):
                continue
            left = subscription.sources.pop(node_id, None)
            if isinstance(left, _Relay):
                left.drop(node_id)
            match location:
                case _Listener():
                    message = _message(subscription, node_id)
                    subscription.sources[node_id] = location
                    subscription.start_source(node_id, node_id)
                    location.send(message)
                case None:
                    subscription.sources[node_id] = None
                    if subscription.query.follow or not self._may_return(node_id):
                        self._miss(subscription, node_id)
                    else:
                        subscription.await_return(node_id, self._clock.monotonic())
                case manager:
                    elsewhere[manager, subscription.is_resumed(node_id)].append(node_id)
        for (manager, _), nodes in elsewhere.items():
            self._relay(subscription, manager, nodes)

    def _location(self, subscription: LogSubscription, node_id: NodeId) -> "_Listener | NodeId | None":
        """Return where a node can be reached: its listener here, another manager, or None."""
        if (listener := self.listeners.get(node_id)) is not None:
            return listener
        owner = self._owner(node_id)
        if subscription.only is not None or self._relays is None or owner in (NO_MANAGER, self._own):
            return None
        return owner

    def _owner(self, node_id: NodeId) -> NodeId:
        return _manager_of(self._store.view().lookup(Node, node_id))

    def _name(self, node_id: NodeId) -> str:
        return node_name(self._store.view(), node_id)

    def _close(self, subscription: LogSubscription) -> None:
        """Cancel the requests at the nodes and the relaying managers."""
        for relaying in tuple(self.relaying.pop(subscription.id, ())):
            relaying.cancel()
        del self.subscriptions[subscription.id]
        subscription.close()
        for node_id, source in sorted(subscription.sources.items()):
            if isinstance(source, _Listener) and node_id in subscription.pending:
                source.send(pb.SubscriptionMessage(id=subscription.id, close=True))

    # -- other managers -------------------------------------------------------------------------------------------

    def _relay(self, subscription: LogSubscription, manager: NodeId, nodes: Sequence[NodeId]) -> None:
        """Request logs through another manager."""
        if self._group is None:
            for node_id in nodes:
                subscription.sources[node_id] = None
                self._miss(subscription, node_id)
            return
        query = subscription.remaining(nodes)
        relay = _Relay(manager, nodes)
        for node_id in nodes:
            subscription.sources[node_id] = relay
            subscription.start_source(node_id, relay)
        task = self._group.create_task(self._read_relay(subscription, relay, query), name="log relay")
        relay.task = task
        relaying = self.relaying.setdefault(subscription.id, set())
        relaying.add(task)
        task.add_done_callback(relaying.discard)

    async def _read_relay(self, subscription: LogSubscription, relay: "_Relay", query: LogQuery) -> None:
        assert self._relays is not None, "only called with relays"
        is_followed = subscription.query.follow
        reason = f"manager {self._name(relay.manager)} disconnected unexpectedly"
        try:
            async with aclosing(
                self._relays.relay_logs(relay.manager, query, sorted(relay.nodes))
            ) as messages:
                async for message in messages:
                    subscription.backoff.reset()
                    if not message.messages and not message.ended_node_id:
                        subscription.reach_present(relay)
                        continue
                    lines = [line_from_pb(entry) for entry in message.messages]
                    sent = [line for line in lines if line.node_id in relay.nodes]
                    if not await subscription.put(self._checked(sent), relay):
                        return
                    ended = NodeId(message.ended_node_id)
                    # A followed node may not be connected yet. Its manager requests its logs once the node connects.
                    if ended in relay.nodes and not is_followed:
                        relay.nodes.discard(ended)
                        subscription.finish(ended, message.reason)
        except SkepError as error:
            reason = str(error)
        finally:
            for node_id in sorted(relay.nodes):
                subscription.finish(node_id, f"node {self._name(node_id)} did not respond: {reason}")
        if is_followed:
            await self._replace_relay(subscription, relay)

    async def _replace_relay(self, subscription: LogSubscription, relay: "_Relay") -> None:
        """Request the nodes of a follower's broken relay again, at their current managers."""
        await subscription.backoff.sleep(self._clock)
        relay.task = None  # the request replaces this relay
        left = sorted(relay.nodes)
        for node_id in left:
            subscription.sources[node_id] = None
        self._request(subscription, left)

    async def _relay_to_manager(
        self, request: skep.LogRelay, _caller: Caller
    ) -> AsyncIterator[skep.RelayedLogs]:
        """Yield lines of this manager's nodes for a reader at another manager."""
        query = query_from_pb(pb.SubscriptionMessage(selector=request.selector, options=request.options))
        only = frozenset(NodeId(id) for id in request.node_ids)
        subscription = self._open(query, only)
        try:
            self._request(subscription, sorted(only))
            while True:
                while lines := subscription.take_many(RELAYED_LINES):
                    yield skep.RelayedLogs(messages=[line_to_pb(line) for line in lines])
                ended = subscription.take_ended()
                for node_id, reason in ended:
                    yield skep.RelayedLogs(ended_node_id=node_id, reason=reason)
                if subscription.take_present():
                    yield skep.RelayedLogs()
                if ended:
                    continue  # more may have arrived while these were sent
                if subscription.is_complete:
                    break
                await self._wait_update(subscription)
        finally:
            self._close(subscription)

    # -- nodes ----------------------------------------------------------------------------------------------------

    async def _listen(
        self, _request: pb.ListenSubscriptionsRequest, caller: Caller
    ) -> AsyncIterator[pb.SubscriptionMessage]:
        node_id = caller.node_id
        if self._store.view().lookup(Node, node_id) is None:
            raise PermissionDenied(f"Permission denied: node {node_id} is not part of this swarm")
        listener = _Listener(caller)
        earlier = self.listeners.get(node_id)
        self.listeners[node_id] = listener
        if earlier is not None:
            earlier.end()
        self._request_again(node_id)
        try:
            while (message := await listener.next()) is not None:
                yield message
        finally:
            if self.listeners.get(node_id) is listener:
                del self.listeners[node_id]
                for subscription in self.subscriptions.values():
                    if node_id in subscription.pending and not subscription.query.follow:
                        name = self._name(node_id)
                        subscription.finish(node_id, f"node {name} disconnected unexpectedly")

    async def _publish(
        self, messages: AsyncIterator[pb.PublishLogsMessage], caller: Caller
    ) -> pb.PublishLogsResponse:
        """Receive one node's lines for one subscription, which the first message names."""
        node_id = caller.node_id
        subscription: LogSubscription | None = None
        source: object = None
        reason = f"node {self._name(node_id)} disconnected unexpectedly"
        try:
            async for message in messages:
                if subscription is None:
                    subscription = self._require(message.subscription_id, node_id)
                    source = subscription.sources[node_id]
                elif subscription.sources[node_id] is not source:
                    return pb.PublishLogsResponse()  # requested elsewhere in the meantime
                lines = self._checked(map(line_from_pb, message.messages), node_id)
                if not await subscription.put(lines, node_id):
                    return pb.PublishLogsResponse()
                if not message.messages:
                    subscription.reach_present(node_id)
                if message.close:
                    reason = ""
                    break
        finally:
            if subscription is not None and subscription.sources[node_id] is source:
                if not subscription.query.follow:
                    subscription.finish(node_id, reason)
                else:
                    subscription.sources[node_id] = (
                        None  # the next change of the node requests its logs again
                    )
        return pb.PublishLogsResponse()

    def _require(self, subscription_id: str, node_id: NodeId) -> LogSubscription:
        subscription = self.subscriptions.get(subscription_id)
        if subscription is None or subscription.sources.get(node_id) is None:
            raise NotFound("log subscription not found")
        return subscription

    def _checked(self, lines: Iterable[LogLine], sender: NodeId = NO_MANAGER) -> list[LogLine]:
        """Return the lines that belong to a task of their node.  ``sender`` is the only node whose lines
        these may be.
        """
        view = self._store.view()
        found: list[LogLine] = []
        tasks: dict[TaskId, Task | None] = {}
        for line in lines:
            if sender and line.node_id not in ("", sender):
                raise PermissionDenied("a node may only send its own logs")
            node_id = sender or line.node_id
            if line.task_id not in tasks:
                tasks[line.task_id] = view.lookup(Task, line.task_id)
            task = tasks[line.task_id]
            if task is None or task.node_id != node_id:
                continue
            if line.node_id != node_id or line.service_id != task.service_id:
                line = msgspec.structs.replace(line, node_id=node_id, service_id=task.service_id)
            found.append(line)
        return found


async def _nothing() -> None:
    """Wait forever.  The commit handler does all the work."""
    await asyncio.get_running_loop().create_future()


class _Listener:
    """A node that listens for subscriptions.  A node that does not read them is disconnected."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        # Each reader adds a request and its end.
        self._messages: asyncio.Queue[pb.SubscriptionMessage | None] = asyncio.Queue(2 * SUBSCRIPTIONS_MAX)

    def send(self, message: pb.SubscriptionMessage) -> None:
        try:
            self._messages.put_nowait(message)
        except asyncio.QueueFull:
            log.warning("node disconnected: it does not read log subscriptions", peer=self._caller.address)
            self._caller.disconnect()

    async def next(self) -> pb.SubscriptionMessage | None:
        """Return the next message, or None if the node now listens on another stream."""
        return await self._messages.get()

    def end(self) -> None:
        while not self._messages.empty():
            self._messages.get_nowait()
        self._messages.put_nowait(None)


class _Relay:
    """A stream from another manager, for its nodes that were not requested elsewhere in the meantime."""

    def __init__(self, manager: NodeId, nodes: Iterable[NodeId]) -> None:
        self.manager = manager
        self.nodes = set(nodes)
        self.task: asyncio.Task[None] | None = None

    def drop(self, node_id: NodeId) -> None:
        self.nodes.discard(node_id)
        if not self.nodes and self.task is not None:
            self.task.cancel()


def _message(subscription: LogSubscription, node_id: NodeId) -> pb.SubscriptionMessage:
    selector, options = query_to_pb(subscription.remaining([node_id]))
    return pb.SubscriptionMessage(id=subscription.id, selector=selector, options=options)


def _is_requested(
    subscription: LogSubscription, node_id: NodeId, location: _Listener | NodeId | None
) -> bool:
    """Return whether the node's logs were requested, for a follower at the node's current location."""
    if node_id not in subscription.sources or (subscription.is_returning(node_id) and location is not None):
        return False
    source = subscription.sources[node_id]
    here = source.manager if isinstance(source, _Relay) else source
    return not subscription.query.follow or here == location


def _manager_of(node: Node | None) -> NodeId:
    """Return the owner of the node's session, or an empty id."""
    return node.session.manager_id if node is not None and node.session is not None else NO_MANAGER


def _is_for(subscription: LogSubscription, node_id: NodeId) -> bool:
    return subscription.only is None or node_id in subscription.only

"""The log broker: asks nodes for the logs of their tasks and brings the lines to whoever reads them.

A node is asked by the manager that owns its session.  The others are asked through that manager (``Relays``): one
stream to each for all its nodes at the start, further ones for nodes that come later.

Source: swarmkit, manager/logbroker/broker.go.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from typing import Protocol

import msgspec
import structlog

from skep.errors import NotFound, PermissionDenied, SkepError, Unavailable
from skep.manager.follow import follow
from skep.manager.logbroker.selection import means, selected, shortfall
from skep.manager.logbroker.subscription import Subscription
from skep.model.ids import IdSource, NodeId
from skep.model.logs import LogLine, LogQuery
from skep.model.node import Node
from skep.model.task import Task
from skep.store.interface import Commit, Created, Store, Updated, View
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.convert.logs import line_from_pb, line_to_pb, query_from_pb, query_to_pb
from skep.wire.service import Handler, client_stream, server_stream

log = structlog.get_logger(__name__)

ANSWER_SECONDS_MAX = 10.0
"""A node that sends nothing for so long, while everything it sent was read, is named as missing."""
NOBODY = NodeId("")
RELAYED_LINES = 100
"""Lines in one message to another manager."""
SUBSCRIPTIONS_MAX = 1000
"""Readers at one time on this manager."""


class Relays(Protocol):
    """Ways to the other managers (``manager.link``)."""

    def relay_logs(
        self, manager: NodeId, query: LogQuery, nodes: Sequence[NodeId]
    ) -> AsyncGenerator[skep.RelayedLogs, None]:
        """What a manager relays of the logs of ``nodes``.  Raises: Unavailable: it cannot be reached (any more)."""


class IncompleteLogs(SkepError):
    """All lines that could be had were given; the text names what is missing."""


class LogBroker:
    """Streams of log lines from nodes, for readers at this manager and at others."""

    def __init__(
        self, store: Store, new_id: IdSource, own: NodeId = NOBODY, relays: Relays | None = None
    ) -> None:
        """``own``: this manager; ``relays``: None where there are no others."""
        self._store = store
        self._new_id = new_id
        self._own = own
        self._relays = relays
        self._group: asyncio.TaskGroup | None = None
        self._relaying: dict[str, set[asyncio.Task[None]]] = {}
        self._subscriptions: dict[str, Subscription] = {}
        self._listeners: dict[NodeId, _Listener] = {}

    def services(self) -> Sequence[Handler]:
        """What to hand to ``wire.server.serve``."""
        return (
            server_stream(methods.LISTEN_SUBSCRIPTIONS, self._listen),
            client_stream(methods.PUBLISH_LOGS, self._publish),
            server_stream(methods.RELAY_LOGS, self._relay_to_manager),
        )

    async def subscribe(self, query: LogQuery) -> AsyncIterator[LogLine]:
        """Lines of all tasks that ``query`` means, each node's in the order it sent them.

        Ends when every node has sent everything; with ``follow`` only when the iterator is closed.

        Raises:
            IncompleteLogs: at the end, naming nodes that did not answer and tasks without a node.
            Unavailable: too many readers at one time.
        """
        subscription = self._open(query)
        try:
            self._ask(subscription, sorted(selected(self._store.view(), query).nodes))
            while True:
                while (line := subscription.take()) is not None:
                    yield line
                if subscription.is_complete:
                    break
                await self._wait_news(subscription)
            missing = shortfall(selected(self._store.view(), query), subscription.reasons)
            if missing:
                raise IncompleteLogs(missing)
        finally:
            self._close(subscription)

    async def run(self) -> None:
        """Ask nodes that get a task of a followed query later, or another manager, until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                await follow(self._store, (Task, Node), start=self._start, note=self._note, work=_nothing)
            finally:
                self._group = None

    def _open(self, query: LogQuery, only: frozenset[NodeId] | None = None) -> Subscription:
        if len(self._subscriptions) >= SUBSCRIPTIONS_MAX:
            raise Unavailable("too many log streams are open")
        subscription = Subscription(self._new_id(), query, only)
        self._subscriptions[subscription.id] = subscription
        return subscription

    # -- readers --------------------------------------------------------------------------------------------------

    async def _wait_news(self, subscription: Subscription) -> None:
        """Wait for lines or ends; give up nodes from which nothing comes, unless the reader follows."""
        if subscription.query.follow:
            await subscription.wait_news()
            return
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                await subscription.wait_news()
        except TimeoutError:
            for node_id in sorted(subscription.pending):
                subscription.finish(node_id, f"node {node_id} did not answer in time")

    def _start(self, view: View) -> None:
        for subscription in self._subscriptions.values():
            if subscription.query.follow:
                self._ask(subscription, sorted(selected(view, subscription.query).nodes))

    def _note(self, commit: Commit) -> None:
        for subscription in self._subscriptions.values():
            if not subscription.query.follow:
                continue
            for event in commit.events:
                match event:
                    case Created(Task() as task) | Updated(_, Task() as task):
                        if task.node_id and means(subscription.query, task):
                            self._ask(subscription, [task.node_id])
                    case Updated(Node() as old, Node() as new) if _manager_of(old) != _manager_of(new):
                        self._ask_again(subscription, new.id)

    def _ask(self, subscription: Subscription, node_ids: Iterable[NodeId]) -> None:
        """Ask nodes that were not asked yet, each where its session is."""
        elsewhere: defaultdict[NodeId, list[NodeId]] = defaultdict(list)
        for node_id in node_ids:
            if node_id in subscription.asked or not _is_for(subscription, node_id):
                continue
            subscription.asked.add(node_id)
            owner = _manager_of(self._store.view().lookup(Node, node_id))
            if (listener := self._listeners.get(node_id)) is not None:
                subscription.pending.add(node_id)
                listener.tell(_message(subscription, node_id))
            elif subscription.only is None and self._relays is not None and owner not in (NOBODY, self._own):
                elsewhere[owner].append(node_id)
            else:
                subscription.finish(node_id, f"node {node_id} is not available")
        for owner, nodes in elsewhere.items():
            self._relay(subscription, owner, nodes)

    def _close(self, subscription: Subscription) -> None:
        """Tell the nodes, and the managers that relay, that nobody reads any more."""
        for relaying in tuple(self._relaying.pop(subscription.id, ())):
            relaying.cancel()
        del self._subscriptions[subscription.id]
        subscription.close()
        for node_id in sorted(subscription.pending):
            listener = self._listeners.get(node_id)
            if listener is not None:
                listener.tell(pb.SubscriptionMessage(id=subscription.id, close=True))

    # -- other managers -------------------------------------------------------------------------------------------

    def _relay(self, subscription: Subscription, manager: NodeId, nodes: Sequence[NodeId]) -> None:
        """Have another manager ask its nodes."""
        if self._group is None:
            for node_id in nodes:
                subscription.finish(node_id, f"node {node_id} is not available")
            return
        subscription.pending.update(nodes)
        task = self._group.create_task(self._read_relay(subscription, manager, nodes), name="log relay")
        relaying = self._relaying.setdefault(subscription.id, set())
        relaying.add(task)
        task.add_done_callback(relaying.discard)

    async def _read_relay(self, subscription: Subscription, manager: NodeId, nodes: Sequence[NodeId]) -> None:
        assert self._relays is not None, "asked before"
        waiting, reason = set(nodes), f"manager {manager} disconnected unexpectedly"
        query = _rest_of(subscription, nodes[0]) if len(nodes) == 1 else subscription.query
        try:
            async with aclosing(self._relays.relay_logs(manager, query, nodes)) as messages:
                async for message in messages:
                    for entry in message.messages:
                        line = line_from_pb(entry)
                        checked = self._checked(line, line.node_id) if line.node_id in waiting else None
                        if checked is not None and not await subscription.put(checked):
                            return
                    ended = NodeId(message.ended_node_id)
                    if ended in waiting:
                        waiting.discard(ended)
                        subscription.finish(ended, message.reason)
        except SkepError as error:
            reason = str(error)
        finally:
            # A follower asks again when the node has another manager.
            for node_id in sorted(waiting):
                if not subscription.query.follow:
                    subscription.finish(node_id, f"node {node_id} did not answer: {reason}")

    async def _relay_to_manager(
        self, request: skep.LogRelay, _caller: Caller
    ) -> AsyncIterator[skep.RelayedLogs]:
        """Lines of nodes whose sessions are here, for a reader at another manager."""
        query = query_from_pb(pb.SubscriptionMessage(selector=request.selector, options=request.options))
        only = frozenset(NodeId(id) for id in request.node_ids)
        subscription = self._open(query, only)
        try:
            self._ask(subscription, sorted(only))
            while True:
                while lines := subscription.take_many(RELAYED_LINES):
                    yield skep.RelayedLogs(messages=[line_to_pb(line) for line in lines])
                while subscription.ended:
                    node_id, reason = subscription.ended.popleft()
                    yield skep.RelayedLogs(ended_node_id=node_id, reason=reason)
                if subscription.is_complete:
                    break
                await self._wait_news(subscription)
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
        earlier = self._listeners.get(node_id)
        self._listeners[node_id] = listener
        if earlier is not None:
            earlier.end()
        for subscription in self._subscriptions.values():
            self._ask_again(subscription, node_id)
        try:
            while (message := await listener.next()) is not None:
                yield message
        finally:
            if self._listeners.get(node_id) is listener:
                del self._listeners[node_id]
                for subscription in self._subscriptions.values():
                    if node_id in subscription.pending and not subscription.query.follow:
                        subscription.finish(node_id, f"node {node_id} disconnected unexpectedly")

    def _ask_again(self, subscription: Subscription, node_id: NodeId) -> None:
        """A node is back that a follower reads from: go on where its lines broke off."""
        if subscription.query.follow and node_id in subscription.asked:
            subscription.asked.discard(node_id)
            self._ask(subscription, [node_id])

    async def _publish(
        self, messages: AsyncIterator[pb.PublishLogsMessage], caller: Caller
    ) -> pb.PublishLogsResponse:
        """One node's lines for one subscription; the first message says which."""
        node_id = caller.node_id
        subscription: Subscription | None = None
        reason = f"node {node_id} disconnected unexpectedly"
        try:
            async for message in messages:
                if subscription is None:
                    subscription = self._require(message.subscription_id, node_id)
                for entry in message.messages:
                    line = self._checked(line_from_pb(entry), node_id)
                    if line is not None and not await subscription.put(line):
                        return pb.PublishLogsResponse()
                if message.close:
                    reason = ""
                    break
        finally:
            if subscription is not None and not (subscription.query.follow and reason):
                subscription.finish(node_id, reason)
        return pb.PublishLogsResponse()

    def _require(self, subscription_id: str, node_id: NodeId) -> Subscription:
        subscription = self._subscriptions.get(subscription_id)
        if subscription is None or node_id not in subscription.asked:
            raise NotFound("no such subscription")
        return subscription

    def _checked(self, line: LogLine, node_id: NodeId) -> LogLine | None:
        """A line as the node may send it: of a task of its own."""
        if line.node_id not in ("", node_id):
            raise PermissionDenied("a node may only send its own logs")
        task = self._store.view().lookup(Task, line.task_id)
        if task is None or task.node_id != node_id:
            return None
        return msgspec.structs.replace(line, node_id=node_id, service_id=task.service_id)


async def _nothing() -> None:
    """The watch is all there is to do here."""
    await asyncio.get_running_loop().create_future()


class _Listener:
    """A node that waits for subscriptions.  One that does not read them is disconnected."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        # A reader puts a question and its end.
        self._messages: asyncio.Queue[pb.SubscriptionMessage | None] = asyncio.Queue(2 * SUBSCRIPTIONS_MAX)

    def tell(self, message: pb.SubscriptionMessage) -> None:
        try:
            self._messages.put_nowait(message)
        except asyncio.QueueFull:
            log.warning("node disconnected: it does not read log subscriptions", peer=self._caller.address)
            self._caller.disconnect()

    async def next(self) -> pb.SubscriptionMessage | None:
        """The next message, or None when the node listens on another stream now."""
        return await self._messages.get()

    def end(self) -> None:
        while not self._messages.empty():
            self._messages.get_nowait()
        self._messages.put_nowait(None)


def _message(subscription: Subscription, node_id: NodeId) -> pb.SubscriptionMessage:
    selector, options = query_to_pb(_rest_of(subscription, node_id))
    return pb.SubscriptionMessage(id=subscription.id, selector=selector, options=options)


def _rest_of(subscription: Subscription, node_id: NodeId) -> LogQuery:
    """The query without what this node has sent already."""
    seen_ns = subscription.seen_ns.get(node_id)
    if seen_ns is None:
        return subscription.query
    return msgspec.structs.replace(subscription.query, since_ns=seen_ns + 1, tail=None)


def _manager_of(node: Node | None) -> NodeId:
    """Who owns the node's session; empty: nobody."""
    return node.session.manager_id if node is not None and node.session is not None else NOBODY


def _is_for(subscription: Subscription, node_id: NodeId) -> bool:
    return subscription.only is None or node_id in subscription.only

"""Serves a manager's log subscriptions (``docker service logs``).

Each subscription is published on a separate stream, so a slow reader blocks only itself.  The first ones use the
session's connection, further ones additional connections.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol

import structlog

from skep.aio.failures import log_error
from skep.errors import SkepError, Unavailable, Unimplemented
from skep.model.logs import LogLine, LogQuery
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.client import ManagerChannel
from skep.wire.convert.logs import line_to_pb, query_from_pb
from skep.wire.shared import ConnectToManager, SharedConnections

log = structlog.get_logger(__name__)

STREAMS_MAX = 80
"""Limit for subscriptions on one connection.

The manager allows 100 streams, and the session needs some of them for other purposes.
"""
SUBSCRIPTIONS_MAX = 1000
"""Limit for concurrent subscriptions.  It equals the number of log readers that a manager accepts."""
CONNECT_S = 5.0
"""Seconds to open an additional connection."""


class LogSource(Protocol):
    """Reads the logs of this node's tasks."""

    def read_lines(self, query: LogQuery) -> AsyncIterator[Sequence[LogLine]]:
        """Yield batches of lines from all tasks of this node that match ``query``, in the order of their times.

        Ends when everything is read.  With ``follow``, it ends only when the iterator is closed.  An empty batch means
        that all existing lines were yielded.
        """


class LogPublisher:
    """Log subscriptions of one session."""

    def __init__(self, channel: ManagerChannel, logs: LogSource, connect: ConnectToManager) -> None:
        """``connect`` opens another connection to the session's manager."""
        self._channel = channel
        self._logs = logs
        self._connect = connect
        self._beside: SharedConnections | None = None
        self._streams = 0
        """Streams on the session's connection."""
        self._publishing: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Listen until the session ends.  A manager without a log broker does not end the session."""
        try:
            async with asyncio.TaskGroup() as group:
                connect = partial(self._connect, timeout_s=CONNECT_S)
                self._beside = SharedConnections(connect, group, streams_max=STREAMS_MAX)
                group.create_task(self._listen(group), name="log subscriptions")
        except* Unimplemented:
            log.warning("the manager does not accept logs", manager=self._channel.address)
        await asyncio.get_running_loop().create_future()  # the session's other parts continue

    async def _listen(self, group: asyncio.TaskGroup) -> None:
        async with self._channel.stream(methods.LISTEN_SUBSCRIPTIONS) as call:
            await call.send(pb.ListenSubscriptionsRequest(), end=True)
            async for message in call:
                task = self._publishing.get(message.id)
                if message.close and task is not None:
                    task.cancel()
                elif not message.close and task is None:
                    self._start(message, group)
        raise Unavailable(f"{self._channel.address} ended the log subscriptions")

    def _start(self, message: pb.SubscriptionMessage, group: asyncio.TaskGroup) -> None:
        if len(self._publishing) >= SUBSCRIPTIONS_MAX:
            log.warning("log subscription refused: too many", subscription=message.id)
            return
        task = group.create_task(self._publish(message), name=f"logs {message.id}")
        self._publishing[message.id] = task
        task.add_done_callback(lambda _: self._publishing.pop(message.id, None))

    async def _publish(self, message: pb.SubscriptionMessage) -> None:
        subscription_id = message.id
        try:
            query = query_from_pb(message)
            async with self._free_channel() as channel, channel.stream(methods.PUBLISH_LOGS) as call:
                lines = self._logs.read_lines(query)
                try:
                    async for batch in lines:
                        entry = pb.PublishLogsMessage(
                            subscription_id=subscription_id, messages=[line_to_pb(line) for line in batch]
                        )
                        await call.send(entry)
                finally:
                    close = getattr(lines, "aclose", None)
                    if close is not None:
                        await close()
                await call.send(pb.PublishLogsMessage(subscription_id=subscription_id, close=True), end=True)
                await call.receive()
        except SkepError as error:
            # The reader has disconnected, or the logs cannot be read.  Neither is a reason to end the session.
            log.info("log subscription ended", subscription=subscription_id, reason=str(error))
        except Exception as error:
            log_error(error, "log subscription failed", subscription=subscription_id)

    @asynccontextmanager
    async def _free_channel(self) -> AsyncIterator[ManagerChannel]:
        """Return a connection that can have one more stream.  Raises: Unavailable."""
        if self._streams < STREAMS_MAX:
            self._streams += 1
            try:
                yield self._channel
            finally:
                self._streams -= 1
        else:
            assert self._beside is not None, "run sets it before any subscription"
            async with self._beside.channel(self._channel.address) as channel:
                yield channel

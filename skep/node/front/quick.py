"""Small requests to the manager and small answers, passed on from where they arrive.

A request that is whole when it is looked at, and an answer likewise, need nobody to wait for anything: they go on
within the event loop's own call, without waking the task of their connection.  That halves what the front adds to a
small request.  Whatever is not plain (a long or streamed body, an upgrade, a manager that is away) is left to that
task, as it is: nothing of it has been taken then.
"""

import asyncio
from collections.abc import Callable

import msgspec

from skep.node.front.framing import PlainRequest, Request, parse_request, plain_answer_bytes, plain_request
from skep.node.front.relay import SMALL_BODY, Connections
from skep.node.front.side import Side


class UnderWay(msgspec.Struct, frozen=True):
    """A request that ``manager`` was sent, whole, and whose answer is still to be passed on."""

    sent: bytes
    head_bytes: int
    manager: Side

    @property
    def request(self) -> Request:
        """What was asked."""
        return parse_request(self.sent[: self.head_bytes])


class _Waiting(msgspec.Struct, frozen=True):
    """A request whose body is still to arrive.  ``size_bytes``: with its head."""

    head_bytes: int
    size_bytes: int


class QuickRelay:
    """Serves one client's connection for as long as its requests are small ones to the manager.

    Args:
        is_for_manager: whether the manager answers a request of this method and target, and may be asked.
    """

    def __init__(
        self, client: Side, connections: Connections, is_for_manager: Callable[[str, str], bool]
    ) -> None:
        self._client = client
        self._connections = connections
        self._is_for_manager = is_for_manager
        self._needed: asyncio.Future[UnderWay | None] | None = None
        self._waiting: _Waiting | None = None
        self._under_way: UnderWay | None = None
        self._passed_on = 0
        self._seen: tuple[int, bool] | None = None
        """What ``end_if_overdue`` found last: requests passed on, and whether the next one had begun."""
        self._seen_at = 0.0

    def end_if_overdue(self, now: float, *, request_s: float, idle_s: float) -> None:
        """End the connection if its client has begun a request so long ago, or done nothing for so long.

        To be asked now and then: a time limit for each request would cost more than the request.  Never ends one
        whose answer is under way, or whose request is not a small one.
        """
        if self._needed is None or self._needed.done() or self._under_way is not None:
            self._seen = None
            return
        found = (self._passed_on, self._client.waiting_bytes > 0)
        if found != self._seen:
            self._seen, self._seen_at = found, now
        elif now - self._seen_at >= (request_s if found[1] else idle_s):
            self._client.close()

    async def wait_needed(self) -> UnderWay | None:
        """Return when there is something to do for the connection's task: an answer that is not small, or is not
        coming; None: a request that is not small, or the client's end."""
        self._needed = asyncio.get_running_loop().create_future()
        self._waiting = None
        try:
            with self._client.watched(self._client_said):
                self._client_said()
                return await self._needed
        except BaseException:
            if self._under_way is not None:
                self._under_way.manager.abort()
            raise
        finally:
            self._under_way = None

    def _leave(self) -> None:
        """Have the task go on from here."""
        if self._needed is not None and not self._needed.done():
            if self._under_way is not None:
                self._under_way.manager.watch(None)
            self._needed.set_result(self._under_way)

    def _client_said(self) -> None:
        """Something has arrived from the client, or it has closed."""
        if self._needed is None or self._needed.done():
            return
        if not self._client.has_ended:
            is_idle = self._under_way is None and self._client.waiting_bytes
            if not is_idle or self._is_passed_on():
                return
        self._leave()

    def _is_passed_on(self) -> bool:
        """Whether the next request is on its way, or can be as soon as it is whole."""
        waiting = self._waiting or self._next()
        if waiting is None:
            return False
        self._waiting = waiting
        if self._client.waiting_bytes < waiting.size_bytes:
            return True
        manager = self._connections.kept()
        if manager is None:
            return False
        if not manager.has_room:
            self._connections.keep(manager)
            return False
        sent = self._client.take(waiting.size_bytes)
        self._waiting = None
        self._passed_on += 1
        self._under_way = UnderWay(sent, waiting.head_bytes, manager)
        manager.watch(self._manager_said)
        manager.transport.write(sent)
        return True

    def _next(self) -> _Waiting | None:
        """The request that has begun to arrive, if it is one for us."""
        raw = self._client.next_head()
        asked = plain_request(raw) if raw is not None else None
        if raw is None or asked is None or not self._is_ours(asked):
            return None
        return _Waiting(len(raw), len(raw) + asked.body_bytes)

    def _is_ours(self, asked: PlainRequest) -> bool:
        return asked.body_bytes <= SMALL_BODY and self._is_for_manager(asked.method, asked.target)

    def _manager_said(self) -> None:
        """Something has arrived from the manager, or it has closed."""
        if self._under_way is None:
            return
        if self._is_answered(self._under_way.manager):
            self._client_said()  # a request sent ahead may wait
        else:
            self._leave()

    def _is_answered(self, manager: Side) -> bool:
        """Whether the answer is passed on, or can be as soon as it is whole."""
        raw = manager.next_head()
        body_bytes = plain_answer_bytes(raw) if raw is not None else None
        if raw is None or body_bytes is None or body_bytes > SMALL_BODY:
            return False
        if manager.has_ended or not self._client.has_room:
            return False
        size_bytes = len(raw) + body_bytes
        if manager.waiting_bytes < size_bytes:
            return True
        self._client.transport.write(manager.take(size_bytes))
        self._under_way = None
        manager.watch(None)
        self._connections.keep(manager)
        return True

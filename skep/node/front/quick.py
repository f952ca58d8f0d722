"""Small requests to the manager and small answers, passed on from where they arrive.

A request that is whole when it is looked at, and an answer likewise, need nobody to wait for anything: they go on
within the event loop's own call, without waking the task of their connection.  That halves what the front adds to a
small request.  Whatever is not plain (a long or streamed body, an upgrade, a manager that is away) is left to that
task, as it is: nothing of it has been taken then.
"""

import asyncio
from collections.abc import Callable

import msgspec

from skep.errors import SkepError
from skep.node.front.framing import (
    Body,
    Request,
    Response,
    Sized,
    body_of_request,
    body_of_response,
    parse_request,
    parse_response,
)
from skep.node.front.relay import SMALL_BODY, Connections, sent_on
from skep.node.front.side import Side


class UnderWay(msgspec.Struct, frozen=True):
    """A whole request that ``manager`` was sent, in these bytes, and whose answer is still to be passed on."""

    request: Request
    sent: bytes
    manager: Side


class _Waiting(msgspec.Struct, frozen=True):
    """A request whose body is still to arrive.  ``size_bytes``: with its head."""

    request: Request
    head_bytes: int
    size_bytes: int


class QuickRelay:
    """Serves one client's connection for as long as its requests are small ones to the manager.

    Args:
        is_for_manager: whether the manager answers a request, and may be asked.
    """

    def __init__(
        self, client: Side, connections: Connections, is_for_manager: Callable[[Request], bool]
    ) -> None:
        self._client = client
        self._connections = connections
        self._is_for_manager = is_for_manager
        self._needed: asyncio.Future[UnderWay | None] | None = None
        self._waiting: _Waiting | None = None
        self._under_way: UnderWay | None = None

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
        if self._client.has_ended:
            self._leave()
        elif self._under_way is None and self._client.waiting_bytes:
            try:
                is_left = not self._passed_on()
            except SkepError:
                is_left = True  # the task meets the same error, and knows what to say
            if is_left:
                self._leave()

    def _passed_on(self) -> bool:
        """Whether the next request is on its way, or can be as soon as it is whole.  Raises: SkepError."""
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
        whole = self._client.take(waiting.size_bytes)
        sent = sent_on(waiting.request) + whole[waiting.head_bytes :]
        self._waiting = None
        self._under_way = UnderWay(waiting.request, sent, manager)
        manager.watch(self._manager_said)
        manager.transport.write(sent)
        return True

    def _next(self) -> _Waiting | None:
        """The request that has begun to arrive, if it is one for us.  Raises: Malformed."""
        raw = self._client.next_head()
        if raw is None:
            return None
        request = parse_request(raw)
        body_bytes = _small(body_of_request(request))
        if body_bytes is None or request.head.is_last or request.upgrades or request.head.all(b"expect"):
            return None
        if not self._is_for_manager(request):
            return None
        return _Waiting(request, len(raw), len(raw) + body_bytes)

    def _manager_said(self) -> None:
        """Something has arrived from the manager, or it has closed."""
        under_way = self._under_way
        if under_way is None:
            return
        try:
            is_passed_on = self._answered(under_way)
        except SkepError:
            is_passed_on = False
        if not is_passed_on:
            self._leave()
        elif self._under_way is None:
            self._client_said()  # a request sent ahead may wait

    def _answered(self, under_way: UnderWay) -> bool:
        """Whether the answer is passed on, or can be as soon as it is whole.  Raises: SkepError."""
        manager = under_way.manager
        raw = manager.next_head()
        if raw is None or manager.has_ended or not self._client.has_room:
            return False
        response = parse_response(raw)
        body_bytes = _small(body_of_response(response, under_way.request.method))
        if body_bytes is None or not _is_plain(response):
            return False
        size_bytes = len(raw) + body_bytes
        if manager.waiting_bytes < size_bytes:
            return True
        self._client.transport.write(manager.take(size_bytes))
        self._under_way = None
        manager.watch(None)
        self._connections.keep(manager)
        return True


def _small(body: Body) -> int | None:
    """The length of a body that is known to be small; None: it may be long."""
    if isinstance(body, Sized) and body.ends_within(SMALL_BODY):
        return body.missing
    return 0 if body.is_complete else None


def _is_plain(response: Response) -> bool:
    """Whether a response is the only and last word to its request, and says nothing about the connection."""
    return response.status >= 200 and not response.head.is_last

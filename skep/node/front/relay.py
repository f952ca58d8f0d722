"""Relays one request to the manager process and its answer back, over connections that are kept.

Bodies are streamed both ways as they come, whatever their length: a log that is followed for days, an upload.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from skep.aio.clock import Clock
from skep.errors import Unavailable
from skep.node.front.framing import (
    Body,
    NoBody,
    Request,
    Sized,
    UntilClose,
    body_of_request,
    body_of_response,
    parse_response,
)
from skep.node.front.side import Gone, Side

_KEPT_MAX = 16
_KEPT_S = 30.0
"""Less than the manager itself keeps an idle connection, so that it rarely closes one that is being used."""
_CONNECT_WAIT_S = 5.0
_WAITING_MAX = 256
_FIRST_RETRY_S = 0.02
_RETRY_S_MAX = 0.5
SMALL_BODY = 64 * 1024
"""A body of at most this is passed on when all of it is there."""
BODY_S = 60.0
"""For a small body to arrive, and for the next bytes of a long one whose length was said; one without a length is a
stream, and takes its time."""
_REPEATABLE = frozenset({"GET", "HEAD"})
_NO_MANAGER = (
    "This node is not a swarm manager. Manager is being prepared or has trouble connecting to the cluster."
)


class Connections:
    """Connections to the manager process: lent to one request at a time, kept for the next.

    While the manager is not there (it restarts), up to 256 requests wait for it, each for up to 5 s.
    """

    def __init__(
        self,
        path: Path,
        clock: Clock,
        chance: Callable[[], float],
        why_waiting: Callable[[], str] = str,
    ) -> None:
        """``why_waiting``: what a manager waits for that is there and serves nobody; empty: nothing is known."""
        self._path = path
        self._why_waiting = why_waiting
        self._clock = clock
        self._chance = chance
        self._kept: deque[tuple[float, Side]] = deque()
        self._waiting = 0

    def kept(self) -> Side | None:
        """A connection used before that is still open."""
        while self._kept:
            since, side = self._kept.pop()
            if not side.has_ended and self._clock.monotonic() - since < _KEPT_S:
                return side
            side.abort()
        return None

    async def fresh(self) -> Side:
        """A new connection.  Raises: Unavailable: no manager for 5 s."""
        if self._waiting >= _WAITING_MAX:
            raise Unavailable("too many requests wait for the manager of this node")
        self._waiting += 1
        try:
            async with asyncio.timeout(_CONNECT_WAIT_S):
                return await self._connect()
        except TimeoutError as error:
            raise Unavailable(self._why_waiting() or _NO_MANAGER) from error
        finally:
            self._waiting -= 1

    async def _connect(self) -> Side:
        loop = asyncio.get_running_loop()
        pause_s = _FIRST_RETRY_S
        while True:
            try:
                return (await loop.create_unix_connection(Side, str(self._path)))[1]
            except OSError:
                await self._clock.sleep(pause_s * (0.5 + self._chance() / 2))
                pause_s = min(pause_s * 2, _RETRY_S_MAX)

    def keep(self, side: Side) -> None:
        """Take back a connection whose exchange is complete."""
        if len(self._kept) < _KEPT_MAX and not side.transport.is_closing():
            self._kept.append((self._clock.monotonic(), side))
        else:
            side.close()

    def close(self) -> None:
        """Drop all kept connections."""
        while self._kept:
            self._kept.pop()[1].abort()


async def relay(client: Side, request: Request, connections: Connections) -> bool:
    """Send ``request`` and its body to the manager and the answer back; whether ``client`` may send another.

    Raises:
        Unavailable: there is no manager to answer; nothing was sent to the client.
        Gone: the client went away, or the manager did in the middle of its answer.
        Malformed: the request's framing; nothing was sent to the client.
    """
    body = body_of_request(request)
    head = request.head.with_headers(without=(b"connection", b"keep-alive"))
    if body.ends_within(SMALL_BODY) and not request.head.all(b"expect"):
        with _in_time():
            async with asyncio.timeout(BODY_S):
                head += await _whole_body(client, body)  # one write, and the manager reads all of it at once
    manager = connections.kept()
    if manager is None:
        return await _exchange(client, request, head, body, await connections.fresh(), connections)
    if not body.is_complete:
        return await _exchange(client, request, head, body, manager, connections)
    return await _go_on(client, request, head, head, manager, connections)


async def go_on(client: Side, request: Request, sent: bytes, manager: Side, connections: Connections) -> bool:
    """``relay`` for a ``request`` that ``manager`` was sent as ``sent``, whole, over a connection used before."""
    return await _go_on(client, request, b"", sent, manager, connections)


async def _go_on(
    client: Side, request: Request, rest: bytes, whole: bytes, manager: Side, connections: Connections
) -> bool:
    """Send ``manager`` the ``rest`` of the ``whole`` request over a connection used before; if need be, all anew."""
    try:
        return await _exchange(client, request, rest, NoBody(), manager, connections)
    except Unavailable:
        if request.method not in _REPEATABLE:
            raise
    fresh = await connections.fresh()  # that one was closed just when we used it
    return await _exchange(client, request, whole, NoBody(), fresh, connections)


async def _whole_body(client: Side, body: Body) -> bytes:
    """What is still to come of ``body``.  Raises: Gone."""
    whole = b""
    while not body.is_complete:
        mine, rest = body.take(await _more(client))
        client.put_back(rest)
        whole += mine
    return whole


@contextmanager
def _in_time() -> Iterator[None]:
    """Raises: Gone: what the client has begun did not come."""
    try:
        yield
    except TimeoutError as error:
        raise Gone("the rest of a request did not come") from error


async def _more(client: Side) -> bytes:
    data = await client.read()
    if not data:
        raise Gone("closed in the middle of a request")
    return data


async def _exchange(
    client: Side, request: Request, head: bytes, body: Body, manager: Side, connections: Connections
) -> bool:
    reusable = False
    try:
        with client.when_ended(manager.abort):  # the answer is for nobody any more
            if body.is_complete:
                await _send_to_manager(manager, head)
                is_last = await _send_response(manager, request.method, client)
            else:
                async with asyncio.TaskGroup() as group:
                    sending = group.create_task(
                        _send_request(client, head, body, manager), name="request body"
                    )
                    is_last = await _send_response(manager, request.method, client)
                    sending.cancel()  # the manager does not wait for it
        reusable = body.is_complete and not is_last
    except (Unavailable, Gone, ExceptionGroup) as error:
        if client.has_ended:
            raise Gone("closed while waiting for the answer") from error
        raise error.exceptions[0] if isinstance(error, ExceptionGroup) else error from None
    finally:
        if reusable:
            connections.keep(manager)
        else:
            manager.abort()
    return reusable and not request.head.is_last


async def _send_to_manager(manager: Side, data: bytes) -> bool:
    """Whether it can still be sent to; if not, its answer, if any, is still to be read."""
    try:
        await manager.send(data)
    except Gone:
        return False
    return True


async def _send_request(client: Side, head: bytes, body: Body, manager: Side) -> None:
    """Pass the request on.  Raises: Gone: the client has gone."""
    is_read = await _send_to_manager(manager, head)
    patience_s = BODY_S if isinstance(body, Sized) else None
    while is_read and not body.is_complete:
        with _in_time():
            async with asyncio.timeout(patience_s):
                data = await _more(client)
        mine, rest = body.take(data)
        client.put_back(rest)
        if mine:
            is_read = await _send_to_manager(manager, mine)


async def _send_response(manager: Side, method: str, client: Side) -> bool:
    """Pass the answer on; whether the manager's connection ends with it."""
    while True:
        try:
            raw = await manager.read_head()
        except Gone:
            raw = b""
        if not raw:
            raise Unavailable("the manager of this node ended before it answered: ask again")
        response = parse_response(raw)
        body = body_of_response(response, method)
        if response.status >= 200 or response.status == 101:
            break
        await client.send(raw)
    if response.status == 101:
        body = UntilClose()
    mine, _ = body.take(manager.take())
    await client.send(raw + mine)
    while not body.is_complete:
        data = await manager.read()
        if not data and isinstance(body, UntilClose):
            break
        if not data:
            raise Gone("the manager ended in the middle of its answer")
        mine, _ = body.take(data)
        await client.send(mine)
    return response.head.is_last or isinstance(body, UntilClose)

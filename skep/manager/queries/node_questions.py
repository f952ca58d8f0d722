"""Asks nodes over their tunnels, each within a deadline: idle times of services at their front doors.

A question is one exchange of HTTP, whose response is bounded.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Final

import msgspec
import structlog

from skep.errors import SkepError, Unavailable
from skep.manager.nodes.tunnels import NodeTunnels
from skep.model.measures.readings import DOOR_IDLE, IDLE_BYTES_MAX, IdleReports, IdleTimes
from skep.model.node import Node
from skep.model.values.ids import NodeId, ServiceId
from skep.store.interface import View
from skep.wire.tunnel import Tunnel

log = structlog.get_logger(__name__)

DOOR_S: Final = 3.0
"""Seconds for an answer of a front door.  A node reads its HAProxy within two, or not at all."""
AT_ONCE_MAX: Final = 16
"""Most front doors that are asked at a time.  Each has a tunnel, which users' requests share."""
_HEAD_BYTES_MAX: Final = 16 << 10
"""Largest head of a response.  Nodes send some hundred bytes."""

AskDoors = Callable[[Collection[NodeId]], Awaitable[IdleReports]]
"""Returns the idle times that nodes read now, within seconds, from those that answer."""


async def ask_no_doors(nodes: Collection[NodeId]) -> IdleReports:
    """Ask no front doors, where none are."""
    return {}


class NodeQuestions:
    """Asks nodes."""

    def __init__(self, tunnels: NodeTunnels, view: Callable[[], View]) -> None:
        self._tunnels = tunnels
        self._view = view

    async def ask_doors(self, nodes: Collection[NodeId]) -> IdleReports:
        """Return the idle times that each node reads now.  Nodes without an answer are left out."""
        turns, found = asyncio.Semaphore(AT_ONCE_MAX), dict[NodeId, IdleTimes]()

        async def one(id: NodeId) -> None:
            try:
                async with turns, asyncio.timeout(DOOR_S):
                    found[id] = await self._idle_times(id)
            except (SkepError, TimeoutError, msgspec.DecodeError) as error:
                log.info("the front door of a node did not answer", node=id, reason=str(error))

        async with asyncio.TaskGroup() as group:
            for id in sorted(nodes):
                group.create_task(one(id), name=f"idle times of {id}")
        return found

    async def _idle_times(self, id: NodeId) -> IdleTimes:
        node = self._view().get(Node, id)
        async with self._tunnels.open_node(node, request_head("GET", DOOR_IDLE)) as tunnel:
            status, body = await _response(tunnel, IDLE_BYTES_MAX)
        if status != 200:
            raise Unavailable(f"the node responded {status}")
        return msgspec.json.decode(body, type=dict[ServiceId, float])


def request_head(method: str, path: str, body: bytes = b"") -> bytes:
    """Return the head of a request.  HTTP/1.0, because the response ends with the connection and needs no framing."""
    lines = [f"{method} {path} HTTP/1.0", "Host: node"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join((*lines, "", "")).encode()


async def _response(tunnel: Tunnel, bytes_max: int) -> tuple[int, bytes]:
    """Return the status and the body of a response.

    Raises: Unavailable: It is longer than ``bytes_max``, or no response of HTTP.
    """
    found = bytearray()
    while data := await tunnel.read():
        found += data
        if len(found) > _HEAD_BYTES_MAX + bytes_max:
            raise Unavailable("the node's response is too long")
    head, _, body = bytes(found).partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise Unavailable("the node sent no response")
    return int(words[1]), body

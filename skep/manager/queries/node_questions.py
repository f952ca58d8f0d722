"""Asks nodes over their tunnels: idle times at their front doors, and queue lengths by a command in a container.

A question is one exchange of HTTP, with a deadline and a bounded response.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from random import Random
from typing import Final
from weakref import WeakValueDictionary

import msgspec
import structlog

from skep.errors import SkepError, Unavailable
from skep.manager.nodes.tunnels import NodeTunnels
from skep.manager.queries.board import AskedQuery
from skep.model.history import cut
from skep.model.measures.queries import (
    AUTOSCALE_QUEUE_EXEC,
    AUTOSCALE_QUEUE_EXEC_IN,
    COMMAND_S,
    QueryFailed,
    length_in,
)
from skep.model.measures.readings import DOOR_IDLE, IDLE_BYTES_MAX, IdleReports, IdleTimes, QueueLine
from skep.model.node import Node, NodeState
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.task_end import on_one_line
from skep.model.values.ids import NodeId, ServiceId
from skep.model.values.stacks import stack_of
from skep.store.interface import View
from skep.wire.tunnel import Tunnel

log = structlog.get_logger(__name__)

_COMMAND_S_MAX: Final = COMMAND_S + 3.0
"""Seconds for a command with its tunnel.  The node ends the command itself before that."""
_LINE_BYTES_MAX: Final = 16 << 10
"""Largest response to a command.  It has one line, or a reason."""
_REASON_CHARACTERS_MAX: Final = 300
"""Longest reason of a failure, which is stored and shown."""
DOOR_S: Final = 3.0
"""Seconds for an answer of a front door.  A node reads its HAProxy within two, or not at all."""
AT_ONCE_MAX: Final = 16
"""Most front doors that are asked at a time.  Each has a tunnel, which users' requests share."""
_HEAD_BYTES_MAX: Final = 16 << 10
"""Largest head of a response.  Nodes send some hundred bytes."""

AskDoors = Callable[[Collection[NodeId]], Awaitable[IdleReports]]
"""Returns the idle times that nodes read now, within seconds.  Nodes without an answer are left out."""


async def ask_no_doors(nodes: Collection[NodeId]) -> IdleReports:
    """Ask no front doors, where none are."""
    return {}


class NodeQuestions:
    """Asks nodes."""

    def __init__(
        self,
        tunnels: NodeTunnels,
        view: Callable[[], View],
        random: Random,
        rights_of: Callable[[View, Task], str],
    ) -> None:
        """``rights_of`` returns a right of a task that only administrators may grant, or an empty text."""
        self._tunnels = tunnels
        self._view = view
        self._random = random
        self._rights_of = rights_of
        self._locks: WeakValueDictionary[ServiceId, asyncio.Lock] = WeakValueDictionary()
        """Held while a command runs in a container of the service."""

    async def run_command(self, asked: AskedQuery) -> float:
        """Return the length of a queue by a command in a container of a service.  Raises: QueryFailed."""
        view = self._view()
        service = commanded_service(view, asked)
        # Any of them, so that an unreachable one does not fail every attempt.
        task = self._random.choice(commanded_tasks(view, service))
        if not asked.is_trusted and (right := self._rights_of(view, task)):
            # Users below administrator may run no command there, and one of them may have written the label.
            raise QueryFailed(
                f"service {service.spec.name} has {right}: only an administrator may set {AUTOSCALE_QUEUE_EXEC} "
                "for its containers"
            )
        lock = self._locks.setdefault(service.id, asyncio.Lock())
        try:
            async with asyncio.timeout(_COMMAND_S_MAX), lock:
                found = await self._line_of(task, asked.query.command)
        except TimeoutError:
            raise QueryFailed(f"its command did not end within {_COMMAND_S_MAX:g} s") from None
        except (SkepError, msgspec.DecodeError) as error:
            raise QueryFailed(cut(on_one_line(str(error)), _REASON_CHARACTERS_MAX)) from None
        return length_in(found.exit_code, found.line)

    async def _line_of(self, task: Task, command: Sequence[str]) -> QueueLine:
        body = msgspec.json.encode({"Cmd": command})
        status = task.status.container_status
        path = f"/containers/{status.container_id if status is not None else ''}/length"
        async with self._tunnels.open(task, head=request_head("POST", path, body)) as tunnel:
            await tunnel.send(body)
            code, answer = await _response(tunnel, _LINE_BYTES_MAX)
        if code != 200:
            message = msgspec.json.decode(answer, type=_Refusal).message
            raise Unavailable(message or f"the node of task {task.id} responded {code}")
        return msgspec.json.decode(answer, type=QueueLine)

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


class _Refusal(msgspec.Struct):
    message: str = ""


def commanded_service(view: View, asked: AskedQuery) -> Service:
    """Return the service in whose container a command runs.  Raises: QueryFailed."""
    own, name = view.lookup(Service, asked.service_id), asked.query.service
    if own is None:
        raise QueryFailed("the service was removed")
    if not name:
        return own
    stack = stack_of(own.spec.labels)
    names = (f"{stack}_{name}", name) if stack else (name,)
    for one in (one for full in names for one in view.find(Service, name=full)):
        if one.removed_at is None and stack_of(one.spec.labels) == stack:
            return one
    where = f"stack {stack}" if stack else "the services without a stack"
    raise QueryFailed(f"{where} has no service {name}: correct the label {AUTOSCALE_QUEUE_EXEC_IN}")


def commanded_tasks(view: View, service: Service) -> list[Task]:
    """Return the tasks in whose containers a command can run.  Raises: QueryFailed: there are none."""
    running = [
        task
        for task in view.find(Task, service_id=service.id)
        if task.is_wanted
        and task.status.state is TaskState.RUNNING
        and (node := view.lookup(Node, task.node_id)) is not None
        and node.status.state is NodeState.READY
    ]
    if not running:
        raise QueryFailed(
            f"no task of service {service.spec.name} runs on a ready node, so no command can run in one"
        )
    return sorted(running, key=lambda task: task.id)


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

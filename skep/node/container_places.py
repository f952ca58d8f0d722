"""Adds to the error about a missing container where it runs, if it belongs to a task on another node.

A docker command reaches only the containers of its own node.  A manager knows to which task a container belongs.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol
from urllib.parse import unquote

import msgspec
from aiohttp import web

from skep.api.access.identity import IDENTITY_HEADER, identity_of, packed
from skep.api.access.permissions import sees
from skep.api.formats.forwarded_requests import TASK_CONTAINER
from skep.api.http.framing import path_of
from skep.api.http.server import insert_in_errors
from skep.errors import NotFound, SkepError
from skep.model.permissions.access import Identity
from skep.model.task import TaskState
from skep.node.cluster.cluster_reads import ClusterReads
from skep.node.cluster.local import LocalNode

_REQUEST = re.compile(r"/containers/(?P<name>[^/]+)(?:/(?P<what>[a-z]+))?")
_KNOWN_ELSEWHERE: Final = re.compile(TASK_CONTAINER)
"""Ids and names of containers that another node may have."""
_REPLACE: Final = "docker service update --force {service}, or docker service scale {service}=N"
_COMMANDS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("", "stop", "restart", "pause", "unpause"), _REPLACE),
    "kill": "skep exec {task} kill -s SIGNAL 1, or " + _REPLACE,
    "exec": "skep exec {task} COMMAND",
    "logs": "skep logs {task}",
    "attach": "skep attach {task}",
    "archive": "skep cp {task}:PATH FILE, or skep cp FILE {task}:PATH",
    "top": "skep task top {task}",
    "stats": "skep stats {task}",
}
_ANY_COMMAND: Final = (
    "skep exec {task} COMMAND, skep logs {task}, skep attach {task}, skep cp or skep stats {task}"
)
"""Commands after ``docker exec``, ``logs`` or ``attach``, which begin with ``inspect``."""


class ContainerPlace(msgspec.Struct, frozen=True, rename="pascal"):
    """The part of ``GET /skep/tasks/{id}/target`` that an error needs."""

    node_id: str = msgspec.field(name="NodeID", default="")
    name: str = ""
    hostname: str = ""
    state: str = ""
    stack: str = ""


class PlaceLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of look-ups, beyond which an error is returned without the place."""

    within_s: float = 1.0
    asked: int = 16
    """Largest number of simultaneous look-ups."""


LIMITS = PlaceLimits()


class SessionMember(Protocol):
    """This node's membership of a cluster."""

    @property
    def node(self) -> LocalNode | None:
        """This node as a member, or None outside of a cluster."""


class ContainerPlaces:
    """Looks up the nodes of containers that run elsewhere."""

    def __init__(self, member: SessionMember, reads: ClusterReads, limits: PlaceLimits = LIMITS) -> None:
        self._member = member
        self._reads = reads
        self._limits = limits
        self._asked = 0

    async def add_place(self, error: NotFound, target: str, identity: Identity) -> NotFound:
        """Return ``error`` about a missing container with its place, or ``error`` itself if that is not known.

        Args:
            target: Path and query of the request.
            identity: The client, who learns only about the stacks that it may see.
        """
        found = _REQUEST.fullmatch(path_of(target))
        word = unquote(found["name"]) if found is not None else ""
        if found is None or not str(error).endswith(f"No such container: {word}"):
            return error
        node = self._member.node
        if node is None or not _KNOWN_ELSEWHERE.fullmatch(word) or self._asked >= self._limits.asked:
            return error
        self._asked += 1
        try:
            async with asyncio.timeout(self._limits.within_s):
                place = await self._place_of(word, identity, is_manager=node.is_manager)
        except (SkepError, TimeoutError, msgspec.DecodeError):
            return error
        finally:
            self._asked -= 1
        if place.node_id in ("", node.node_id) or not sees(identity, place.stack):
            return error
        return NotFound(f"{error} on this node. {_sentences(place, found['what'] or '')}")

    async def _place_of(self, word: str, identity: Identity, *, is_manager: bool) -> ContainerPlace:
        """Return the task of a container and its node.  Raises: SkepError; msgspec.DecodeError."""
        path = f"/skep/tasks/{word}/target"
        if not is_manager:
            return msgspec.json.decode(await self._reads.body(path), type=ContainerPlace)
        headers = {IDENTITY_HEADER: packed(identity).decode(), "X-Skep-Stale": "1"}
        response = await self._reads.own.send("GET", path, headers=headers)
        if response.status >= 300:
            raise response.error()
        return msgspec.json.decode(response.body, type=ContainerPlace)


def _sentences(place: ContainerPlace, what: str) -> str:
    node = place.hostname or place.node_id
    service = place.name.partition(".")[0]
    if place.state == TaskState.UNKNOWN.value:
        return f"It is a container of task {place.name} on node {node}, which is down. Run skep explain {service}"
    if place.state != TaskState.RUNNING.value:
        return (
            f"It is a container of task {place.name} on node {node}, and the task is {place.state}. "
            f"Run skep explain {service}"
        )
    command = _COMMANDS.get(what, _ANY_COMMAND).format(task=place.name, service=service)
    return f"It is a container of task {place.name} on node {node}. Run {command}"


AddPlace = Callable[[NotFound, str, Identity], Awaitable[NotFound]]
"""``ContainerPlaces.add_place``."""


async def add_no_place(error: NotFound, _target: str, _identity: Identity) -> NotFound:
    """Return ``error`` as it is."""
    return error


PLACES: web.AppKey[ContainerPlaces] = web.AppKey("container places")


def add_places(app: web.Application, places: ContainerPlaces) -> None:
    """Add the places of containers to the errors of ``app``."""

    @web.middleware
    async def with_place(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except NotFound as error:
            raise await places.add_place(error, request.raw_path, identity_of(request)) from error

    app[PLACES] = places
    insert_in_errors(app, with_place)

"""Decides by an ordered table which process answers a request.  The first matching rule applies."""

import re
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Protocol
from urllib.parse import parse_qsl, unquote

import msgspec

from skep.api.access.permissions import sees
from skep.api.http.framing import is_for_manager, path_of
from skep.engine.engine import Engine
from skep.errors import NotFound
from skep.model.options.labels import LABEL_TASK_ID
from skep.model.permissions.access import Identity
from skep.node.front.task_requests import TaskContainer
from skep.node.visible_containers import visible_container


class Destination(Enum):
    """The process that answers a request."""

    HERE = "this node"
    MANAGER = "the manager process"
    ENGINE = "the machine's Docker Engine"


class OwnObjects(Protocol):
    """Tells which objects are this node's own."""

    @property
    def has_docker_engine(self) -> bool:
        """Whether requests for other objects are passed on to a Docker Engine of this machine."""

    def owns_container(self, word: str) -> bool:
        """Return whether an id, id prefix or name means a container of this node's own engine."""

    def owns_image(self, reference: str) -> bool:
        """Return whether this node has that image."""

    def owns_exec(self, id: str) -> bool:
        """Return whether the exec belongs to this node's own engine."""

    def container_of(self, identity: Identity, word: str) -> TaskContainer:
        """Return the container that ``word`` means to a user.  Raises: NotFound, InvalidArgument."""

    def container_of_exec(self, identity: Identity, id: str) -> TaskContainer:
        """Return the container in which exec ``id`` runs, if the user sees it.  Raises: NotFound."""

    @property
    def has_volumes(self) -> bool:
        """Whether this node stores volumes itself, at least volumes of services."""


class LocalObjects:
    """``OwnObjects`` by the node's container engine.  ``engine`` is None on a node without containers and images."""

    def __init__(self, engine: Engine | None, *, has_docker_engine: bool) -> None:
        self._engine = engine
        self.has_docker_engine = has_docker_engine

    @property
    def has_volumes(self) -> bool:
        """See ``OwnObjects``."""
        return self._engine is not None

    def owns_container(self, word: str) -> bool:
        """See ``OwnObjects``."""
        return self._engine is not None and self._engine.has(word)

    def owns_image(self, reference: str) -> bool:
        """See ``OwnObjects``."""
        return self._engine is not None and self._engine.images.lookup(reference) is not None

    def owns_exec(self, id: str) -> bool:
        """See ``OwnObjects``."""
        return self._engine is not None and self._engine.execs.has(id)

    def container_of(self, identity: Identity, word: str) -> TaskContainer:
        """See ``OwnObjects``."""
        found = visible_container(self._engine, identity, word)
        return TaskContainer(task=found.labels.get(LABEL_TASK_ID, ""), stack=found.stack)

    def container_of_exec(self, identity: Identity, id: str) -> TaskContainer:
        """See ``OwnObjects``."""
        if self._engine is not None and self._engine.execs.has(id):
            with suppress(NotFound):
                return self.container_of(identity, self._engine.execs.get(id).container_id)
        raise NotFound(f"No such exec instance: {id}")


class _Request(msgspec.Struct, frozen=True):
    """The properties of a request that rules use."""

    method: str
    path: str
    query: str
    ownership: OwnObjects


class _Rule(msgspec.Struct, frozen=True):
    """One row of the table.

    ``decide`` returns the destination of a matching request, given the pattern's group ``name``.
    """

    pattern: re.Pattern[str]
    decide: Callable[[_Request, str], Destination]


def route(method: str, target: str, ownership: OwnObjects, identity: Identity | None = None) -> Destination:
    """Return which process answers ``method`` on ``target`` (path and query as sent).

    Args:
        identity: The client, or None on a Unix socket of the node.
    """
    found = _route(method, target, ownership)
    if found is Destination.ENGINE and identity is not None and not sees(identity, ""):
        # Users with rights on single stacks get the answer of a node without an engine.  If the engine's objects were
        # refused differently, the answer would reveal which objects belong to the node.
        return Destination.HERE
    return found


def _route(method: str, target: str, ownership: OwnObjects) -> Destination:
    path = path_of(target)
    if is_for_manager(path):
        return Destination.MANAGER
    request = _Request(method, path, target.partition("?")[2], ownership)
    for rule in _RULES:
        if match := rule.pattern.fullmatch(path):
            return rule.decide(request, unquote(match.groupdict().get("name") or ""))
    return _others(request)


def is_build(path: str) -> bool:
    """Return whether a request starts a build, or a build session."""
    return path in ("/build", "/session", "/grpc")


def _here(_request: _Request, _name: str) -> Destination:
    return Destination.HERE


def _others(request: _Request, _name: str = "") -> Destination:
    """Return the destination for objects that this node does not have: the engine, or this node to refuse the
    request.
    """
    return Destination.ENGINE if request.ownership.has_docker_engine else Destination.HERE


def _owner_of_container(request: _Request, name: str) -> Destination:
    return Destination.HERE if request.ownership.owns_container(name) else _others(request)


def _owner_of_committed(request: _Request, _name: str) -> Destination:
    return _owner_of_container(request, dict(parse_qsl(request.query)).get("container", ""))


def _owner_of_exec(request: _Request, name: str) -> Destination:
    return Destination.HERE if request.ownership.owns_exec(name) else _others(request)


def _owner_of_image(request: _Request, name: str) -> Destination:
    return Destination.HERE if request.ownership.owns_image(name) else _others(request)


def _owner_of_pushed(request: _Request, name: str) -> Destination:
    """Clients name the tag to push in the query, and none to push all tags."""
    tag = dict(parse_qsl(request.query)).get("tag", "")
    return _owner_of_image(request, f"{name}:{tag}" if tag else name)


def _volumes(request: _Request, _name: str) -> Destination:
    return Destination.HERE if request.ownership.has_volumes else _others(request)


def _rule(pattern: str, decide: Callable[[_Request, str], Destination]) -> _Rule:
    return _Rule(re.compile(pattern), decide)


_RULES = (
    # the node's description of itself
    _rule(r"/(?:_ping|version|info|events)", _here),
    # the node's own membership works without a manager; everything else about the swarm belongs to the manager
    _rule(r"/swarm/(?:init|join|leave|unlock)", _here),
    # networks: the cluster's, the engine's and the node's own in one list
    _rule(r"/networks(?:/.*)?", _here),
    # Skep's own paths
    _rule(r"/skep/restore", _here),
    _rule(r"/metrics", _here),
    # containers: this node's (of tasks, and plain ones); all others belong to the engine
    _rule(r"/containers/(?:json|create)", _here),  # both query the engine as well
    _rule(r"/containers/prune", _others),
    _rule(r"/containers/(?P<name>[^/]+)(?:/.*)?", _owner_of_container),
    _rule(r"/commit", _owner_of_committed),
    _rule(r"/exec/(?P<name>[^/]+)(?:/.*)?", _owner_of_exec),
    # volumes: the node's own and the engine's in one list
    _rule(r"/volumes(?:/.*)?", _volumes),
    # images: services on this node run from the node's store, which pull, load and ls work on
    _rule(r"/images/(?:json|create|load|get|prune)", _here),
    _rule(r"/images/(?P<name>.+)/push", _owner_of_pushed),
    _rule(r"/images/(?P<name>.+)/(?:json|history|attestations|tag|get)", _owner_of_image),
    _rule(r"/images/(?P<name>.+)", _owner_of_image),
    _rule(r"/distribution/.+/json", _here),
)

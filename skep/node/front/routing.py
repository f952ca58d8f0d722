"""Which request goes where: an ordered table, the first rule that fits decides."""

import re
from collections.abc import Callable
from enum import Enum
from typing import Protocol
from urllib.parse import unquote, urlsplit

import msgspec


class Destination(Enum):
    """Who answers a request."""

    HERE = "this node"
    MANAGER = "the manager process"
    ENGINE = "the machine's Docker Engine"


class Knowledge(Protocol):
    """What routing has to know about this node."""

    @property
    def is_manager(self) -> bool: ...

    @property
    def has_engine(self) -> bool: ...

    def knows_container(self, word: str) -> bool:
        """Whether an id, prefix of an id, or name means a container that this node made."""

    def knows_image(self, reference: str) -> bool:
        """Whether this node has that image."""

    def knows_exec(self, id: str) -> bool:
        """Whether this node made that exec."""


class _Asked(msgspec.Struct, frozen=True):
    """A request as the rules see it."""

    method: str
    path: str
    knowledge: Knowledge


class _Rule(msgspec.Struct, frozen=True):
    """Requests whose path matches go where ``decide`` says; ``decide`` gets the pattern's group ``name``."""

    pattern: re.Pattern[str]
    decide: Callable[[_Asked, str], Destination]


def route(method: str, target: str, knowledge: Knowledge) -> Destination:
    """Who answers ``method`` on ``target`` (path and query as sent)."""
    path = without_version(urlsplit(target).path)
    asked = _Asked(method, path, knowledge)
    for rule in _RULES:
        if match := rule.pattern.fullmatch(path):
            return rule.decide(asked, unquote(match.groupdict().get("name") or ""))
    return _others(asked)


def without_version(path: str) -> str:
    """``/v1.41/info`` -> ``/info``."""
    return _VERSION.sub("/", path, count=1)


_VERSION = re.compile(r"^/v[0-9][0-9.]*/")


def _here(_asked: _Asked, _name: str) -> Destination:
    return Destination.HERE


def _manager(_asked: _Asked, _name: str) -> Destination:
    return Destination.MANAGER


def _others(asked: _Asked, _name: str = "") -> Destination:
    """The engine's; without an engine this node answers that it cannot."""
    return Destination.ENGINE if asked.knowledge.has_engine else Destination.HERE


def _owner_of_container(asked: _Asked, name: str) -> Destination:
    return Destination.HERE if asked.knowledge.knows_container(name) else _others(asked)


def _owner_of_exec(asked: _Asked, name: str) -> Destination:
    return Destination.HERE if asked.knowledge.knows_exec(name) else _others(asked)


def _owner_of_image(asked: _Asked, name: str) -> Destination:
    return Destination.HERE if asked.knowledge.knows_image(name) else _others(asked)


def _rule(pattern: str, decide: Callable[[_Asked, str], Destination]) -> _Rule:
    return _Rule(re.compile(pattern), decide)


_RULES = (
    # what a node says of itself
    _rule(r"/(?:_ping|version|info|events)", _here),
    # the node's own membership works without a manager; all else about the swarm is the manager's
    _rule(r"/swarm/(?:init|join|leave|unlock)", _here),
    _rule(r"/(?:swarm|services|tasks|nodes|secrets|configs)(?:/.*)?", _manager),
    # networks: the cluster's, the engine's and the node's own in one list
    _rule(r"/networks(?:/.*)?", _here),
    # ours: what Docker has no word for
    _rule(r"/skep/restore", _here),
    _rule(r"/skep/(?:backup|quorum|doctor/network|cluster/.+|(?:tasks|services)/.+)", _manager),
    # containers: those of tasks are ours; plain ones belong to the engine
    _rule(r"/containers/(?:json|create)", _here),  # both ask the engine, too
    _rule(r"/containers/prune", _others),
    _rule(r"/containers/(?P<name>[^/]+)(?:/.*)?", _owner_of_container),
    _rule(r"/exec/(?P<name>[^/]+)(?:/.*)?", _owner_of_exec),
    # images: services on this node run from our store, so that is what pull, load and ls mean
    _rule(r"/images/(?:json|create|load|get|prune)", _here),
    _rule(r"/images/(?P<name>.+)/(?:json|history|tag|push|get)", _owner_of_image),
    _rule(r"/images/(?P<name>.+)", _owner_of_image),
    _rule(r"/distribution/.+/json", _here),
)

"""Which request goes where."""

import re

import pytest
from aiohttp import web

from skep.api.http.framing import is_for_manager
from skep.manager.routes import _TABLES
from skep.node.front.routing import Destination, route

HERE, MANAGER, ENGINE = Destination.HERE, Destination.MANAGER, Destination.ENGINE


class Owned:
    """A node that has the container ``ours``, the image ``ours:1`` and the exec ``e1``."""

    def __init__(self, *, has_engine: bool = False, has_volumes: bool = True) -> None:
        self.has_docker_engine = has_engine
        self.has_volumes = has_volumes

    def owns_container(self, word: str) -> bool:
        return word in ("ours", "our name")

    def owns_image(self, reference: str) -> bool:
        return reference in ("ours:1", "registry:5000/team/ours:1")

    def owns_exec(self, id: str) -> bool:
        return id == "e1"

    def task_of_container(self, word: str) -> str:
        return ""

    def stack_of_container(self, word: str) -> str:
        return ""

    def task_of_exec(self, id: str) -> str:
        return ""


OF_MANAGERS = sorted(
    {
        re.sub(r"\{[^}]*\}", "x", one.path)
        for table in _TABLES
        for one in table
        if isinstance(one, web.RouteDef) and one.path.startswith("/skep/")
    }
)


@pytest.mark.parametrize("path", OF_MANAGERS)
def test_requests_that_only_managers_serve_reach_them(path: str) -> None:
    assert is_for_manager(path)


ALWAYS = [
    ("HEAD", "/_ping", HERE),
    ("GET", "/v1.41/version", HERE),
    ("GET", "/v1.41/info?x=1", HERE),
    ("GET", "/events", HERE),
    ("POST", "/v1.41/swarm/init", HERE),
    ("POST", "/v1.41/swarm/join", HERE),
    ("POST", "/swarm/leave?force=1", HERE),
    ("POST", "/swarm/unlock", HERE),
    ("GET", "/v1.41/swarm", MANAGER),
    ("POST", "/swarm/update?version=3", MANAGER),
    ("GET", "/swarm/unlockkey", MANAGER),
    ("POST", "/v1.24/services/create", MANAGER),
    ("GET", "/services/web/logs?follow=1", MANAGER),
    ("GET", "/tasks", MANAGER),
    ("DELETE", "/nodes/w1?force=1", MANAGER),
    ("GET", "/secrets", MANAGER),
    ("GET", "/skep/jobs", MANAGER),
    ("POST", "/skep/services/nightly/run", MANAGER),
    ("POST", "/configs/create", MANAGER),
    ("GET", "/containers/json?all=1", HERE),
    ("GET", "/containers/ours/json", HERE),
    ("POST", "/containers/our%20name/exec", HERE),
    ("POST", "/v1.41/exec/e1/start", HERE),
    ("GET", "/images/json", HERE),
    ("POST", "/images/create?fromImage=x", HERE),
    ("POST", "/images/load", HERE),
    ("GET", "/images/ours:1/json", HERE),
    ("GET", "/images/registry:5000/team/ours:1/history", HERE),
    ("POST", "/v1.41/images/ours/push?tag=1", HERE),
    ("POST", "/images/registry%3A5000/team/ours/push?platform=x&tag=1", HERE),
    ("DELETE", "/images/ours:1", HERE),
    ("GET", "/distribution/library/busybox/json", HERE),
    ("POST", "/containers/create?name=x", HERE),
    ("GET", "/volumes", HERE),
    ("POST", "/volumes/create", HERE),
    ("POST", "/v1.42/volumes/prune?filters=x", HERE),
]

OTHERS = [
    ("POST", "/containers/prune"),
    ("GET", "/containers/theirs/json"),
    ("POST", "/exec/e2/start"),
    ("GET", "/images/theirs:1/json"),
    ("GET", "/images/search?term=x"),
    ("POST", "/images/theirs:1/push"),
    ("POST", "/images/theirs/push?tag=1"),
    ("POST", "/images/ours/push?tag=2"),
    ("POST", "/build/prune"),
    ("POST", "/v1.41/build?version=1"),
    ("POST", "/session"),
    ("POST", "/grpc"),
    ("GET", "/system/df"),
    ("POST", "/auth"),
    ("GET", "/plugins"),
    ("GET", "/"),
    ("GET", "/servicesque"),
    ("GET", "/v1.41"),
]


@pytest.mark.parametrize("has_engine", [False, True])
@pytest.mark.parametrize(("method", "target", "expected"), ALWAYS)
def test_what_is_ours_stays_ours_beside_an_engine(
    method: str, target: str, expected: Destination, has_engine: bool
) -> None:
    assert route(method, target, Owned(has_engine=has_engine)) is expected


@pytest.mark.parametrize(("method", "target"), OTHERS)
def test_everything_else_is_the_engines_if_there_is_one(method: str, target: str) -> None:
    assert route(method, target, Owned(has_engine=True)) is ENGINE
    assert route(method, target, Owned(has_engine=False)) is HERE


@pytest.mark.parametrize("has_engine", [True, False])
def test_networks_of_cluster_engine_and_node_are_one_list(has_engine: bool) -> None:
    assert route("GET", "/v1.41/networks", Owned(has_engine=has_engine)) is HERE
    assert route("POST", "/networks/x/connect", Owned(has_engine=has_engine)) is HERE


def test_volumes_are_the_engines_where_this_node_has_none() -> None:
    assert route("GET", "/v1.41/volumes", Owned(has_engine=True, has_volumes=False)) is ENGINE
    assert route("GET", "/v1.41/volumes", Owned(has_engine=False, has_volumes=False)) is HERE

"""What a node says about a container that it does not have: where it runs, to those who may know."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from aiohttp import web
from msgspec.structs import replace

from skep.agent.session.session_state import SessionState
from skep.aio.clock import SystemClock
from skep.api.access.identity import identify
from skep.api.client.client import ApiClient
from skep.api.http.server import application as api_application
from skep.api.http.server import runner
from skep.engine.api.containers import container_routes
from skep.errors import NotFound
from skep.manager.routes import application
from skep.model.node import NodeState
from skep.model.permissions.access import ALL, Identity, Origin, parse_binding
from skep.model.service import Service
from skep.model.task import ContainerStatus, Task, TaskState, TaskStatus
from skep.model.values.stacks import STACK_LABEL
from skep.node.authorization import NodeObjects
from skep.node.cluster.cluster_reads import ClusterReads
from skep.node.container_places import LIMITS, ContainerPlaces, PlaceLimits, add_places
from tests.conformance.manager import a_manager_api
from tests.support.builders import a_node, a_service, a_task
from tests.support.engine.oci_rig import Machine, memory_engine
from tests.support.store.store_transactions import put

ID, GONE, LOST = "3f2a" * 16, "beef" * 16, "10c7" * 16
TASK = "t" * 25
ROOT = Identity(name="root", origin=Origin.SOCKET, bindings=ALL)
REPLACE = "docker service update --force shop_web, or docker service scale shop_web=N"
PLACE = "It is a container of task shop_web.2 on node w2. Run"


_BODY = '{"Cmd":["id"]}'


def a_user(*roles: str) -> Identity:
    return Identity(name="ann", origin=Origin.TOKEN, bindings=tuple(map(parse_binding, roles)))


def at_w2(service: Service, id: str, container: str, slot: int, state: TaskState, node: str = "w2") -> Task:
    status = TaskStatus(state=state, container_status=ContainerStatus(container_id=container))
    return replace(a_task(id, service=service.id, slot=slot, node=node), status=status)


class Node:
    """A node whose manager is on another socket."""

    def __init__(self, new_handler: Any, places: ContainerPlaces) -> None:
        self._new_handler = new_handler
        self.places = places

    async def answer(self, identity: Identity, request: str) -> tuple[int, str]:
        ours, theirs = socket.socketpair()
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(self._new_handler, theirs)
        identify(transport, identity)
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(
            f"{request} HTTP/1.1\r\nHost: n\r\nContent-Type: application/json\r\nContent-Length: {len(_BODY)}\r\n"
            f"Connection: close\r\n\r\n{_BODY}".encode()
        )
        try:
            async with asyncio.timeout(10):
                head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        finally:
            writer.close()
            transport.abort()
        return int(head.split()[1]), msgspec.json.decode(body)["message"]


@asynccontextmanager
async def a_cluster(
    directory: Path,
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None,
    limits: PlaceLimits = LIMITS,
) -> AsyncIterator[Node]:
    """A node next to a manager with two tasks on w2.  ``answer`` is a manager of another kind."""
    async with a_manager_api() as api:
        service = a_service("shop_web")
        service = replace(service, spec=replace(service.spec, labels={STACK_LABEL: "shop"}))
        for one in (
            service,
            a_node("w2"),
            a_node("w3", state=NodeState.DOWN),
            at_w2(service, "v" * 25, LOST, 4, TaskState.RUNNING, "w3"),
            at_w2(service, TASK, ID, 2, TaskState.RUNNING),
            at_w2(service, "u" * 25, GONE, 3, TaskState.FAILED),
        ):
            await api.store.update(put, one)
        manager_app = application(api)
        if answer is not None:
            manager_app = web.Application()
            manager_app.router.add_route("*", "/{tail:.*}", answer)
        manager = runner(manager_app)
        await manager.setup()
        await web.UnixSite(manager, str(directory / "manager.sock")).start()
        engine = memory_engine(directory, Machine())
        async with engine.running(), ApiClient.local(directory / "manager.sock", "the manager") as own:
            clock = SystemClock()
            member = SimpleNamespace(node=SimpleNamespace(node_id="m1", is_manager=True))
            places = ContainerPlaces(cast("Any", member), ClusterReads(SessionState(clock), own), limits)
            app = api_application(
                container_routes(engine, clock), objects=NodeObjects(engine, cast("Any", None))
            )
            add_places(app, places)
            served = runner(app)
            await served.setup()
            yield Node(served.server, places)
            await served.cleanup()
        await manager.cleanup()


async def test_each_command_is_named_that_reaches_the_container(tmp_path: Path) -> None:
    commands = {
        "POST /v1.41/containers/{}/exec": "skep exec shop_web.2 COMMAND",
        "GET /containers/{}/logs?stdout=1": "skep logs shop_web.2",
        "POST /containers/{}/attach?stream=1": "skep attach shop_web.2",
        "GET /containers/{}/archive?path=/": "skep cp shop_web.2:PATH FILE, or skep cp FILE shop_web.2:PATH",
        "GET /containers/{}/top": "skep task top shop_web.2",
        "GET /containers/{}/stats?stream=0": "skep stats shop_web.2",
        "POST /v1.41/containers/{}/stop": REPLACE,
        "DELETE /v1.41/containers/{}?force=1": REPLACE,
        "GET /v1.41/containers/{}/json": "skep exec shop_web.2 COMMAND, skep logs shop_web.2, "
        "skep attach shop_web.2, skep cp or skep stats shop_web.2",
    }
    async with a_cluster(tmp_path) as node:
        for word in (ID, ID[:12], f"shop_web.2.{TASK}"):
            for request, command in commands.items():
                status, text = await node.answer(ROOT, request.format(word))
                assert (status, text) == (
                    404,
                    f"No such container: {word} on this node. {PLACE} {command}",
                ), request
        _, text = await node.answer(ROOT, f"POST /containers/{ID}/kill")
        assert text.startswith(f"Cannot kill container: {ID}: No such container: {ID} on this node. {PLACE} ")
        assert text.endswith(f"skep exec shop_web.2 kill -s SIGNAL 1, or {REPLACE}")
        assert (await node.answer(ROOT, f"GET /containers/{GONE}/logs?stdout=1"))[1].endswith(
            "It is a container of task shop_web.3 on node w2, and the task is failed. Run skep explain shop_web"
        )


async def test_no_command_is_named_for_a_container_of_a_node_that_is_down(tmp_path: Path) -> None:
    async with a_cluster(tmp_path) as node:
        for request in (f"POST /containers/{LOST}/exec", f"GET /containers/{LOST}/logs?stdout=1"):
            assert (await node.answer(ROOT, request))[1].endswith(
                "It is a container of task shop_web.4 on node w3, which is down. Run skep explain shop_web"
            )


async def test_a_container_that_no_task_has_is_missing_as_before(tmp_path: Path) -> None:
    async with a_cluster(tmp_path) as node:
        for word in ("nosuch", ID[:11], "a" * 64, f"shop_web.2.{'x' * 25}", "shop_web"):
            for request in (f"GET /containers/{word}/json", f"GET /containers/{word}/logs?stdout=1"):
                assert await node.answer(ROOT, request) == (404, f"No such container: {word}")


async def test_a_user_learns_only_where_containers_of_its_stacks_run(tmp_path: Path) -> None:
    async with a_cluster(tmp_path) as node:
        request = f"GET /containers/{ID}/logs?stdout=1"
        for roles in (("viewer",), ("viewer:shop",), ("operator:blog", "viewer:shop")):
            assert PLACE in (await node.answer(a_user(*roles), request))[1]
        for roles in (("operator:blog",), ("viewer:news", "operator:blog")):
            assert await node.answer(a_user(*roles), request) == (404, f"No such container: {ID}")
            error = NotFound(f"No such container: {ID}")
            target = f"/v1.41/containers/{ID}/exec"  # refused by the front
            assert await node.places.add_place(error, target, a_user(*roles)) is error
        named = await node.places.add_place(
            NotFound(f"No such container: {ID}"), target, a_user("operator:shop")
        )
        assert str(named).endswith(f"{PLACE} skep exec shop_web.2 COMMAND")


async def test_a_silent_manager_does_not_delay_the_error(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def never(_request: web.Request) -> web.StreamResponse:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError("not reached")

    plain = (404, f"No such container: {ID}")
    async with a_cluster(tmp_path, never, PlaceLimits(within_s=0.05)) as node:
        assert await node.answer(ROOT, f"GET /containers/{ID}/json") == plain
        assert asked.is_set()
    # Nor do many errors at one moment ask many times.
    (tmp_path / "another").mkdir()
    async with a_cluster(tmp_path / "another", never, PlaceLimits(within_s=30.0, asked=0)) as node:
        assert await node.answer(ROOT, f"GET /containers/{ID}/json") == plain


@pytest.mark.parametrize("body", [b"", b"[]", b'{"Name": 5}', b"no json"])
async def test_an_odd_answer_of_a_manager_changes_no_error(tmp_path: Path, body: bytes) -> None:
    async def odd(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=body)

    async with a_cluster(tmp_path, odd) as node:
        assert await node.answer(ROOT, f"GET /containers/{ID}/json") == (404, f"No such container: {ID}")

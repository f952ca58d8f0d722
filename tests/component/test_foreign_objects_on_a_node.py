"""For a user of one stack, a node answers about an object of others as about a missing one.

Each request is sent to two nodes.  One of them also has containers, an exec and volumes of other stacks and of none.
"""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote

import msgspec
import pytest
from aiohttp import web
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.access.identity import identify
from skep.api.http.framing import with_target
from skep.api.http.server import application, runner
from skep.engine.api.commits import commit_routes
from skep.engine.api.containers import container_routes
from skep.engine.api.images import image_routes
from skep.engine.api.routes import absent_routes
from skep.engine.api.volumes import volume_routes
from skep.engine.containers.container import ExecConfig
from skep.engine.engine import Engine
from skep.engine.images.store import ImageStore
from skep.errors import SkepError
from skep.model.options.labels import LABEL_TASK_ID
from skep.model.permissions.access import Identity, Origin, parse_binding
from skep.model.values.stacks import STACK_LABEL
from skep.node.authorization import NodeObjects
from skep.node.docker.docker_engine import DockerEngine, with_containers_of
from skep.node.front.routing import Destination, LocalObjects, route
from skep.node.front.server import refusal
from skep.node.front.task_requests import as_task_request
from skep.node.routes.cluster_networks import ClusterNetworks
from tests.support.engine.oci_rig import Machine, memory_engine, new_container
from tests.support.engine.stub_engine import NoImages

ROLES = ("viewer:shop", "operator:shop", "viewer:shop operator:news")
FOREIGN = ("blog.1", "tool")
"""A container of another stack, and a plain one."""


class OwnEngine:
    """A Docker Engine with one container, which no user of a stack sees."""

    async def containers(self, request: web.Request) -> list[Any]:
        return [{"Id": "d" * 64, "Created": 0, "Names": ["/theirs"]}]


class Node:
    def __init__(self, engine: Engine, new_handler: Any, *, has_docker_engine: bool) -> None:
        self.engine = engine
        self._new_handler = new_handler
        self._objects = LocalObjects(engine, has_docker_engine=has_docker_engine)
        self.names = {one.id: one.name for one in engine.list() if one.stack == "shop"}

    async def answer(self, roles: str, request: str) -> str:
        """Return the whole response, or the destination of the request if this node does not answer it."""
        method, target = request.split(" ", 1)
        identity = Identity(
            name="ann", origin=Origin.TOKEN, bindings=tuple(map(parse_binding, roles.split()))
        )
        raw = f"{method} {target} HTTP/1.1\r\nHost: n\r\nContent-Length: 2\r\nConnection: close\r\n\r\n"
        try:
            if changed := as_task_request(identity, method, target, self._objects):
                raw = with_target(raw.encode(), changed).decode()
                target = changed
        except SkepError as error:
            return refusal(error).decode()
        destination = route(method, target, self._objects, identity)
        if destination is not Destination.HERE:
            return f"{destination.value}: {self._masked(target)}"
        ours, theirs = socket.socketpair()
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(self._new_handler, theirs)
        identify(transport, identity)
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(raw.encode() + b"{}")
        try:
            async with asyncio.timeout(10):
                found = (await reader.read()).decode()
        finally:
            writer.close()
            transport.abort()
        return self._masked(found)

    def _masked(self, text: str) -> str:
        for id, name in self.names.items():
            text = text.replace(id, name)
        text = re.sub(r"Date: [^\r]+|Content-Length: \d+", "", text)
        text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?", "TIME", text)
        text = re.sub(r'"Created":\d+|"EndpointID":"\w+"|Up [^"]+', "", text)
        return re.sub(r"/[^\s\"]*/(with|without)/", "/", text)


class NamedImages(NoImages):
    """A store that finds images by their names."""

    def __init__(self, images: Mapping[str, object]) -> None:
        self.lookup = images.get


@asynccontextmanager
async def a_node(directory: Path, *, has_foreign: bool, has_docker_engine: bool) -> AsyncIterator[Node]:
    images = {
        "shop/app:1": SimpleNamespace(id="sha256:" + "aa" * 32, references=(), size_bytes=1),
        "blog/app:1": SimpleNamespace(id="sha256:" + "aa" * 32, references=(), size_bytes=1),
        "sha256:" + "aa" * 32: SimpleNamespace(id="sha256:" + "aa" * 32, references=(), size_bytes=1),
    }
    if not has_foreign:
        del images["blog/app:1"]
    engine = memory_engine(directory, Machine(), images=cast("ImageStore", NamedImages(images)))
    async with engine.running():
        # ``since`` and ``limit`` count in the order of creation.
        for name, stack in (("blog.1", "blog"), ("shop.1", "shop"), ("tool", ""), ("shop.2", "shop")):
            if has_foreign or stack == "shop":
                image = f"{stack or 'blog'}/app:1"
                new = replace(new_container(name), image=image, image_id="sha256:" + "aa" * 32, stack=stack)
                labels = {LABEL_TASK_ID: f"t{name.replace('.', '')}"} if stack else {}
                await engine.start((await engine.add(replace(new, labels=labels))).id)
        for name, stack in (("shop_data", "shop"), ("blog_data", "blog"), ("tools", "")):
            if has_foreign or stack == "shop":
                labels = {STACK_LABEL: stack} if stack else {}
                await engine.volumes.create(name, labels=labels)
        clock = SystemClock()
        routes: tuple[web.AbstractRouteDef, ...] = (
            *container_routes(engine, clock),
            *commit_routes(engine, clock),
            *volume_routes(engine.volumes, engine.list),
            *image_routes(engine.images, tuple, clock=clock),
            *absent_routes(),
        )
        if has_docker_engine:
            routes = with_containers_of(cast("DockerEngine", OwnEngine()), routes)
        served = runner(application(routes, objects=NodeObjects(engine, cast("ClusterNetworks", None))))
        await served.setup()
        try:
            yield Node(engine, served.server, has_docker_engine=has_docker_engine)
        finally:
            await served.cleanup()


def listed(**filters: str) -> str:
    return "/containers/json?filters=" + quote(
        msgspec.json.encode({name: [word] for name, word in filters.items()}).decode()
    )


def requests(words: list[str], execs: list[str]) -> list[str]:
    """Every request about containers, execs, images and volumes."""
    found = ["GET /containers/json", *(f"GET /containers/json?limit={number}" for number in (1, 2, 3))]
    for word in words:
        names = ("before", "since", "name", "id", "volume", "network")
        found += [f"GET {listed(**{name: word})}" for name in names]
        found += [f"GET /containers/{word}/{what}" for what in ("json", "logs?stdout=1", "stats?stream=0")]
        found += [f"GET /containers/{word}/{what}" for what in ("top", "changes", "export", "archive?path=/")]
        for what in ("start", "stop", "restart", "pause", "unpause", "kill", "rename?name=x", "update"):
            found.append(f"POST /containers/{word}/{what}")
        for what in ("exec", "attach?stream=1", "wait", "resize?h=1&w=1"):
            found.append(f"POST /containers/{word}/{what}")
        found += [f"DELETE /containers/{word}", f"PUT /containers/{word}/archive?path=/"]
        found += [f"GET /containers/{word}/attach/ws", f"POST /commit?container={word}"]
    for id in execs:
        found += [f"GET /exec/{id}/json", f"POST /exec/{id}/start", f"POST /exec/{id}/resize?h=1&w=1"]
    for image in ("blog/app:1", "nosuch:1", "sha256:aaaa", "sha256:" + "aa" * 32, "shop/app:1"):
        found.append(f"GET {listed(ancestor=image)}")
    for image in ("blog/app:1", "nosuch:1"):
        found += [f"GET /images/{image}/json", f"GET /images/{image}/history", f"DELETE /images/{image}"]
        found += [
            f"POST /images/{image}/tag?repo=x",
            f"POST /images/{image}/push",
            f"GET /images/{image}/get",
        ]
    for volume in ("blog_data", "tools", "nosuch"):
        found += [f"GET /volumes/{volume}", f"DELETE /volumes/{volume}"]
        found.append("GET /volumes?filters=" + quote(f'{{"name":["{volume}"]}}'))
    found += ["GET /volumes", "GET /system/df", "POST /containers/prune", "POST /volumes/prune"]
    return found


@pytest.mark.parametrize("has_docker_engine", [False, True])
async def test_an_object_of_others_is_answered_as_a_missing_one(
    has_docker_engine: bool, tmp_path: Path
) -> None:
    different = []
    async with (
        a_node(tmp_path / "with", has_foreign=True, has_docker_engine=has_docker_engine) as one,
        a_node(tmp_path / "without", has_foreign=False, has_docker_engine=has_docker_engine) as other,
    ):
        foreign = [one.engine.get(name) for name in FOREIGN]
        words = [*FOREIGN, *(each.id for each in foreign), *(each.id[:12] for each in foreign), "nosuch"]
        execs = [one.engine.execs.create(each.id, ExecConfig(command=("id",))) for each in foreign]
        asked = requests(words, [*execs, "e" * 64])
        for roles in ROLES:
            for request in asked:
                answers = [await node.answer(roles, request) for node in (one, other)]
                if answers[0] != answers[1]:
                    different.append((roles, request, *answers))
        own = await one.answer("viewer:shop", "GET /containers/json?limit=2")
        assert re.findall(r'"Names":\["/([^"]+)"\]', own) == ["shop.2", "shop.1"], "others do not count"
    assert not different, "\n".join(map(str, different))


async def test_docker_inspect_of_a_service_name_passes_each_kind_that_its_user_may_not_read(
    tmp_path: Path,
) -> None:
    """The command stops its search at the first error other than 404."""
    search = {
        "/containers/shop_web/json": "No such container: shop_web",
        "/images/shop_web/json": "No such image: shop_web (the role viewer of the whole cluster is needed",
        "/images/blog/app:1/json": "No such image: blog/app:1 (the role viewer of the whole cluster is needed",
        "/volumes/shop_web": "get shop_web: no such volume",
        "/plugins/shop_web/json": 'plugin \\"shop_web\\" not found (the role viewer of the whole cluster is needed',
    }
    async with a_node(tmp_path, has_foreign=True, has_docker_engine=False) as node:
        for path, message in search.items():
            answer = await node.answer("operator:shop", f"GET {path}")
            assert answer.startswith("HTTP/1.1 404 "), (path, answer)
            assert message in answer
        for path in ("/images/json", "/plugins", "/images/shop_web/history"):
            assert (await node.answer("operator:shop", f"GET {path}")).startswith("HTTP/1.1 403 "), path


async def test_names_of_a_nodes_networks_cannot_be_tried(tmp_path: Path) -> None:
    """The node compares the name with its own networks before the manager checks the rights."""

    async def conflict(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=409)

    objects = NodeObjects(None, cast("ClusterNetworks", None))
    served = runner(application([web.post("/networks/create", conflict)], objects=objects))
    await served.setup()
    identity = Identity(name="ann", origin=Origin.TOKEN, bindings=(parse_binding("operator:shop"),))
    statuses = {}
    for name, stack in (("blog_net", "shop"), ("blog_net", "blog"), ("blog_net", ""), ("shop_net", "shop")):
        ours, theirs = socket.socketpair()
        assert served.server is not None
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(served.server, theirs)
        identify(transport, identity)
        reader, writer = await asyncio.open_connection(sock=ours)
        data = msgspec.json.encode({"Name": name, "Driver": "overlay", "Labels": {STACK_LABEL: stack}})
        head = f"POST /networks/create HTTP/1.1\r\nHost: n\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        statuses[name, stack] = int((await reader.readuntil(b"\r\n")).split()[1])
        writer.close()
        transport.abort()
    await served.cleanup()
    assert statuses == {
        ("blog_net", "shop"): 403,
        ("blog_net", "blog"): 403,
        ("blog_net", ""): 403,
        ("shop_net", "shop"): 409,
    }

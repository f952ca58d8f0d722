"""The images and volumes of a node and of the engine beside it, through the API.

The engine is Skep's own image routes on a socket of their own, with a store of their own.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from aiohttp import web

from skep.agent.executor.interface import Rejected
from skep.agent.executor.pulling import ImagePuller
from skep.aio.clock import SystemClock
from skep.api.client.client import ApiClient
from skep.api.http.server import application
from skep.api.http.versions import NEWEST
from skep.engine.api.images import image_routes
from skep.engine.api.volumes import volume_routes
from skep.engine.images.removal import ImageUser
from skep.engine.images.store import ImageStore
from skep.engine.volumes.volumes import Volumes
from skep.errors import NotFound, SkepError
from skep.node.docker.docker_engine import DockerEngine
from skep.node.docker.engine_images import EngineImages
from skep.node.routes.docker_objects import with_objects_of
from tests.support.images.archives import a_config, a_docker_archive, a_file, a_tar, sha256

CLOCK = SystemClock()


def an_archive(name: str, content: str) -> bytes:
    return a_docker_archive(a_tar(a_file("file", content.encode())), tags=(name,))


def id_of(content: str) -> str:
    return sha256(a_config(a_tar(a_file("file", content.encode()))))


class Machine:
    """``ours``: this node's images; ``theirs``: the engine's; ``api``: what a client of this node sees."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ours, self.theirs = ImageStore(directory / "ours"), ImageStore(directory / "theirs")
        self.our_volumes, self.their_volumes = Volumes(directory / "v1"), Volumes(directory / "v2")
        self.our_users: list[ImageUser] = []
        self.their_users: list[ImageUser] = []
        self.docker = DockerEngine(ApiClient.local(directory / "theirs.sock", "the engine"))
        self.beside = self.new_beside()
        self.api = ApiClient.local(directory / "ours.sock", "this node")
        self.puller = ImagePuller(self.ours, CLOCK, self.bring)

    def new_beside(self) -> EngineImages:
        return EngineImages(self.docker, self.ours, lambda: self.our_users, self.directory / "engine.json")

    async def bring(self, word: str) -> None:
        await self.beside.bring(word)

    async def load(self, store: ImageStore, name: str, content: str) -> str:
        async def pieces() -> AsyncIterator[bytes]:
            yield an_archive(name, content)

        await store.load(pieces())
        return id_of(content)

    async def listed(self) -> dict[str, list[str]]:
        found: list[dict[str, Any]] = await self.api.get("/v1.41/images/json")
        return {name: [one["Id"] for one in found if name in one["RepoTags"]] for name in names(found)}


def names(found: list[dict[str, Any]]) -> set[str]:
    return {name for one in found for name in one["RepoTags"]}


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    with tempfile.TemporaryDirectory() as directory:
        machine = Machine(Path(directory))
        await machine.ours.open()
        await machine.theirs.open()
        routes = (
            *image_routes(machine.ours, lambda: machine.our_users),
            *volume_routes(machine.our_volumes, list),
        )
        of_engine = (
            *image_routes(machine.theirs, lambda: machine.their_users),
            *volume_routes(machine.their_volumes, list),
        )
        async with AsyncExitStack() as stack:
            for name, found in (
                ("theirs", of_engine),
                ("ours", with_objects_of(machine.docker, machine.beside, machine.our_volumes, tuple(routes))),
            ):
                runner = web.AppRunner(application(found, newest=NEWEST))
                await runner.setup()
                stack.push_async_callback(runner.cleanup)
                await web.UnixSite(runner, str(machine.directory / f"{name}.sock")).start()
            await stack.enter_async_context(machine.docker.api)
            await stack.enter_async_context(machine.api)
            yield machine


async def test_a_service_finds_what_the_engine_has(machine: Machine) -> None:
    await machine.load(machine.theirs, "localhost:1/app:1", "first")
    assert (await machine.puller.image("localhost:1/app:1", "")).id == id_of("first")
    with pytest.raises(Rejected):
        await machine.puller.image("localhost:1/nothing:1", "")


async def test_a_service_finds_what_the_engine_has_built_anew_under_the_same_name(machine: Machine) -> None:
    await machine.load(machine.theirs, "localhost:1/app:1", "first")
    await machine.puller.image("localhost:1/app:1", "")
    await machine.beside.reconcile()
    await machine.load(machine.theirs, "localhost:1/app:1", "second")
    assert (await machine.puller.image("localhost:1/app:1", "")).id == id_of("second")


async def test_a_name_that_moved_in_the_engine_is_not_this_nodes_any_more(machine: Machine) -> None:
    await machine.load(machine.ours, "app:1", "first")
    await machine.load(machine.theirs, "app:1", "first")
    await machine.beside.reconcile()
    await machine.load(machine.theirs, "app:1", "second")
    later = machine.new_beside()  # as after a restart of the node
    await later.reconcile()
    assert machine.ours.lookup("app:1") is None
    assert (await machine.listed())["app:1"] == [id_of("second")]


async def test_what_this_node_pulled_or_loaded_last_is_handed_to_the_engine(machine: Machine) -> None:
    await machine.load(machine.theirs, "app:1", "first")
    await machine.beside.reconcile()
    await machine.load(machine.ours, "app:1", "second")
    await machine.beside.reconcile()
    assert machine.ours.get("app:1").id == id_of("second")
    await machine.beside.hand_over("app:1")
    assert machine.theirs.get("app:1").id == id_of("second")
    assert (await machine.puller.image("app:1", "")).id == id_of("second")


async def test_what_both_had_before_they_were_first_compared_stays(machine: Machine) -> None:
    await machine.load(machine.ours, "app:1", "ours")
    await machine.load(machine.theirs, "app:1", "theirs")
    await machine.beside.bring("app:1")
    await machine.beside.reconcile()
    assert machine.ours.get("app:1").id == id_of("ours")
    assert machine.theirs.get("app:1").id == id_of("theirs")


async def test_there_is_one_list_and_one_removal(machine: Machine) -> None:
    for store in (machine.ours, machine.theirs):
        await machine.load(store, "both:1", "both")
    await machine.load(machine.ours, "ours:1", "ours")
    await machine.load(machine.theirs, "theirs:1", "theirs")
    assert await machine.listed() == {
        "both:1": [id_of("both")],
        "ours:1": [id_of("ours")],
        "theirs:1": [id_of("theirs")],
    }
    removed = await machine.api.delete("/v1.41/images/both:1")
    assert removed.count({"Untagged": "both:1"}) == 1
    assert machine.ours.lookup("both:1") is machine.theirs.lookup("both:1") is None
    await machine.api.post("/v1.41/images/prune", filters='{"dangling":["false"]}')
    assert await machine.listed() == {}


async def test_an_image_of_a_plain_container_is_not_removed(machine: Machine) -> None:
    for store in (machine.ours, machine.theirs):
        await machine.load(store, "both:1", "both")
    machine.their_users.append(ImageUser("c" * 64, id_of("both"), is_running=True))
    with pytest.raises(SkepError, match="conflict"):
        await machine.api.delete("/v1.41/images/both:1")
    assert await machine.listed() == {"both:1": [id_of("both")]}


async def test_an_image_of_the_engine_is_saved_beside_this_nodes(machine: Machine) -> None:
    await machine.load(machine.ours, "ours:1", "ours")
    await machine.load(machine.theirs, "theirs:1", "theirs")
    async with machine.api.stream("/v1.41/images/get?names=ours:1&names=theirs:1") as stream:
        archive = b"".join([piece async for piece in stream.pieces()])
    assert b"ours:1" in archive
    assert b"theirs:1" in archive


async def test_without_the_engine_this_nodes_images_are_listed_and_used(machine: Machine) -> None:
    await machine.load(machine.ours, "localhost:1/ours:1", "ours")
    (machine.directory / "theirs.sock").unlink()
    await machine.docker.api.__aexit__(None, None, None)
    await machine.docker.api.__aenter__()
    assert await machine.listed() == {"localhost:1/ours:1": [id_of("ours")]}
    assert (await machine.puller.image("localhost:1/ours:1", "")).id == id_of("ours")


async def test_volumes_of_services_are_listed_inspected_and_removed_beside_the_engines(
    machine: Machine,
) -> None:
    machine.our_volumes.ensure("of-service", {"a": "b"})
    await machine.api.post("/v1.41/volumes/create", {"Name": "plain"})
    assert machine.their_volumes.names() == ["plain"]
    listed = await machine.api.get("/v1.41/volumes")
    assert sorted(one["Name"] for one in listed["Volumes"]) == ["of-service", "plain"]
    assert (await machine.api.get("/v1.41/volumes/of-service"))["Labels"] == {"a": "b"}
    await machine.api.delete("/v1.41/volumes/of-service")
    await machine.api.delete("/v1.41/volumes/plain")
    assert machine.our_volumes.names() == machine.their_volumes.names() == []
    with pytest.raises(NotFound):
        await machine.api.get("/v1.41/volumes/of-service")


async def engines(machine: Machine) -> dict[str, str]:
    """What the engine has: name -> id."""
    return {name: one["Id"] for one in await machine.docker.images() for name in one["RepoTags"] or ()}


async def test_a_build_of_the_engine_finds_what_users_have_brought_here(machine: Machine) -> None:
    await machine.load(machine.ours, "loaded:1", "loaded")
    await machine.api.request("POST", "/v1.41/images/loaded:1/tag", query={"repo": "tagged", "tag": "2"})
    await machine.load(machine.ours, "of-tasks:1", "of-tasks:1")
    await machine.beside.note_given(["loaded:1", "nosuch:1"])
    beside = machine.new_beside()  # another process of the node
    await beside.hand_over_given()
    assert await engines(machine) == {"loaded:1": id_of("loaded"), "tagged:2": id_of("loaded")}
    await machine.load(machine.theirs, "loaded:1", "built anew")
    await beside.hand_over_given()
    assert (await engines(machine))["loaded:1"] == id_of("built anew"), "the engine's has changed last"


async def test_an_engine_that_does_not_respond_fails_no_build_here(machine: Machine) -> None:
    await machine.load(machine.ours, "loaded:1", "loaded")
    await machine.beside.note_given(["loaded:1"])
    gone = DockerEngine(ApiClient.local(machine.directory / "nosuch.sock", "the engine"))
    async with gone.api:
        beside = EngineImages(gone, machine.ours, list, machine.directory / "engine.json")
        await beside.hand_over_given()


class OtherIds(DockerEngine):
    """An engine that identifies images by their manifests.

    The call ``slow`` stops at ``gate`` while the engine's app:1 is the image ``stage``.
    """

    def __init__(self, machine: Machine, slow: str = "") -> None:
        super().__init__(machine.docker.api)
        self.slow, self.stage = slow, ""
        self.reached, self.gate = asyncio.Event(), asyncio.Event()
        self.loads = 0
        self._store = machine.theirs
        machine.docker = self
        machine.beside = machine.new_beside()

    async def _stop(self, name: str) -> None:
        if name == self.slow and self._store.get("app:1").id == self.stage:
            self.reached.set()
            await self.gate.wait()

    async def images(
        self, query: Mapping[str, str] = MappingProxyType({}), path: str = "/images/json"
    ) -> list[Any]:
        found = [{**one, "Id": f"{one['Id']}-manifest"} for one in await super().images(query, path)]
        await self._stop("images")
        return found

    async def image_id(self, word: str) -> str:
        found = await super().image_id(word)
        await self._stop("image_id")
        return f"{found}-manifest" if found else ""

    async def load(self, archive: AsyncIterable[bytes]) -> None:
        self.loads += 1
        await super().load(archive)


@pytest.mark.parametrize("slow", ["images", "image_id"])
async def test_a_copy_to_the_engine_beside_a_comparison_keeps_the_name_here(
    machine: Machine, slow: str
) -> None:
    engine = OtherIds(machine, slow)
    await machine.load(machine.theirs, "app:1", "first")
    await machine.beside.reconcile()
    await machine.load(machine.ours, "app:1", "second")
    engine.stage = id_of("first" if slow == "images" else "second")
    works = [machine.beside.reconcile, partial(machine.beside.hand_over, "app:1")]
    if slow == "image_id":
        works.reverse()
    first = asyncio.create_task(works[0]())
    await engine.reached.wait()
    second = asyncio.create_task(works[1]())
    await asyncio.wait([second], timeout=1.5)
    engine.gate.set()
    await asyncio.gather(first, second)
    await machine.beside.reconcile()
    assert machine.ours.get("app:1").id == id_of("second")


async def test_two_builds_at_the_same_moment_copy_an_image_once(machine: Machine) -> None:
    engine = OtherIds(machine)
    await machine.load(machine.ours, "app:1", "first")
    await asyncio.gather(*(machine.beside.hand_over("app:1") for _ in range(2)))
    assert engine.loads == 1
    assert machine.theirs.get("app:1").id == id_of("first")

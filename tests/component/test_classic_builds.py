"""Requests of classic builds: what a request that waits costs, and clients that send nothing."""

import asyncio
import gzip
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from skep.aio.clock import SystemClock
from skep.aio.slots import Slots
from skep.api.http.server import application
from skep.engine.api import builds
from skep.engine.build.builder import Builder
from skep.engine.build.cache.cache import CacheKey
from skep.engine.build.files.remotes import repository_address
from skep.engine.build.interface import BuildResult
from skep.engine.images.local import ImageEvent
from skep.engine.images.store import ImageStore
from tests.support.images.archives import a_file, a_tar
from tests.support.managers.wire_rig import until

pytestmark = pytest.mark.needs("root")

EXPECTED = "filter expects a duration (e.g., '24h') or a timestamp"
CONTEXT = a_tar(a_file("Dockerfile", b"FROM scratch\nENV A=1\n"))


class NotingBuilder(Builder):
    """Notes in ``found`` which files are on the disk when a build begins."""

    found: list[Path]

    async def build_in_slot(self, *words: Any, **options: Any) -> BuildResult:
        self.found = [path for path in self.images.scratch.rglob("*") if path.is_file()]
        return await super().build_in_slot(*words, **options)


class Rig:
    """The routes of builds at a socket; no engine below, so that no step runs."""

    def __init__(self, socket: Path, builder: NotingBuilder, events: Sequence[ImageEvent]) -> None:
        self.builder = builder
        self.events = events
        self.scratch = builder.images.scratch
        self._socket = socket

    async def post(
        self, body: bytes | AsyncIterator[bytes], *, path: str = "build", **query: str
    ) -> tuple[int, str]:
        connector = aiohttp.UnixConnector(str(self._socket))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(f"http://d/v1.41/{path}", data=body, params=query) as response,
        ):
            return response.status, await response.text()

    async def prune(self, filters: Mapping[str, Sequence[str]], **query: str) -> tuple[int, Any]:
        status, text = await self.post(b"", path="build/prune", filters=json.dumps(filters), **query)
        answer = json.loads(text)
        return status, answer.get("message", answer)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    events: list[ImageEvent] = []
    images = ImageStore(tmp_path / "images", on_event=events.append)
    await images.open()
    engine: Any = SimpleNamespace(images=images)
    builder = NotingBuilder(engine, tmp_path / "builds", SystemClock())
    builder.slots = Slots(1, 1, "builds are at work on this node")
    runner = web.AppRunner(application(builds.build_routes(builder)), handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "api")).start()
    yield Rig(tmp_path / "api", builder, events)
    await runner.cleanup()


async def test_nothing_of_a_request_is_unpacked_before_its_build_has_a_slot(rig: Rig) -> None:
    async with rig.builder.slots.hold():
        waiting = asyncio.create_task(rig.post(CONTEXT))
        await until(lambda: rig.builder.slots.waiting)
        status, text = await rig.post(CONTEXT)
        assert (status, "1 builds are at work on this node and 1 wait" in text) == (500, True), text
        assert not list(rig.scratch.iterdir())
    status, text = await waiting
    assert (status, "Successfully built" in text) == (200, True), text
    assert not list(rig.scratch.iterdir())


async def test_a_new_image_has_an_event_with_or_without_a_name(rig: Rig) -> None:
    for tags in ({}, {"t": "made:1"}):
        assert (await rig.post(CONTEXT, **tags))[0] == 200
    assert [one.action for one in rig.events] == ["create", "create", "tag"]
    assert {one.id for one in rig.events} == {rig.builder.images.get("made:1").id}


async def test_a_client_that_stops_sending_gives_its_slot_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builds, "_SILENT_S", 0.2)
    ended = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield CONTEXT[:700]
        await ended.wait()

    silent = asyncio.create_task(rig.post(body()))
    await until(lambda: list(rig.scratch.iterdir()))
    status, text = await rig.post(CONTEXT)
    assert (status, "Successfully built" in text) == (200, True), text
    ended.set()
    await asyncio.wait([silent])
    assert not list(rig.scratch.iterdir())


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"until": ["rubbish"]}, f'"until" {EXPECTED}: failed to parse value as time or duration: "rubbish"'),
        (
            {"unused-for": ["1 d"]},
            f'"unused-for" {EXPECTED}: failed to parse value as time or duration: "1 d"',
        ),
        ({"until": ["1h", "2h"]}, "filters expect only one value"),
        ({"until": ["1h"], "unused-for": ["1h"]}, 'conflicting filters: "until" and "unused-for"'),
        ({"bogus": ["1"]}, "Invalid filter 'bogus'"),
    ],
)
async def test_a_prune_refuses_a_wrong_filter_as_the_engine_does(
    rig: Rig, filters: dict[str, list[str]], message: str
) -> None:
    assert await rig.prune(filters) == (400, f"failed to prune build cache: {message}")


async def test_a_prune_never_removes_more_than_its_filters_and_bounds_select(rig: Rig) -> None:
    async with rig.builder.mounts.hold(CacheKey(id="kept"), "shared"):
        pass
    nothing = (200, {"CachesDeleted": None, "SpaceReclaimed": 0})
    filtered: tuple[dict[str, list[str]], ...] = (
        {"until": ["1h"]},
        {"unused-for": ["1h"]},
        {"until": ["0s"], "label": ["a"]},
        {"label": ["a"]},
        {"label!": ["a"]},
    )
    for filters in filtered:
        assert await rig.prune(filters) == nothing
    for name in ("id", "parent", "type", "description", "inuse", "shared", "private"):
        refusal = f"docker builder prune --filter {name} is not supported"
        assert await rig.prune({name: ["x"]}) == (501, refusal)
    for name in ("keep-storage", "reserved-space", "max-used-space", "min-free-space"):
        assert await rig.prune({}, **{name: "1"}) == (501, f"docker builder prune --{name} is not supported")
    assert (await rig.prune({}))[1]["CachesDeleted"]


async def test_a_prune_until_a_time_removes_what_no_build_has_used_since(rig: Rig) -> None:
    """As ``docker system prune --filter until=24h`` does every night."""
    mounts, old, new = rig.builder.mounts, CacheKey(id="old"), CacheKey(id="new")
    for key in (old, new):
        async with mounts.hold(key, "shared") as place:
            os.utime(place, (0, 0))
    os.utime(place.with_name(old.name), (time.time() - 7200, time.time() - 7200))
    removed = {"CachesDeleted": [old.name], "SpaceReclaimed": 0}
    assert await rig.prune({"until": ["1h"]}) == (200, removed)
    assert list(mounts.sizes()) == [new.name]


async def test_what_an_interrupted_build_has_left_goes_with_the_next_start(tmp_path: Path) -> None:
    images = ImageStore(tmp_path / "images")
    await images.open()
    for directory in (images.scratch / "context-1", images.contexts / "0123"):
        directory.mkdir(parents=True)
        (directory / "file").write_text("of a client")
    again = ImageStore(tmp_path / "images")
    await again.open()
    await again.settle()
    assert not [path for path in (tmp_path / "images").rglob("*") if path.name == "file"]


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    """A web server with an archive, a Dockerfile and a repository."""
    place = tmp_path / "www"
    source = tmp_path / "source"
    for directory in (place, source / "app"):
        directory.mkdir(parents=True)
    dockerfile = "FROM scratch\nCOPY file /\n"
    for name, content in (("Dockerfile", dockerfile), ("file", "fetched"), (".dockerignore", "ignored\n")):
        (source / "app" / name).write_text(content)
    members = [a_file("Other", dockerfile.encode()), a_file("file", b"fetched")]
    (place / "c.tar.gz").write_bytes(gzip.compress(a_tar(*members)))
    (place / "Dockerfile").write_text("FROM scratch\nENV A=b\n")
    script = (
        "git init -q && git add . && git -c user.name=x -c user.email=x@y commit -qm one"
        f" && git clone -q --bare . {place}/r.git && git -C {place}/r.git update-server-info"
    )
    subprocess.run(  # noqa: ASYNC221 - milliseconds
        ["sh", "-ec", script], cwd=source, check=True, env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    )
    app = web.Application()
    app.router.add_static("/", place)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.mark.parametrize(
    ("place", "options", "step"),
    [
        ("c.tar.gz", {"dockerfile": "Other"}, "COPY file /"),
        ("Dockerfile", {}, "ENV A=b"),
        ("r.git#:app", {}, "COPY file /"),
    ],
)
async def test_a_context_is_fetched_from_an_address(
    rig: Rig, address: str, place: str, options: dict[str, str], step: str
) -> None:
    """``remote=`` of docker-py: an archive, a Dockerfile alone, a repository."""
    status, said = await rig.post(b"", remote=f"{address}/{place}", t="fetched:1", **options)
    assert status == 200, said
    assert f"Step 2/2 : {step}" in said
    assert "Successfully tagged fetched:1" in said, said
    assert not list(rig.scratch.iterdir())


@pytest.mark.parametrize(
    ("remote", "status", "text"),
    [
        ("http://ann:pa55word@127.0.0.1:1/x.tar", 503, "xxxxx:xxxxx@127.0.0.1:1"),
        (
            "http://ann:pa55word@127.0.0.1:1/x.git",
            503,
            "failed to fetch http://xxxxx:xxxxx@127.0.0.1:1/x.git",
        ),
        ("/etc", 500, "remoteURL (/etc) could not be recognized as URL"),
        ("file:///etc", 500, "could not be recognized as URL"),
    ],
)
async def test_an_address_that_gives_no_context_fails_the_build(
    rig: Rig, remote: str, status: int, text: str
) -> None:
    found, said = await rig.post(b"", remote=remote)
    assert (found, text in said, "pa55word" in said) == (status, True, False), said


@pytest.mark.parametrize(
    ("address", "is_repository"),
    [
        ("github.com/user/app", True),
        ("https://github.com/user/app.git#main:web", True),
        ("https://github.com/user/app/archive/main.tar.gz", False),
        ("https://example.com/app.tar", False),
    ],
)
def test_an_archive_of_a_site_with_repositories_is_downloaded(address: str, is_repository: bool) -> None:
    assert bool(repository_address(address)) is is_repository


async def test_the_archive_of_a_context_is_not_kept_during_the_build(rig: Rig, address: str) -> None:
    status, said = await rig.post(b"", remote=f"{address}/c.tar.gz", dockerfile="Other")
    assert (status, "Successfully built" in said) == (200, True), said
    assert [path.name for path in sorted(rig.builder.found)] == ["Other", "file"]


async def test_further_cache_sources_are_left_out(rig: Rig) -> None:
    names = []
    for number in range(18):
        content = a_tar(a_file("Dockerfile", b"FROM scratch\nENV A=%d\n" % number))
        await rig.post(content, t=f"image:{number}")
        names.append(f"image:{number}")
    for query in ({}, {"q": "1"}):
        status, said = await rig.post(CONTEXT, cachefrom=json.dumps(names), **query)
        warning = "[Warning] 2 cache sources are not used: a build has at most 16"
        assert (status, warning in said) == (200, not query)


async def test_with_cache_sources_other_steps_of_this_node_are_not_used(rig: Rig) -> None:
    """As in moby 20.10, image/cache/cache.go (ImageCache.GetCache)."""
    await rig.post(CONTEXT, t="first:1")
    for names, is_used in (([], True), (["first:1"], True), (["gone:1"], False)):
        status, said = await rig.post(CONTEXT, cachefrom=json.dumps(names))
        assert (status, "Using cache" in said) == (200, is_used), names

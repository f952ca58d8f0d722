"""BuildKit's protocols over real connections: sessions, files of clients, builds, and clients that are hostile."""

import asyncio
import tarfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web

from skep.aio.clock import SystemClock
from skep.api.http.server import application
from skep.engine.build.interface import BuildRequest, BuildResult, BuildStep, OpenContext, Progress, Provider
from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.caches import Caches
from skep.engine.buildkit.contexts import ContextStore
from skep.engine.buildkit.protocol.control import Control
from skep.engine.buildkit.protocol.sessions import SESSIONS_MAX, BuildSessions
from skep.engine.buildkit.routes import BuildKit, buildkit_routes
from skep.engine.buildkit.solver import Solver
from skep.engine.containers.container import StandardStream
from skep.engine.images.archives.workers import ImageLimits
from skep.engine.images.digest import Digest
from skep.engine.images.reference import Reference
from skep.engine.images.store import ImageStore
from skep.rpc.status import CallFailed, StatusCode
from tests.support.builds.buildkit_client import (
    FileServer,
    Tree,
    a_file,
    a_link,
    control,
    session,
    session_by_call,
)
from tests.support.images.archives import a_file as archived
from tests.support.images.archives import a_tar, an_entry

IMAGE = Digest("sha256:" + "1" * 64)
DOCKERFILE = a_file("Dockerfile", "FROM scratch\nCOPY . /\n")
NOTHING: Tree = ()


def texts_below(root: Path) -> dict[str, str]:
    """The files below a directory, with their texts."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_text(errors="replace") for path in files}


class ReadingBuilds:
    """Builds that read the whole context.  A Dockerfile with ``sleep`` in it never ends."""

    def __init__(self) -> None:
        self.requests: list[BuildRequest] = []
        self.files: dict[str, str] = {}
        self.named: dict[str, dict[str, str]] = {}
        """Files of the named contexts."""
        self.padding_bytes = 0
        """Added to the archive of an image."""
        self.sleeps = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.images: dict[str, tuple[str, ...]] = {}
        """Variables of the images that are here."""
        self.indexes: list[tuple[tuple[Digest, ...], str]] = []
        """Images that were named together, with their names."""

    def env_of(self, name: str) -> tuple[str, ...] | None:
        return self.images.get(name)

    async def build(
        self,
        request: BuildRequest,
        context: OpenContext,
        progress: Progress,
        provider: Provider | None = None,
    ) -> BuildResult:
        self.requests.append(request)
        step = BuildStep(number=1, total=1, text="COPY . /")
        progress.started(step)
        if "sleep" in request.dockerfile:
            self.sleeps.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        self.files = texts_below(await context())
        self.named = {name: texts_below(await opened()) for name, opened in request.directories.items()}
        progress.output(step, StandardStream.STDOUT, b"read\n")
        progress.finished(step, IMAGE)
        return BuildResult(image_id=IMAGE)

    async def name_index(self, ids: Sequence[Digest], tags: Sequence[Reference]) -> Digest:
        self.indexes.append((tuple(ids), ",".join(map(str, tags))))
        return ids[0]

    @asynccontextmanager
    async def archive(self, image_id: Digest) -> AsyncIterator[AsyncIterator[bytes]]:
        assert image_id == IMAGE

        async def pieces() -> AsyncIterator[bytes]:
            yield a_tar(an_entry("dir", tarfile.DIRTYPE), archived("dir/file", b"content"))
            yield bytes(self.padding_bytes)

        yield pieces()


@dataclass
class Rig:
    socket: Path
    builds: ReadingBuilds
    kit: BuildKit
    directory: Path


@pytest.fixture
async def rig(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    sessions = getattr(request, "param", BuildSessions)()
    builds, limits = ReadingBuilds(), ImageLimits(archive_bytes_max=12_000)
    contexts = ContextStore(tmp_path / "contexts", limits)
    images = ImageStore(tmp_path / "images")
    await images.open()
    solver = Solver(builds, builds.archive, sessions, contexts, Caches(images), SystemClock(), job_wait_s=2.0)
    kit = BuildKit(sessions, solver, Control(sessions, solver, None))  # type: ignore[arg-type]  # no cache is asked for
    runner = web.AppRunner(application(buildkit_routes(kit)), handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "api")).start()
    yield Rig(tmp_path / "api", builds, kit, tmp_path / "contexts")
    await runner.cleanup()


def a_request(ref: str, session: str, **attributes: str) -> pb.SolveRequest:
    request = pb.SolveRequest(ref=ref, session=session, frontend="dockerfile.v0")
    request.frontend_attrs.update(attributes)
    request.exporters.add(type="moby").attrs["name"] = "made"
    return request


async def built(
    rig: Rig, ref: str, files: FileServer, *, key: str = "", **attributes: str
) -> pb.SolveResponse:
    async with session(rig.socket, f"s-{ref}", files, key=key), control(rig.socket) as calls:
        return await calls.solve(a_request(ref, f"s-{ref}", **attributes))


async def test_a_build_gets_the_files_of_its_client_and_its_image_has_its_names(rig: Rig) -> None:
    tree = (pb.Stat(path=b"d", mode=(1 << 31) | 0o755), b""), a_file("d/one", "1"), a_file("two", "22")
    files = FileServer([DOCKERFILE], [a_file(".dockerignore", "no*\n")], tree)
    async with session(rig.socket, "s", files), control(rig.socket) as calls:
        response, events = await asyncio.gather(calls.solve(a_request("r", "s")), calls.status("r"))
    assert rig.builds.files == {"d/one": "1", "two": "22"}
    assert dict(response.exporter_response) == {
        "containerimage.digest": IMAGE,
        "containerimage.config.digest": IMAGE,
        "image.name": "docker.io/library/made:latest",
    }
    names = [vertex.name for event in events for vertex in event.vertexes if vertex.HasField("completed")]
    assert "[internal] load build context" in names
    assert "[1/1] COPY . /" in names
    assert b"".join(log.msg for event in events for log in event.logs) == b"read\n"


async def test_a_context_that_comes_again_sends_only_what_changed(rig: Rig) -> None:
    trees: list[Tree] = [
        [a_file("gone", "1", mod_time=1), a_file("other", "1", mod_time=1), a_file("same", "1", mod_time=1)],
        [a_file("new", "2"), a_file("other", "2", mod_time=2), a_file("same", "1", mod_time=1)],
    ]
    requested = []
    for number, tree in enumerate(trees):
        files = FileServer([DOCKERFILE], NOTHING, tree)
        await built(rig, f"r{number}", files, key="k")
        requested.append([path for path in files.requested if path != "Dockerfile"])
    assert requested == [["gone", "other", "same"], ["new", "other"]]
    assert rig.builds.files == {"new": "2", "other": "2", "same": "1"}
    assert len(list(rig.directory.iterdir())) == 1
    await built(rig, "r3", files := FileServer([DOCKERFILE], NOTHING, trees[0]), key="another")
    assert "same" in files.requested


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../../etc/passwd", "/proc/self/environ"])
async def test_a_dockerfile_that_is_a_link_leads_no_further_than_its_context(rig: Rig, target: str) -> None:
    with pytest.raises(CallFailed, match="failed to read dockerfile: open Dockerfile: no such file"):
        await built(rig, "r", FileServer([a_link("Dockerfile", target)]))
    assert not rig.builds.requests


async def test_a_dockerfile_may_be_a_link_within_its_directory(rig: Rig) -> None:
    tree = [a_link("Dockerfile", "/real"), a_file("real", DOCKERFILE[1].decode())]
    await built(rig, "r", FileServer(tree, NOTHING, NOTHING))
    assert rig.builds.requests[0].dockerfile == DOCKERFILE[1].decode()


STAT, DATA, REQ = pb.Packet.STAT, pb.Packet.DATA, pb.Packet.REQ


@pytest.mark.parametrize(
    ("packets", "text"),
    [
        ([pb.Packet(type=DATA, id=1, data=b"x")], "data before it had listed"),
        ([pb.Packet(type=STAT, stat=pb.Stat(path=b"/out", mode=0o644))], "invalid path"),
        (
            [pb.Packet(type=STAT, stat=one[0]) for one in (a_link("a", "/"), a_file("a/b", "x"))],
            "out of order",
        ),
        ([pb.Packet(type=STAT, stat=a_file("a", "x" * 20_000)[0])], "larger than the 12000 bytes"),
        (
            [
                pb.Packet(type=STAT, stat=a_file("a", "x")[0]),
                pb.Packet(type=STAT),
                pb.Packet(type=DATA, id=5, data=b"x"),
            ],
            "invalid file request 5",
        ),
        (
            [
                pb.Packet(type=STAT, stat=a_file("a", "x")[0]),
                pb.Packet(type=STAT),
                *[pb.Packet(type=DATA, id=0, data=b"x" * 5000)] * 3,
            ],
            "larger than this node accepts",
        ),
        ([pb.Packet(type=STAT, stat=a_file("a", "x")[0])], "ended the transfer of its files early"),
        ([pb.Packet(type=pb.Packet.ERR, data=b"no such directory")], "error from sender: no such directory"),
    ],
)
async def test_a_hostile_client_gets_an_error_and_leaves_nothing(
    rig: Rig, packets: Sequence[pb.Packet], text: str
) -> None:
    files = FileServer([DOCKERFILE], NOTHING, NOTHING, packets=packets, stays="early" not in text)
    with pytest.raises(CallFailed, match=text):
        await built(rig, "r", files, key="k")
    assert not list(rig.directory.iterdir())


async def test_a_build_ends_with_its_session(rig: Rig) -> None:
    files = FileServer([a_file("Dockerfile", "FROM scratch\nRUN sleep\n")])
    async with control(rig.socket) as calls, session(rig.socket, "s", files) as transport:
        solving = asyncio.create_task(calls.solve(a_request("r", "s")))
        async with asyncio.timeout(60):
            await rig.builds.sleeps.wait()
        transport.abort()
        with pytest.raises(CallFailed, match="the client of the build disconnected"):
            await solving
    assert rig.builds.cancelled.is_set()
    assert not list(rig.directory.iterdir())


async def test_a_build_ends_with_its_call(rig: Rig) -> None:
    files = FileServer([a_file("Dockerfile", "FROM scratch\nRUN sleep\n")])
    async with session(rig.socket, "s", files), control(rig.socket) as calls:
        solving = asyncio.create_task(calls.solve(a_request("r", "s")))
        async with asyncio.timeout(60):
            await rig.builds.sleeps.wait()
            solving.cancel()
            await rig.builds.cancelled.wait()


async def test_a_session_within_a_call_serves_several_builds(rig: Rig) -> None:
    """As buildx opens it for the targets of a bake that share a directory."""
    large = a_file("large", "x" * 5000)
    trees = [[DOCKERFILE], NOTHING, [large]] * 2
    async with control(rig.socket) as calls:
        async with session_by_call(calls, "s", FileServer(*trees)):
            for ref in ("r1", "r2"):
                await calls.solve(a_request(ref, "s"))
                assert rig.builds.files == {"large": "x" * 5000}
        async with asyncio.timeout(60):
            while len(rig.kit.sessions):  # noqa: ASYNC110 - the server notices the end by itself
                await asyncio.sleep(0.01)


async def test_a_build_ends_with_a_session_within_a_call(rig: Rig) -> None:
    files = FileServer([a_file("Dockerfile", "FROM scratch\nRUN sleep\n")])
    async with control(rig.socket) as calls:
        async with session_by_call(calls, "s", files):
            solving = asyncio.create_task(calls.solve(a_request("r", "s")))
            async with asyncio.timeout(60):
                await rig.builds.sleeps.wait()
        with pytest.raises(CallFailed, match="the client of the build disconnected"):
            await solving
    assert rig.builds.cancelled.is_set()


async def test_a_session_within_a_call_needs_an_id(rig: Rig) -> None:
    async with control(rig.socket) as calls:
        with pytest.raises(CallFailed, match="a session needs an id"):
            await calls.call("/moby.buildkit.v1.Control/Session", pb.BytesMessage(), pb.BytesMessage)


@pytest.mark.parametrize("rig", [partial(BuildSessions, sessions_max=1)], indirect=True)
async def test_the_number_of_sessions_is_bounded(rig: Rig) -> None:
    assert SESSIONS_MAX >= 16
    async with session(rig.socket, "s", FileServer()):
        with pytest.raises(ConnectionError, match="session s already exists"):
            async with session(rig.socket, "s", FileServer()):
                pass
        with pytest.raises(ConnectionError, match="there are 1 build sessions already"):
            async with session(rig.socket, "other", FileServer()):
                pass
    async with asyncio.timeout(60):
        while len(rig.kit.sessions):  # noqa: ASYNC110 - the server notices the end by itself
            await asyncio.sleep(0.01)
    async with session(rig.socket, "other", FileServer()):
        pass


async def test_a_client_that_asks_in_two_calls_gets_what_it_returns(rig: Rig) -> None:
    """As buildx does: the outer call ends with what the inner one has built and the client has returned."""
    bridge = "/moby.buildkit.v1.frontend.LLBBridge/"
    outer = pb.SolveRequest(ref="r", session="s")
    outer.exporters.add(type="moby").attrs["name"] = "made:1"
    inner = pb.BridgeSolveRequest(frontend="dockerfile.v0", frontend_opt={"target": "t"})
    async with (
        session(rig.socket, "s", FileServer([DOCKERFILE], NOTHING, NOTHING)),
        control(rig.socket) as calls,
    ):
        solving = asyncio.create_task(calls.solve(outer))
        result = await calls.call(f"{bridge}Solve", inner, pb.BridgeSolveResponse, build="r")
        returned = pb.ReturnRequest(result=result.result)
        await calls.call(f"{bridge}Return", returned, pb.ReturnResponse, build="r")
        assert (await solving).exporter_response["image.name"] == "docker.io/library/made:1"
    assert (rig.builds.requests[0].target, str(rig.builds.requests[0].tags[0])) == (
        "t",
        "docker.io/library/made:1",
    )


async def test_a_client_that_fails_between_its_calls_fails_the_build(rig: Rig) -> None:
    outer = pb.SolveRequest(ref="r", session="s")
    failed = pb.ReturnRequest(error=pb.RpcStatus(code=StatusCode.INVALID_ARGUMENT, message="not like this"))
    async with session(rig.socket, "s", FileServer()), control(rig.socket) as calls:
        solving = asyncio.create_task(calls.solve(outer))
        await calls.call("/moby.buildkit.v1.frontend.LLBBridge/Return", failed, pb.ReturnResponse, build="r")
        with pytest.raises(CallFailed, match="not like this"):
            await solving


async def test_after_the_end_of_its_job_a_client_builds_nothing(rig: Rig) -> None:
    bridge = "/moby.buildkit.v1.frontend.LLBBridge/"
    refused, sleeping = pb.SolveRequest(ref="r", session="s"), pb.SolveRequest(ref="r2", session="s")
    refused.exporters.add(type="nosuch")
    inner = pb.BridgeSolveRequest(frontend="dockerfile.v0")
    failed = pb.ReturnRequest(error=pb.RpcStatus(code=StatusCode.INVALID_ARGUMENT, message="not like this"))
    dockerfile = [a_file("Dockerfile", "FROM scratch\nRUN sleep\n")]
    async with session(rig.socket, "s", FileServer(dockerfile, NOTHING)), control(rig.socket) as calls:
        with pytest.raises(CallFailed, match="nosuch"):
            await calls.solve(refused)
        with pytest.raises(CallFailed, match="no such job r"):
            await calls.call(f"{bridge}Solve", inner, pb.BridgeSolveResponse, build="r")
        assert not rig.builds.requests
        solving = asyncio.create_task(calls.solve(sleeping))
        building = asyncio.create_task(
            calls.call(f"{bridge}Solve", inner, pb.BridgeSolveResponse, build="r2")
        )
        await rig.builds.sleeps.wait()
        await calls.call(f"{bridge}Return", failed, pb.ReturnResponse, build="r2")
        with pytest.raises(CallFailed, match="not like this"):
            await solving
        with pytest.raises(CallFailed, match="job r2 has ended"):
            await building
        assert rig.builds.cancelled.is_set()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (pb.SolveRequest(frontend_attrs={"force-network-mode": "host"}), "network.host is not allowed"),
        (pb.SolveRequest(definition=pb.Definition(**{"def": [b"x"]})), "LLB definitions"),
        (
            pb.SolveRequest(frontend_attrs={"requestid": "frontend.nosuch"}),
            "unsupported request frontend.nosuch",
        ),
        (pb.SolveRequest(entitlements=["security.insecure"]), "granting entitlement security.insecure"),
        (
            pb.SolveRequest(frontend_attrs={"context": "ftp://example.org/x"}),
            "a build context at this address",
        ),
        (pb.SolveRequest(frontend="other.v0"), "front end other.v0 is not supported"),
    ],
)
async def test_what_is_not_done_is_refused_by_name(rig: Rig, change: pb.SolveRequest, text: str) -> None:
    request = a_request("r", "s")
    request.MergeFrom(change)
    async with session(rig.socket, "s", FileServer([DOCKERFILE], NOTHING)), control(rig.socket) as calls:
        with pytest.raises(CallFailed, match=text):
            await calls.solve(request)


async def test_cache_sources_of_any_kind_never_fail_a_build(rig: Rig) -> None:
    """A source that is missing, or of a kind that is not read, is a warning."""
    options = {"cache-from": "127.0.0.1:1/gone:1", "build-arg:BUILDKIT_INLINE_CACHE": "1"}
    request = a_request("r", "s", **options)
    for kind in ("gha", "s3"):
        request.cache.imports.add(type=kind)
    request.cache.imports.add(type="local")
    request.cache.imports.add(type="registry").attrs["ref"] = "bad//name"
    files = FileServer([DOCKERFILE], NOTHING, NOTHING)
    async with session(rig.socket, "s", files), control(rig.socket) as calls:
        response, events = await asyncio.gather(calls.solve(request), calls.status("r"))
    assert response.exporter_response["image.name"]
    said = {warning.short.decode() for event in events for warning in event.warnings}
    unread = "use registry or local"
    assert {one for one in said if "cache" in one and "gone:1" not in one} == {
        *(f"cache source {one} is not used: type {one} is not supported; {unread}" for one in ("gha", "s3")),
        "cache source local is not used: a local cache needs the digest of its manifest, and got none",
        "cache source bad//name is not used: invalid reference format",
    }
    assert any(one.startswith("cache source 127.0.0.1:1/gone:1 is not used: ") for one in said)
    assert rig.builds.requests[0].inline_cache


@pytest.mark.parametrize("attributes", [{}, {"ignore-error": "true"}])
async def test_a_cache_export_of_another_type_fails_the_build_before_its_first_step(
    rig: Rig, attributes: dict[str, str]
) -> None:
    request = a_request("r", "s")
    request.cache.exports.add(type="gha").attrs.update(attributes)
    async with session(rig.socket, "s", FileServer([DOCKERFILE], NOTHING)), control(rig.socket) as calls:
        with pytest.raises(CallFailed, match='unknown cache exporter: "gha"'):
            await calls.solve(request)
    assert not rig.builds.requests


async def test_an_image_for_several_platforms_is_built_one_after_the_other_from_one_context(rig: Rig) -> None:
    request = a_request("r", "s", platform="linux/amd64,linux/arm64")
    files = FileServer([DOCKERFILE], NOTHING, NOTHING)
    async with session(rig.socket, "s", files), control(rig.socket) as calls:
        response, events = await asyncio.gather(calls.solve(request), calls.status("r"))
    assert [one.platform for one in rig.builds.requests] == ["linux/amd64", "linux/arm64"]
    assert [one.tags for one in rig.builds.requests] == [(), ()], "the images are named together"
    assert rig.builds.indexes == [((IMAGE, IMAGE), response.exporter_response["image.name"])]
    names = {vertex.name for event in events for vertex in event.vertexes}
    assert {"[linux/amd64 1/1] COPY . /", "[linux/arm64 1/1] COPY . /"} <= names
    assert sum(name.startswith("[internal] load build context") for name in names) == 1


async def test_findings_of_checks_are_warnings_of_the_definition(rig: Rig) -> None:
    rig.builds.images["base:1"] = ("PATH=/bin",)
    definition = a_file("Dockerfile", "FROM base:1\nENV A=$PTH\nCMD x\n")
    files = FileServer([definition], NOTHING, NOTHING)
    async with session(rig.socket, "s", files), control(rig.socket) as calls:
        _, events = await asyncio.gather(calls.solve(a_request("r", "s")), calls.status("r"))
    warnings = [warning for event in events for warning in event.warnings]
    assert [warning.short.decode().partition(":")[0] for warning in warnings] == [
        "UndefinedVar",
        "JSONArgsRecommended",
    ]
    assert warnings[0].url == "https://docs.docker.com/go/dockerfile/rule/undefined-var/"


@pytest.mark.parametrize(
    ("packets", "text"),
    [
        ([pb.Packet(type=REQ, id=0)], "requested entry 0, which is not a file"),
        ([pb.Packet(type=REQ, id=7)], "requested entry 7, which is not a file"),
        ([pb.Packet(type=STAT)], "requested entry 0, which is not a file"),
        ([pb.Packet(type=pb.Packet.ERR, data=b"disk full")], "error from receiver: disk full"),
        ([], "ended the transfer of the result early"),
    ],
)
async def test_a_hostile_receiver_gets_an_error_and_leaves_nothing(
    rig: Rig, packets: Sequence[pb.Packet], text: str
) -> None:
    request = a_request("r", "s")
    request.exporters[0].type, request.exporters[0].attrs["name"] = "local", ""
    files = FileServer([DOCKERFILE], NOTHING, NOTHING, receives=packets)
    async with session(rig.socket, "s", files), control(rig.socket) as calls:
        with pytest.raises(CallFailed, match=text):
            await calls.solve(request)
    assert not list(rig.directory.iterdir())


IMPATIENT = partial(BuildSessions, silent_s=0.3)


@pytest.mark.parametrize("rig", [IMPATIENT], indirect=True)
@pytest.mark.parametrize("packets", [[], [pb.Packet(type=STAT, stat=DOCKERFILE[0]), pb.Packet(type=STAT)]])
async def test_a_client_that_sends_nothing_of_its_files_ends_its_build(
    rig: Rig, packets: Sequence[pb.Packet]
) -> None:
    with pytest.raises(CallFailed, match="the client of the build did not respond in time"):
        await built(rig, "r", FileServer([DOCKERFILE], NOTHING, NOTHING, packets=packets))
    assert not list(rig.directory.iterdir())


@pytest.mark.parametrize("rig", [IMPATIENT], indirect=True)
async def test_a_client_that_takes_nothing_of_its_result_ends_its_build(rig: Rig) -> None:
    rig.builds.padding_bytes = 8 << 20
    request = a_request("r", "s")
    request.exporters[0].type, request.exporters[0].attrs["name"] = "tar", ""
    files = FileServer([DOCKERFILE], NOTHING, NOTHING, receives=(), takes=False)
    async with session(rig.socket, "s", files), control(rig.socket) as calls:
        with pytest.raises(CallFailed, match="the client of the build did not respond in time"):
            await calls.solve(request)


async def test_a_client_that_takes_no_files_is_refused(rig: Rig) -> None:
    request = a_request("r", "s")
    request.exporters[0].type, request.exporters[0].attrs["name"] = "tar", ""
    files = FileServer([DOCKERFILE], NOTHING, NOTHING)
    async with session(rig.socket, "s", files), control(rig.socket) as calls:
        with pytest.raises(CallFailed, match="FileSend/DiffCopy not supported by the client"):
            await calls.solve(request)


async def test_an_unknown_method_and_a_build_that_is_not_there_have_their_status(rig: Rig) -> None:
    async with control(rig.socket) as calls:
        with pytest.raises(CallFailed) as unknown:
            await calls.call("/moby.buildkit.v1.Control/Other", pb.InfoRequest(), pb.InfoResponse)
        assert unknown.value.status is StatusCode.UNIMPLEMENTED
        with pytest.raises(CallFailed, match="no such job x") as missing:
            await calls.status("x")
        assert missing.value.status is StatusCode.NOT_FOUND

"""Contexts that are no directory of the client: uploaded, of a web address, of a git repository."""

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from skep.engine.buildkit import buildkit_pb2 as pb
from skep.rpc.server import ServerStream
from skep.rpc.status import CallFailed
from tests.component.test_buildkit_protocol import Rig, built, rig
from tests.support.builds.build_rig import a_tar
from tests.support.builds.buildkit_client import FileServer, a_file

__all__ = ["rig"]

pytestmark = pytest.mark.needs("root")
UPLOADED = "http://buildkit-session/abc"
DOCKERFILE = "FROM scratch\nCOPY . /\n"


class Uploading(FileServer):
    """A client that uploads an archive, or another file, and serves directories besides."""

    def __init__(self, content: bytes, *trees: object) -> None:
        super().__init__(*trees)  # type: ignore[arg-type]
        self.methods.append("/moby.upload.v1.Upload/Pull")
        self._content = content

    async def handle(self, stream: ServerStream) -> None:
        """Serve one call."""
        if stream.request.path != "/moby.upload.v1.Upload/Pull":
            await super().handle(stream)
            return
        for at in range(0, len(self._content), 1000):
            await stream.send_message(pb.BytesMessage(data=self._content[at : at + 1000]))
        await stream.send_status()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
async def test_an_archive_on_standard_input_is_the_context(rig: Rig, mode: str) -> None:
    archive = a_tar({"Dockerfile": DOCKERFILE, ".dockerignore": "*\n", "d/": "", "d/x": "x\n"}, mode)
    await built(rig, "r", Uploading(archive), context=UPLOADED)
    assert rig.builds.requests[0].dockerfile == DOCKERFILE
    assert rig.builds.files == {"Dockerfile": DOCKERFILE, ".dockerignore": "*\n", "d/x": "x\n"}
    assert list(rig.directory.iterdir()) == []


async def test_another_file_on_standard_input_is_the_dockerfile(rig: Rig) -> None:
    await built(rig, "r", Uploading(b"FROM scratch\nENV A=b\n"), context=UPLOADED)
    assert rig.builds.requests[0].dockerfile == "FROM scratch\nENV A=b\n"


async def test_a_dockerfile_of_the_client_is_built_with_an_uploaded_context(rig: Rig) -> None:
    client = Uploading(a_tar({"x": "x\n"}, "w:gz"), [a_file("other", DOCKERFILE)])
    await built(rig, "r", client, context=UPLOADED, filename="other", dockerfilekey="dockerfile")
    assert rig.builds.requests[0].dockerfile == DOCKERFILE
    assert rig.builds.files == {"x": "x\n"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "an empty context"),
        (a_tar({"x": "x\n"}, "w:gz"), "failed to read dockerfile: open Dockerfile"),
        (bytes(20_000), "no space left on device for the build context"),
    ],
)
async def test_an_uploaded_context_that_is_none_fails_the_build(rig: Rig, content: bytes, text: str) -> None:
    with pytest.raises(CallFailed, match=text):
        await built(rig, "r", Uploading(content), context=UPLOADED)
    assert list(rig.directory.iterdir()) == []


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    """A web server for the files in ``www``."""
    (tmp_path / "www").mkdir()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        path = tmp_path / "www" / request.path.lstrip("/")
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_a_web_address_is_an_archive_or_a_dockerfile(rig: Rig, address: str, tmp_path: Path) -> None:
    (tmp_path / "www/c.tar.gz").write_bytes(a_tar({"sub/Other": DOCKERFILE}, "w:gz"))
    (tmp_path / "www/Dockerfile").write_text("FROM scratch\nENV A=b\n")
    await built(rig, "one", FileServer(), context=f"{address}/c.tar.gz", filename="sub/Other")
    assert rig.builds.files == {"sub/Other": DOCKERFILE}
    await built(rig, "two", FileServer(), context=f"{address}/Dockerfile")
    assert rig.builds.requests[1].dockerfile == "FROM scratch\nENV A=b\n"
    guarded = address.replace("://", "://ann:pa55word@")
    with pytest.raises(CallFailed, match=r"xxxxx:xxxxx@.*invalid response status 404"):
        await built(rig, "three", FileServer(), context=f"{guarded}/none")
    request = pb.BuildHistoryRequest(early_exit=True)
    records = [event.record async for event in rig.kit.solver.history.listen(request)]
    assert f"{address.replace('://', '://xxxxx:xxxxx@')}/none" in [
        record.frontend_attrs["context"] for record in records
    ]


def make_repository(place: Path) -> None:
    """A repository that the web server has as ``r.git``, with a Dockerfile in ``app``."""
    source = place / "source"
    (source / "app").mkdir(parents=True)
    (source / "app/Dockerfile").write_text(DOCKERFILE)
    script = (
        "git init -q && git add . && git -c user.name=x -c user.email=x@y commit -qm one"
        f" && git clone -q --bare . {place}/www/r.git && git -C {place}/www/r.git update-server-info"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    subprocess.run(["sh", "-ec", script], cwd=source, check=True, env=environment)


async def test_a_git_repository_is_the_context(rig: Rig, address: str, tmp_path: Path) -> None:
    make_repository(tmp_path)
    await built(rig, "one", FileServer(), context=f"{address}/r.git#:app")
    assert rig.builds.files == {"Dockerfile": DOCKERFILE}
    kept = {
        "context": f"{address}/r.git",
        "filename": "app/Dockerfile",
        "build-arg:BUILDKIT_CONTEXT_KEEP_GIT_DIR": "1",
    }
    await built(rig, "two", FileServer(), **kept)
    assert {"app/Dockerfile", ".git/HEAD"} <= rig.builds.files.keys()


async def test_named_contexts_are_repositories_and_files_of_addresses(
    rig: Rig, address: str, tmp_path: Path
) -> None:
    make_repository(tmp_path)
    archive = a_tar({"x": "x\n"})
    (tmp_path / "www/c.tar").write_bytes(archive)
    named = {"context:code": f"{address}/r.git#:app", "context:file": f"{address}/c.tar"}
    await built(rig, "one", Uploading(a_tar({"Dockerfile": DOCKERFILE})), context=UPLOADED, **named)
    assert rig.builds.named == {
        "code": {"Dockerfile": DOCKERFILE},
        "file": {"context": archive.decode()},  # as in BuildKit, an archive is not unpacked
    }
    missing = {"context:file": f"{address.replace('://', '://ann:pa55word@')}/none"}
    with pytest.raises(CallFailed, match=r"xxxxx:xxxxx@.*invalid response status 404") as failed:
        await built(rig, "two", Uploading(a_tar({"Dockerfile": DOCKERFILE})), context=UPLOADED, **missing)
    assert "pa55word" not in str(failed.value)
    assert list(rig.directory.iterdir()) == []


@pytest.mark.parametrize("context", ["ftp://h/x", "/a/path"])
async def test_another_place_is_refused_by_name(rig: Rig, context: str) -> None:
    with pytest.raises(CallFailed, match="a build context at this address is not supported"):
        await built(rig, "r", FileServer(), context=context)

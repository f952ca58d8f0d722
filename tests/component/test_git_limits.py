"""Git repositories of servers that are not trusted: what they may cost a node, and what they learn."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from skep.engine.build import git as git_module
from skep.engine.build.repositories import Repository, address_of
from skep.engine.images.workers import Limits
from skep.errors import ResourceExhausted, Unavailable

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Server:
    """A web server that answers with ``answer``.  It notes each path and the credentials sent with it."""

    def __init__(self) -> None:
        self.port = 0
        self.requests: list[tuple[str, str]] = []
        self.answer: Answer | None = None

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append((request.path, request.headers.get("Authorization", "")))
        return await self.answer(request) if self.answer is not None else web.Response(status=404)


@pytest.fixture
async def servers() -> AsyncIterator[tuple[Server, Server]]:
    """Two servers on this machine's loopback."""
    both, runners = (Server(), Server()), []
    for server in both:
        runner = web.ServerRunner(web.Server(server.handle))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.port = runner.addresses[0][1]
        runners.append(runner)
    yield both
    for runner in runners:
        await runner.cleanup()


def repository_at(url: str, directory: Path, limits: Limits | None = None) -> Repository:
    directory.mkdir()
    return Repository(address_of(url), directory, limits or Limits(), None)


def made(directory: Path, files: int, size: int) -> Path:
    """A repository with so many files of one content, as a simple web server has it."""
    source = directory / "source"
    source.mkdir()
    for number in range(files):
        (source / f"{number}").write_bytes(bytes(size))
    script = (
        "git init -q && git add . && git -c user.name=x -c user.email=x@y commit -qm one"
        f" && git clone -q --bare . {directory}/r.git && git -C {directory}/r.git update-server-info"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    subprocess.run(["sh", "-ec", script], cwd=source, check=True, env=environment)
    return directory / "r.git"


def files_of(root: Path) -> Answer:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        path = root / request.path.removeprefix("/r.git/")
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    return answer


@pytest.mark.parametrize(
    ("files", "size", "limits", "error"),
    [
        (10, 1 << 20, Limits(archive_bytes_max=4 << 20), "/r.git has more than 4194304 bytes"),
        (1, 8 << 20, Limits(archive_bytes_max=1 << 20), "/r.git has more than 1048576 bytes"),
        (200, 1, Limits(entries_max=150), "/r.git has more than 150 files"),
        (1, 1, Limits(spare_bytes=1 << 60, spare_share=1.0), "no space is left on this node for .*/r.git"),
    ],
)
async def test_a_small_repository_with_large_files_is_refused(
    servers: tuple[Server, Server], tmp_path: Path, files: int, size: int, limits: Limits, error: str
) -> None:
    server = servers[0]
    server.answer = files_of(await asyncio.to_thread(made, tmp_path, files, size))
    repository = repository_at(f"http://127.0.0.1:{server.port}/r.git", tmp_path / "tree", limits)
    with pytest.raises(ResourceExhausted, match=error):
        await repository.fetch()


async def test_a_command_is_ended_while_it_writes_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that would not end before its deadline."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").write_text("#!/bin/sh\nhead -c 3000000 /dev/zero > big\nsleep 600\n")
    (tmp_path / "bin/git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(git_module, "_WATCH_S", 0.05)
    repository = repository_at("http://h/r.git", tmp_path / "tree", Limits(archive_bytes_max=2 << 20))
    async with asyncio.timeout(60):
        with pytest.raises(ResourceExhausted, match="has more than 2097152 bytes"):
            await repository.fetch()


@pytest.mark.filterwarnings("error")
async def test_a_server_with_endless_references_is_given_up(
    servers: tuple[Server, Server], tmp_path: Path
) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        names = (f"{number:040x}\trefs/x/{number}/{'a' * 900}/HEAD\n" for number in range(3000))
        return web.Response(text="".join(names) if request.path == "/r.git/info/refs" else "")

    servers[0].answer = answer
    repository = repository_at(f"http://127.0.0.1:{servers[0].port}/r.git", tmp_path / "tree")
    with pytest.raises(ResourceExhausted, match=r"/r\.git lists more than 1048576 bytes of references"):
        await repository.resolve()


async def test_git_has_limits_of_memory_and_file_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").write_text("#!/bin/sh\ncat /proc/self/limits >&2\nexit 1\n")
    (tmp_path / "bin/git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(git_module, "_SHOWN_BYTES", 10_000)
    repository = repository_at("http://h/r.git", tmp_path / "tree", Limits(archive_bytes_max=1 << 20))
    with pytest.raises(Unavailable) as failure:
        await repository.fetch()
    found = {line[:26].strip(): line[26:].split()[:2] for line in str(failure.value).splitlines()}
    assert found["Max address space"] == [str(2 << 30)] * 2
    assert found["Max file size"] == [str((1 << 20) + 512)] * 2
    assert found["Max core file size"] == ["0", "0"]

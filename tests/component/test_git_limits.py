"""Git repositories of servers that are not trusted: what they may cost a node, and what they learn."""

import asyncio
import base64
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from skep.engine.build.files.remotes import Download, KnownAnswers
from skep.engine.build.files.repositories import GitRepository, address_of
from skep.engine.images.archives.workers import ImageLimits
from skep.errors import InvalidArgument, ResourceExhausted, SkepError, Unavailable

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


class Secrets:
    """A client with secrets, and perhaps an agent for ssh."""

    def __init__(self, secrets: Mapping[str, bytes], agent: Path | None = None) -> None:
        self._secrets = secrets
        self._agent = agent

    async def secret(self, id: str) -> bytes | None:
        return self._secrets.get(id)

    async def credentials(self, domain: str) -> str:
        return ""

    @asynccontextmanager
    async def ssh(self, id: str) -> AsyncIterator[Path | None]:
        yield self._agent


def repository_at(
    url: str, directory: Path, limits: ImageLimits | None = None, provider: Secrets | None = None
) -> GitRepository:
    directory.mkdir()
    return GitRepository(address_of(url), directory, limits or ImageLimits(), provider)


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
        (10, 1 << 20, ImageLimits(archive_bytes_max=4 << 20), "/r.git has more than 4194304 bytes"),
        (1, 8 << 20, ImageLimits(archive_bytes_max=1 << 20), "/r.git has more than 1048576 bytes"),
        (200, 1, ImageLimits(entries_max=150), "/r.git has more than 150 files"),
        (
            1,
            1,
            ImageLimits(spare_bytes=1 << 60, spare_share=1.0),
            "no space is left on this node for .*/r.git",
        ),
    ],
)
async def test_a_small_repository_with_large_files_is_refused(
    servers: tuple[Server, Server], tmp_path: Path, files: int, size: int, limits: ImageLimits, error: str
) -> None:
    server = servers[0]
    server.answer = files_of(await asyncio.to_thread(made, tmp_path, files, size))
    repository = repository_at(f"http://127.0.0.1:{server.port}/r.git", tmp_path / "tree", limits)
    with pytest.raises(ResourceExhausted, match=error):
        await repository.fetch()


def replace_git(monkeypatch: pytest.MonkeyPatch, directory: Path, script: str) -> None:
    """Have the program git be a shell script."""
    directory.mkdir()
    (directory / "git").write_text(f"#!/bin/sh\n{script}")
    (directory / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


async def test_a_command_is_ended_while_it_writes_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that would not end before its deadline."""
    replace_git(monkeypatch, tmp_path / "bin", "head -c 3000000 /dev/zero > big\nsleep 600\n")
    repository = repository_at("http://h/r.git", tmp_path / "tree", ImageLimits(archive_bytes_max=2 << 20))
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
    replace_git(monkeypatch, tmp_path / "bin", "grep -E 'space|file size' /proc/self/limits >&2\nexit 1\n")
    repository = repository_at("http://h/r.git", tmp_path / "tree", ImageLimits(archive_bytes_max=1 << 20))
    with pytest.raises(Unavailable) as failure:
        await repository.fetch()
    found = {line[:26].strip(): line[26:].split()[:2] for line in str(failure.value).splitlines()}
    assert found["Max address space"] == [str(2 << 30)] * 2
    assert found["Max file size"] == [str((1 << 20) + 512)] * 2
    assert found["Max core file size"] == ["0", "0"]


# --- credentials -------------------------------------------------------------------------------------------------


def redirecting_to(other: Server) -> Answer:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(
            status=302, headers={"Location": f"http://127.0.0.1:{other.port}{request.path_qs}"}
        )

    return answer


async def test_a_token_does_not_follow_a_redirect(servers: tuple[Server, Server], tmp_path: Path) -> None:
    first, other = servers
    first.answer = redirecting_to(other)
    provider = Secrets({"GIT_AUTH_TOKEN.127.0.0.1": b"t0ken"})
    repository = repository_at(f"http://127.0.0.1:{first.port}/r.git", tmp_path / "tree", provider=provider)
    with pytest.raises(Unavailable):
        await repository.resolve()
    assert first.requests[0][1].startswith("basic ")
    assert other.requests == []
    public = repository_at(f"http://127.0.0.1:{first.port}/r.git", tmp_path / "public")
    with pytest.raises(Unavailable):
        await public.resolve()
    assert other.requests[0] == ("/r.git/info/refs", ""), "without a secret a redirect is followed"


@pytest.mark.parametrize("name", ["GIT_AUTH_TOKEN", "GIT_AUTH_HEADER"])
async def test_a_secret_for_every_host_is_not_sent_without_tls(
    servers: tuple[Server, Server], tmp_path: Path, name: str
) -> None:
    url = f"http://127.0.0.1:{servers[0].port}/r.git"
    with pytest.raises(Unavailable):
        await repository_at(url, tmp_path / "tree", provider=Secrets({name: b"t0ken"})).resolve()
    assert {header for _, header in servers[0].requests} == {""}


async def test_a_download_sends_its_token_to_the_first_origin_only(
    servers: tuple[Server, Server], tmp_path: Path
) -> None:
    first, other = servers
    first.answer = redirecting_to(other)
    provider = Secrets({"HTTP_AUTH_TOKEN_127.0.0.1": b"t0ken"})
    url = f"http://127.0.0.1:{first.port}/file"
    with pytest.raises(SkepError, match="invalid response status 404"):
        await Download(url, "", tmp_path, 100, KnownAnswers(), provider).fetch()
    assert first.requests == [("/file", "Bearer t0ken")]
    assert other.requests == [("/file", "")], "the same host, but another port"


@pytest.mark.parametrize("has_agent", [True, False])
async def test_ssh_has_no_keys_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_agent: bool
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text('#!/bin/sh\necho "$@" $SSH_AUTH_SOCK >&2\nexit 1\n')
    (tmp_path / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    provider = Secrets({}, Path("/agent") if has_agent else None)
    with pytest.raises(Unavailable) as failure:
        await repository_at("ssh://git:pw@h/r", tmp_path / "tree", provider=provider).resolve()
    text = str(failure.value)
    assert "-o IdentityFile=none -o CertificateFile=none" in text
    assert ("-o IdentityAgent=none" in text, "/agent" in text) == (not has_agent, has_agent)
    assert "git@h" in text
    assert "pw" not in text


async def test_a_password_of_an_address_is_in_the_header_only(
    servers: tuple[Server, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arguments of a process can be read by every user of a machine."""
    program = shutil.which("git")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/words\nexec {program} "$@"\n')
    (tmp_path / "bin/git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    repository = repository_at(f"http://us%40er:p%2Fw@127.0.0.1:{servers[0].port}/r.git", tmp_path / "tree")
    with pytest.raises(Unavailable) as failure:
        await repository.resolve()
    sent = servers[0].requests[0][1].removeprefix("basic ")
    assert base64.b64decode(sent) == b"us@er:p/w"
    words = (tmp_path / "words").read_text()
    assert f"http://127.0.0.1:{servers[0].port}/r.git" in words
    for text in (words, str(failure.value)):
        assert "p%2Fw" not in text
        assert "us%40er" not in text


@pytest.mark.parametrize("url", ["https://user:pa55/w0rd@h/r.git", "https://[::1/r.git", "https:///r.git"])
def test_a_wrong_address_is_an_error_without_its_password(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="invalid git address") as failure:
        address_of(f"{url}#-x")
    assert "w0rd" not in str(failure.value)


@pytest.mark.parametrize("scheme", ["https", "git", "ssh"])
@pytest.mark.parametrize("password", ["pa55/w0rd", "pa55@in/w0rd", "pa55/w0@rd"])
def test_a_password_that_would_be_a_host_is_refused(scheme: str, password: str) -> None:
    """Git would get the rest as host or path, in its arguments and errors."""
    with pytest.raises(InvalidArgument, match=r"^invalid git address: .*@h/r.git: .*%2F") as failure:
        address_of(f"{scheme}://user:{password}@h/r.git")
    assert not any(part in str(failure.value) for part in ("pa55", "in/", "w0", "rd@"))


async def test_gits_errors_have_no_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A submodule's address comes from the repository, and a long error is cut."""
    script = f"echo 'fatal: clone of https://ann:pa55{'pa55' * 300}@h/x into y' >&2\nexit 1\n"
    replace_git(monkeypatch, tmp_path / "bin", script)
    with pytest.raises(Unavailable) as failure:
        await repository_at("https://h/r.git", tmp_path / "tree").fetch()
    assert "pa55" not in str(failure.value)
    assert "into y" in str(failure.value)

"""ADD of http(s) addresses and of git repositories, as builds against a web server of the test's own."""

import asyncio
import json
import os
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from aiohttp import web

from skep.engine.build.files.remotes import is_git, is_remote
from skep.engine.build.files.repositories import RepositoryAddress, address_of
from skep.errors import InvalidArgument, SkepError
from tests.support.builds.build_rig import BuildRig, a_tar

pytestmark = pytest.mark.needs("root")

TOOL = b"#!/bin/sh\necho fetched\n"
SUM = sha256(TOOL).hexdigest()
MODIFIED = "Wed, 21 Oct 2015 07:28:00 GMT"


class WebServer:
    """Serves a few files, and the directory ``root`` below ``/git``; notes what was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = ""
        self.requests: list[tuple[str, Mapping[str, str]]] = []
        self.tool = TOOL

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.path_qs, dict(request.headers)))
        match request.path:
            case "/tool.sh" | "/" | "/dir/" | "/a b" | "/..":
                return web.Response(body=self.tool, headers={"Last-Modified": MODIFIED})
            case "/tagged":
                if request.headers.get("If-None-Match") == '"1"':
                    return web.Response(status=304, headers={"ETag": '"1"'})
                return web.Response(body=self.tool, headers={"ETag": '"1"'})
            case "/a.tar":
                return web.Response(body=a_tar({"in/x": "x\n"}))
            case "/moved":
                raise web.HTTPFound("/tool.sh")
            case "/round":
                raise web.HTTPFound("/round")
            case "/file":
                raise web.HTTPFound("file:///etc/passwd")
            case "/secret":
                if request.headers.get("Authorization") != "Bearer t0ken":
                    raise web.HTTPUnauthorized
                return web.Response(body=self.tool)
        path = self.root / request.path.removeprefix("/git/")
        if not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path)


class Secrets:
    """A client with one secret."""

    async def secret(self, id: str) -> bytes | None:
        return b"t0ken\n" if id == "HTTP_AUTH_TOKEN_127.0.0.1" else None

    async def credentials(self, domain: str) -> str:
        return ""

    def ssh(self, id: str) -> AbstractAsyncContextManager[Path | None]:
        raise NotImplementedError


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[WebServer]:
    """A web server on this machine's loopback."""
    (tmp_path / "www").mkdir()
    server = WebServer(tmp_path / "www")
    runner = web.ServerRunner(web.Server(server.handle))  # type: ignore[arg-type]
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


@pytest.fixture
def rig(tmp_path: Path) -> BuildRig:
    """An empty context."""
    return BuildRig(tmp_path)


@asynccontextmanager
async def built(rig: BuildRig, *lines: str, provider: Secrets | None = None) -> AsyncIterator[Path]:
    image = await rig.build("\n".join(("FROM scratch", *lines, "")), provider=provider)
    with rig.files(image) as root:
        yield root


# --- http(s) -----------------------------------------------------------------------------------------------------


async def test_a_file_of_an_address_has_mode_600_and_the_servers_time(
    rig: BuildRig, server: WebServer
) -> None:
    async with built(
        rig, f"ADD {server.url}/tool.sh?x=1 {server.url}/a.tar /t/", f"ADD {server.url}/tool.sh /named"
    ) as root:
        found = (root / "t/tool.sh").stat()
        assert (root / "t/tool.sh").read_bytes() == (root / "named").read_bytes() == TOOL
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_mtime) == (0o600, 0, 1445412480)
        assert (root / "t/a.tar").is_file(), "an archive that was fetched is not unpacked"
        assert (root / "t/a.tar").stat().st_mtime == 0


@pytest.mark.parametrize(
    ("path", "name"), [("/", "__unnamed__"), ("/dir/", "dir"), ("/a%20b", "a b"), ("/%2e%2e", "__unnamed__")]
)
async def test_the_name_is_the_last_one_of_the_address(
    rig: BuildRig, server: WebServer, path: str, name: str
) -> None:
    async with built(rig, f"ADD {server.url}{path} /t/") as root:
        assert [one.name for one in (root / "t").iterdir()] == [name]


async def test_owner_mode_and_unpacking_of_what_is_fetched(rig: BuildRig, server: WebServer) -> None:
    lines = (
        f"ADD --chmod=755 --chown=3:4 {server.url}/tool.sh /tool",
        f"ADD --chmod=u+x {server.url}/tool.sh /other",
        f"ADD --unpack=true {server.url}/a.tar /out",
        f"ADD --link {server.url}/moved /link/",
    )
    async with built(rig, *lines) as root:
        status = (root / "tool").stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o755, 3, 4)
        assert stat.S_IMODE((root / "other").stat().st_mode) == 0o700
        assert (root / "out/in/x").read_text() == "x\n"
        assert (root / "link/moved").read_bytes() == TOOL


async def test_a_checksum_is_checked_and_makes_the_step_known(rig: BuildRig, server: WebServer) -> None:
    right = f"ADD --checksum=sha256:{SUM} {server.url}/tool.sh /tool"
    async with built(rig, f"ARG S={SUM}", f"ADD --checksum=sha256:$S {server.url}/tool.sh /t") as root:
        assert (root / "t").read_bytes() == TOOL
    async with built(rig, right):
        asked = len(server.requests)
    async with built(rig, right):
        assert len(server.requests) == asked, "its content is known without asking"
    with pytest.raises(
        InvalidArgument, match=rf"digest mismatch for .*: sha256:{SUM} \(expected: sha256:0000"
    ):
        await rig.build(f"FROM scratch\nADD --checksum=sha256:{0:064d} {server.url}/tool.sh /tool\n")


async def test_a_file_that_changed_is_fetched_again_and_one_that_did_not_is_not(
    rig: BuildRig, server: WebServer
) -> None:
    text = f"FROM scratch\nADD {server.url}/tool.sh /tool\n"
    first = await rig.build(text)
    assert await rig.build(text) == first
    server.tool = b"another\n"
    with rig.files(await rig.build(text)) as root:
        assert (root / "tool").read_bytes() == b"another\n"
    tagged = f"FROM scratch\nADD {server.url}/tagged /tool\n"
    await rig.build(tagged)
    await rig.build(tagged)
    assert server.requests[-1][1]["If-None-Match"] == '"1"'
    assert rig.cached == 1


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/nosuch", "failed to load .*/nosuch: invalid response status 404"),
        ("/round", "stopped after 10 redirects"),
        ("/file", "unsupported protocol scheme in a redirect"),
        ("/secret", "invalid response status 401"),
    ],
)
async def test_what_cannot_be_fetched_fails_the_build(
    rig: BuildRig, server: WebServer, path: str, error: str
) -> None:
    with pytest.raises(SkepError, match=error):
        await rig.build(f"FROM scratch\nADD {server.url}{path} /t\n")


async def test_a_server_that_is_not_there_fails_the_build(rig: BuildRig) -> None:
    with pytest.raises(SkepError, match=r"failed to load http://127.0.0.1:1/x: .*onnect"):
        await rig.build("FROM scratch\nADD http://u:pw@127.0.0.1:1/x /t\n".replace("u:pw@", ""))
    with pytest.raises(SkepError, match=r"http://xxxxx:xxxxx@127.0.0.1:1/x"):
        await rig.build("FROM scratch\nADD http://u:pw@127.0.0.1:1/x /t\n")


async def test_a_secret_of_the_client_is_sent_to_its_host(rig: BuildRig, server: WebServer) -> None:
    async with built(rig, f"ADD {server.url}/secret /t", provider=Secrets()) as root:
        assert (root / "t").read_bytes() == TOOL


async def test_the_classic_builder_fetches_files_too(rig: BuildRig, server: WebServer) -> None:
    image = await rig.build(f"FROM scratch\nADD {server.url}/tool.sh /t/\n", is_buildkit=False)
    with rig.files(image) as root:
        assert stat.S_IMODE((root / "t/tool.sh").stat().st_mode) == 0o600


@pytest.mark.parametrize("is_buildkit", [True, False])
async def test_no_password_of_an_address_is_in_steps_history_and_errors(
    rig: BuildRig, server: WebServer, is_buildkit: bool
) -> None:
    guarded = server.url.replace("://", "://ann:pa55word@")
    add = f"ADD {guarded}/tool.sh /t/\nONBUILD ADD {guarded}/moved /o/\n"
    image = await rig.build("FROM scratch\n" + add, is_buildkit=is_buildkit)
    assert server.requests[-1][1]["Authorization"].startswith("Basic "), "the server gets it"
    said = [call.args[0].text for call in rig.progress.started.call_args_list]
    assert said[1] == f"ADD {server.url.replace('://', '://xxxxx:xxxxx@')}/tool.sh /t/"
    assert "pa55word" not in "".join(said)
    parent = rig.images.get(rig.images.get(image).parent)
    config = rig.images.config_file(parent).read_text()
    assert "pa55word" not in config
    assert ("xxxxx:xxxxx@" in config) == is_buildkit, "the classic builder's history has a digest"
    for wrong in (f"{guarded}/nosuch", f"{guarded}/no.git", "http://ann:pa55word@127.0.0.1:x/y"):
        with pytest.raises(SkepError) as error:
            await rig.build(f"FROM scratch\nADD {wrong} /t\n", is_buildkit=is_buildkit)
        assert "pa55word" not in str(error.value)


async def test_no_password_of_an_address_is_in_the_history_of_other_instructions(rig: BuildRig) -> None:
    dockerfile = (
        "FROM scratch\nCOPY tool /x\n"
        "ENV A='https://ann:pa55word@h/x' B=https://h,https://ann:pa55/word@h\n"
        'CMD curl "https://ann:pa55\'word@h/x"\n'
    )
    (rig.context / "tool").touch()
    for is_buildkit in (True, False):
        image = await rig.build(dockerfile, is_buildkit=is_buildkit)
        config = json.loads(rig.images.config_file(rig.images.get(image)).read_text())
        assert "pa55" in str(config["config"]), "containers get it"
        assert "xxxxx:xxxxx@h" in str(config["history"])
        assert "pa55" not in str([config["history"], config.get("container_config", {}).get("Cmd")])
        assert "pa55" not in str(rig.progress.started.call_args_list)
        await rig.build(dockerfile, is_buildkit=is_buildkit)
        assert rig.cached == 3
        await rig.build(dockerfile.replace("pa55", "other"), is_buildkit=is_buildkit)
        assert rig.cached == 1, "another password is another step"


# --- git ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "remote", "git"),
    [
        ("http://h/x", True, False),
        ("https://h/x.git", True, True),
        ("https://h/x.git#main:docs", True, True),
        ("https://h/x.git?ref=v1", True, True),
        ("https://h/x#a.git", True, False),
        ("git@h:o/r.git", True, True),
        ("git://h/r", True, True),
        ("ssh://git@h/r", True, True),
        ("./git@h:o", False, False),
        ("github.com/o/r", False, False),
        ("ftp://h/x", False, False),
        ("a@b", False, False),
        ("HTTP://h/x", False, False),
    ],
)
def test_which_sources_are_fetched(source: str, remote: bool, git: bool) -> None:
    assert (is_remote(source), is_git(source)) == (remote, git)


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("https://h/r.git", RepositoryAddress(remote="https://h/r.git")),
        ("https://h/r.git#v1", RepositoryAddress(remote="https://h/r.git", ref="v1")),
        (
            "https://h/r.git#v1:a/../docs",
            RepositoryAddress(remote="https://h/r.git", ref="v1", subdir="docs"),
        ),
        ("git@h:o/r.git#:docs", RepositoryAddress(remote="git@h:o/r.git", subdir="docs")),
        (
            "https://h/r.git?tag=v1&subdir=d&checksum=ab&keep-git-dir=1&submodules=0",
            RepositoryAddress(
                remote="https://h/r.git",
                ref="refs/tags/v1",
                subdir="d",
                checksum="ab",
                keep_git_dir=True,
                submodules=False,
            ),
        ),
        ("https://h/r.git?branch=b", RepositoryAddress(remote="https://h/r.git", ref="refs/heads/b")),
        ("https://h/r.git?commit=ab", RepositoryAddress(remote="https://h/r.git", ref="ab", checksum="ab")),
        (
            "https://h/r.git?mtime=commit#:d",
            RepositoryAddress(remote="https://h/r.git", subdir="d", has_commit_times=True),
        ),
        (
            "https://h/r.git?mtime=checkout&subdir=d#:d",
            RepositoryAddress(remote="https://h/r.git", subdir="d"),
        ),
    ],
)
def test_the_address_of_a_repository(source: str, address: RepositoryAddress) -> None:
    assert address_of(source) == address


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("https://h/r.git?x=1", 'unexpected query "x"'),
        ("https://h/r.git?ref=", 'query "ref" has no value'),
        ("https://h/r.git?ref=a&ref=b", 'query "ref" has multiple values'),
        ("https://h/r.git?ref=a#b", "ref conflicts: a vs b"),
        ("https://h/r.git?keep-git-dir=maybe", 'invalid keep-git-dir value: "maybe"'),
        ("https://h/r.git?mtime=now", 'invalid mtime value: "now"'),
        ("https://h/r.git?subdir=a#:b", 'subdir conflicts: "b" vs "a"'),
        ("https://h/r.git?fetch-by-commit=true", 'unexpected query "fetch-by-commit"'),
        ("https://h/r.git#--upload-pack=x", "invalid git address"),
    ],
)
def test_a_wrong_address_of_a_repository_is_refused(source: str, error: str) -> None:
    with pytest.raises(InvalidArgument, match=error):
        address_of(source)


def git(directory: Path, *words: str) -> str:
    identity = {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", "-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always", *words],
        cwd=directory,
        env={**os.environ, **identity, "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
async def repository(server: WebServer, tmp_path: Path) -> str:
    """``README``, ``docs/page`` and a program; tag ``v1`` has another README.  The commit of v1 is ``v1`` of git."""
    source = tmp_path / "source"
    (source / "docs").mkdir(parents=True)
    await asyncio.to_thread(git, source, "init", "--quiet")
    (source / "README").write_text("one\n")
    (source / "docs/page").write_text("page\n")
    (source / "program").write_text("#!/bin/sh\n")
    (source / "program").chmod(0o755)
    git(source, "add", ".")
    git(source, "commit", "--quiet", "-m", "one")
    git(source, "tag", "-a", "v1", "-m", "v1")
    (source / "README").write_text("two\n")
    git(source, "commit", "--quiet", "-am", "two")
    git(source, "clone", "--quiet", "--bare", str(source), str(server.root / "r.git"))
    git(server.root / "r.git", "update-server-info")
    return f"{server.url}/git/r.git"


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@needs_git
async def test_a_repository_is_cloned_without_its_git_directory(rig: BuildRig, repository: str) -> None:
    async with built(rig, f"ADD {repository} /r") as root:
        assert sorted(path.name for path in (root / "r").iterdir()) == ["README", "docs", "program"]
        assert (root / "r/README").read_text() == "two\n"
        modes = {
            name: stat.S_IMODE((root / "r" / name).stat().st_mode) for name in ("README", "docs", "program")
        }
        assert modes == {"README": 0o644, "docs": 0o755, "program": 0o755}


@needs_git
async def test_a_branch_a_tag_a_commit_and_a_directory(
    rig: BuildRig, repository: str, tmp_path: Path
) -> None:
    commit = git(tmp_path / "source", "rev-parse", "v1^{commit}")
    for fragment, readme in (
        ("#v1", "one\n"),
        ("#main", "two\n"),
        (f"#{commit}", "one\n"),
        ("?tag=v1", "one\n"),
        (f"?commit={commit}", "one\n"),
    ):
        async with built(rig, f"ADD {repository}{fragment} /r") as root:
            assert (root / "r/README").read_text() == readme, fragment
    async with built(rig, f"ADD --chown=3:4 {repository}#v1:docs /r") as root:
        assert [path.name for path in (root / "r").iterdir()] == ["page"]
        assert (root / "r/page").stat().st_uid == 3


@needs_git
async def test_files_of_a_repository_have_the_time_of_the_commit_where_that_is_asked_for(
    rig: BuildRig, server: WebServer, repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_COMMITTER_DATE", "2001-02-03T04:05:06Z")
    source = tmp_path / "source"
    (source / "link").symlink_to("/etc/passwd")
    git(source, "add", ".")
    git(source, "commit", "--quiet", "-m", "three")
    git(source, "push", "--quiet", str(server.root / "r.git"), "main")
    git(server.root / "r.git", "update-server-info")
    async with built(rig, f"ADD {repository}?mtime=commit /r") as root:
        times = {path.lstat().st_mtime for path in (root / "r").rglob("*")}
    assert times == {981173106}
    async with built(rig, f"ADD {repository} /r") as root:
        assert (root / "r/README").stat().st_mtime > 981173106


@needs_git
async def test_keep_git_dir_and_checksum_of_a_repository(
    rig: BuildRig, repository: str, tmp_path: Path
) -> None:
    commit = git(tmp_path / "source", "rev-parse", "v1^{commit}")
    line = f"ADD --keep-git-dir=true --checksum={commit[:7]} {repository}#v1 /r"
    async with built(rig, line) as root:
        assert (root / "r/.git/HEAD").read_text().strip() == commit
    async with built(rig, line):
        assert rig.cached == 1
    with pytest.raises(InvalidArgument, match=f"expected checksum to match 0000, got {commit}"):
        await rig.build(f"FROM scratch\nADD --checksum=0000 {repository}#v1 /r\n")


@needs_git
async def test_a_repository_or_a_part_of_it_that_is_not_there_fails_the_build(
    rig: BuildRig, repository: str
) -> None:
    for address, error in (
        (f"{repository}#nosuch", "does not contain ref nosuch"),
        (f"{repository}#v1:nosuch", "invalid subdir nosuch"),
        (repository.replace("r.git", "none.git"), "git stderr"),
    ):
        with pytest.raises(SkepError, match=error):
            await rig.build(f"FROM scratch\nADD {address} /r\n")


async def test_without_the_program_a_repository_is_refused_by_name(
    rig: BuildRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(SkepError, match="needs the program git on this node"):
        await rig.build("FROM scratch\nADD git://127.0.0.1:1/r /r\n")

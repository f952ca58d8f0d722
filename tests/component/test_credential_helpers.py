"""Credential helpers: programs on the path that a registry's credentials are asked of."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from skep.agent.executor.interface import Rejected
from skep.agent.executor.pulling import ImagePuller
from skep.aio.clock import SystemClock
from skep.engine.images.reference import parse_reference
from skep.engine.images.registry.credentials import CredentialHelpers, RegistryCredentials
from skep.engine.images.registry.endpoints import RegistryPolicy
from skep.engine.images.registry.registry import DOCKER_MANIFEST
from skep.engine.images.store import ImageStore
from skep.errors import NotFound, SkepError
from tests.support.images.archives import sha256
from tests.support.images.bent_registry import Registry
from tests.support.images.registry_rig import BLOBS, CONFIG, a_manifest


class Helper:
    """A helper ``docker-credential-test`` that a test writes; it notes each call."""

    def __init__(self, directory: Path) -> None:
        self.calls = directory / "calls"
        self._path = directory / "docker-credential-test"

    def does(self, *lines: str) -> None:
        note = f'read server; echo "$1 $server" >> {self.calls}'
        self._path.write_text("\n".join(("#!/bin/sh", note, *lines, "")))
        self._path.chmod(0o755)

    def gives(self, username: str, secret: str) -> None:
        self.does(f"echo '{json.dumps({'ServerURL': 'x', 'Username': username, 'Secret': secret})}'")

    @property
    def asked(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Helper:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return Helper(directory)


@pytest.fixture
def helpers() -> CredentialHelpers:
    return CredentialHelpers(SystemClock())


async def test_a_helper_is_asked_by_its_protocol(helper: Helper, helpers: CredentialHelpers):
    helper.gives("user", "secret")
    assert (await helpers.provide("test", "r:5000")).credentials == RegistryCredentials(
        username="user", password="secret"
    )
    await helpers.provide("test", "docker.io")
    assert helper.asked == ["get r:5000", "get https://index.docker.io/v1/"]


async def test_a_token_is_no_password(helper: Helper, helpers: CredentialHelpers):
    helper.gives("<token>", "t1")
    assert (await helpers.provide("test", "r:5000")).credentials == RegistryCredentials(identity_token="t1")


async def test_many_at_once_ask_once_and_refused_ones_ask_again(helper: Helper, helpers: CredentialHelpers):
    helper.gives("user", "old")
    first = await asyncio.gather(*(helpers.provide("test", "r:5000") for _ in range(20)))
    assert {one.credentials.password for one in first} == {"old"}
    assert len(helper.asked) == 1
    helper.gives("user", "new")
    assert (await helpers.provide("test", "r:5000")).credentials.password == "old"
    again = await asyncio.gather(*(helpers.provide("test", "r:5000", fresh=True) for _ in range(20)))
    assert {one.credentials.password for one in again} == {"new"}
    assert len(helper.asked) == 2


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (("echo credentials not found in native keychain", "exit 1"), ""),
        (("echo locked; exit 3",), "docker-credential-test: exit code 3: 'locked'"),
        (("echo password123",), "docker-credential-test: its output is not JSON with Username and Secret"),
        (("exec yes",), "docker-credential-test: its output is longer than 1048576 bytes"),
        (("exec sleep 1000",), "docker-credential-test: no response within 0.5 s"),
        (("sleep 1000 & exit 0",), "docker-credential-test: no response within 0.5 s"),
    ],
)
async def test_a_helper_that_fails_gives_nothing_but_its_problem(
    helper: Helper,
    lines: tuple[str, ...],
    problem: str,
):
    helpers = CredentialHelpers(SystemClock(), **({"deadline_s": 0.5} if "0.5 s" in problem else {}))
    helper.does(f"echo $$ > {helper.calls}.pid", *lines)
    provided = await helpers.provide("test", "r:5000")
    assert (provided.credentials, provided.problem) == (RegistryCredentials(), problem)
    session = Path(f"{helper.calls}.pid").read_text().strip()
    deadline = time.monotonic() + 60
    while _of_session(session):
        assert time.monotonic() < deadline, "what the helper started is ended with it"
        await asyncio.sleep(0.02)


def _of_session(session: str) -> list[str]:
    """Processes of a session that are no zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[3] == session and fields[0] != "Z":
                found.append(entry.name)
    return found


async def test_a_helper_that_is_not_installed_is_named(helpers: CredentialHelpers):
    provided = await helpers.provide("nowhere", "r:5000")
    assert provided.problem == "docker-credential-nowhere: no such file or directory"


@pytest.fixture
async def guarded() -> AsyncIterator[Registry]:
    """A registry with ``app:1`` for ``user`` and whatever password is right at present (``right``)."""
    registry = Registry()
    registry.blobs = {sha256(content): content for content in (CONFIG, *BLOBS)}
    registry.manifests["1"] = (a_manifest(), DOCKER_MANIFEST)

    async def guard(request: web.Request) -> web.StreamResponse | None:
        if request.headers.get("Authorization") == aiohttp.encode_basic_auth("user", registry.right):
            return None
        return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})

    registry.right = "secret"
    registry.bend = guard
    async with registry.serving():
        yield registry


async def a_store(tmp_path: Path, registry: Registry) -> ImageStore:
    store = ImageStore(tmp_path / "images", policy=RegistryPolicy(helpers={registry.address: "test"}))
    await store.open()
    return store


async def test_a_plain_pull_and_a_question_use_the_helper(tmp_path: Path, helper: Helper, guarded: Registry):
    images = await a_store(tmp_path, guarded)
    helper.gives("user", "secret")
    reference = f"{guarded.address}/app:1"
    assert (await images.pull(reference)).id == sha256(CONFIG)
    found = await images.inspect_remote(images.get(reference).tags[0], "")
    assert found["Descriptor"]["digest"] == sha256(a_manifest())


@pytest.mark.parametrize("auth", ["", "eyJ1c2VybmFtZSI6InVzZXIiLCJwYXNzd29yZCI6Im9sZCJ9"])
async def test_a_task_that_nobody_trusts_does_not_use_the_helper(
    tmp_path: Path, helper: Helper, guarded: Registry, auth: str
):
    """Neither without credentials, nor where its own are refused."""
    images = await a_store(tmp_path, guarded)
    helper.gives("user", "secret")
    puller = ImagePuller(images, SystemClock())
    with pytest.raises(Rejected, match="No such image"):
        await puller.image(f"{guarded.address}/app:1", auth)
    with pytest.raises(SkepError):
        await images.inspect_remote(parse_reference(f"{guarded.address}/app:1"), auth, uses_helper=False)
    assert helper.asked == []
    found = await puller.image(f"{guarded.address}/app:1", auth, uses_helper=True)
    assert found.id == sha256(CONFIG)


async def test_credentials_that_have_expired_are_renewed_by_the_helper(
    tmp_path: Path, helper: Helper, guarded: Registry
):
    """Those that a service was created with, and those that the helper gave a moment ago."""
    images = await a_store(tmp_path, guarded)
    helper.gives("user", "secret")
    expired = "eyJ1c2VybmFtZSI6InVzZXIiLCJwYXNzd29yZCI6Im9sZCJ9"
    await images.pull(f"{guarded.address}/app:1", expired)
    guarded.right = "next"
    helper.gives("user", "next")
    await images.pull(f"{guarded.address}/app:1")
    assert len(helper.asked) == 2
    guarded.right = "last"
    helper.gives("user", "last")
    found = await images.inspect_remote(images.get(f"{guarded.address}/app:1").tags[0], expired)
    assert found["Descriptor"]["digest"] == sha256(a_manifest())
    assert len(helper.asked) == 3


async def test_a_refused_pull_names_what_is_wrong_with_the_helper(
    tmp_path: Path, helper: Helper, guarded: Registry
):
    images = await a_store(tmp_path, guarded)
    helper.does("echo locked; exit 3")
    with pytest.raises(
        NotFound, match=r"no basic auth credentials \(docker-credential-test: exit code 3: 'locked'\)$"
    ):
        await images.pull(f"{guarded.address}/app:1")
    helper.gives("user", "wrong")
    with pytest.raises(SkepError, match="pull access denied"):
        await images.pull(f"{guarded.address}/app:1")


async def test_another_registry_does_not_get_the_helpers_credentials(
    tmp_path: Path, helper: Helper, guarded: Registry
):
    images = await a_store(tmp_path, guarded)
    helper.gives("user", "secret")
    async with Registry().serving() as other:
        with pytest.raises(SkepError):
            await images.pull(f"{other.address}/app:1")
        assert not any("Authorization" in request.headers for request in other.requests)
    assert helper.asked == []

"""``docker build`` by BuildKit's session protocol, as the machine's docker command speaks it, on real runc.

Clients before 23 speak it themselves, later ones by the plug-in buildx.
"""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from skep.engine.images.listing import ImageFilter, select
from tests.support.builds.build_lab import BASE, LIMIT_S, BuildLab, CommandResult, build_lab
from tests.support.machines.playground_rig import CLIS, wait_until
from tests.support.machines.plugins import let_find

pytestmark = pytest.mark.timeout(300)


async def wait_for(condition: Callable[[], bool]) -> None:
    """Return once ``condition`` holds."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[BuildLab]:
    async with build_lab(tmp_path) as lab:
        yield lab


def left_by_builds(lab: BuildLab) -> list[str]:
    """Containers, and files in the store's scratch directory."""
    return [*map(str, lab.images.scratch.iterdir()), *(container.name for container in lab.engine.list())]


@cache
def needs_buildx() -> bool:
    said = subprocess.run(
        [CLIS[0], "--version"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    return int(said.removeprefix("Docker version ").partition(".")[0]) >= 23


async def started(
    lab: BuildLab, context: Path, *options: str, **environment: str
) -> asyncio.subprocess.Process:
    if needs_buildx():
        let_find(lab.root, "docker-buildx")
    return await asyncio.create_subprocess_exec(
        *(CLIS[0], "build", *options, str(context)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(lab.root),
            "DOCKER_HOST": f"unix://{lab.socket}",
            "DOCKER_BUILDKIT": "1",
            "DOCKER_API_VERSION": "1.41",
            **environment,
        },
    )


async def built(lab: BuildLab, context: Path, *options: str, **environment: str) -> CommandResult:
    """``DOCKER_BUILDKIT=1 docker build`` of a directory."""
    process = await started(lab, context, "--progress", "plain", *options, **environment)
    try:
        async with asyncio.timeout(LIMIT_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return CommandResult(process.returncode, output.decode(errors="replace"))


STAGES = f"""
# syntax=docker/dockerfile:1
FROM {BASE} AS first
ARG WHO=nobody
COPY data /data
RUN cat /data > /out; echo $WHO >> /out
FROM {BASE} AS second
COPY --from=first /out /out
LABEL a=b
FROM {BASE} AS third
RUN false
"""


async def test_a_context_is_built_once_and_found_again(lab: BuildLab) -> None:
    context = lab.context(STAGES, {"data": "one\n", "ignored": "x", ".dockerignore": "ign*\n"})
    options = (
        "--target",
        "second",
        "--build-arg",
        "WHO=me",
        "--label",
        "c=d",
        "-t",
        "made:1",
        "-t",
        "made:2",
    )
    first = await built(lab, context, *options)
    assert first.exit == 0, first.output
    assert lab.text("made:1", "out") == "one\nme\n"
    assert lab.images.get("made:1").id == lab.images.get("made:2").id
    assert "third" not in first.output
    shown = {one.image.id for one in select(lab.images.images(), ImageFilter())}
    assert shown == {lab.images.get(name).id for name in ("made:1", BASE)}, "no stage is listed"
    labels = lab.images.get("made:1").config.defaults.labels
    assert {name: labels[name] for name in "ac"} == {"a": "b", "c": "d"}
    again = await built(lab, context, *options)
    assert again.exit == 0, again.output
    assert "CACHED" in again.output
    assert lab.images.get("made:1").id in again.output
    (context / "data").write_text("two\n")
    changed = await built(lab, context, *options)
    assert changed.exit == 0, changed.output
    assert lab.text("made:1", "out") == "two\nme\n"
    assert not left_by_builds(lab)


async def test_steps_have_secrets_mounts_and_here_documents_and_a_secret_is_in_no_layer(
    lab: BuildLab,
) -> None:
    (lab.root / "password").write_text("hunter2")
    context = lab.context(
        f"""
FROM {BASE}
RUN --mount=type=secret,id=password --mount=type=cache,target=/cache <<END
set -e
test "$(cat /run/secrets/password)" = hunter2
echo run >> /cache/runs
cat /cache/runs > /out
END
COPY <<END /doc
here
END
"""
    )
    done = await built(lab, context, "-t", "made", "--secret", f"id=password,src={lab.root / 'password'}")
    assert done.exit == 0, done.output
    assert lab.text("made", "out") == "run\n"
    assert lab.text("made", "doc") == "here\n"
    layers = [path for layer in lab.images.layers(lab.images.get("made")) for path in layer.rglob("*")]
    files = [path for path in layers if path.is_file() and not path.is_symlink()]
    assert not [path for path in files if path.name == "password" or b"hunter2" in path.read_bytes()]
    again = await built(
        lab, context, "--no-cache", "-t", "made", "--secret", f"id=password,src={lab.root / 'password'}"
    )
    assert again.exit == 0, again.output
    assert lab.text("made", "out") == "run\nrun\n"
    without = await built(lab, context, "--no-cache", "-t", "without")
    assert without.exit != 0
    assert lab.images.lookup("without") is None
    assert not left_by_builds(lab)


def with_libraries(command: str) -> dict[Path, str]:
    """A command of this machine with what it loads: files, and where each belongs."""
    path = shutil.which(command)
    assert path is not None
    loaded = subprocess.run(["ldd", path], check=True, capture_output=True, text=True).stdout
    found = {Path(path): f"bin/{command}"}
    for library in re.findall(r"(/\S+) \(0x", loaded):
        found[Path(library)] = library.removeprefix("/")
    return found


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    """The socket of an ssh agent with one key."""
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "mine", "-f", str(key)], check=True)
    with tempfile.TemporaryDirectory(prefix="skep-agent-") as directory:
        address = f"{directory}/agent"
        with subprocess.Popen(["ssh-agent", "-D", "-a", address], stdout=subprocess.DEVNULL) as process:
            environment = {**os.environ, "SSH_AUTH_SOCK": address}
            try:
                wait_until(lambda: Path(address).exists(), "the agent listens")
                subprocess.run(["ssh-add", "-q", str(key)], check=True, env=environment)
                yield address
            finally:
                process.terminate()


async def test_commands_talk_to_the_ssh_agent_of_the_client(lab: BuildLab, agent: str) -> None:
    context = lab.context(f"FROM {BASE}\nCOPY root /\nRUN --mount=type=ssh ssh-add -l > /keys\n")
    for source, place in with_libraries("ssh-add").items():
        (context / "root" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, context / "root" / place)
    done = await built(lab, context, "-t", "made", "--ssh", "default", SSH_AUTH_SOCK=agent)
    assert done.exit == 0, done.output
    assert re.fullmatch(r"256 SHA256:\S+ mine \(ED25519\)\n", lab.text("made", "keys"))
    assert not left_by_builds(lab)


async def test_a_command_that_fails_fails_the_build_and_tags_nothing(lab: BuildLab) -> None:
    done = await built(lab, lab.context(f"FROM {BASE}\nRUN echo said; exit 3\n"), "-t", "made")
    assert done.exit != 0
    assert re.search(r"#\d+ [\d.]+ said", done.output), done.output
    assert 'process "/bin/sh -c echo said; exit 3" did not complete successfully: exit code: 3' in done.output
    assert lab.images.lookup("made") is None
    missing = await built(lab, lab.context(f"FROM {BASE}\nCOPY nothing /\n"), "-t", "made")
    assert missing.exit != 0
    assert "nothing" in missing.output
    other = await built(lab, lab.context(f"# syntax=some/frontend\nFROM {BASE}\n"), "-t", "made")
    assert other.exit != 0
    assert "front end some/frontend is not supported" in other.output
    assert not left_by_builds(lab)


async def test_an_interrupted_build_ends_its_command(lab: BuildLab) -> None:
    process = await started(lab, lab.context(f"FROM {BASE}\nRUN sleep 3600\n"), "-t", "made")
    await wait_for(lambda: any(one.is_running for one in lab.engine.list()))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: buildx is a process of its own
    async with asyncio.timeout(LIMIT_S):
        await process.communicate()
    await wait_for(lambda: not left_by_builds(lab))
    assert lab.images.lookup("made") is None


async def test_an_unknown_session_and_another_protocol_are_refused(lab: BuildLab) -> None:
    for head, text in (
        (
            b"POST /session HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n",
            b"protocol tcp not supported",
        ),
        (b"POST /grpc HTTP/1.1\r\nHost: x\r\n\r\n", b"no upgrade proto in request"),
    ):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, str(lab.socket))
            await loop.sock_sendall(connection, head)
            async with asyncio.timeout(LIMIT_S):
                assert text in await loop.sock_recv(connection, 4096)


@pytest.mark.parametrize("is_buildkit", [True, False], ids=["buildkit", "classic"])
async def test_no_password_of_an_address_is_in_steps_errors_and_history(
    lab: BuildLab, is_buildkit: bool
) -> None:
    address = "https://ann:pa55/w0rd'x@h.invalid/x"
    run = f'RUN echo "{address}" "https://v:pa55@i,https://w:pa55@j" > /x\n'
    for dockerfile in (f"ARG U\n{run}", f"ARG U\n{run}RUN true {address} && exit 3\n"):
        context = lab.context(f"FROM {BASE}\n{dockerfile}")
        words = ("build", "--build-arg", f"U={address}", "-t", "kept", str(context))
        said = await (built(lab, context, *words[1:-1]) if is_buildkit else lab.docker(*words))
        assert "h.invalid" in said.output, said.output
        assert "pa55" not in said.output
        assert "w0rd" not in said.output
    image = lab.images.get("kept")
    assert lab.text("kept", "x").count("pa55") == 3
    config = lab.images.config_file(image).read_text()
    assert "xxxxx:xxxxx@h.invalid" in config
    assert "pa55" not in config

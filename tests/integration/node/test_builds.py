"""Images that a node builds: the docker command, the node's API, real containers."""

import asyncio
import gzip
import os
import re
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from skep.aio.clock import SystemClock
from skep.engine.build.builder import Builder
from skep.engine.build.files import context as contexts
from skep.engine.build.interface import BuildRequest, BuildStep
from skep.engine.containers.container import StandardStream
from skep.engine.images.archives import workers
from skep.engine.images.archives.workers import ImageLimits
from skep.engine.images.digest import Digest
from skep.engine.images.progress import ProgressMessage
from skep.engine.images.reference import parse_reference
from skep.errors import SkepError
from tests.integration.node.conftest import eventually
from tests.support.builds.build_lab import BuildLab, build_lab
from tests.support.images.archives import a_file, a_tar, an_entry
from tests.support.machines.playground_rig import CLIS
from tests.support.managers.counted_calls import calls_of

pytestmark = [pytest.mark.needs("root", "runc", "conmon", "docker"), pytest.mark.timeout(180)]


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[BuildLab]:
    async with build_lab(tmp_path) as node:
        yield node


def lines(output: str) -> list[str]:
    """What the builder said, with ids replaced."""
    text = re.sub(r"\b[0-9a-f]{12}\b", "ID", output)
    return [
        line for line in text.splitlines() if line and not line.startswith(("Sending", "DEPREC", "     "))
    ]


async def post(node: BuildLab, body: bytes, **query: str) -> tuple[int, str]:
    """Status and text of a request to build ``body``."""
    connector = aiohttp.UnixConnector(str(node.socket))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post("http://d/v1.41/build", data=body, params=query) as response,
    ):
        return response.status, await response.text()


async def test_a_dockerfile_is_built_with_its_steps_shown_and_cached(node: BuildLab) -> None:
    context = node.context(
        "ARG TAG=2\n"
        "FROM busybox:$TAG AS first\n"
        "ARG WORD=nothing\n"
        "ENV A=1 B=$WORD\n"
        "RUN echo $B$A > /said; echo err >&2\n"
        "WORKDIR /w\n"
        "FROM first\n"
        "COPY a.txt b.txt ./sub/\n"
        "COPY --from=0 /said /again\n"
        'CMD ["cat", "/said"]\n',
        {"a.txt": "a\n", "b.txt": "b\n"},
    )
    options = (
        "-t",
        "mine:1",
        "-t",
        "other",
        "--build-arg",
        "TAG=1",
        "--build-arg",
        "WORD=w",
        "--build-arg",
        "X=1",
    )
    first = await node.build(context, *options, "--label", "l=v")
    assert lines(first.output) == [
        "Step 1/11 : ARG TAG=2",
        "Step 2/11 : FROM busybox:$TAG AS first",
        " ---> ID",
        "Step 3/11 : ARG WORD=nothing",
        *(" ---> Running in ID", "Removing intermediate container ID", " ---> ID"),
        "Step 4/11 : ENV A=1 B=$WORD",
        *(" ---> Running in ID", "Removing intermediate container ID", " ---> ID"),
        "Step 5/11 : RUN echo $B$A > /said; echo err >&2",
        *(" ---> Running in ID", "\x1b[91merr", "\x1b[0mRemoving intermediate container ID", " ---> ID"),
        "Step 6/11 : WORKDIR /w",
        *(" ---> Running in ID", "Removing intermediate container ID", " ---> ID"),
        "Step 7/11 : FROM first",
        " ---> ID",
        "Step 8/11 : COPY a.txt b.txt ./sub/",
        " ---> ID",
        "Step 9/11 : COPY --from=0 /said /again",
        " ---> ID",
        'Step 10/11 : CMD ["cat", "/said"]',
        *(" ---> Running in ID", "Removing intermediate container ID", " ---> ID"),
        "Step 11/11 : LABEL l=v",
        *(" ---> Running in ID", "Removing intermediate container ID", " ---> ID"),
        "[Warning] One or more build-args [X] were not consumed",
        "Successfully built ID",
        "Successfully tagged mine:1",
        "Successfully tagged other:latest",
    ]
    image = node.images.get("mine:1")
    defaults = image.config.defaults
    assert node.images.get("other").id == image.id
    assert (defaults.cmd, defaults.working_dir, defaults.labels) == (
        ("cat", "/said"),
        "/w",
        {"test": "yes", "l": "v"},
    )
    assert set(defaults.env or ()) >= {"A=1", "B=w"}
    assert node.text("mine:1", "again") == "w1\n"
    assert sorted(node.files("mine:1")) == ["again", "said", "w", "w/sub", "w/sub/a.txt", "w/sub/b.txt"]
    history = [entry.created_by for entry in image.config.history or ()]
    assert history[2] == "/bin/sh -c #(nop)  ENV A=1 B=w"
    assert history[3] == "|1 WORD=w /bin/sh -c echo $B$A > /said; echo err >&2"
    assert re.fullmatch(r"/bin/sh -c #\(nop\) COPY multi:[0-9a-f]{64} in ./sub/ ", history[5])
    for cli in CLIS:  # the second time
        again = await node.build(context, *options, "--label", "l=v", cli=cli)
        assert again.exit == 0, again.output
        assert "Running in" not in again.output
        assert again.output.count(" ---> Using cache\n") == 8
        assert node.images.get("mine:1").id == image.id
    (context / "b.txt").write_text("B\n")
    changed = lines((await node.build(context, *options)).output)
    assert changed.count(" ---> Using cache") == 4
    assert node.text("mine:1", "w/sub/b.txt") == "B\n"
    anew = await node.build(context, *options, "--no-cache", "--target", "FIRST", "-q")
    assert re.fullmatch(r"sha256:[0-9a-f]{64}\n", anew.output.replace("\r", "").splitlines(keepends=True)[-1])
    assert not node.remains()


async def test_copies_go_where_docker_puts_them(node: BuildLab) -> None:
    context = node.context(
        "FROM busybox:1\n"
        "WORKDIR /w\n"
        "COPY a /file\n"
        "COPY a new/\n"
        "COPY d /d\n"
        "COPY d/x* here/\n"
        'COPY ["with blank", "/with blank"]\n'
        "COPY --chown=alice d /owned/\n"
        "COPY --chown=7:staff a /owned/ids\n"
        "ADD t.tgz /unpacked/\n"
        "COPY t.tgz /unpacked.tgz\n"
        "RUN ln -s /d /link; rm /d/y; mkdir /only\n"
        "COPY a /link/z\n"
        "FROM scratch\n"
        "COPY --from=0 /owned /o\n",
        {"a": "a\n", "d/x1": "1", "d/x2": "2", "d/y": "y", "with blank": "b", "ignored": "i"},
    )
    (context / ".dockerignore").write_text("ignored\n")
    (context / "d/x1").chmod(0o751)
    archive = a_tar(an_entry("in", tarfile.DIRTYPE, uid=5), a_file("in/f", b"f", uid=5, gid=6))
    (context / "t.tgz").write_bytes(gzip.compress(archive))
    built = await node.build(context, "-t", "mine")
    assert built.exit == 0, built.output
    owned = node.files("mine")
    assert {name: (one.uid, one.gid) for name, one in owned.items()} == {
        "o": (0, 0),
        "o/ids": (7, 50),
        **dict.fromkeys(("o/x1", "o/x2", "o/y"), (1000, 1001)),
    }
    assert owned["o/x1"].mode == 0o751
    whole = await node.build(context, "-t", "whole", "--target", "0")
    assert whole.exit == 0, whole.output
    assert "Running in" not in whole.output
    found = node.files("whole")
    assert {name for name, one in found.items() if one.isreg()} == {
        *("file", "w/new/a", "d/x1", "d/x2", "w/here/x1", "w/here/x2", "with blank"),
        *("owned/x1", "owned/x2", "owned/y", "owned/ids", "unpacked/in/f", "unpacked.tgz", "d/z"),
    }


async def test_a_build_that_fails_says_why_and_leaves_nothing(node: BuildLab) -> None:
    for step, reason in {
        "RUN echo out; exit 3": "The command '/bin/sh -c echo out; exit 3' returned a non-zero code: 3",
        'RUN ["/nosuch"]': "no such file or directory",
        "COPY nosuch /": "COPY failed: file not found in build context or excluded by .dockerignore: stat nosuch: file"
        " does not exist",
        "COPY ../../etc/shadow /": "COPY failed: forbidden path outside the build context: ../../etc/shadow ()",
        "COPY a b /x": "When using COPY with more than one source file, the destination must be a directory and end",
        "COPY --from=5 a /x": "invalid from flag value 5: index out of bounds",
        "COPY --from=last a /x": "invalid from flag value last: refers to current build stage",
        "COPY --chown=nobody2 a /x": "unable to convert uid/gid chown string to host mapping: can't find uid for user"
        " nobody2: no such user: nobody2",
        "COPY --chmod=600 a /x": "the --chmod option requires BuildKit",
        "COPY http://x/y /x": "COPY failed: source can't be a URL for COPY",
        "ADD http://127.0.0.1:1/y /x": "failed to load http://127.0.0.1:1/y: ",
        "RUN --mount=type=tmpfs,target=/x ls": "the --mount option requires BuildKit",
        "EXPOSE x": "Invalid containerPort: x",
        "ENV A=${B:?not-given}": "B: not-given",
    }.items():
        context = node.context(f"FROM busybox:1 AS last\nRUN true\n{step}\nRUN false\n", {"a": "", "b": ""})
        built = await node.build(context, "-t", "mine")
        assert reason in built.output, built.output
        assert built.exit != 0
        assert "Step 4/4" not in built.output
        assert node.images.lookup("mine") is None
        assert not node.remains()
    failed = await node.build(node.context("FROM busybox:1\nRUN exit 3\n"), cli=CLIS[0])
    assert failed.exit == 3


async def test_a_quiet_build_that_fails_shows_its_steps(node: BuildLab) -> None:
    context = node.context("FROM busybox:1\nRUN echo shown\nRUN exit 3\n")
    failed = await node.build(context, "-q")
    assert failed.exit == 3
    assert "Step 2/3 : RUN echo shown" in failed.output
    assert "returned a non-zero code: 3" in failed.output
    (context / "Dockerfile").write_text("FROM busybox:1\nRUN echo shown\n")
    built = await node.build(context, "-q")
    assert built.exit == 0
    assert "Step" not in built.output


async def test_a_dockerfile_comes_by_standard_input_beside_its_context(node: BuildLab) -> None:
    """The docker command does not close the archive that it makes then: its last file is not padded."""
    context = node.context("", {"file": "content\n"})
    dockerfile = b"FROM busybox:1\nCOPY file /x/\n"
    built = await node.docker("build", "-t", "mine", "-f", "-", str(context), stdin=dockerfile)
    assert built.exit == 0, built.output
    assert node.text("mine", "x/file") == "content\n"
    broken = a_tar(a_file("Dockerfile", dockerfile), a_file("file", b"x" * 600)).rstrip(b"\0")
    assert (await post(node, broken))[0] == 200
    status, said = await post(node, broken[:-1])
    assert (status, "unexpected EOF" in said) == (400, True)


async def test_a_context_that_comes_again_is_unpacked_only_for_steps_that_are_not_cached(
    node: BuildLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = node.context("FROM busybox:1\nCOPY a /x/\nADD b c /x/\n", {"a": "1", "b": "2", "c": "3"})

    async def build(*options: str) -> tuple[int, int]:
        """How often it was unpacked, and how many steps were cached."""
        with calls_of(workers.unpack) as unpacked:
            said = await node.build(context, "-t", "mine", *options)
        assert said.exit == 0, said.output
        return len(unpacked), said.output.count("Using cache")

    assert await build() == (1, 0)
    first = node.images.lookup("mine")
    assert first is not None
    assert await build() == (0, 2)
    assert node.images.lookup("mine") == first
    (context / "c").write_text("other")
    assert await build() == (1, 1)
    assert node.text("mine", "x/c") == "other"
    assert await build("--no-cache") == (1, 0)
    assert node.text("mine", "x/c") == "other"
    await node.docker("rmi", "-f", "mine", first.id)
    assert (await build())[0] == 1, "its results are gone"
    monkeypatch.setattr(contexts, "_COMPARED_BYTES_MAX", 1000)
    assert await build() == (1, 2), "too large to be compared"
    assert not node.remains()


async def test_a_request_that_cannot_be_built_is_refused(node: BuildLab) -> None:
    good = a_file("Dockerfile", b"FROM busybox:1\n")
    platform = "linux/s390x"
    for body, query, status, reason in (
        (a_tar(a_file("Dockerfile")), {}, 400, "the Dockerfile (Dockerfile) cannot be empty"),
        (
            a_tar(a_file("Dockerfile", b"FOO x\n")),
            {},
            400,
            "dockerfile parse error line 1: unknown instruction: FOO",
        ),
        (a_tar(a_file("x")), {}, 500, "Cannot locate specified Dockerfile: Dockerfile"),
        (
            a_tar(an_entry("Dockerfile", tarfile.SYMTYPE, "/etc/shadow")),
            {},
            500,
            "Cannot locate specified Dockerfile",
        ),
        (
            a_tar(an_entry("Dockerfile", tarfile.SYMTYPE, "../../../etc/shadow")),
            {},
            500,
            "Cannot locate specified",
        ),
        (a_tar(an_entry("Dockerfile", tarfile.DIRTYPE)), {}, 400, "Dockerfile is not a regular file"),
        (a_tar(an_entry("Dockerfile", tarfile.FIFOTYPE)), {}, 400, "Dockerfile is not a regular file"),
        (
            a_tar(an_entry("Dockerfile", tarfile.CHRTYPE, devmajor=1, devminor=5)),
            {},
            400,
            "not a regular file",
        ),
        (b"no archive" * 100, {}, 400, "Error processing tar file"),
        (a_tar(good, a_file("x", b"y" * 5000))[:3000], {}, 400, "unexpected EOF"),
        (a_tar(good), {"target": "nosuch"}, 400, "failed to reach build target nosuch in Dockerfile"),
        (a_tar(good), {"t": "Bad"}, 400, "repository name must be lowercase"),
        (a_tar(good), {"platform": platform}, 200, f"not {platform}: "),
        (
            a_tar(a_file("Dockerfile", b"FROM --platform=linux/s390x busybox:1\n")),
            {},
            200,
            f"not {platform}: ",
        ),
        (
            a_tar(good),
            {"remote": "ftp://127.0.0.1/x"},
            500,
            "remoteURL (ftp://127.0.0.1/x) could not be recognized as URL",
        ),
        (a_tar(good), {"squash": "1"}, 400, "squash is only supported with experimental mode"),
        (a_tar(good), {"rm": "0"}, 200, "[Warning] --rm=false has no effect"),
        (a_tar(good), {"cgroupparent": "x"}, 501, "cgroupparent is not supported"),
        (a_tar(good), {"cpusetcpus": "0"}, 501, "cpusetcpus is not supported"),
        (a_tar(good), {"buildargs": "["}, 400, "error reading build args"),
    ):
        answered, text = await post(node, body, **query)
        assert (answered, reason in text) == (status, True), (query, answered, text)
    assert not node.remains()
    linked = a_tar(
        a_file("sub/real", b"FROM busybox:1\n"), an_entry("Dockerfile", tarfile.SYMTYPE, "/sub/real")
    )
    status, text = await post(node, linked)
    assert (status, "Successfully built" in text) == (200, True)


async def test_a_build_ends_with_its_client(node: BuildLab) -> None:
    context = node.context("FROM busybox:1\nRUN echo begun; sleep 600\n")
    client = await node.start("build", "-t", "mine", str(context))
    assert client.stdout is not None
    while (
        line := await client.stdout.readline()
    ) and line.strip() != b"begun":  # the step shows its command first
        pass
    assert line, "the step runs"
    assert len(node.engine.list()) == 1
    client.kill()
    await client.wait()
    await eventually(lambda: not node.remains(), "container and files are gone", within_s=60)
    assert node.images.lookup("mine") is None


async def test_contexts_and_steps_end_at_the_limits_of_the_node(tmp_path: Path) -> None:
    async with build_lab(tmp_path, ImageLimits(layer_bytes_max=6 << 20, entries_max=600)) as node:
        fits = node.context("FROM busybox:1\nCOPY . /x/\n")
        (fits / "data").write_bytes(os.urandom(1 << 20))
        assert (await node.build(fits)).exit == 0
        (fits / "data").write_bytes(os.urandom(7 << 20))
        large = await node.build(fits)
        assert "the archive unpacks to more than 6291456 bytes, the limit of this node" in large.output
        many = a_tar(a_file("Dockerfile", b"FROM busybox:1\n"), *(a_file(f"f{n}") for n in range(600)))
        assert "holds more than 600 entries" in (await post(node, many))[1]
        bomb = gzip.compress(
            a_tar(a_file("Dockerfile", b"FROM busybox:1\n"), a_file("zero", bytes(64 << 20)))
        )
        assert "more than 6291456 bytes" in (await post(node, bomb))[1]
        written = node.context("FROM busybox:1\nRUN dd if=/dev/zero of=/big bs=1M count=8 2>/dev/null\n")
        assert "the limit of this node" in (await node.build(written, "-t", "mine")).output
        assert node.images.lookup("mine") is None
        assert not node.remains()


async def test_triggers_run_in_the_builds_that_begin_with_their_image(node: BuildLab) -> None:
    parent = node.context("FROM busybox:1\nONBUILD COPY a /a\nONBUILD RUN echo two > /b\n")
    assert (await node.build(parent, "-t", "parent")).exit == 0
    child = await node.build(node.context("FROM parent\n", {"a": "a\n"}), "-t", "child")
    assert lines(child.output)[:2] == ["Step 1/1 : FROM parent", "# Executing 2 build triggers"]
    assert (node.text("child", "a"), node.text("child", "b")) == ("a\n", "two\n")
    assert node.images.get("child").config.defaults.on_build is None


class Recorded:
    """What a build has reported."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def started(self, step: BuildStep) -> None:
        self.events.append(f"{step.number} {step.text}")

    def cached(self, step: BuildStep) -> None:
        self.events.append("cached")

    def pulling(self, step: BuildStep, message: ProgressMessage) -> None:
        """Nothing is pulled."""

    def running(self, step: BuildStep, container_id: str) -> None:
        """Not looked at."""

    def output(self, step: BuildStep, stream: StandardStream, data: bytes) -> None:
        self.events.append(data.decode())

    def removed(self, step: BuildStep, container_id: str) -> None:
        """Not looked at."""

    def warning(self, step: BuildStep, text: str) -> None:
        self.events.append(text)

    def finished(self, step: BuildStep, image_id: Digest | None) -> None:
        """Not looked at."""

    def failed(self, step: BuildStep, error: Exception) -> None:
        self.events.append(f"failed {error}")


class Client:
    """Gives one secret and one socket."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def secret(self, id: str) -> bytes | None:
        return b"hush-7391\n" if id == "token" else None

    @asynccontextmanager
    async def ssh(self, id: str) -> AsyncIterator[Path | None]:
        yield self._socket if id == "default" else None


async def built(
    node: BuildLab, dockerfile: str, context: Path, **options: object
) -> tuple[Recorded, SkepError | None]:
    """What BuildKit's protocol gets of a build that is tagged ``mine``."""
    recorded = Recorded()

    async def opened() -> Path:
        return context

    request = BuildRequest(
        dockerfile=dockerfile,
        tags=(parse_reference("mine:latest"),),
        is_buildkit=True,
        **options,  # type: ignore[arg-type]
    )
    builder = Builder(node.engine, node.images.builds, SystemClock())
    agent = node.root / "agent"
    agent.touch()
    try:
        await builder.build(request, opened, recorded, Client(agent))
    except SkepError as error:
        return recorded, error
    return recorded, None


async def test_buildkits_language_has_mounts_secrets_and_here_documents(node: BuildLab) -> None:
    context = node.context("", {"a.txt": "a\n"})
    text = (
        "FROM busybox:1 AS unneeded\n"
        "RUN exit 9\n"
        "FROM busybox:1 AS tools\n"
        "RUN echo tool > /tool\n"
        "FROM busybox:1\n"
        "ARG TARGETARCH\n"
        "RUN --mount=target=/ctx,rw --mount=from=tools,source=/tool,target=/t/tool"
        " cat /ctx/a.txt /t/tool > /both; echo x > /ctx/new\n"
        "RUN --mount=type=secret,id=token --mount=type=secret,id=token,env=TOKEN"
        " cat /run/secrets/token; echo env $TOKEN; stat -c %a /run/secrets/token\n"
        "RUN --mount=type=cache,target=/root/cache echo x >> /root/cache/n; cat /root/cache/n > /n\n"
        "RUN --mount=type=ssh echo $SSH_AUTH_SOCK; ls $SSH_AUTH_SOCK\n"
        "RUN --mount=type=tmpfs,target=/mem,size=1m echo x > /mem/x\n"
        "RUN <<EOF\necho $TARGETARCH > /arch\necho two > /two\nEOF\n"
        "RUN cat <<A > /docs && cat <<B >> /docs\none\nA\ntwo\nB\n"
        "RUN <<EOF\n#!/bin/cat\nscript\nEOF\n"
        "COPY --chmod=640 <<file.txt a.txt /copied/\ncontent\nfile.txt\n"
        "COPY --link --from=tools /tool /linked\n"
    )
    recorded, error = await built(node, text, context)
    assert error is None, recorded.events
    said = "".join(recorded.events)
    assert "exit 9" not in said
    assert "hush-7391\nenv hush-7391\n400\n" in said
    assert "/run/buildkit/ssh_agent.0\n/run/buildkit/ssh_agent.0\n" in said
    assert "#!/bin/cat\nscript\n" in said
    assert node.text("mine", "both") == "a\ntool\n"
    assert node.text("mine", "docs") == "one\ntwo\n"
    assert node.text("mine", "copied/file.txt") == "content\n"
    assert not (context / "new").exists()
    files = node.files("mine")
    names = {"both", "n", "arch", "two", "docs", "copied/a.txt", "copied/file.txt", "linked"}
    assert {name for name, one in files.items() if not one.isdir()} == names
    assert not {"ctx", "t", "mem", "root", "run", "root/cache"} & files.keys()
    assert files["copied/file.txt"].mode == files["copied/a.txt"].mode == 0o640
    assert not any(
        b"hush-7391" in path.read_bytes() for path in (node.root / "images").rglob("*") if path.is_file()
    )
    again, error = await built(node, text, context)
    assert again.events.count("cached") == 12
    (context / "a.txt").write_text("b\n")
    _, error = await built(node, text, context)
    assert error is None
    assert node.text("mine", "both") == "b\ntool\n"
    assert node.text("mine", "n") == "x\nx\n", "a cache stays"
    status = await node.docker("system", "df", "--format", "{{.Type}}: {{.Size}} {{.Reclaimable}}")
    assert "Build Cache: 4B 4B" in status.output, status.output
    status = await node.docker("builder", "prune", "--force")
    assert "Total reclaimed space: 4B" in status.output, status.output
    assert not node.remains()


async def test_what_buildkits_language_lacks_here_is_refused_by_name(node: BuildLab) -> None:
    context = node.context("", {"a.txt": "a\n"})
    for step, reason in {
        "RUN --security=insecure ls": "security.insecure is not allowed",
        "RUN --network=host ls": "network.host is not allowed",
        "RUN --mount=type=secret,id=nosuch,required ls": "secret nosuch: not found",
        "RUN --mount=source=/nosuch,target=/x ls": "stat nosuch: file does not exist",
    }.items():
        recorded, error = await built(node, f"FROM busybox:1\n{step}\n", context)
        assert reason in str(error), (step, error)
        assert recorded.events[-1] == f"failed {error}"
    assert node.images.lookup("mine") is None
    assert not node.remains()


async def test_two_builds_at_once_do_not_disturb_each_other(node: BuildLab) -> None:
    contexts = [
        node.context(f"FROM busybox:1\nCOPY f /f\nRUN cat /f > /g; echo {n % 2}\n", {"f": f"{n}"})
        for n in range(4)
    ]
    ended = await asyncio.gather(*(node.build(one, "-t", f"mine:{n}") for n, one in enumerate(contexts)))
    assert [one.exit for one in ended] == [0] * 4, [one.output for one in ended]
    assert [node.text(f"mine:{n}", "g") for n in range(4)] == ["0", "1", "2", "3"]
    assert not node.remains()

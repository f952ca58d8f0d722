"""Each way out of a container that is tried ends in Skep's containers as in those of a Docker Engine beside it.

The engine's own seccomp profile may be an older one, so its containers are asked twice: with the profile that Skep has,
where everything else has to be equal, and as they come.  ``make escapes`` keeps the table.
"""

import asyncio
import io
import json
import platform
import re
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from skep.engine.confinement import apparmor, seccomp_default
from skep.errors import SkepError
from tests.integration.node import test_escapes
from tests.integration.node.conftest import Runner
from tests.integration.node.test_apparmor import unload_default
from tests.support.engine.escapes import (
    WRITE_TO_ETC,
    is_as_it_was,
    lead_etc_out,
    outcomes,
    spoil_users,
)
from tests.support.engine.runc_lab import Lab, busybox_tree
from tests.support.machines.plain_engine import docker, plain_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs("root", "dockerd"),
    pytest.mark.timeout(600),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="calls have other numbers"),
]

LATER_MASKS: Final = {"read /proc/interrupts", "mount /proc/interrupts"}
"""What containers of Skep do not see, as those of Docker 29; older engines show it."""
LATER_APPARMOR: Final = {"crypto sockets"} if apparmor.is_supported() else set()
"""What Docker's AppArmor profile has denied since 20.10: beside it, also where there is no filter."""
LATER_CALLS: Final = {"io_uring_setup", "vsock", "crypto sockets", "read a process of the machine"}
"""Calls of which Docker's profile has changed its mind since 20.10; see docs/conformance.md."""


class Engine:
    """A Docker Engine."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self.version = self.docker("version", "--format", "{{.Server.Version}}").strip()

    def docker(self, *words: str, stdin: bytes | None = None) -> str:
        done = docker(self._socket, *words, stdin=stdin)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def load(self, tree: Path, name: str) -> None:
        """Make an image of this directory."""
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as packed:
            packed.add(tree, arcname=".")
        self.docker("import", "-", name, stdin=archive.getvalue())

    def run(self, image: str, *command: str, options: tuple[str, ...] = ()) -> str:
        """What a container printed on both streams, or why there was none."""
        done = docker(self._socket, "run", "--rm", *options, image, *command)
        return (done.stdout + done.stderr).decode()

    async def python(self, profile: str, script: str, *arguments: str, **way: Any) -> Any:
        """As ``test_escapes.python``.  ``profile``: a file, or empty for the engine's own."""
        options = [word for path in ("/usr", "/lib", "/lib64") for word in ("-v", f"{path}:{path}:ro")]
        options += ["--user", way["user"]] if "user" in way else []
        options += [word for name in way.get("capability_drop", ()) for word in ("--cap-drop", name)]
        chosen = way.get("seccomp", profile)
        options += ["--security-opt", f"seccomp={chosen}"] if chosen else []
        command = ("/usr/bin/python3", "-ISc", script, *arguments)
        output = await asyncio.to_thread(self.run, "plain", *command, options=tuple(options))
        try:
            return json.loads(output)
        except ValueError:
            raise AssertionError(output) from None


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """With image ``plain``, the lab's."""
    with plain_engine() as socket:
        engine = Engine(socket)
        engine.load(busybox_tree(tmp_path_factory.mktemp("image") / "tree"), "plain")
        yield engine


@pytest.fixture
def victim() -> Iterator[int]:
    """A process of the machine, which no attempt ends."""
    process = subprocess.Popen(["sleep", "1000"])
    try:
        yield process.pid
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


async def test_each_attempt_ends_as_in_docker(
    tmp_path: Path, engine: Engine, run: Runner, victim: int
) -> None:
    profile = tmp_path / "seccomp.json"
    profile.write_text(json.dumps(seccomp_default.profile()))
    forget_profile()
    ours = await outcomes(lambda *words, **way: test_escapes.python(run, *words, **way), victim)
    forget_profile()
    same_profile = await outcomes(lambda *words, **way: engine.python(str(profile), *words, **way), victim)
    theirs = await outcomes(lambda *words, **way: engine.python("", *words, **way), victim)
    print(f"\n{table(engine.version, ours, same_profile, theirs)}")
    assert len(ours) > 200
    assert differences(ours, same_profile) <= LATER_MASKS | LATER_APPARMOR
    assert differences(ours, theirs) <= LATER_MASKS | LATER_CALLS


async def test_an_image_that_leads_its_etc_out_gets_as_far_as_in_docker(
    tmp_path: Path, engine: Engine, lab: Lab, run: Runner
) -> None:
    for outside in (tmp_path / "of-docker", tmp_path / "of-skep"):
        tree = busybox_tree(tmp_path / f"tree-{outside.name}")
        lead_etc_out(tree, outside)
        if outside.name == "of-docker":
            engine.load(tree, "linked")
            output = engine.run("linked", *WRITE_TO_ETC)
        else:
            (lab.tree / "etc").rename(lab.tree / "etc-of-the-image")
            (lab.tree / "etc").symlink_to((tree / "etc").readlink())
            try:
                output = await run.output(*WRITE_TO_ETC)
            except SkepError as error:
                output = str(error)
        print(f"\n{outside.name}: {output}")
        assert is_as_it_was(outside)
        assert "of the machine" not in output


async def test_absurd_users_get_as_far_as_in_docker(engine: Engine, lab: Lab, run: Runner) -> None:
    """An invalid number is never used: the engine refuses the container, Skep skips the entry."""
    spoil_users(lab.tree)
    engine.load(lab.tree, "spoiled")
    theirs = engine.run("spoiled", "id", options=("--user", "alice"))
    print(f"\nDocker, absurd users: {theirs}")
    assert "uids and gids must be in range" in theirs
    ours = await run.output("id", user="alice")
    assert "uid=1000(alice) gid=1001(alice) groups=50(staff),1001(alice)\n" in ours


def forget_profile() -> None:
    """Each engine confines by an AppArmor profile of its own, by the same name."""
    if apparmor.is_supported():
        unload_default()


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> set[str]:
    """The attempts that ended otherwise in some way."""
    found = {one for one in ours.keys() | theirs.keys() if ours.get(one) != theirs.get(one)}
    return {re.sub(", as .*", "", attempt) for attempt in found}


def table(version: str, *columns: Mapping[str, str]) -> str:
    """Attempts, and how each ended in containers of Skep, of the engine with Skep's profile, and with its own."""
    head = [f"| attempt | Skep | Docker {version}, same profile | Docker {version} |", "|---|---|---|---|"]
    rows = (f"| {one} | {' | '.join(column.get(one, '') for column in columns)} |" for one in columns[0])
    return "\n".join([*head, *rows])

"""An ordinary user of this machine with a rootless node, for tests (needs root and RootlessKit)."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from skep.engine.confinement.cgroups import MOUNT_POINT, remove_tree
from tests.support.machines.daemon_rig import wait_until
from tests.support.machines.playground_rig import CLIS

_ROOT = Path(__file__).parents[3]
_SKEP = Path(sys.executable).with_name("skep")
PATIENCE = 10 if os.environ.get("SKEP_VIRTUAL") == "1" else 1
"""Factor of time limits.  A node starts in minutes where a busy machine emulates the processor."""
_DEVICES = {"net/tun": (10, 200)}
"""Devices that every user may open on an ordinary machine, with their numbers."""


class RootlessNode:
    """A user's node in the network namespace ``netns``, as the docker command sees it.

    The daemon has a mount namespace in which the user reaches the interpreter and the devices, whatever the modes of
    root's directories on this machine are.
    """

    def __init__(self, user: str, home: Path, netns: str, group: Path | None) -> None:
        self._user, self._home, self._netns, self._group = user, home, netns, group
        self.runtime_dir = home / "run"
        self.socket = f"unix://{self.runtime_dir / 'skep.sock'}"
        self.log = home / "daemon.log"
        self._process: subprocess.Popen[bytes] | None = None

    def daemon(self, *words: str, hides_devices: bool = False, **environment: str) -> list[str]:
        """Return the command that runs ``skep daemon --rootless`` as the user."""
        own = {
            "HOME": str(self._home),
            "PATH": os.environ["PATH"],
            "XDG_RUNTIME_DIR": str(self.runtime_dir),
        } | environment
        return [
            *("nsenter", f"--net={self._netns}", "unshare", "--mount", "--propagation", "slave"),
            *("sh", "-ec", self._preparation(hides_devices=hides_devices), "sh"),
            *("setpriv", "--reuid", self._user, "--regid", self._user, "--init-groups"),
            *("env", "-i", *(f"{name}={value}" for name, value in own.items())),
            *(str(_SKEP), "daemon", "--rootless", *words),
        ]

    def _preparation(self, *, hides_devices: bool) -> str:
        lines = _preparation(self._home, hides_devices=hides_devices)
        if self._group is not None:
            lines += _entering(self._group, self._home / "aside/cgroup")
        return "\n".join([*lines, 'exec "$@"'])

    def start(self, **environment: str) -> None:
        """Start the daemon, and wait until its API is served."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self.daemon(**environment), stdout=log, stderr=log)
        try:
            wait_until(
                lambda: self.is_serving() or not self.is_running(), "the rootless node serves", 60 * PATIENCE
            )
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.log.read_text()}") from error
        assert self.is_running(), self.log.read_text()

    def is_serving(self) -> bool:
        # The command takes seconds of an emulated processor, so not before there is a socket.
        socket = Path(self.socket.removeprefix("unix://"))
        return socket.exists() and self.docker("version", check=False).returncode == 0

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the daemon with a signal to RootlessKit, and wait until all its processes have ended."""
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.wait(60 * PATIENCE)
        self._process = None
        wait_until(lambda: not self.pids(), "all processes of the user have ended", 30 * PATIENCE)

    def pids(self, name: str = "") -> list[int]:
        """Return the processes of the user and of the user's ranges below the daemon, by command name."""
        found = subprocess.run(
            ["pgrep", "--uid", self._user, *([name] if name else [])],
            capture_output=True,
            text=True,
            check=False,
        )
        return list(map(int, found.stdout.split()))

    def docker(
        self, *words: str, check: bool = True, stdin: bytes = b""
    ) -> "subprocess.CompletedProcess[str]":
        """Run the docker command against this node."""
        environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "DOCKER_HOST": self.socket}
        command = [CLIS[-1], *words]
        done = subprocess.run(
            command, input=stdin, capture_output=True, env=environment, timeout=60 * PATIENCE, check=False
        )
        output, errors = (part.decode(errors="replace") for part in (done.stdout, done.stderr))
        assert not check or done.returncode == 0, f"{' '.join(command)}: {errors}{output}"
        return subprocess.CompletedProcess(command, done.returncode, output, errors)


def _preparation(home: Path, *, hides_devices: bool) -> list[str]:
    """Return the shell commands that prepare a mount namespace for the user."""
    needed = [path for path in (Path(sys.base_prefix), Path(sys.prefix), _ROOT) if _closed_above(path)]
    aside = home / "aside"
    lines = [f"mkdir -p {aside}", f"mount -t tmpfs -o mode=755 none {aside}"]
    for number, path in enumerate(needed):
        lines += [f"mkdir {aside}/{number}", f"mount --bind {path} {aside}/{number}"]
    for closed in dict.fromkeys(_closed_above(path) for path in needed):
        lines.append(f"mount -t tmpfs -o mode=755 none {closed}")
    for number, path in enumerate(needed):
        lines += [f"mkdir -p {path}", f"mount --bind {aside}/{number} {path}"]
    for number, (name, (major, minor)) in enumerate(_DEVICES.items()):
        mode = "600" if hides_devices else "666"
        device = f"{aside}/device{number}"
        lines += [f"mknod -m {mode} {device} c {major} {minor}", f"mount --bind {device} /dev/{name}"]
    return lines


def _entering(group: Path, aside: Path) -> list[str]:
    """Return the shell commands that enter a control group, and show nothing but its hierarchy."""
    lines = [f"echo $$ > {group}/cgroup.procs"]
    if group.parent != MOUNT_POINT:  # a hybrid machine
        lines += [f"mkdir {aside}", f"mount --bind {group.parent} {aside}"]
        lines += [f"umount -R {MOUNT_POINT}", f"mount --bind {aside} {MOUNT_POINT}", f"umount {aside}"]
    return lines


@contextmanager
def _delegated_group(user: str) -> Iterator[Path]:
    """Make a control group of version 2 that belongs to ``user``, as systemd does for ``Delegate=yes``."""
    group = next(root for root in (MOUNT_POINT / "unified", MOUNT_POINT) if root.is_dir()) / user
    group.mkdir()
    try:
        for path in (group, *(group / f"cgroup.{name}" for name in ("procs", "subtree_control", "threads"))):
            shutil.chown(path, user)
        yield group
    finally:
        wait_until(lambda: remove_tree(group), "the group is removed")


def _closed_above(path: Path) -> Path | None:
    """Return the topmost directory above ``path`` that only its owner may enter."""
    closed = [one for one in path.parents if not one.stat().st_mode & 0o001]
    return closed[-1] if closed else None


@contextmanager
def a_rootless_node(
    name: str, netns: str = "/proc/self/ns/net", *, is_delegated: bool = False
) -> Iterator[RootlessNode]:
    """Make a user with ranges of ids and a node, not yet started.  Removes everything afterwards."""
    home = Path(
        tempfile.mkdtemp(prefix="skep-rootless-", dir="/var/tmp")
    )  # a file system with user.* attributes
    home.chmod(0o755)
    _run("useradd", "--no-create-home", "--home-dir", str(home), name)
    try:
        _give_ranges(name)
        with _delegated_group(name) if is_delegated else nullcontext() as group:
            node = RootlessNode(name, home, netns, group)
            node.runtime_dir.mkdir()
            for path in (home, node.runtime_dir):
                shutil.chown(path, name, name)
            try:
                yield node
            finally:
                node.end(signal.SIGKILL)
    finally:
        _run("userdel", "--force", name)
        shutil.rmtree(home)


def _give_ranges(name: str) -> None:
    """Give the user ranges of ids, unless useradd has done it."""
    for kind in ("uid", "gid"):
        lines = [line.split(":") for line in Path(f"/etc/sub{kind}").read_text().splitlines()]
        if name not in (line[0] for line in lines):
            first = max((int(line[1]) + int(line[2]) for line in lines), default=100_000)
            _run("usermod", f"--add-sub{kind}s", f"{first}-{first + 65_535}", name)
    assert pwd.getpwnam(name).pw_uid


def _run(*words: str) -> Sequence[str]:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()

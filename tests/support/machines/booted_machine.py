"""A bare machine of a distribution that boots its own systemd, in its own namespaces and cgroups."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import docker

from tests.support.machines.playground_rig import wait_until

ROOT = Path(__file__).parents[3]


class BootedMachine:
    """Runs commands on the machine, as root."""

    def __init__(self, directory: Path, name: str, pid: int) -> None:
        self.directory, self._name = directory, name
        self.pid = pid
        """Pid of its first process."""

    def run(self, command: str, *, within_s: float = 120) -> str:
        """Run a shell command there, and return its output and errors.  Raises: AssertionError: it failed."""
        done = subprocess.run(
            [
                *("nsenter", "-t", str(self.pid), "--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup"),
                *(f"--root=/proc/{self.pid}/root", f"--wd=/proc/{self.pid}/root", "env", "-i"),
                *("HOME=/root", "TERM=dumb", "DEBIAN_FRONTEND=noninteractive"),
                *("PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c", command),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=within_s,
            check=False,
        )
        print(f"$ {command}\n{done.stdout}")
        assert done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def client(self) -> docker.DockerClient:
        """Return a docker-py client of its node."""
        return docker.DockerClient(base_url=f"unix:///proc/{self.pid}/root/run/skep/skep.sock", timeout=60)

    def processes(self, pattern: str) -> list[int]:
        """Return the processes whose command line matches, with their pids as the machine sees them."""
        return [pid for pid in _pids() if self._has(pid) and re.search(pattern, _command(pid))]

    def _has(self, pid: int) -> bool:
        with suppress(OSError):
            return f"/{self._name}/" in Path(f"/proc/{pid}/cgroup").read_text()
        return False


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def build_package(directory: Path, version: str) -> Path:
    """Build the Debian package of this commit with that version number."""
    built = subprocess.run(
        [ROOT / "setup/package.sh", directory, version],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert built.returncode == 0, f"{built.stdout}{built.stderr}"
    (package,) = directory.glob(f"skep_{version}_*.deb")
    return package


@contextmanager
def a_booted_machine(
    suite: str, directory: Path, package: Path, *, has_ssh_alone: bool = False
) -> Iterator[BootedMachine]:
    """Boot a machine that has the dependencies of ``package``, because it had the package installed and purged.

    Args:
        has_ssh_alone: install only an sshd, and put the package's dependencies into apt's cache.  No machine here can
            reach a package archive.
    """
    machine, name = directory / suite, f"skep-test-{os.getpid()}"
    options, further = (["--fetch-only"], ["openssh-server"]) if has_ssh_alone else ([], [])
    made = subprocess.run(
        [ROOT / "setup/bootable.sh", *options, suite, machine, package, *further],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert made.returncode == 0, f"{made.stdout[-4000:]}{made.stderr[-2000:]}"
    with (directory / "boot.log").open("wb") as log:
        boot = subprocess.Popen(
            [ROOT / "setup/boot.sh", machine, name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        pid = wait_until(lambda: _first_process(boot), "systemd has started", 30)
        booted = BootedMachine(machine, name, pid)
        wait_until(lambda: _has_booted(boot, booted), "the machine has booted", 120)
        yield booted
    finally:
        with suppress(ProcessLookupError):
            os.killpg(boot.pid, signal.SIGKILL)  # ends the first process, and with it all others
        boot.wait(30)
        wait_until(lambda: _cgroups_are_gone(name), "its cgroups are removed", 30)
        shutil.rmtree(machine)


def _first_process(boot: "subprocess.Popen[bytes]") -> int:
    """Return the pid of systemd, once the shells before it have executed it."""
    assert boot.poll() is None, "setup/boot.sh has ended"
    children = Path(f"/proc/{boot.pid}/task/{boot.pid}/children").read_text().split()
    return next((int(pid) for pid in children if "/systemd " in _command(int(pid))), 0)


def _has_booted(boot: "subprocess.Popen[bytes]", machine: BootedMachine) -> bool:
    assert boot.poll() is None, f"the machine has ended with {boot.returncode} while it booted"
    with suppress(AssertionError):
        # Degraded: units of the distribution need devices that this machine lacks.
        return machine.run("systemctl is-system-running --wait || test $? = 1").strip() in (
            "running",
            "degraded",
        )
    return False


def _cgroups_are_gone(name: str) -> bool:
    """Remove the machine's cgroups, and return whether all are removed.  A cgroup whose processes are still ending is
    retried.
    """
    for folder in Path("/sys/fs/cgroup").glob(f"**/{name}"):
        for path, _, _ in os.walk(folder, topdown=False):
            with suppress(OSError):
                os.rmdir(path)
    return not list(Path("/sys/fs/cgroup").glob(f"*/{name}"))

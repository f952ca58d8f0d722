"""A daemon in its own network and mount namespace, started and stopped by a test."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socket
from typing import Any, TypeVar

T = TypeVar("T")

SKEP = str(Path(sys.executable).with_name("skep"))
PAUSE_S_MIN, PAUSE_S_MAX = 0.02, 0.1
"""Seconds between two looks at a condition.  A tenth of the time that the test has waited lies between them."""
INIT = {"ListenAddr": "127.0.0.1:2377", "AdvertiseAddr": "127.0.0.1"}


def wait_until(condition: Callable[[], T], what: str, within_s: float = 30) -> T:
    """Poll until ``condition`` returns a true value, and return it.  Fail the test after ``within_s``.

    The pauses grow to ``PAUSE_S_MAX``, because most conditions run a command or send a request, which would keep a
    processor busy for as long as a test waits.
    """
    began = time.monotonic()
    while True:
        if result := condition():
            return result
        waited = time.monotonic() - began
        assert waited < within_s, f"not within {within_s} s: {what}"
        time.sleep(min(max(waited / 10, PAUSE_S_MIN), PAUSE_S_MAX))


class Connection(HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket(AF_UNIX, SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class DaemonRig:
    """One data and run directory, and the daemon that uses them.  Tasks are plain commands by default."""

    def __init__(self, directory: Path, beside: "DaemonRig | None" = None) -> None:
        """``beside``: another daemon whose namespaces this daemon shares."""
        self._beside = beside
        self.data = directory / "data"
        self.run = directory / "run"
        self.log = directory / "log"
        self.toml = directory / "skep.toml"
        self.toml.touch()
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *flags: str) -> list[str]:
        return [
            *(SKEP, "daemon", "--data-dir", str(self.data), "--run-dir", str(self.run)),
            *("--config", str(self.toml), "--daemon-json", "", "--executor", "process", *flags),
        ]

    def start(self, *flags: str) -> None:
        """Start the daemon and wait until it responds.  If an earlier daemon left processes, use their namespaces."""
        home = self._home() or (self._beside and self._beside._home())
        within = (
            ["nsenter", "-t", str(home), "-n", "-m"]
            if home
            else ["unshare", "-n", "-m", "sh", "-c", 'ip link set lo up; exec "$@"', "sh"]
        )
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*within, *self.command(*flags)], stdout=log, stderr=log)
        try:
            wait_until(self.answers, "the daemon answers", within_s=50)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()}") from None

    def _home(self) -> int | None:
        return self.pid_of("net") or self.pid_of("manager")

    def refusal(self, *flags: str, before: str = "true") -> str:
        """Return the message of a daemon that does not start.  ``before``: a command in its namespaces."""
        done = subprocess.run(
            ["unshare", "-n", "-m", "sh", "-c", f'{before} && exec "$@"', "sh", *self.command(*flags)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 1, done.stdout + done.stderr
        return "\n".join(line for line in done.stderr.splitlines() if line.startswith("skep daemon: "))

    def answers(self) -> bool:
        assert self.process is None or self.process.poll() is None, self.log.read_text()
        try:
            return self.get("/_ping")[0] == 200
        except OSError:
            return False

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Send a request.  Return status and decoded body."""
        connection = Connection(self.run / "skep.sock")
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        return response.status, json.loads(text) if is_json and text else text.decode()

    def get(self, path: str) -> tuple[int, Any]:
        return self.ask("GET", path)

    def swarm(self) -> dict[str, Any]:
        """Return the swarm section of ``/info``."""
        section: dict[str, Any] = self.get("/info")[1]["Swarm"]
        return section

    def pid_of(self, process: str) -> int | None:
        """Return the pid in a pid file if that process is running."""
        try:
            pid = int(json.loads((self.run / f"{process}.pid").read_text())["pid"])
        except (OSError, ValueError):
            return None
        return pid if is_running(pid) else None

    def kill(self) -> None:
        """Kill only the node process with SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)
        self.process = None

    def kill_all(self) -> None:
        """Kill all processes of the node with SIGKILL."""
        self.kill()
        self._kill_its_children()

    def _kill_its_children(self) -> None:
        for name in ("manager", "net"):
            if (pid := self.pid_of(name)) is not None:
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda pid=pid: not is_running(pid), f"{name} is gone")

    def stop(self) -> None:
        """Send SIGTERM, and wait until the daemon has ended."""
        if self.process is not None:
            self.process.terminate()
            assert self.process.wait(30) == 0, self.log.read_text()
            self.process = None

    def clean_up(self) -> None:
        """End all processes, whatever the test did."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        self._kill_its_children()
        for pid in self.tasks():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.tasks(), "the tasks, which outlive every daemon, are gone")

    def tasks(self) -> list[int]:
        """Return the plain commands that run as tasks, which write into files of their executor."""
        place = f"{self.data}/processes/"
        return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _output(pid).startswith(place)]


def _output(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/1")
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    """Return whether a process has this pid and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def children_named(parent: int, name: str) -> list[int]:
    """Return the children of a process with this command name."""
    pids = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == name]


@contextmanager
def daemon_rig(directory: Path, beside: DaemonRig | None = None) -> Iterator[DaemonRig]:
    rig = DaemonRig(directory, beside)
    try:
        yield rig
    finally:
        rig.clean_up()

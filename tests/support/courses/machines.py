"""Three machines that a course uses over ssh: root file systems that boot on this kernel, or virtual machines.

This process is at the other end of their cables, in a network namespace with a bridge.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import TypeVar

import docker

from tests.support.clients.ssh_client import write_client

T = TypeVar("T")

ROOT = Path(__file__).parents[3]
GATEWAY = "198.51.100.1"
BRIDGE = "cluster"
_ETH_P_ALL = 3
_BEGAN = time.monotonic()


def say(text: str) -> None:
    """Print a line of the log."""
    print(f"{time.monotonic() - _BEGAN:6.0f} s  {text}", flush=True)


def until(what: str, condition: Callable[[], T], within_s: float) -> T:
    """Wait for a condition, and return its value.  Raises: TimeoutError."""
    began = time.monotonic()
    last: Exception | None = None
    while time.monotonic() - began < within_s:
        try:
            if value := condition():
                say(f"  {what}, after {time.monotonic() - began:.1f} s")
                return value
        except (OSError, AssertionError, subprocess.TimeoutExpired, docker.errors.DockerException) as error:
            last = error
        time.sleep(0.2)
    raise TimeoutError(f"not within {within_s:.0f} s: {what} ({last})")


def call(*command: str | Path, within_s: float = 60, **environment: str) -> str:
    """Run a command here, and return its output.  Raises: AssertionError: it failed."""
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
    return done.stdout


class Machine:
    """One machine, and how it is reached."""

    def __init__(self, place: Path, number: int) -> None:
        self.place, self.number = place, number
        self.name = f"node{number}"
        self.address = f"198.51.100.1{number}"
        self.cable = f"cable{number}"
        self._tunnel: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Switch it on, and connect its cable to the bridge."""
        raise NotImplementedError

    def ssh(self, command: str, *, within_s: float = 600, shows: bool = True) -> str:
        """Run a shell command there, and return its output.  Raises: AssertionError: it failed."""
        if shows:
            say(f"{self.name}$ {command}")
        return call("ssh", "-o", "ConnectTimeout=20", f"root@{self.address}", command, within_s=within_s)

    def answers(self) -> bool:
        """Return whether its sshd answers, and systemd has started everything."""
        state = self.ssh("systemctl is-system-running || true", within_s=30, shows=False).strip()
        return state in ("running", "degraded")

    @property
    def socket(self) -> str:
        return f"unix://{self.place}/{self.name}.sock"

    def client(self) -> docker.DockerClient:
        """Return a client of its node, over a tunnel that is opened again if it has ended."""
        path = self.place / f"{self.name}.sock"
        if self._tunnel is None or self._tunnel.poll() is not None:
            path.unlink(missing_ok=True)
            words = ("-N", "-o", "ExitOnForwardFailure=yes", "-o", "ConnectTimeout=5")
            alive = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
            target = ("-L", f"{path}:/run/skep/skep.sock", f"root@{self.address}")
            self._tunnel = subprocess.Popen(["ssh", *words, *alive, *target], stderr=subprocess.DEVNULL)
            until(f"a tunnel leads to {self.name}", path.exists, 60)
        return docker.DockerClient(base_url=self.socket, timeout=120)

    def cut(self) -> None:
        """Pull its cable."""
        say(f"{self.name}: the cable is pulled")
        call("ip", "link", "set", self.cable, "down")

    def plug(self) -> None:
        say(f"{self.name}: the cable is plugged in")
        call("ip", "link", "set", self.cable, "up")

    def end(self) -> None:
        """End the tunnel, and the machine if this process started it."""
        if self._tunnel is not None:
            self._tunnel.kill()
            self._tunnel.wait()


class BareMachine(Machine):
    """A root file system that boots its own systemd, on this kernel."""

    def start(self) -> None:
        self._cgroup = f"skep-course-{os.getpid()}-{self.number}"
        with (self.place / f"{self.name}.log").open("wb") as log:
            self._boot = subprocess.Popen(
                [ROOT / "setup/boot.sh", self.place / self.name, self._cgroup, self.address],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        within = ("nsenter", f"--net=/proc/{self._boot.pid}/ns/net", "ip", "link")
        until(f"{self.name} has its cable", lambda: call(*within, "show", "up", "dev", "eth1"), 30)
        call(*within, "set", "eth1", "down")
        call(*within, "set", "eth1", "name", self.cable)
        call(*within, "set", self.cable, "netns", str(os.getpid()))
        call("ip", "link", "set", self.cable, "master", BRIDGE, "up")

    def end(self) -> None:
        super().end()
        with suppress(ProcessLookupError):
            os.killpg(self._boot.pid, signal.SIGKILL)  # ends the first process, and with it all others
        self._boot.wait(30)
        until(f"{self.name} has no cgroups", self._has_no_cgroups, 60)

    def _has_no_cgroups(self) -> bool:
        for folder in Path("/sys/fs/cgroup").glob(f"**/{self._cgroup}"):
            for path, _, _ in os.walk(folder, topdown=False):
                with suppress(OSError):
                    os.rmdir(path)
        return not list(Path("/sys/fs/cgroup").glob(f"*/{self._cgroup}"))


class VirtualMachine(Machine):
    """A virtual machine with the suite's kernel.  Its processor is emulated."""

    def start(self) -> None:
        call("ip", "tuntap", "add", self.cable, "mode", "tap")
        call("ip", "link", "set", self.cable, "master", BRIDGE, "up")
        disk = f"file={self.place / self.name}.disk,format=raw,if=virtio,cache=unsafe"
        network = f"tap,id=cable,ifname={self.cable},script=no,downscript=no"
        device = f"virtio-net-pci,netdev=cable,mac=52:54:00:00:00:0{self.number}"
        kernel = ("-kernel", self.place / "vmlinuz", "-initrd", self.place / "initrd")
        options = "root=/dev/vda rw console=ttyS0 quiet loglevel=3 net.ifnames=0 no_timer_check"
        accelerator: tuple[str, ...] = ("tcg,thread=multi",)
        if shift := os.environ.get("ICOUNT"):
            accelerator = ("tcg,thread=single", "-icount", f"shift={shift}")
        self._process = subprocess.Popen(
            [
                *(
                    "qemu-system-x86_64",
                    "-M",
                    "q35",
                    "-cpu",
                    "max",
                    "-accel",
                    *accelerator,
                    "-smp",
                    "1",
                ),
                *(
                    "-m",
                    os.environ.get("MEMORY_MB", "1536"),
                    "-nodefaults",
                    "-no-user-config",
                    "-display",
                    "none",
                ),
                *("-device", "virtio-rng-pci", "-netdev", network, "-device", device, "-drive", disk),
                *(*kernel, "-append", options, "-serial", f"file:{self.place / self.name}.log"),
            ],
            stdin=subprocess.DEVNULL,
        )

    def end(self) -> None:
        super().end()
        self._process.kill()
        self._process.wait()


def write_ssh(place: Path, machines: list[Machine]) -> None:
    """Put an ``ssh`` on the path that knows the machines and the user's key, and nothing else of this machine."""
    addresses = ",".join(one.address for one in machines)
    write_client(place, addresses, (place / "host.pub").read_text(), "BatchMode yes")
    os.environ["PATH"] = f"{place}/bin:{place}/operator/bin:{os.environ['PATH']}:{ROOT}/.venv/bin"
    os.environ["HOME"] = str(place)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder to the machines, and yield its address."""
    with ThreadingHTTPServer((GATEWAY, 0), partial(_Quiet, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{GATEWAY}:{server.server_address[1]}"
        server.shutdown()


@contextmanager
def up(kind: str, place: Path) -> Iterator[list[Machine]]:
    """Boot three machines, and yield them once they answer."""
    call("ip", "link", "set", "lo", "up")
    call("ip", "link", "add", BRIDGE, "type", "bridge")
    call("ip", "address", "add", f"{GATEWAY}/24", "dev", BRIDGE)
    call("ip", "link", "set", BRIDGE, "up")
    factory = {"bare": BareMachine, "virtual": VirtualMachine}[kind]
    machines = [factory(place, number) for number in (1, 2, 3)]
    write_ssh(place, [*machines])
    started: list[Machine] = []
    try:
        for one in machines:
            one.start()
            started.append(one)
        for one in machines:
            until(f"{one.name} has booted", one.answers, 1200 if kind == "virtual" else 120)
        yield [*machines]
    except BaseException:
        for one in started:
            tail = (place / f"{one.name}.log").read_text(errors="replace")[-1500:]
            say(f"{one.name}, its end of the console:\n{tail}")
        raise
    finally:
        for one in started:
            one.end()


class Frames:
    """Frames that passed between the machines."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def have(self, text: str) -> bool:
        return any(text.encode() in frame for frame in self.seen)

    def to_port(self, port: int) -> int:
        """Count the UDP packets to a port, in IPv4 without options."""
        udp = (frame for frame in self.seen if frame[23:24] == bytes([socket.IPPROTO_UDP]))
        return sum(frame[36:38] == port.to_bytes(2) for frame in udp)


@contextmanager
def frames() -> Iterator[Frames]:
    """Yield the frames on all cables while the block runs."""
    found, over = Frames(), Event()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as tap:
        tap.settimeout(0.2)

        def read() -> None:
            while not over.is_set():
                with suppress(TimeoutError):
                    found.seen.append(tap.recv(65536))

        reader = Thread(target=read)
        reader.start()
        try:
            yield found
            time.sleep(0.5)  # for packets that are still on their way
        finally:
            over.set()
            reader.join()

"""A directory that GlusterFS replicates over two bricks, with the distribution's programs, which are only unpacked.

The programs look for their modules below /usr, so each runs in a mount namespace in which the unpacked files are part
of it.  Mounts below a shared directory are seen by the machine.
"""

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from skep.linux.syscalls import MNT_DETACH, MS_BIND, mount, unmount

MS_SHARED = 1 << 20
BRICKS = (1, 2)
_WITHIN_S = 30.0
"""Seconds until a brick listens, or a directory is mounted, on a busy machine."""
_WITH_UNPACKED = (
    'mount --make-private / && mount -t overlay overlay -o lowerdir=$0/usr:/usr /usr && exec "$@"'
)


class Gluster:
    """Two bricks, and the volume that replicates over them."""

    def __init__(self, directory: Path, unpacked: Path) -> None:
        self._directory, self._unpacked = directory, unpacked
        self._bricks: dict[int, subprocess.Popen[bytes]] = {}
        self._ports = {number: _free_port() for number in BRICKS}

    def files(self, number: int) -> Path:
        """The directory of a brick."""
        return self._directory / f"brick{number}"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run both bricks during the block."""
        try:
            for number in BRICKS:
                self.files(number).mkdir()
                self._bricks[number] = self._start(f"brick{number}", "glusterfsd", self._brick(number))
            for port in self._ports.values():
                _wait(lambda port=port: _listens(port), f"a brick listens at {port}")  # type: ignore[misc]
            yield
        finally:
            for process in self._bricks.values():
                process.kill()
                process.wait()

    def kill(self, number: int) -> None:
        """Kill a brick, as the loss of its machine would."""
        self._bricks[number].send_signal(signal.SIGKILL)
        self._bricks[number].wait()

    @contextmanager
    def mounted(self, name: str) -> Iterator[Path]:
        """Mount the volume during the block, as a node does."""
        place = self._directory / name
        place.mkdir()
        with ExitStack() as stack:
            mount(str(place), place, None, MS_BIND)
            stack.callback(unmount, place, MNT_DETACH)
            mount("", place, None, MS_SHARED)
            process = self._start(name, "glusterfs", self._client(), str(place))
            stack.callback(process.wait)
            stack.callback(process.kill)
            _wait(
                lambda: f" {place} fuse.glusterfs " in Path("/proc/mounts").read_text(), f"{place} is mounted"
            )
            stack.callback(unmount, place, MNT_DETACH)
            yield place

    def _start(self, name: str, program: str, volume: str, *words: str) -> subprocess.Popen[bytes]:
        file = self._directory / f"{name}.vol"
        file.write_text(volume)
        command = (program, "-N", "-f", str(file), "-l", str(self._directory / f"{name}.log"), *words)
        within = ("unshare", "--mount", "--propagation", "unchanged", "sh", "-ec", _WITH_UNPACKED)
        return subprocess.Popen(
            [*within, str(self._unpacked), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _brick(self, number: int) -> str:
        server = (
            "transport-type tcp",
            f"transport.socket.listen-port {self._ports[number]}",
            "transport.socket.bind-address 127.0.0.1",
            "auth.addr.locks.allow 127.0.0.1",
        )
        posix = _volume("posix", "storage/posix", f"directory {self.files(number)}")
        locks = _volume("locks", "features/locks", below=("posix",))
        return posix + locks + _volume("server", "protocol/server", *server, below=("locks",))

    def _client(self) -> str:
        bricks = [
            _volume(
                f"brick{number}",
                "protocol/client",
                *("transport-type tcp", "remote-host 127.0.0.1", "remote-subvolume locks", "ping-timeout 2"),
                f"remote-port {self._ports[number]}",
            )
            for number in BRICKS
        ]
        names = [f"brick{number}" for number in BRICKS]
        pending = f"afr-pending-xattr {','.join(names)}"
        return "".join(bricks) + _volume("replicas", "cluster/replicate", pending, below=names)


def _volume(name: str, type: str, *options: str, below: Sequence[str] = ()) -> str:
    lines = [f"volume {name}", f"  type {type}", *(f"  option {one}" for one in options)]
    if below:
        lines.append(f"  subvolumes {' '.join(below)}")
    return "\n".join([*lines, "end-volume", ""])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
    except OSError:
        return False
    return True


def _wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {_WITHIN_S} s: {what}"
        time.sleep(0.05)

"""A temporary Docker Engine in its own network namespace, for tests (needs root)."""

import asyncio
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from skep.aio.trees import discard_tree_now

ADDRESS = "10.99.0.1"
IMAGE = "bb:latest"
_CLONE_NEWNET = 0x40000000


@contextmanager
def network_namespace(name: str) -> Iterator[None]:
    """Move this process and its children into a new namespace with one address, ``ADDRESS``."""
    here = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    _run("ip", "netns", "add", name)
    try:
        for command in (
            f"-n {name} link set lo up",
            f"-n {name} link add lan0 type bridge",
            f"-n {name} addr add {ADDRESS}/24 dev lan0",
            f"-n {name} link set lan0 up",
        ):
            _run("ip", *command.split())
        there = os.open(f"/var/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _set_namespace(there)
        finally:
            os.close(there)
        yield
    finally:
        _set_namespace(here)
        os.close(here)
        _run("ip", "netns", "del", name)


class Engine:
    """A running dockerd.  Its socket, data and pid file are in its own directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._process: asyncio.subprocess.Process | None = None

    @property
    def host(self) -> str:
        return f"unix://{self.directory}/d.sock"

    def log(self) -> str:
        """Return the engine's log, including debug messages."""
        return (self.directory / "log").read_text(errors="replace")

    async def docker(self, *arguments: str, timeout_s: float = 30, check: bool = True) -> str:
        """Run a docker command against this engine, and return its output."""
        process = await asyncio.create_subprocess_exec(
            *("docker", "-H", self.host, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), timeout_s)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
        text = output.decode().strip()
        assert process.returncode == 0 or not check, f"docker {' '.join(arguments)}: {text}"
        return text

    async def start(self) -> None:
        """Start the engine and wait until it responds."""
        command = (
            f"mount --make-rprivate /; exec dockerd --debug --data-root {self.directory}/data"
            f" --exec-root {self.directory}/exec -H {self.host} --pidfile {self.directory}/d.pid"
            f" --cgroup-parent /{self.directory.name}"
        )
        with (self.directory / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *("unshare", "--mount", "sh", "-c", command), stdout=log, stderr=log, start_new_session=True
            )
        await self.wait_for(lambda output: "Server" in output, "version", within_s=40)

    async def wait_for(self, condition: Callable[[str], bool], *arguments: str, within_s: float = 30) -> None:
        """Repeat a docker command until its output meets ``condition``."""
        async with asyncio.timeout(within_s):
            while not condition(await self.docker(*arguments, check=False)):
                assert self._process is not None
                assert self._process.returncode is None, (self.directory / "log").read_text()[-2000:]
                await asyncio.sleep(0.2)

    async def stop(self) -> None:
        """Stop the engine and its containers, and wait until it has ended."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), 30)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        (self.directory / "d.pid").unlink(
            missing_ok=True
        )  # a left-over pid file keeps the engine from starting

    async def import_image(self) -> None:
        """Create ``IMAGE`` from the machine's busybox."""
        root = self.directory / "root"
        (root / "bin").mkdir(parents=True)
        for name in ("etc", "tmp", "run", "proc", "sys", "dev"):
            (root / name).mkdir()
        shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin" / "busybox")
        for name in ("sh", "sleep", "cat"):
            (root / "bin" / name).symlink_to("busybox")
        archive = self.directory / "root.tar"
        await asyncio.to_thread(_run, "tar", "-C", str(root), "-cf", str(archive), ".")
        await self.docker("import", str(archive), IMAGE)


@asynccontextmanager
async def an_engine() -> AsyncIterator[Engine]:
    """Run an engine with an image in the current network namespace, and clean up afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="skep-engine-", dir="/var/tmp"))
    engine = Engine(directory)
    try:
        await engine.start()
        await engine.import_image()
        yield engine
    finally:
        await engine.stop()
        discard_tree_now(directory)
        for group in Path("/sys/fs/cgroup").glob(f"**/{directory.name}"):
            group.rmdir()


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)

"""Record how a real Docker Engine answers the script: ``python -m tests.conformance.record`` (as root).

The engine gets a network namespace, data and sockets of its own and is gone afterwards, with everything it made.
The answers are kept in ``recorded/*.json``; they are data for tests, made by this script alone.
"""

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from tests.conformance.exchange import Memory, Recorded, recorded, request_of
from tests.conformance.script import BEFORE_INIT, IN_SWARM, INIT, INITS, Step

RECORDED = Path(__file__).parent / "recorded"
NAMESPACE = f"skep-conformance-{os.getpid()}"


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("engine", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask(engine: Path, step: Step, memory: Memory) -> Recorded:
    """One step's request and answer."""
    path, body = request_of(step, memory)
    connection = UnixConnection(engine)
    headers = dict(step.headers)
    if body is not None:
        headers["Content-Type"] = "application/json"
    try:
        with contextlib.suppress(BrokenPipeError):  # an answer may come before a large body has been sent
            connection.request(step.method, path, body=body, headers=headers)
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    return recorded(step, response.status, dict(response.getheaders()), content, memory)


def ask_all(engine: Path, steps: Iterable[Step], memory: Memory) -> list[Recorded]:
    """The answers to ``steps``, in order."""
    responses = []
    for step in steps:
        responses.append(ask(engine, step, memory))
        print(f"{responses[-1].status} {step.name}: {responses[-1].message or ''}"[:160], flush=True)
    return responses


@contextlib.contextmanager
def running_engine(folder: Path) -> Iterator[Path]:
    """A dockerd in a network namespace of its own; gives its socket."""
    run("ip", "netns", "add", NAMESPACE)
    try:
        inside = ("ip", "netns", "exec", NAMESPACE)
        run(*inside, "ip", "link", "set", "lo", "up")
        run(*inside, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        run(*inside, "ip", "address", "add", "10.77.0.1/24", "dev", "eth0")
        run(*inside, "ip", "link", "set", "eth0", "up")
        run(*inside, "ip", "link", "set", "eth1", "up")
        Path("/run/docker").mkdir(exist_ok=True)
        socket_path = folder / "docker.sock"
        with (folder / "log").open("wb") as log:
            engine = subprocess.Popen(
                [
                    # its own mounts: what it leaves mounted goes with it
                    *(
                        "nsenter",
                        f"--net=/run/netns/{NAMESPACE}",
                        "unshare",
                        "--mount",
                        "--propagation",
                        "private",
                    ),
                    *("sh", "-c", 'mount -t tmpfs none /run/docker && exec "$@"', "sh", "dockerd"),
                    *("--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")),
                    *("--pidfile", str(folder / "pid"), "--host", f"unix://{socket_path}"),
                    *("--iptables=false", "--bridge=none", "--storage-driver=vfs"),
                ],
                stdout=log,
                stderr=log,
            )
        try:
            wait_for(socket_path, engine)
            yield socket_path
        finally:
            engine.send_signal(signal.SIGTERM)
            try:
                engine.wait(30)
            except subprocess.TimeoutExpired:
                engine.kill()
                engine.wait()
    finally:
        run("ip", "netns", "delete", NAMESPACE)


def wait_for(socket_path: Path, engine: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Return when the engine answers.  Raises RuntimeError when it ends or takes longer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and engine.poll() is None:
        connection = UnixConnection(socket_path)
        try:
            connection.request("GET", "/_ping")
            if connection.getresponse().read() == b"OK":
                return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise RuntimeError("the engine does not answer")


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def write(name: str, responses: list[Recorded]) -> None:
    """Keep ``answers`` as readable JSON."""
    text = msgspec.json.format(msgspec.json.encode(responses), indent=1)
    (RECORDED / f"{name}.json").write_bytes(text + b"\n")


def recorded_before(name: str) -> list[Recorded]:
    """What an earlier run has kept."""
    return msgspec.json.decode((RECORDED / f"{name}.json").read_bytes(), type=list[Recorded])


def main() -> None:
    """Record everything; with any argument only what is new in a swarm and needs nothing before it."""
    folder = Path(tempfile.mkdtemp(prefix="skep-conformance-"))
    memory = Memory()
    try:
        with running_engine(folder) as engine:
            before = ask_all(engine, BEFORE_INIT, memory)
            inits = ask_all(engine, INITS, memory)
            first = ask(engine, msgspec.structs.replace(INIT, keep="node"), memory)
            if first.status != 200:
                sys.exit(f"init failed: {first.message}")
            kept = {} if len(sys.argv) < 2 else {one.name: one for one in recorded_before("in_swarm")}
            steps = [step for step in IN_SWARM if step.name not in kept]
            new = {response.name: response for response in ask_all(engine, steps, memory)}
            responses = [(kept | new)[step.name] for step in IN_SWARM]
            ask(engine, Step(name="leave", method="POST", path="/swarm/leave?force=1"), memory)
    finally:
        if os.environ.get("SKEP_KEEP") != "1":
            unmount_all(folder)
            shutil.rmtree(folder, ignore_errors=True)
    RECORDED.mkdir(exist_ok=True)
    write("before_init", before)
    write("inits", inits)
    write("in_swarm", responses)


def unmount_all(folder: Path) -> None:
    """Unmount what the engine may have left below ``folder``."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in sorted((point for point in points if point.startswith(f"{folder}/")), reverse=True):
        subprocess.run(("umount", "--lazy", point), check=False)


if __name__ == "__main__":
    main()

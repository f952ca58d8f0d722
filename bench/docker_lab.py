"""A real Docker Engine in swarm mode in its own namespaces, to compare Skep with.

The engine is the distribution's, with its default configuration (overlay2, json-file logs, seccomp).  Only paths and
the cgroup parent are set.  All its files are below its directory, and ``down`` removes them.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from bench.engine import Engine
from skep.aio.trees import discard_tree_now

ADDRESS = "192.168.77.11"

# dockerd writes bridge settings through sysfs, which must show its own network namespace.  The cgroups are mounted on
# top again.
_START = """
groups=/sys/fs/cgroup; [ -d $groups/cpuacct ] && groups=$groups/cpuacct
mkdir -p $groups/{cgroup}/daemons && echo $$ > $groups/{cgroup}/daemons/cgroup.procs
mkdir -p /etc/docker /run/docker {dir}/cgroups
mount --rbind /sys/fs/cgroup {dir}/cgroups && mount -t sysfs none /sys && mount --rbind {dir}/cgroups /sys/fs/cgroup
mount --bind {dir}/etc /etc/docker && mount -t tmpfs none /run/docker
exec {dockerd} --data-root {dir}/root --exec-root {dir}/run --pidfile {dir}/docker.pid -H unix://{dir}/docker.sock \
  --cgroup-parent /{cgroup}
"""


class DockerLab:
    """One manager.  ``up`` returns when the swarm is initialized and the image loaded."""

    system = "docker"

    def __init__(self, directory: Path, name: str = "docker-beside-skep") -> None:
        """``name`` is a unique name of its network namespace and its control group."""
        self.directory = directory
        self.cgroup = name
        self.netns = Path("/run/netns") / name
        self.image = ""
        self.engine = Engine(directory / "docker.sock")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def root_pids(self) -> list[int]:
        return [self._process.pid] if self._process else []

    def up(self, archive: bytes, image: str) -> None:
        """Start dockerd, load ``archive`` and initialize the swarm.  Raises TimeoutError after 60 s."""
        self.down()
        dockerd = found_dockerd()
        if dockerd is None:
            raise SystemExit("no dockerd found: apt-get install docker.io, then run the benchmark again")
        for part in ("etc", "root", "run"):
            (self.directory / part).mkdir(parents=True)
        _run("ip", "netns", "add", self.cgroup)
        _run("ip", "-n", self.cgroup, "link", "set", "lo", "up")
        _run("ip", "-n", self.cgroup, "link", "add", "eth0", "type", "veth", "peer", "name", "cable")
        _run("ip", "-n", self.cgroup, "addr", "add", f"{ADDRESS}/24", "dev", "eth0")
        _run("ip", "-n", self.cgroup, "link", "set", "eth0", "up")
        script = _START.format(dir=self.directory, dockerd=dockerd, cgroup=self.cgroup)
        with (self.directory / "dockerd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*f"nsenter --net={self.netns} unshare -m -u --propagation private sh -c".split(), script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_api()
        self.engine.raw("POST", "/images/load", archive, "application/x-tar")
        self.image = image
        listen = f"{ADDRESS}:2377"
        self.engine.post("/swarm/init", {"ListenAddr": listen, "AdvertiseAddr": ADDRESS})

    def version(self) -> str:
        response: dict[str, Any] = self.engine.get("/version")
        return f"dockerd {response['Version']}"

    def down(self) -> None:
        """End dockerd and its containers, and remove all traces."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        for pid in _cgroup_pids(self.cgroup) | _namespace_pids(self.netns):
            _kill(pid)
        _wait_for(lambda: not (_cgroup_pids(self.cgroup) | _namespace_pids(self.netns)), 10)
        if self.netns.exists():
            _run("ip", "netns", "del", self.cgroup)
        for top in _groups(self.cgroup):
            for root, _, _ in os.walk(top, topdown=False):
                Path(root).rmdir()
        discard_tree_now(self.directory)

    def _wait_api(self) -> None:
        def answers() -> bool:
            if self._process is not None and self._process.poll() is not None:
                raise SystemExit(f"dockerd ended: see {self.directory}/dockerd.log")
            try:
                self.engine.get("/info")
            except OSError:
                return False
            return True

        _wait_for(answers, 60)


def found_dockerd() -> str | None:
    """Return the path of dockerd, which ``put_engine_first`` may have chosen, or None."""
    return shutil.which("dockerd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/bin:/sbin:/bin")


def put_engine_first(suite: str, directory: Path) -> None:
    """Use the Docker Engine of a Debian suite from now on (``setup/engine.sh``).  Its command is in ``directory``."""
    script = Path(__file__).parents[1] / "setup/engine.sh"
    subprocess.run([script, suite, directory], check=True)
    os.environ["PATH"] = f"{directory}:{os.environ['PATH']}"


def _wait_for(condition: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so after {timeout_s} s: {condition}")
        time.sleep(0.02)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _cgroup_pids(cgroup: str) -> set[int]:
    found: set[int] = set()
    for group in _groups(cgroup):
        for listing in group.glob("**/cgroup.procs"):
            found |= {int(word) for word in listing.read_text().split()}
    return found


def _groups(cgroup: str) -> list[Path]:
    """Return its directories: in every hierarchy of cgroup v1, or in the one of v2."""
    top = Path("/sys/fs/cgroup")
    return [*top.glob(f"*/{cgroup}"), *top.glob(cgroup)]


def _namespace_pids(netns: Path) -> set[int]:
    if not netns.exists():
        return set()
    inode = f"net:[{netns.stat().st_ino}]"
    found = set()
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.readlink(f"/proc/{entry}/ns/net") == inode:
                found.add(int(entry))
        except OSError:
            continue
    return found

"""One node of a playground: describe, start, kill and remove it."""

import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from skep.aio.trees import discard_tree
from skep.errors import SkepError, Unavailable
from skep.linux.processes import start_ticks_of, stat_of
from skep.playground import cgroups, docker, engine, names, processes, tls, underlay
from skep.playground.commands import find, wait_until
from skep.playground.description import PlaygroundNode

HOLDER = Path(__file__).with_name("holder.sh")
SKEP = Path(sys.executable).with_name("skep")
_API_WITHIN_S = 60
"""Time limit in seconds for a node's start."""
_ENDS_MAX = 3
"""Number of ends after which a starting daemon counts as failed.

A daemon that refuses its configuration or its machine ends every time.
"""
_CONFIGURATION = """\
# Configuration of this node alone; the machine's own /etc/skep/skep.toml is not read here.
# After a change: send SIGHUP to the daemon (its PID: skep playground ps), or kill and start the node.
# Hosts are served beside the playground's own sockets, once the node was killed and started.
"""
_LOGS = ("holder.log", "skep.log")
_TAIL_LINES = 15
"""Number of lines of each log that an error shows."""


def described(
    directory: Path,
    playground: str,
    name: str,
    role: names.Role,
    ip: str,
    engine: names.Engine = "skep",
) -> PlaygroundNode:
    """Return the description of a node that will be created."""
    home = directory / name
    socket = docker.SOCKET if engine == "docker" else "skep.sock"
    return PlaygroundNode(
        name=name,
        role=role,
        addr=ip,
        endpoint=f"unix://{home / socket}",
        netns=str(underlay.NETNS_ROOT / names.namespace(playground, name)),
        cgroup=names.cgroup(playground, name),
        state_dir=str(home / "data"),
        link=(names.namespace(playground, names.SWITCH), names.port(name)),
        start=(str(SKEP), "playground", "start", "--dir", str(directory), "--name", playground, name),
        engine=engine,
    )


class Holder:
    """The holder process of a node that is being started."""

    def __init__(
        self,
        node: PlaygroundNode,
        home: Path,
        process: "subprocess.Popen[bytes]",
        logged: Mapping[str, int],
    ) -> None:
        """Args: logged: Bytes that each log had before this start."""
        self.node, self._home, self._process, self._logged = node, home, process, logged

    async def wait_for_api(self, then: str) -> None:
        """Wait until the API responds.  Raises: Unavailable, with the end of the node's log and the next step."""
        try:
            await wait_until(self._answers, f"{self.node.name} serves its API", _API_WITHIN_S, then)
        except Unavailable as error:
            raise Unavailable(f"{error}\n{_tail(self._home, self._logged)}") from error

    async def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise Unavailable(f"{self.node.name} stopped right after its start")
        if keeps_stopping(self.node):
            raise Unavailable(f"the daemon of {self.node.name} keeps stopping")
        return await engine.is_up(self.node.endpoint)


def switch_on(directory: Path, playground: str, node: PlaygroundNode) -> Holder:
    """Start the node's holder, which starts its daemon.  The network namespace must exist.

    Raises: Unavailable: it ended at once.
    """
    home = directory / node.name
    (home / "data").mkdir(parents=True, exist_ok=True)
    (home / "ends").unlink(missing_ok=True)
    logged = written_so_far(home)
    agents = cgroups.make(playground, node.name)
    daemon = docker.command(home, node) if node.engine == "docker" else daemon_command(home, node)
    with (home / "holder.log").open("ab") as output:
        process = subprocess.Popen(
            (
                *(find("nsenter"), f"--net={node.netns}"),
                *(find("unshare"), "--mount", "--uts", "--propagation", "private"),
                *(find("tini-static", "tini"), "-s", "--"),
                *("/bin/sh", str(HOLDER), node.name, str(home), " ".join(map(str, agents)), "--"),
                *daemon,
            ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    started = start_ticks_of(process.pid)
    if started is None:
        raise Unavailable(f"{node.name} did not start:\n{_tail(home, logged)}")
    return Holder(msgspec.structs.replace(node, pids=(process.pid,), started=started), home, process, logged)


def runs_as_configured(directory: Path, node: PlaygroundNode) -> bool:
    """Return whether the node's daemon was started with the hosts that its configuration file has now."""
    if node.engine == "docker":
        return True
    try:
        words = Path(f"/proc/{node.pids[0]}/cmdline").read_bytes().decode().split("\0")[:-1]
    except OSError:
        return False
    command = daemon_command(directory / node.name, node)
    return tuple(words[-len(command) :]) == command


def daemon_command(home: Path, node: PlaygroundNode) -> tuple[str, ...]:
    """Return the command of the node's daemon, with the hosts of its file.  Creates the file if it is missing."""
    configuration = home / "skep.toml"
    if not configuration.exists():
        has_tls = (home / "server.pem").exists()
        served = tls.configuration(home, tls.authority_file(home.parent)) if has_tls else ""
        configuration.write_text(_CONFIGURATION + served)
    own = ("unix:///run/skep/skep.sock", node.endpoint)
    return (
        *(str(SKEP), "daemon", "--config", str(configuration), "--daemon-json", ""),
        *("--log-format", "json", "--advertise-addr", node.addr, "--cgroup-parent", node.cgroup),
        *("--data-dir", node.state_dir, "--run-dir", "/run/skep"),
        *(word for host in (*own, *further_hosts(configuration, own)) for word in ("--host", host)),
    )


def further_hosts(configuration: Path, own: Sequence[str]) -> Iterator[str]:
    """Yield the ``hosts`` in a node's configuration file that are not among the playground's ``own``.

    Ignores errors in the file, which the daemon reports.
    """
    try:
        hosts = tomllib.loads(configuration.read_text()).get("hosts", ())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return
    for host in hosts if isinstance(hosts, list) else [hosts]:
        if isinstance(host, str) and host not in own:
            yield host


async def kill(playground: str, node: PlaygroundNode) -> PlaygroundNode:
    """Simulate a power loss: kill every process of the node at once, so that none can announce its end."""
    for pid in node.pids:
        processes.kill_exactly(pid, node.started)
    await processes.kill_all(playground, node.name)
    Path(node.endpoint.removeprefix("unix://")).unlink(missing_ok=True)
    return msgspec.structs.replace(node, pids=(), started=0)


async def remove_files(home: Path) -> None:
    """Remove the node's directory.  Call it when all processes of the node have ended.

    A directory that was a mount point in the node's mount namespace is busy until the kernel has removed that
    namespace, a moment after its last process.  Raises: Unavailable: it stays busy.
    """

    async def is_removed() -> bool:
        await discard_tree(home)
        return not home.exists()

    await wait_until(is_removed, f"{home} can be removed", within_s=20)


def is_up(node: PlaygroundNode) -> bool:
    """Return whether the process that holds the node's namespaces runs.  The daemon may still be starting."""
    return any(start_ticks_of(pid) == node.started for pid in node.pids)


def daemon_pid(node: PlaygroundNode) -> int | None:
    """Return the pid of the daemon, which is the first child process of the holder's shell, or None."""
    pid = node.pids[0] if is_up(node) else None
    for _ in ("shell", "daemon"):
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return None
        pid = int(children[0]) if children else None
    return pid


async def state(playground: str, node: PlaygroundNode) -> str:
    """Return the node's state for users: up, paused, cut, half-cut, starting, failing or down.

    The daemon of a failing node keeps stopping.
    """
    if not is_up(node):
        return "down"
    if is_paused(node):
        return "paused"
    try:
        if not await underlay.is_connected(playground, node.name):
            return "cut"
        if await underlay.is_blocked(playground, node.name):
            return "half-cut"
    except SkepError:
        return "down"
    if await engine.is_up(node.endpoint):
        return "up"
    return "failing" if keeps_stopping(node) else "starting"


def is_paused(node: PlaygroundNode) -> bool:
    """Return whether the node's daemon is stopped by a signal, as ``skep playground pause`` leaves it."""
    pid = daemon_pid(node)
    stat = stat_of(pid) if pid is not None else None
    return stat is not None and stat.state == "T"


def keeps_stopping(node: PlaygroundNode) -> bool:
    """Return whether the daemon has ended too often since the node was switched on."""
    try:
        ends = (Path(node.state_dir).parent / "ends").read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(ends) >= _ENDS_MAX


def written_so_far(home: Path) -> Mapping[str, int]:
    """Return the size of each of the node's logs."""
    return {file: (home / file).stat().st_size for file in _LOGS if (home / file).exists()}


def _tail(home: Path, logged: Mapping[str, int]) -> str:
    """Return the end of what the holder and the daemon have written since a start, each line once.

    Args:
        home: The node's directory.
        logged: Bytes that each log had before the start.  A daemon that keeps stopping repeats its error.
    """
    lines: list[str] = []
    for file in _LOGS:
        try:
            written = (home / file).read_bytes()[logged.get(file, 0) :].decode(errors="replace")
        except FileNotFoundError:
            continue
        lines += list(dict.fromkeys(written.splitlines()))[-_TAIL_LINES:]
    return "\n".join(f"  {line}" for line in lines) or f"  (nothing was written in {home})"

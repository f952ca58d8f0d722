"""One node of a playground: made, started, killed, removed."""

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec

from skep.errors import SkepError, Unavailable
from skep.playground import cgroups, engine, names, processes, underlay
from skep.playground.commands import find, wait_until
from skep.playground.description import Node

HOLDER = Path(__file__).with_name("holder.sh")
SKEP = Path(sys.executable).with_name("skep")
_API_WITHIN_S = 60
_TAIL_LINES = 15


def described(directory: Path, playground: str, name: str, role: names.Role, ip: str) -> Node:
    """The node as it will be; nothing is made yet."""
    home = directory / name
    return Node(
        name=name,
        role=role,
        addr=ip,
        endpoint=f"unix://{home / 'skep.sock'}",
        netns=str(underlay.NETNS_ROOT / names.namespace(playground, name)),
        cgroup=names.cgroup(playground, name),
        state_dir=str(home / "data"),
        link=(names.namespace(playground, names.SWITCH), names.port(name)),
        start=(str(SKEP), "playground", "start", "--dir", str(directory), "--name", playground, name),
    )


async def start(directory: Path, playground: str, node: Node) -> Node:
    """Start the node's holder and wait until its API answers.  The namespace must exist.

    Raises: Unavailable: the API does not answer, with the end of the node's log.
    """
    home = directory / node.name
    data = home / "data"
    data.mkdir(parents=True, exist_ok=True)
    agents = cgroups.make(playground, node.name)
    daemon = (
        *(str(SKEP), "daemon", "--config", "none", "--log-format", "json"),
        *("--data-dir", str(data), "--run-dir", "/run/skep"),
        *("--host", "unix:///run/skep/skep.sock", "--host", node.endpoint),
        *("--cgroup-parent", node.cgroup, "--advertise-addr", node.addr),
    )
    holder = subprocess.Popen(  # noqa: ASYNC220 - it outlives this command, and its loop
        (
            *(find("nsenter"), f"--net={node.netns}"),
            *(find("unshare"), "--mount", "--uts", "--propagation", "private"),
            *(find("tini-static"), "-s", "--"),
            *("/bin/sh", str(HOLDER), node.name, str(home), " ".join(map(str, agents)), "--"),
            *daemon,
        ),
        stdin=subprocess.DEVNULL,
        stdout=(home / "holder.log").open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    started = processes.start_time(holder.pid)
    if started is None:
        raise Unavailable(f"{node.name} did not start:\n{_tail(home)}")

    async def answers() -> bool:
        if holder.poll() is not None:
            raise Unavailable(f"{node.name} ended at once:\n{_tail(home)}")
        return await engine.is_up(node.endpoint)

    try:
        await wait_until(answers, f"{node.name} serves its API", _API_WITHIN_S)
    except Unavailable as error:
        raise Unavailable(f"{error}\n{_tail(home)}") from error
    return msgspec.structs.replace(node, pids=(holder.pid,), started=started)


async def kill(playground: str, node: Node) -> Node:
    """Power loss: everything that lives on the node ends at once and without a word."""
    for pid in node.pids:
        processes.kill_exactly(pid, node.started)
    await processes.kill_all(playground, node.name)
    Path(node.endpoint.removeprefix("unix://")).unlink(missing_ok=True)
    return msgspec.structs.replace(node, pids=(), started=0)


async def remove_files(home: Path) -> None:
    """Remove the node's directory.  Call it when nothing lives on the node any more.

    A directory that was a mount point in the node's own mount namespace is busy until the kernel has taken that
    namespace apart, a moment after its last process.
    Raises: Unavailable: it stays busy.
    """

    async def removed() -> bool:
        await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)
        return not home.exists()

    await wait_until(removed, f"{home} can be removed", within_s=20)


def is_up(node: Node) -> bool:
    """Whether the node's holder lives.  Its daemon may still be starting."""
    return any(processes.is_alive(pid, node.started) for pid in node.pids)


async def state(playground: str, node: Node) -> str:
    """One word for people: up, cut, starting or down."""
    if not is_up(node):
        return "down"
    try:
        if not await underlay.is_connected(playground, node.name):
            return "cut"
    except SkepError:
        return "down"
    return "up" if await engine.is_up(node.endpoint) else "starting"


def _tail(home: Path) -> str:
    """The end of what holder and daemon wrote."""
    lines: list[str] = []
    for file in ("holder.log", "skep.log"):
        try:
            lines += (home / file).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        except FileNotFoundError:
            continue
    return "\n".join(f"  {line}" for line in lines) or f"  (nothing was written in {home})"

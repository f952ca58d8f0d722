"""``skep up``: turns machines into a cluster over ssh.  It checks all of them first, then installs, starts and joins.

Every step first checks whether it is already done, so rerunning the command resumes an interrupted one, or adds
machines.  OpenSSH's own client is used, with the user's configuration and with keys, so it never prompts.
"""

import asyncio
import ipaddress
import time
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import PIPE
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import msgspec

from skep.api.client.client import ApiClient
from skep.api.client.ssh import SshDestination
from skep.cli.running import errors_shown
from skep.cli.stack.stack_screens import ProgressPrinter
from skep.cli.start.machines import PREFLIGHT, START, PreflightFacts, facts_of, problems
from skep.errors import FailedPrecondition, InvalidArgument, SkepError, Unavailable
from skep.model.task_end import printable
from skep.model.values.counts import counted

AT_ONCE = 10
"""Machines that are installed at once.  Each has an SSH client and an upload of the package."""
_LOOKS_WITHIN_S = 30.0
"""Seconds to log in by SSH and read facts, which may wait for a name server."""
INSTALLS_WITHIN_S = 600.0
"""Seconds for apt, which may wait 120 s for another apt (``APT_INSTALL``) and downloads what the package needs."""
_JOINS_WITHIN_S = 120.0
"""Seconds to start a node or to join, which waits for certificates and, at a manager, for a member of etcd."""
_ENDS_WITHIN_S = 5.0
"""Seconds for a killed SSH client to end.  A process that it started may hold its pipes."""
_OUTPUT_BYTES_MAX = 64 << 10
"""The end of a program's output is enough: it contains the error."""
APT_INSTALL = (
    "DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=120 -o Dpkg::Options::=--force-confdef "
    "-o Dpkg::Options::=--force-confold install -y --allow-downgrades"
)
"""Installs without prompts, and keeps changed settings.  Waits for a running apt, such as the one after boot."""
_INSTALL = f"""set -e
umask 077
package=$(mktemp -d)/skep.deb
trap 'rm -rf "$(dirname "$package")"' EXIT
cat >"$package"
chmod 755 "$(dirname "$package")"; chmod 644 "$package"
{APT_INSTALL} "$package" >&2 </dev/null
"""


class TargetMachine(msgspec.Struct, frozen=True):
    """A machine as named by the user, and its ssh destination."""

    word: str
    destination: SshDestination

    @classmethod
    def of(cls, word: str) -> "TargetMachine":
        """Parse ``machine``, ``user@machine`` or ``ssh://[user@]machine[:port][/path/of.sock]``.

        Raises: InvalidArgument.
        """
        url = word if word.startswith("ssh://") else f"ssh://{word}"
        destination = SshDestination.of(url)
        if destination.machine.startswith("-"):
            raise InvalidArgument(f"{word!r} is not a machine. Use [USER@]MACHINE.")
        return cls(word, destination)

    def command(self, words: Sequence[str]) -> list[str]:
        """Return an ssh command that runs ``words`` on the machine and never prompts."""
        at = self.destination
        return [
            *("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ControlPath=none"),
            *(("-p", str(at.port)) if at.port else ()),
            *(("-l", at.user) if at.user else ()),
            *("--", at.machine, *words),
        ]

    def client(self) -> ApiClient:
        """Return a client of the node's API."""
        return ApiClient.at(str(self.destination))

    async def run(self, words: Sequence[str], given: bytes, *, timeout_s: float) -> str:
        """Run a command on the machine and return its output.  Raises: Unavailable, with the last line of its error
        output.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                *self.command(words), stdin=PIPE, stdout=PIPE, stderr=PIPE
            )
        except OSError as error:
            raise Unavailable(f"ssh cannot be run: {error.strerror}. Install openssh-client.") from error
        try:
            async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
                out, err = (group.create_task(_end_of(one)) for one in (process.stdout, process.stderr))
                group.create_task(_give(process.stdin, given))
                await process.wait()
        except TimeoutError:
            raise Unavailable(f"not done within {timeout_s:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                with suppress(TimeoutError):  # asyncio reports its end only when the pipes have been read
                    async with asyncio.timeout(_ENDS_WITHIN_S):
                        await asyncio.gather(_end_of(process.stdout), _end_of(process.stderr), process.wait())
        if process.returncode:
            lines = err.result().decode(errors="replace").strip().splitlines()
            raise Unavailable(lines[-1].strip() if lines else f"ssh ended with code {process.returncode}")
        return out.result().decode(errors="replace")


async def _end_of(stream: StreamReader | None) -> bytes:
    """Return the last part of a machine's output.  It is bounded, because the output may be endless."""
    assert stream is not None, "a pipe was asked for"
    end = b""
    while data := await stream.read(_OUTPUT_BYTES_MAX):
        end = (end + data)[-_OUTPUT_BYTES_MAX:]
    return end


async def _give(stream: StreamWriter | None, given: bytes) -> None:
    """Write the input of a command, which may end before it has read it."""
    assert stream is not None, "a pipe was asked for"
    with suppress(ConnectionError):
        stream.write(given)
        await stream.drain()
    stream.close()


class DesiredCluster(msgspec.Struct, frozen=True, kw_only=True):
    """The desired cluster.  ``managers``: number of managers, which are the first machines."""

    managers: int = 1
    package: Path | None = None
    advertise: str = ""


@click.command()
@click.option(
    "--managers",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Number of managers. The first N hosts become managers.",
)
@click.option(
    "--package",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Debian package to install on machines without Skep.",
)
@click.option(
    "--advertise-addr",
    "advertise",
    default="",
    metavar="INTERFACE",
    help="Network interface that other nodes reach, if machines have several.",
)
@click.option("--dry-run", is_flag=True, help="Check the machines without changing them.")
@click.argument("hosts", metavar="HOST...", nargs=-1, required=True)
def up(hosts: tuple[str, ...], managers: int, package: Path | None, advertise: str, dry_run: bool) -> None:
    """Turn machines into a cluster over SSH.

    HOST is [USER@]MACHINE. You need root and an SSH key there. The first HOST becomes the first manager.

    Checks all machines first, and changes nothing if one is not suitable. Rerun the command to continue after an error,
    or to add machines.

    \b
    Examples:
      skep up --dry-run root@m1 root@w1 root@w2
      skep up --package skep.deb root@m1 root@w1 root@w2
      skep up --managers 3 root@m1 root@m2 root@m3 root@w1
    """
    with errors_shown():
        if package is not None and package.suffix != ".deb":
            raise InvalidArgument(
                f"{package} is not a Debian package (.deb). Choose one, or install Skep by other means."
            )
        if _is_address(advertise):
            raise InvalidArgument(
                "--advertise-addr is the name of an interface, such as eth1, because each machine has another address"
            )
        machines = [TargetMachine.of(word) for word in hosts]
        if len({str(one.destination) for one in machines}) < len(machines):
            raise InvalidArgument("A machine is listed twice. Remove one.")
        wanted = DesiredCluster(managers=managers, package=package, advertise=advertise)
        asyncio.run(make_cluster(machines, wanted, is_dry=dry_run))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


async def make_cluster(machines: Sequence[TargetMachine], wanted: DesiredCluster, *, is_dry: bool) -> None:
    """Turn ``machines`` into the ``wanted`` cluster, or only check them.

    Raises: FailedPrecondition: a machine is not suitable, and nothing was changed; Unavailable: some could not join.
    """
    progress = ProgressPrinter()
    facts = await _preflight(machines, wanted, progress)
    if is_dry:
        return
    await _each(machines, lambda one: install(one, facts[one.word], wanted, progress))
    first, *others = machines
    address, tokens, members = await _ensure_cluster(first, wanted, progress)

    def joins(one: TargetMachine, role: str) -> Callable[[], Any]:
        return lambda: join(one, role, address, tokens, members, wanted, progress)

    for one in others[: wanted.managers - 1]:  # one after the other, because each changes the set of voters
        await _each([one], lambda machine: joins(machine, "Manager")())
    await _each(others[wanted.managers - 1 :], lambda machine: joins(machine, "Worker")())
    click.echo(
        f"{counted(len(machines), 'machine')} in the cluster. Next: skep --host {first.destination} status"
    )


async def _each(machines: Sequence[TargetMachine], work: Callable[[TargetMachine], Any]) -> None:
    """Run ``work`` for all machines, some at once, even if one fails.

    Raises: Unavailable: names each machine that failed, with its reason.
    """
    places, failed = asyncio.Semaphore(AT_ONCE), dict[str, str]()

    async def attempt(machine: TargetMachine) -> None:
        async with places:
            try:
                await work(machine)
            except (SkepError, OSError) as error:
                failed[machine.word] = printable(str(error))

    async with asyncio.TaskGroup() as group:
        for machine in machines:
            group.create_task(attempt(machine), name=machine.word)
    if failed:
        lines = [f"{machine.word}: {failed[machine.word]}" for machine in machines if machine.word in failed]
        raise Unavailable(
            "\n".join([*lines, "Fix the problem and rerun the command to complete the cluster."])
        )


async def _preflight(
    machines: Sequence[TargetMachine], wanted: DesiredCluster, progress: ProgressPrinter
) -> Mapping[str, PreflightFacts]:
    found: dict[str, PreflightFacts] = {}

    async def look(machine: TargetMachine) -> None:
        begun = time.time()
        text = await machine.run(["sh", "-s"], PREFLIGHT.encode(), timeout_s=_LOOKS_WITHIN_S)
        facts = facts_of(text)
        found[machine.word] = facts
        bad = problems(facts, begun, time.time(), has_package=wanted.package is not None)
        if bad:
            raise FailedPrecondition(" ".join(bad))
        progress.show(machine.word, f"suitable: {facts.summary}")

    try:
        await _each(machines, look)
    except Unavailable as error:
        text = str(error).rpartition("\n")[0]
        raise FailedPrecondition(
            f"{text}\nNothing was changed. Fix the problem and rerun the command."
        ) from error
    return found


async def install(
    machine: TargetMachine,
    facts: PreflightFacts,
    wanted: DesiredCluster,
    progress: ProgressPrinter,
    start: str = START,
) -> None:
    """Install the package if the machine has none, and start the node by the script ``start``.  Raises: Unavailable."""
    then = "starting skep"
    if not facts.skep and not facts.runs and wanted.package is not None:
        progress.show(machine.word, f"installing {wanted.package.name}")
        content = await asyncio.to_thread(wanted.package.read_bytes)
        await machine.run(["sh", "-c", quoted(_INSTALL)], content, timeout_s=INSTALLS_WITHIN_S)
        then = "waiting for skep to start"  # the package starts skep
    if not facts.runs:
        progress.show(machine.word, then)
        await machine.run(["sh", "-s"], start.encode(), timeout_s=_JOINS_WITHIN_S)


def quoted(text: str) -> str:
    """Quote one word for the remote shell, because ssh joins its words by spaces."""
    return "'" + text.replace("'", "'\\''") + "'"


async def _ensure_cluster(
    first: TargetMachine, wanted: DesiredCluster, progress: ProgressPrinter
) -> tuple[str, Mapping[str, str], Mapping[str, str]]:
    """Start the cluster if needed; return the first manager's address, the join tokens, and the role of each node."""
    async with first.client() as client:
        info = await client.get("/info", timeout_s=_LOOKS_WITHIN_S)
        if (info["Swarm"].get("LocalNodeState") or "inactive") == "inactive":
            body = {"ListenAddr": "0.0.0.0:2377", "AdvertiseAddr": wanted.advertise}
            await client.post("/swarm/init", body, timeout_s=_JOINS_WITHIN_S)
            progress.show(first.word, "created the cluster")
            info = await client.get("/info", timeout_s=_LOOKS_WITHIN_S)
        else:
            progress.show(first.word, "already in a cluster")
        if not info["Swarm"].get("ControlAvailable"):
            raise FailedPrecondition(
                f"{first.word} is not a working manager. Put a manager first in the list, or run skep status there."
            )
        swarm = await client.get("/swarm", timeout_s=_LOOKS_WITHIN_S)
        nodes = await client.get("/nodes", timeout_s=_LOOKS_WITHIN_S)
    peers = {one["NodeID"]: one["Addr"] for one in info["Swarm"].get("RemoteManagers") or ()}
    address = peers.get(info["Swarm"]["NodeID"]) or f"{info['Swarm']['NodeAddr']}:2377"
    return address, swarm["JoinTokens"], {node["ID"]: node["Spec"]["Role"] for node in nodes}


async def join(
    machine: TargetMachine,
    role: str,
    address: str,
    tokens: Mapping[str, str],
    members: Mapping[str, str],
    wanted: DesiredCluster,
    progress: ProgressPrinter,
) -> None:
    """Join a machine unless it is a member.

    Args:
        members: Role of each node of the cluster, by id.

    Raises: FailedPrecondition: it is locked, or in another cluster; Unavailable.
    """
    async with machine.client() as client:
        swarm = (await client.get("/info", timeout_s=_LOOKS_WITHIN_S))["Swarm"]
        if (state := swarm.get("LocalNodeState") or "inactive") != "inactive":
            if state == "locked":
                raise FailedPrecondition(
                    "it is locked. Run docker swarm unlock there, then rerun the command."
                )
            if swarm.get("NodeID") not in members:
                raise FailedPrecondition(
                    f"it is in another cluster ({state}). Run docker swarm leave there, then rerun the command."
                )
            promote = f" as a worker. To make it a manager, run docker node promote {swarm['NodeID']}."
            # A manager that has just started does not respond as one yet.
            is_less = role == "Manager" and members[swarm["NodeID"]] == "worker"
            progress.show(machine.word, f"already in the cluster{promote if is_less else ''}")
            return
        body = {
            "ListenAddr": "0.0.0.0:2377",
            "AdvertiseAddr": wanted.advertise,
            "RemoteAddrs": [address],
            "JoinToken": tokens[role],
        }
        await client.post("/swarm/join", body, timeout_s=_JOINS_WITHIN_S)
    progress.show(machine.word, f"has joined as a {role.lower()}")

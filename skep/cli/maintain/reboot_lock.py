"""``skep reboot-lock``: a lock, so that only one node at a time is down on purpose."""

import getpass
import socket
from collections.abc import Sequence
from datetime import datetime, timedelta

import click
import msgspec

from skep.api.client.client import ApiClient
from skep.cli import options
from skep.cli.endpoint import HostOptions
from skep.cli.formatting import duration
from skep.cli.maintain import maintenance
from skep.cli.maintain.maintenance import LockHolder
from skep.cli.maintain.upgrade_plan import UpgradableNode
from skep.cli.output import OutputOptions, Shown, shows
from skep.cli.running import run_requests, say
from skep.errors import InvalidArgument


@click.group("reboot-lock")
def reboot_lock() -> None:
    """Manage the cluster-wide reboot lock.

    Take the lock before you reboot a node, and release it afterwards, so that only one node is down at a time.

    The lock is refused while another node holds it, while skep upgrade runs, and if the managers would lose quorum.

    \b
    Examples:
      skep reboot-lock take w1 && skep node drain w1 && ssh root@w1 reboot
      skep reboot-lock release w1
    """


def whoami() -> str:
    """Return the holder's name as shown to others."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


@reboot_lock.command()
@click.option(
    "--ttl",
    type=options.Duration(plain_s=60.0),
    default="30m",
    show_default=True,
    metavar="DURATION",
    help="Time after which another node may take the lock.",
)
@click.option(
    "--at-once",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Number of nodes that may hold the lock.",
)
@options.override_freeze
@click.argument("node", metavar="NODE")
@click.pass_obj
def take(host: HostOptions, node: str, ttl: float, at_once: int, override_freeze: bool) -> None:
    """Take or renew the lock for a node.

    Exit code 1: another node holds the lock, or the cluster is frozen.

    \b
    Examples:
      skep reboot-lock take w1
      until skep reboot-lock take --ttl 10m "$(hostname)"; do sleep 30; done
    """
    run_requests(_take(host, node, ttl, at_once, is_override=override_freeze))
    click.echo(f"{node} holds the lock for {duration(ttl)}")


@reboot_lock.command()
@click.option(
    "--all", "everything", is_flag=True, help="Release all locks, including the lock of an upgrade."
)
@click.argument("node", metavar="[NODE]", default="")
@click.pass_obj
def release(host: HostOptions, node: str, everything: bool) -> None:
    """Release the lock of a node.

    Says so if NODE does not hold it.

    \b
    Examples:
      skep reboot-lock release w1
      skep reboot-lock release --all
    """
    run_requests(_release(host, node, everything))


@reboot_lock.command()
@shows
@click.pass_obj
def status(host: HostOptions, output: OutputOptions) -> None:
    """Show the holders of the lock.

    Exit code 3: a holder is overdue.

    \b
    Example:
      skep reboot-lock status
    """

    async def fetch() -> Shown:
        async with host.client() as client:
            members, now = await maintenance.nodes_and_time(client)
            holders = await maintenance.holders_of(client)
        lines = [maintenance.described(one, members, now) for one in holders] or ["No node holds the lock."]

        is_late = any(one.is_overdue(now) for one in holders)
        rows = [msgspec.to_builtins(one) for one in holders]
        return Shown(data=rows, rows=rows, lines=lambda _: iter(lines), exit_code=3 if is_late else 0)

    output.show(fetch)


def named(members: Sequence[UpgradableNode], word: str) -> UpgradableNode:
    """Return the node with this name or id.  Raises: InvalidArgument."""
    found = [one for one in members if word in (one.id, one.name)]
    if len(found) != 1:
        raise InvalidArgument(
            f"{'no node is' if not found else 'several nodes are'} called {word!r}. List nodes with skep node ls."
        )
    return found[0]


async def _take(host: HostOptions, word: str, ttl: float, at_once: int, *, is_override: bool) -> None:
    async with host.client() as client:
        if not is_override:
            await maintenance.require_unfrozen(client)

        def decide(text: str, members: Sequence[UpgradableNode], now: datetime) -> str:
            wanted = LockHolder(node=named(members, word).id, by=whoami(), until=now + timedelta(seconds=ttl))
            holders = maintenance.taken(maintenance.read(text), wanted, members, now, at_once=at_once)
            return maintenance.written(holders)

        await maintenance.change_by_nodes(client, decide)


async def _release(host: HostOptions, word: str, everything: bool) -> None:
    if bool(word) == everything:
        raise InvalidArgument("Specify a node or --all.")
    async with host.client() as client:
        if everything:
            await maintenance.change(client, lambda _: "")
            return
        await _release_one(client, word)


async def _release_one(client: ApiClient, word: str) -> None:
    members, _ = await maintenance.nodes_and_time(client)
    is_held = False

    def decide(text: str) -> str:
        nonlocal is_held
        holders = maintenance.read(text)
        # The node of a lock may have been removed since. Its id is then all that is known of it.
        node = word if any(one.node == word for one in holders) else named(members, word).id
        kept = [one for one in holders if one.is_upgrade or one.node != node]
        is_held = len(kept) < len(holders)
        return maintenance.written(kept)

    await maintenance.change(client, decide)
    if not is_held:
        say(f"{word} does not hold the lock. Run skep reboot-lock status to see which node does.")

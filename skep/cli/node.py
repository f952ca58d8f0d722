"""``skep node``: docker's commands, and evict: revoking and replacing every secret that a node has had."""

import asyncio
import getpass
import socket
from collections.abc import Mapping
from typing import Any

import click

from skep.cli import passthrough
from skep.cli.endpoint import HostOptions
from skep.cli.running import run_requests
from skep.errors import SkepError, Unavailable

_ANSWERS_WITHIN_S = 15.0
_LOOK_S = 0.5
_PATH = "/skep/cluster/evict"


class _Node(click.Group):
    """Docker's commands, except for those that are defined here."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or passthrough.command("node", cmd_name)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        formatter.write_text("Everything else is docker's: skep node ls, inspect, ps, update, rm, ...")


@click.group(cls=_Node)
def node() -> None:
    """Nodes.

    \b
    Examples:
      skep node ls
      skep node evict m3
    """


@node.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.argument("name", metavar="NODE")
@click.pass_obj
def evict(host: HostOptions, name: str, yes: bool) -> None:
    """Remove a node that is no longer trusted, and replace every key that it had.

    NODE is a name or an id; one that was removed already is named by its whole id.  The managers continue when
    this command is interrupted; the same command again shows the progress.  Secrets of your services that the node
    had are yours to replace.

    \b
    Examples:
      skep node evict m3
      skep node evict --yes 4pwj9jbl5hxo2wadgmuzktzve
    """
    if not yes:
        click.confirm(
            f"Remove {name}, and replace the managers' keys, the root certificate, join tokens and the unlock key?",
            abort=True,
            err=True,
        )
    if unlock_key := run_requests(_evict(host, name)):
        click.echo(
            "To unlock a swarm manager after it restarts, run the `docker swarm unlock`\n"
            f"command and provide the following key:\n\n    {unlock_key}\n\n"
            "Please remember to store this key in a password manager, since without it you\n"
            "will not be able to restart the manager."
        )


async def _evict(host: HostOptions, name: str) -> str:
    """Evict and wait for the end; gives the new unlock key if there is one."""
    by = f"{getpass.getuser()}@{socket.gethostname()}"
    async with host.client() as client:
        progress = _Progress()
        state = await client.post(_PATH, {"Node": name, "By": by}, timeout_s=_ANSWERS_WITHIN_S)
        while not progress.show(state):
            await asyncio.sleep(_LOOK_S)
            try:
                state = await client.get(_PATH, timeout_s=_ANSWERS_WITHIN_S)
            except (Unavailable, OSError) as error:  # the manager's etcd restarts, too
                progress.note(str(error))
        try:
            response = await client.get("/swarm/unlockkey", timeout_s=_ANSWERS_WITHIN_S)
        except SkepError as error:
            raise Unavailable(f"all is done, and the unlock key could not be read: {error}") from error
        return str(response.get("UnlockKey") or "")


class _Progress:
    """Prints what has changed."""

    def __init__(self) -> None:
        self._done: set[str] = set()
        self._damaged: set[str] = set()
        self._last_note = ""

    def show(self, state: Mapping[str, Any]) -> bool:
        """Whether it is complete."""
        for step in state["Steps"]:
            if step["Done"] and step["Text"] not in self._done:
                self._done.add(step["Text"])
                click.echo(f"done: {step['Text']}")
        if damaged := [key for key in state.get("Damaged") or () if key not in self._damaged]:
            self._damaged.update(damaged)
            click.echo(f"      could not be read, and are left as they are: {', '.join(damaged)}", err=True)
        if state["Complete"]:
            click.echo(
                f"{state['Hostname'] or state['NodeID']} is evicted: every key that it had is revoked or replaced."
            )
            return True
        self.note(state["WaitsFor"])
        return False

    def note(self, reason: str) -> None:
        """What is waited for, once."""
        if reason and reason != self._last_note:
            click.echo(f"      {reason}", err=True)
        self._last_note = reason

"""``skep network``: docker's commands, and a command that adds subnets."""

from collections.abc import Sequence
from urllib.parse import quote

import click

from skep.cli import passthrough
from skep.cli.endpoint import HostOptions
from skep.cli.running import run_requests

AUTOMATIC = "auto"


class _Network(click.Group):
    """A command group in which every command except Skep's own is docker's."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or passthrough.command("network", cmd_name)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        formatter.write_text(
            "Other docker commands also work: skep network create, ls, inspect, rm, prune, ..."
        )


@click.group(cls=_Network)
def network() -> None:
    """Manage networks.

    \b
    Examples:
      skep network ls
      skep network update --subnet-add 10.20.0.0/24 backend
    """


@network.command()
@click.option(
    "--subnet-add",
    "subnets",
    metavar="SUBNET",
    multiple=True,
    required=True,
    help=f"Subnet to add, or {AUTOMATIC} for one from the default address pools. Repeat for several.",
)
@click.argument("name", metavar="NETWORK")
@click.pass_obj
def update(host: HostOptions, subnets: Sequence[str], name: str) -> None:
    """Add subnets to an overlay network in use.

    \b
    Examples:
      skep network update --subnet-add 10.20.0.0/24 backend
      skep network update --subnet-add auto backend
    """
    run_requests(_update(host, name, subnets))
    click.echo(name)


async def _update(host: HostOptions, name: str, subnets: Sequence[str]) -> None:
    added = [{} if subnet == AUTOMATIC else {"Subnet": subnet} for subnet in subnets]
    async with host.client() as client:
        await client.post(f"/networks/{quote(name, safe='')}/update", {"SubnetsAdd": added})

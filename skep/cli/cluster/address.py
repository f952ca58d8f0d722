"""``skep cluster address``: addresses that move to another node when theirs fails."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import click

from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.output import Cell, OutputOptions, Screen, Shown, shows, table
from skep.cli.running import run_requests

_COLORS = {"held": "green", "moving": "yellow", "unheld": "red"}


@click.command()
@click.argument("addresses", metavar="[ADDRESS]...", nargs=-1)
@click.option("--interface", default="", metavar="NAME", help="Use this interface on every node.")
@click.option("--remove", "is_removed", is_flag=True, help="Remove the addresses.")
@shows
@click.pass_obj
def address(
    host: HostOptions, addresses: tuple[str, ...], interface: str, *, is_removed: bool, output: OutputOptions
) -> None:
    """Show, add or remove failover addresses.

    A failover address is held by one node that runs the front door. If the node fails, another one takes the address
    within three seconds. ADDRESS is an IPv4 or IPv6 address with the prefix length of its subnet.

    Each node uses the interface whose subnet has the address, unless you name another one with --interface.

    \b
    Examples:
      skep cluster address 10.0.0.100/24
      skep cluster address
      skep cluster address 10.0.0.100 --remove
    """
    if is_removed and not addresses:
        raise click.UsageError("--remove needs an address")
    if is_removed and interface:
        raise click.UsageError("--remove and --interface exclude each other")
    if interface and not addresses:
        raise click.UsageError("--interface needs an address")
    if addresses:
        run_requests(_change(host, addresses, interface, is_removed=is_removed))
    output.show(lambda: _ask(host))


async def _change(host: HostOptions, addresses: Sequence[str], interface: str, *, is_removed: bool) -> None:
    async with host.requests() as client:
        for one in addresses:
            if is_removed:
                path = f"/skep/cluster/addresses/{quote(one.partition('/')[0], safe='')}"
                await client.delete(path, timeout_s=RESPONSE_TIMEOUT_S)
            else:
                body = {"Address": one, "Interface": interface}
                await client.post("/skep/cluster/addresses", body, timeout_s=RESPONSE_TIMEOUT_S)


async def _ask(host: HostOptions) -> Shown:
    async with host.requests() as client:
        return listed(await client.get("/skep/cluster/addresses", timeout_s=RESPONSE_TIMEOUT_S))


def listed(found: Sequence[Mapping[str, Any]]) -> Shown:
    """Return the output of the addresses."""
    return Shown(data=found, rows=found, lines=lambda screen: _lines(found, screen))


def _lines(found: Sequence[Mapping[str, Any]], screen: Screen) -> Iterator[str]:
    rows: list[Sequence[str | Cell]] = [
        (
            one["Address"],
            Cell(one["State"], _COLORS.get(one["State"], "")),
            one["Hostname"] or "-",
            one.get("Since", "")[:19].replace("T", " ") or "-",
            one["Reason"],
        )
        for one in found
    ]
    head = ("ADDRESS", "STATE", "NODE", "TAKEN", "REASON")
    yield from table(head, rows, screen, empty="No failover addresses.")

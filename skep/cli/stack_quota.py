"""``skep stack quota``: what the services of a stack may take together."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import click

from skep.cli.endpoint import HostOptions
from skep.cli.output import Output, Screen, Shown, shows, table
from skep.cli.running import run_requests
from skep.errors import InvalidArgument

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_CPU = 1_000_000_000


@click.group()
def quota() -> None:
    """What the services of a stack may take together.

    \b
    Examples:
      skep stack quota set shop --tasks 20 --cpus 4 --memory 8g --ports 3
      skep stack quota show shop
    """


@quota.command("set")
@click.option(
    "--tasks", type=click.IntRange(min=0), default=0, help="Tasks of all its services; 0: no bound."
)
@click.option("--cpus", type=click.FloatRange(min=0), default=0.0, help="Reserved CPUs of all its tasks.")
@click.option("--memory", default="0", metavar="SIZE", help="Reserved memory of all its tasks: 512m, 8g.")
@click.option("--ports", type=click.IntRange(min=0), default=0, help="Published ports.")
@click.argument("stack")
@click.pass_obj
def set_quota(options: HostOptions, stack: str, tasks: int, cpus: float, memory: str, ports: int) -> None:
    """Set the quota of a stack.  What its services take already stays.

    \b
    Examples:
      skep stack quota set shop --tasks 20 --cpus 4 --memory 8g --ports 3
    """

    async def put() -> None:
        body = {"Tasks": tasks, "NanoCPUs": round(cpus * _CPU), "MemoryBytes": _bytes(memory), "Ports": ports}
        async with options.requests() as client:
            await client.request("PUT", f"/skep/stacks/{quote(stack, safe='')}/quota", body=body)

    run_requests(put())
    click.echo(stack)


@quota.command()
@click.argument("stack")
@shows
@click.pass_obj
def show(options: HostOptions, stack: str, output: Output) -> None:
    """Show the quota of a stack, and what of it is taken.

    \b
    Examples:
      skep stack quota show shop
    """

    async def fetch() -> Shown:
        async with options.requests() as client:
            found = await client.get(f"/skep/stacks/{quote(stack, safe='')}/quota")
        return _shown(found)

    output.show(fetch)


@quota.command("rm")
@click.argument("stack")
@click.pass_obj
def remove(options: HostOptions, stack: str) -> None:
    """Remove the quota of a stack.

    \b
    Examples:
      skep stack quota rm shop
    """

    async def delete() -> None:
        async with options.requests() as client:
            await client.delete(f"/skep/stacks/{quote(stack, safe='')}/quota")

    run_requests(delete())
    click.echo(stack)


def _shown(found: dict[str, Any]) -> Shown:
    rows = [
        {
            "Resource": noun,
            "Used": f"{found['Used'][key] / scale:g}",
            "Limit": f"{found['Quota'][key] / scale:g}" if found["Quota"][key] else "-",
        }
        for key, noun, scale in (
            ("Tasks", "tasks", 1),
            ("NanoCPUs", "reserved CPUs", _CPU),
            ("MemoryBytes", "reserved MiB", 1 << 20),
            ("Ports", "published ports", 1),
        )
    ]

    def lines(screen: Screen) -> Iterator[str]:
        cells = [(row["Resource"], row["Used"], row["Limit"]) for row in rows]
        return table(("RESOURCE", "USED", "LIMIT"), cells, screen)

    return Shown(data=found, rows=rows, lines=lines)


def _bytes(text: str) -> int:
    digits = text.rstrip("bkmgtBKMGT")
    unit = text[len(digits) :].lower()
    unit = unit.removesuffix("b") or unit
    if not (digits.isascii() and digits.isdigit() and len(digits) < 16 and unit in _UNITS):
        raise InvalidArgument(f"invalid size {text!r}: want 512m or 8g")
    return int(digits) * _UNITS[unit]

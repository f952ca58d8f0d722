"""``skep stack quota``: limits for all objects of a stack together."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

import click

from skep.cli.endpoint import HostOptions
from skep.cli.formatting import size
from skep.cli.output import OutputOptions, Screen, Shown, shows, table
from skep.cli.running import run_requests
from skep.errors import FailedPrecondition, InvalidArgument
from skep.model.needs import CPU_NANO

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

_count = partial(click.option, type=click.IntRange(min=0), default=0, metavar="N")


@click.group()
def quota() -> None:
    """Manage the quotas of stacks.

    A quota limits the resources of all services of a stack together.

    \b
    Examples:
      skep stack quota set shop --tasks 20 --cpus 4 --memory 8g --ports 3
      skep stack quota show shop
    """


@quota.command("set")
@_count("--tasks", help="Maximum number of tasks.")
@click.option(
    "--cpus", type=click.FloatRange(min=0), default=0.0, metavar="N", help="Maximum sum of reserved CPUs."
)
@click.option("--memory", default="0", metavar="SIZE", help="Maximum sum of reserved memory: 512m, 8g.")
@_count("--ports", help="Maximum number of published ports.")
@_count("--networks", help="Maximum number of networks.")
@_count("--addresses", help="Maximum number of IPv4 addresses in its networks.")
@_count("--secrets", help="Maximum number of secrets.")
@_count("--configs", help="Maximum number of configs, including revisions.")
@_count("--services", help="Maximum number of services.")
@click.option("--data", default="0", metavar="SIZE", help="Maximum size of secrets and configs: 64m.")
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="HOST",
    help="Host of the front door for this stack alone: shop.example.com, *.shop.example.com. Repeatable.",
)
@click.argument("stack")
@click.pass_obj
def set_quota(options: HostOptions, /, stack: str, **bounds: Any) -> None:
    """Set the quota of a stack.

    Existing tasks stay, even if they exceed the quota. Limits that you leave out are unlimited.

    \b
    Examples:
      skep stack quota set shop --tasks 20 --cpus 4 --memory 8g --ports 3
      skep stack quota set shop --networks 10 --addresses 4096 --data 64m
      skep stack quota set shop --host shop.example.com --host '*.shop.example.com'
    """

    async def put() -> None:
        body = _body(**bounds)
        async with options.requests() as client:
            path = f"/skep/stacks/{quote(stack, safe='')}/quota"
            state = await client.request("PUT", path, body=body)
        _check_is_set(body, state or {})

    run_requests(put())
    click.echo(stack)


def _body(cpus: float, memory: str, data: str, hosts: Sequence[str] = (), **numbers: int) -> dict[str, Any]:
    """Return the quota in the API's form.  Bounds that older managers do not know are left out if they are not set."""
    older = {
        "Tasks": numbers.pop("tasks"),
        "NanoCPUs": round(cpus * CPU_NANO),
        "MemoryBytes": _bytes(memory),
        "Ports": numbers.pop("ports"),
    }
    newer: dict[str, Any] = {name.capitalize(): number for name, number in numbers.items()}
    newer |= {"DataBytes": _bytes(data), "Hosts": [host.lower() for host in hosts]}
    return older | {name: bound for name, bound in newer.items() if bound}


def _check_is_set(body: dict[str, Any], state: dict[str, Any]) -> None:
    """Check that all bounds were set.

    Raises: FailedPrecondition: the manager runs an older version, which drops bounds that it does not know.
    """
    present = state.get("Quota", {})
    if missing := [name for name, bound in body.items() if bound and present.get(name) != bound]:
        raise FailedPrecondition(
            f"the manager's version does not support the limits {', '.join(missing)}. Run skep upgrade first."
        )


@quota.command()
@click.argument("stack")
@shows
@click.pass_obj
def show(options: HostOptions, stack: str, output: OutputOptions) -> None:
    """Show the quota of a stack and its usage.

    \b
    Example:
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
    Example:
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
            "Used": words(found["Used"].get(key, 0)),
            "Limit": words(found["Quota"][key]) if found["Quota"].get(key) else "-",
        }
        for key, noun, words in (
            ("Tasks", "tasks", str),
            ("NanoCPUs", "reserved CPUs", lambda number: f"{number / CPU_NANO:g}"),
            ("MemoryBytes", "reserved memory", size),
            ("Ports", "published ports", str),
            ("Networks", "networks", str),
            ("Addresses", "addresses", str),
            ("Secrets", "secrets", str),
            ("Configs", "configs", str),
            ("DataBytes", "data of secrets and configs", size),
            ("Services", "services", str),
        )
    ]

    if hosts := found["Quota"].get("Hosts"):
        used = ", ".join(found["Used"].get("Hosts", ())) or "-"
        rows.append({"Resource": "hosts", "Used": used, "Limit": ", ".join(hosts)})

    def lines(screen: Screen) -> Iterator[str]:
        cells = [(row["Resource"], row["Used"], row["Limit"]) for row in rows]
        return table(("RESOURCE", "USED", "LIMIT"), cells, screen)

    return Shown(data=found, rows=rows, lines=lines)


def _bytes(text: str) -> int:
    digits = text.rstrip("bkmgtBKMGT")
    unit = text[len(digits) :].lower()
    unit = unit.removesuffix("b") or unit
    if not (digits.isascii() and digits.isdigit() and len(digits) < 16 and unit in _UNITS):
        raise InvalidArgument(f"invalid size {text!r}. Use a size such as 512m or 8g.")
    return int(digits) * _UNITS[unit]

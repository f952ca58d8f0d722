"""``skep rebalance``: the moves that would spread tasks more evenly, and their execution."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from skep.cli import options
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.formatting import duration
from skep.cli.output import OutputOptions, Screen, Shown, shows, table
from skep.cli.running import run_requests
from skep.errors import InvalidArgument
from skep.model.values.counts import counted
from skep.model.values.times import minute

PLAN_TIMEOUT_S = 90.0
"""Seconds to wait for the plan.  A manager ends after 60 seconds, and may first answer others."""
_MOVES_SHOWN = 20
"""Moves that are listed without ``-o wide``."""


@click.command()
@click.option("--apply", "is_applied", is_flag=True, help="Make the moves.")
@click.option("--stop", "is_stopped", is_flag=True, help="Stop making moves. Begun ones are completed.")
@shows
@click.pass_obj
def rebalance(host: HostOptions, *, is_applied: bool, is_stopped: bool, output: OutputOptions) -> None:
    """Move tasks for an even spread over the nodes.

    Without an option, the command shows a plan. It has moves of running tasks, and what each one gains. No move makes
    anything worse. Tasks stay if they write data, hold a port of their node or use a cluster volume.

    With --apply, the leader makes at most five moves at a time. A task stops when its successor runs. Freezes and the
    maintenance window hold moves back.

    \b
    Examples:
      skep rebalance
      skep rebalance --apply
      skep rebalance --stop
    """
    if is_applied and is_stopped:
        raise click.UsageError("--apply and --stop exclude each other")
    if is_stopped:
        run_requests(_stop(host))
        click.echo("No further task is moved.")
        return
    if is_applied:
        run_requests(_start(host))
    output.show(lambda: _ask(host))


@click.command("rebalance")
@click.option(
    "--after-return",
    "after_return",
    type=options.Duration(),
    metavar="DURATION",
    help="Rebalance this long after nodes return. 0 turns it off.",
)
@shows
@click.pass_obj
def rebalance_setting(host: HostOptions, after_return: float | None, output: OutputOptions) -> None:
    """Show or set whether tasks are rebalanced after nodes return.

    A node returns if it joins, is up again, or is active again. The leader waits as long as the setting says, and up to
    a quarter longer. By default, no task moves by itself.

    \b
    Examples:
      skep cluster rebalance --after-return 10m
      skep cluster rebalance --after-return 0
      skep cluster rebalance
    """
    if after_return is not None:
        run_requests(_set(host, after_return))
    output.show(lambda: _ask(host))


async def _start(host: HostOptions) -> None:
    async with host.requests() as client:
        await client.post("/skep/rebalance", timeout_s=RESPONSE_TIMEOUT_S)


async def _stop(host: HostOptions) -> None:
    async with host.requests() as client:
        await client.delete("/skep/rebalance", timeout_s=RESPONSE_TIMEOUT_S)


async def _set(host: HostOptions, seconds: float) -> None:
    if seconds != int(seconds):
        raise InvalidArgument(f"{seconds:g} s is not allowed. Use whole seconds.")
    async with host.requests() as client:
        body = {"AfterReturnS": int(seconds)}
        await client.request("PUT", "/skep/cluster/rebalance", body=body, timeout_s=RESPONSE_TIMEOUT_S)


async def _ask(host: HostOptions) -> Shown:
    async with host.requests() as client:
        return planned(await client.get("/skep/rebalance", timeout_s=PLAN_TIMEOUT_S))


def planned(found: Mapping[str, Any]) -> Shown:
    """Return the output of a plan."""
    return Shown(data=found, rows=found["Moves"], lines=lambda screen: _lines(found, screen))


def _lines(found: Mapping[str, Any], screen: Screen) -> Iterator[str]:
    moves: Sequence[Mapping[str, Any]] = found["Moves"]
    record = found["Rebalancing"]
    title = (
        f"{counted(len(moves), 'move')} would spread tasks more evenly."
        if moves
        else "No moves: tasks are spread."
    )
    yield screen.styled(title, bold=True)
    if run := record.get("Run"):
        by = f" by {run['By']}" if run["By"] else " after the return of nodes"
        since = minute(run["StartedAt"])
        yield f"  in progress since {since}{by}: {counted(run['Moved'], 'move')} begun"
        if run["Waiting"]:
            yield f"  waiting: {run['Waiting']}"
    elif record["Last"]:
        yield f"  last rebalance: {record['Last']}"
    if found["Held"]:
        yield from screen.fitted(f"  {found['Held']}: no task is moved until then", indent=2)
    wait = record["AfterReturnS"]
    yield f"  after nodes return: {f'rebalanced {duration(wait)} later' if wait else 'nothing moves by itself'}"
    if not moves:
        return
    yield ""
    shown = moves if screen.is_wide else moves[:_MOVES_SHOWN]
    rows = [
        (f"{one['Service']}.{one['Slot']}", one["SourceName"], one["TargetName"], _gain(one)) for one in shown
    ]
    yield from table(("TASK", "FROM", "TO", "GAIN"), rows, screen)
    if len(shown) < len(moves):
        yield f"  and {len(moves) - len(shown)} more (-o wide)"


def _gain(move: Mapping[str, Any]) -> str:
    """Return what becomes more even, such as ``of web 3:0 → 2:1, of all 9:4 → 8:5``."""
    measures = [(f"of {move['Service']}", move["Own"]), ("of all", move["Every"])]
    measures += [("per domain", one) for one in move.get("Domains") or ()]
    texts = [
        f"{name} {one['SourceBefore']}:{one['TargetBefore']} → {one['SourceAfter']}:{one['TargetAfter']}"
        for name, one in measures
        if one["SourceBefore"] - one["TargetBefore"] > 1
    ]
    return ", ".join(texts)

"""``skep cluster freeze`` and ``window``, and the same for stacks: times in which Skep changes nothing by itself."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import click
import msgspec

from skep.api.client.requests import Requests
from skep.cli import options
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.maintain.maintenance import nodes_and_time
from skep.cli.output import OutputOptions, Shown, shows
from skep.cli.running import run_requests
from skep.cli.see.points_in_time import local_now, moment_of
from skep.errors import InvalidArgument, SkepError
from skep.model.options.freezes import (
    CLUSTER,
    ChangeFreeze,
    FreezeRequest,
    FreezesResponse,
    MaintenanceWindow,
    never_meet,
)
from skep.model.task_end import printable
from skep.model.values.times import SECOND_NS, Timestamp, timestamp

F = TypeVar("F", bound=Callable[..., Any])


def _ends(command: F) -> F:
    """Add the options of a new freeze."""
    for option in (
        click.option("--strict", is_flag=True, help="Also refuse the users' deploys, changes and drains."),
        click.option("--reason", default="", metavar="TEXT", help="Reason to show."),
        click.option(
            "--until", default="", metavar="TIME", help="End: '18:00', '2026-12-27 06:00', RFC 3339."
        ),
        click.option(
            "--for", "length", type=options.Duration(), metavar="DURATION", help="Time until the end."
        ),
    ):
        command = option(command)
    return command


async def strict_freezes(client: Requests, stack: str) -> list[str]:
    """Return a sentence for each freeze during which the managers refuse a deploy of ``stack``."""
    try:
        found = await fetch_freezes(client)
    except SkepError:  # an earlier version, or the user may not see it
        return []
    freezes = ((scope, found.freezes.get(scope)) for scope in (CLUSTER, stack))
    return [
        f"{one.words(scope)}: the managers refuse a deploy until then"
        for scope, one in freezes
        if one is not None and one.is_strict
    ]


@click.command()
@_ends
@shows
@click.pass_obj
def freeze(
    host: HostOptions, length: float | None, until: str, reason: str, strict: bool, output: OutputOptions
) -> None:
    """Freeze the cluster, or list all freezes.

    Until the end of the freeze, Skep preempts no tasks, scales no service down, and removes no lost nodes. Changed
    labels and resources of nodes move no tasks. Upgrades and reboot locks are refused.

    Failed tasks and tasks of lost nodes are still replaced, and users can change everything.

    Without --for and --until, the command lists the freezes.

    \b
    Examples:
      skep cluster freeze --until '2026-12-27 06:00' --reason holidays
      skep cluster freeze --for 2h --strict
      skep cluster freeze
    """
    wanted = _wanted(length, until, reason, strict=strict)
    if wanted is not None:
        run_requests(_put(host, "/skep/cluster/freeze", wanted, length))
    output.show(lambda: _fetch(host))


@click.command("freeze")
@_ends
@click.argument("name", metavar="STACK")
@shows
@click.pass_obj
def freeze_stack(
    host: HostOptions,
    name: str,
    length: float | None,
    until: str,
    reason: str,
    strict: bool,
    output: OutputOptions,
) -> None:
    """Freeze a stack, or show its freeze.

    Until the end of the freeze, Skep itself does not move, preempt or scale down tasks of the stack. It still replaces
    failed tasks and tasks of lost nodes.

    Without --for and --until, the command shows the freeze.

    \b
    Examples:
      skep stack freeze shop --for 3h --reason 'sales day'
      skep stack freeze shop --until 18:00 --strict
    """
    wanted = _wanted(length, until, reason, strict=strict)
    if wanted is not None:
        run_requests(_put(host, f"/skep/stacks/{quote(name, safe='')}/freeze", wanted, length))
    output.show(lambda: _fetch(host, name))


@click.command()
@click.pass_obj
def unfreeze(host: HostOptions) -> None:
    """End the freeze of the cluster.

    \b
    Example:
      skep cluster unfreeze
    """
    run_requests(_delete(host, "/skep/cluster/freeze"))
    click.echo("The cluster is not frozen any longer.")


@click.command("unfreeze")
@click.argument("name", metavar="STACK")
@click.pass_obj
def unfreeze_stack(host: HostOptions, name: str) -> None:
    """End the freeze of a stack.

    \b
    Example:
      skep stack unfreeze shop
    """
    run_requests(_delete(host, f"/skep/stacks/{quote(name, safe='')}/freeze"))
    click.echo(f"Stack {name} is not frozen any longer.")


def _opens(command: F) -> F:
    """Add the options of a window."""
    for option in (
        click.option("--remove", is_flag=True, help="Remove the window."),
        click.option(
            "--time-zone", default="UTC", show_default=True, metavar="ZONE", help="Time zone of CRON."
        ),
        click.option(
            "--for",
            "length",
            type=options.Duration(),
            metavar="DURATION",
            help="Time for which it stays open.",
        ),
    ):
        command = option(command)
    return command


@click.command()
@_opens
@click.argument("cron", metavar="[CRON]", default="")
@shows
@click.pass_obj
def window(
    host: HostOptions, cron: str, length: float | None, time_zone: str, remove: bool, output: OutputOptions
) -> None:
    """Show or set the maintenance window.

    CRON has the times at which the window opens, in the five fields of cron. Several expressions are separated by
    semicolons. Outside of the window the cluster is frozen, as by skep cluster freeze.

    \b
    Examples:
      skep cluster window '0 2 * * SAT' --for 4h --time-zone Europe/Berlin
      skep cluster window
      skep cluster window --remove
    """
    _change_window(host, "/skep/cluster/window", cron, length, time_zone, remove=remove)
    output.show(lambda: _fetch_window(host))


@click.command("window")
@_opens
@click.argument("name", metavar="STACK")
@click.argument("cron", metavar="[CRON]", default="")
@shows
@click.pass_obj
def window_of_stack(
    host: HostOptions,
    name: str,
    cron: str,
    length: float | None,
    time_zone: str,
    remove: bool,
    output: OutputOptions,
) -> None:
    """Show or set the maintenance window of a stack.

    Outside of the window the stack is frozen, as by skep stack freeze. The cluster's own window and freezes hold, too:
    Skep acts by itself on the stack only when both windows are open.

    CRON has the times at which the window opens, in the five fields of cron.

    \b
    Examples:
      skep stack window shop '0 3 * * MON-FRI' --for 2h --time-zone Europe/Berlin
      skep stack window shop
      skep stack window shop --remove
    """
    path = f"/skep/stacks/{quote(name, safe='')}/window"
    _change_window(host, path, cron, length, time_zone, remove=remove)
    output.show(lambda: _fetch_window(host, name))


def _change_window(
    host: HostOptions, path: str, cron: str, length: float | None, time_zone: str, *, remove: bool
) -> None:
    """Set or remove a window, or do nothing if it is only shown.  Raises: click.UsageError."""
    if remove and (cron or length is not None):
        raise click.UsageError("--remove takes no window")
    if bool(cron) != (length is not None):
        raise click.UsageError("a window needs CRON and --for DURATION")
    if remove:
        run_requests(_delete(host, path))
    elif length is not None:
        wanted = MaintenanceWindow(cron=cron, time_zone=time_zone, length=round(length * SECOND_NS))
        run_requests(_put(host, path, wanted))


def _wanted(length: float | None, until: str, reason: str, *, strict: bool) -> FreezeRequest | None:
    """Return the requested freeze, or None to show the freezes.  Raises: click.UsageError."""
    if length is not None and until:
        raise click.UsageError("--for and --until cannot be used together")
    if length is None and not until:
        if reason or strict:
            raise click.UsageError("a freeze needs an end: use --for DURATION or --until TIME")
        return None
    try:
        end = moment_of(until, local_now()) if until else Timestamp("")
    except InvalidArgument as error:
        raise click.UsageError(
            f"invalid time {until!r}. Use '18:00', '2026-12-27 06:00' or 2026-12-27T06:00:00Z."
        ) from error
    return FreezeRequest(until=end, reason=reason, is_strict=strict)


async def _put(
    host: HostOptions, path: str, wanted: FreezeRequest | MaintenanceWindow, length_s: float | None = None
) -> None:
    """Send a freeze or a window.  ``length_s``: seconds until the end of the freeze, on the manager's clock."""
    async with host.client() as client:
        if length_s is not None:
            _, now = await nodes_and_time(client)
            end_ns = round((now.timestamp() + length_s) * SECOND_NS)
            wanted = msgspec.structs.replace(wanted, until=timestamp(end_ns))
        await client.request("PUT", path, body=msgspec.to_builtins(wanted), timeout_s=RESPONSE_TIMEOUT_S)


async def _delete(host: HostOptions, path: str) -> None:
    async with host.client() as client:
        await client.delete(path, timeout_s=RESPONSE_TIMEOUT_S)


async def _freezes(host: HostOptions) -> FreezesResponse:
    async with host.client() as client:
        return await fetch_freezes(client)


async def fetch_freezes(client: Requests) -> FreezesResponse:
    """Return the freezes that the user sees."""
    found = await client.get("/skep/cluster/freezes", timeout_s=RESPONSE_TIMEOUT_S)
    return msgspec.convert(found, FreezesResponse)


async def _fetch(host: HostOptions, stack: str | None = None) -> Shown:
    return shown_freezes((await _freezes(host)).freezes, stack)


def shown_freezes(found: Mapping[str, ChangeFreeze], stack: str | None = None) -> Shown:
    """Return the freezes by their stacks, where an empty name means the cluster, or the freeze of ``stack``."""
    shown = {scope: one for scope, one in found.items() if stack is None or scope == stack}
    none = "Nothing is frozen." if stack is None else f"Stack {stack} is not frozen."

    def lines() -> Iterator[str]:
        for scope, one in shown.items():
            yield printable(one.words(scope) + (" (strict)" if one.is_strict else ""))
        if not shown:
            yield none

    rows = [{"Stack": scope, **msgspec.to_builtins(one)} for scope, one in shown.items()]
    return Shown(data=rows, rows=rows, lines=lambda _: lines())


async def _fetch_window(host: HostOptions, stack: str = CLUSTER) -> Shown:
    return shown_window(await _freezes(host), stack, time.time_ns())


def shown_window(found: FreezesResponse, stack: str = CLUSTER, now_ns: int = 0) -> Shown:
    """Return the window of the cluster or a stack, and the stacks whose windows never meet the cluster's."""
    window = found.stack_windows.get(stack) if stack else found.window
    if window is None:
        none = f"Stack {stack} has no window of its own." if stack else "No window: Skep may act at any time."
        return Shown(data={}, lines=lambda _: iter([none]))
    is_open = f"the maintenance window{f' of stack {stack}' if stack else ''} is open"
    state = window.words(stack) if window.closed_until else is_open
    lines = [printable(f"{window.times}; {state}"), *_unmet(found, stack, now_ns)]
    return Shown(data=msgspec.to_builtins(window), lines=lambda _: iter(lines))


def _unmet(found: FreezesResponse, stack: str, now_ns: int) -> Iterator[str]:
    for name, window in sorted(found.stack_windows.items()):
        if stack in (CLUSTER, name) and found.window is not None and never_meet(window, found.window, now_ns):
            yield printable(
                f"WARNING: the windows of the cluster and of stack {name} are never open at the same time "
                f"(skep stack window {name}), so nothing of the stack moves"
            )

"""``skep what-if``: what would follow from a change, decided by the managers on a copy of the cluster's state."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import click

from skep.cli.endpoint import HostOptions
from skep.cli.formatting import duration, named, size
from skep.cli.output import Cell, OutputOptions, Screen, Shown, shows, table
from skep.cli.running import errors_shown
from skep.cli.stack.stack_files import (
    GivenFiles,
    chooses_services,
    plan_with_cluster,
    reads_files,
    supposed_services,
)
from skep.errors import InvalidArgument
from skep.model.task_end import printable
from skep.model.values.counts import counted
from skep.stack.planning import PlanAction
from skep.stack.project import Stack

DIFFERS = 3
"""Exit code if tasks do not run afterwards, or fewer than a service's minimum run meanwhile."""
ANSWER_TIMEOUT_S = 90.0
"""Seconds to wait for an answer.  A manager ends after 60 seconds, and may first answer others."""
_MOVES_MAX = 3
"""Moves of one service that its row names."""
_NODES_MAX = 10
"""Nodes that are listed without ``-o wide``."""


@click.group("what-if", short_help="Show what would follow from a change.")
def what_if() -> None:
    """Show what would follow from a change.

    A manager makes the decisions on a copy of the cluster's state: which tasks stop, where they run again, and which
    ones wait. Nothing is written.

    The answer supposes that images can be pulled and that tasks which start keep running. The exit code is 3 if tasks
    do not run afterwards or cannot leave their node. It is also 3 if fewer than a service's minimum run meanwhile
    (skep.min-available).

    \b
    Examples:
      skep what-if lose w1
      skep what-if drain zone=b
      skep what-if scale web=50
      skep what-if deploy -c compose.yaml shop
    """


@what_if.command()
@click.argument("node", metavar="NODE|LABEL=VALUE")
@shows
@click.pass_obj
def lose(host: HostOptions, node: str, output: OutputOptions) -> None:
    """Suppose that nodes lose their power, by name or label.

    \b
    Examples:
      skep what-if lose w1
      skep what-if lose zone=b
    """
    output.show(lambda: _ask(host, "lose", node, f"What if {node} is lost"))


@what_if.command()
@click.argument("node", metavar="NODE|LABEL=VALUE")
@shows
@click.pass_obj
def drain(host: HostOptions, node: str, output: OutputOptions) -> None:
    """Suppose that nodes are drained, by name or label.

    \b
    Examples:
      skep what-if drain w1
      skep what-if drain rack=7
    """
    output.show(lambda: _ask(host, "drain", node, f"What if {node} is drained"))


@what_if.command()
@click.argument("target", metavar="SERVICE=REPLICAS")
@shows
@click.pass_obj
def scale(host: HostOptions, target: str, output: OutputOptions) -> None:
    """Suppose that a service has another number of tasks.

    \b
    Example:
      skep what-if scale web=50
    """
    name, _, number = target.partition("=")
    if not name or not number.isdecimal():
        raise click.BadParameter(f"{target}: write SERVICE=REPLICAS, for example web=50")
    output.show(lambda: _ask_about_scale(host, name, int(number)))


@what_if.command()
@reads_files
@chooses_services
@shows
@click.pass_obj
def deploy(
    host: HostOptions,
    *,
    given: GivenFiles,
    only: tuple[str, ...],
    resolve_image: str,
    output: OutputOptions,
) -> None:
    """Suppose that a stack is deployed.

    \b
    Example:
      skep what-if deploy -c compose.yaml shop
    """
    with errors_shown():
        stack, _ = given.read()
    output.show(lambda: _ask_about_deploy(host, stack, only, resolve_image))


async def _ask_about_scale(host: HostOptions, name: str, replicas: int) -> Shown:
    async with host.requests() as client:
        spec = (await client.get(f"/services/{quote(name, safe='')}"))["Spec"]
        if "Replicated" not in spec["Mode"]:
            raise InvalidArgument(f"service {name} is not replicated. Choose a replicated service")
        spec["Mode"] = {"Replicated": {"Replicas": replicas}}
        found = await client.post("/skep/what-if/services", [spec], timeout_s=ANSWER_TIMEOUT_S)
    return answered(f"What if {spec['Name']} has {counted(replicas, 'task')}", found)


async def _ask_about_deploy(host: HostOptions, stack: Stack, only: Sequence[str], resolve: str) -> Shown:
    title = f"What if stack {stack.name} is deployed"
    async with host.requests() as client:
        plan = await plan_with_cluster(client, stack, prune=False, only=only, resolve=resolve)
        body = supposed_services(plan, PlanAction.CREATE, PlanAction.UPDATE)
        found = await client.post("/skep/what-if/services", body, timeout_s=ANSWER_TIMEOUT_S)
    return answered(title, found)


async def _ask(host: HostOptions, kind: str, node: str, title: str) -> Shown:
    async with host.requests() as client:
        query: dict[str, Any] = {kind: node}
        found = await client.get("/skep/what-if", timeout_s=ANSWER_TIMEOUT_S, **query)
    return answered(title, found)


def answered(title: str, answer: Mapping[str, Any]) -> Shown:
    """Return the output of an answer, with exit code 3 if something does not run."""
    services: Sequence[Mapping[str, Any]] = answer["Services"]
    is_worse = answer["OtherMissing"] or any(
        one["Missing"] or one.get("FailedUpdate") or one.get("Staying") or is_below_minimum(one)
        for one in services
    )
    return Shown(
        data=answer,
        rows=services,
        lines=lambda screen: _lines(title, answer, screen),
        exit_code=DIFFERS if is_worse else 0,
    )


def is_below_minimum(service: Mapping[str, Any]) -> bool:
    """Return whether fewer tasks than the service's minimum are available at some time."""
    minimum = service.get("Minimum")
    return minimum is not None and service["Lowest"] < minimum


def _lines(title: str, answer: Mapping[str, Any], screen: Screen) -> Iterator[str]:
    services, nodes = answer["Services"], answer["Nodes"]
    yield screen.styled(f"{printable(title)}: {_summary(answer)}", bold=True)
    for note in answer["Notes"]:
        yield from screen.fitted(f"  {note}", indent=2)
    if services:
        yield ""
        yield from table(
            ("SERVICE", "RUNNING", "LOWEST", "SECONDS", "MOVES"),
            [_row(one, screen) for one in services],
            screen,
        )
    for one in services:
        for missing in one["Missing"]:
            text = f"  {one['Name']}: {missing['Tasks']} not running: {missing['Reason']}"
            yield from map(printable, screen.fitted(text, indent=4))
        if why := one.get("WhyStaying"):
            yield from map(printable, screen.fitted(f"  {why}", indent=4))
        if why := one.get("FailedUpdate"):
            yield from map(printable, screen.fitted(f"  {one['Name']}: its update fails: {why}", indent=4))
        if volumes := one.get("LeftBehind"):
            left = sorted({each["Source"] for each in one["Moves"] if each["Source"] and each["Target"]})
            text = f"  {one['Name']}: starts elsewhere with empty volumes, the data of {named(volumes)} stays on "
            yield from map(printable, screen.fitted(f"{text}{named(left)}", indent=4))
    if answer["OtherServices"]:
        more = f", and {answer['OtherMissing']} of their tasks do not run" if answer["OtherMissing"] else ""
        verb = "is" if answer["OtherServices"] == 1 else "are"
        yield f"  {counted(answer['OtherServices'], 'service')} of other stacks {verb} affected{more}"
    if not nodes:
        return
    yield ""
    shown = nodes if screen.is_wide else nodes[:_NODES_MAX]
    rows = [
        (
            one["Hostname"],
            f"{one['Before']} → {one['After']}",
            f"{one['FreeNanoCPUs'] / 1e9:g}" if one["TakesTasks"] else "-",
            size(one["FreeMemoryBytes"]) if one["TakesTasks"] else "-",
        )
        for one in shown
    ]
    yield from table(("NODE", "TASKS", "CPUS LEFT", "MEMORY LEFT"), rows, screen)
    if len(shown) < len(nodes):
        yield f"  and {len(nodes) - len(shown)} more (-o wide)"
    yield f"  {_capacity(answer)}"


def _summary(answer: Mapping[str, Any]) -> str:
    missing = answer["OtherMissing"] + sum(
        each["Tasks"] for one in answer["Services"] for each in one["Missing"]
    )
    moved = sum(each["Tasks"] for one in answer["Services"] for each in one["Moves"])
    failed = sum(bool(one.get("FailedUpdate")) for one in answer["Services"])
    if failed and not missing:
        return f"{counted(failed, 'update')} cannot complete"
    staying = sum(one.get("Staying", 0) for one in answer["Services"])
    if not missing and not moved:
        return f"{counted(staying, 'task')} cannot leave" if staying else "no task has to move"
    when = f" within about {duration(max(answer['Seconds'], 1.0))}" if answer["Seconds"] else ""
    rest = f"{counted(missing, 'task')} not running afterwards" if missing else "all run afterwards"
    stays = f", {counted(staying, 'task')} cannot leave" if staying else ""
    return f"{counted(moved, 'task')} started, moved or stopped{when}, {rest}{stays}"


def _row(one: Mapping[str, Any], screen: Screen) -> tuple[str | Cell, ...]:
    color = "red" if one["Missing"] else "yellow" if is_below_minimum(one) else ""
    moves = one["Moves"] if screen.is_wide else one["Moves"][:_MOVES_MAX]
    texts = [f"{each['Tasks']} {each['Source'] or 'new'} → {each['Target'] or 'none'}" for each in moves]
    if len(moves) < len(one["Moves"]):
        texts.append(f"{len(one['Moves']) - len(moves)} more")
    minimum = f" of {one['Minimum']}" if one.get("Minimum") is not None else ""
    return (
        one["Name"],
        Cell(f"{one['Before']} → {one['After']}/{one['Desired']}", color),
        f"{one['Lowest']}{minimum}",
        f"{one['Seconds']:g}",
        ", ".join(texts),
    )


def _capacity(answer: Mapping[str, Any]) -> str:
    before, after = answer["CapacityBefore"], answer["CapacityAfter"]
    cpus = f"{before['FreeNanoCPUs'] / 1e9:g} → {counted(after['FreeNanoCPUs'] / 1e9, 'CPU')}"
    memory = f"{size(before['FreeMemoryBytes'])} → {size(after['FreeMemoryBytes'])}"
    nodes = counted(after["Nodes"], "node that takes", "nodes that take")
    return f"left on {before['Nodes']} → {nodes} tasks: {cpus}, {memory}"

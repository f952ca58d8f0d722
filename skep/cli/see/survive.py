"""``skep survive``: which single loss takes which service of a stack down."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from skep.cli.endpoint import HostOptions
from skep.cli.formatting import duration
from skep.cli.output import Cell, OutputOptions, Screen, Shown, shows, table
from skep.cli.running import errors_shown
from skep.cli.see.what_if import ANSWER_TIMEOUT_S, DIFFERS
from skep.cli.stack.stack_files import GivenFiles, plan_with_cluster, reads_files, supposed_services
from skep.model.values.counts import counted
from skep.stack.planning import PlanAction
from skep.stack.project import Stack

KINDS = ("node", "zone", "manager", "registry", "volume")
_EFFECTS = (
    ("Down", "down", "red"),
    ("WithoutData", "data lost", "red"),
    ("Reduced", "fewer tasks", "yellow"),
    ("Interrupted", "interrupted", "yellow"),
    ("NotStartable", "image on one node only", "yellow"),
)
"""Fields of a loss with their words, the worst first."""
_WORST = ("Down", "WithoutData")
"""Fields that end the command with another exit code."""


@click.command()
@reads_files
@click.option(
    "--ignore",
    multiple=True,
    type=click.Choice(KINDS),
    help="Leave out losses of this kind. Repeat for several.",
)
@shows
@click.pass_obj
def survive(host: HostOptions, *, given: GivenFiles, ignore: tuple[str, ...], output: OutputOptions) -> None:
    """Show which single loss takes a service of a stack down.

    Tries the loss of each node, manager and zone (node label zone or skep.zone). Also lists registries and local
    volumes on which a service depends. With -c, the stack is supposed to be deployed from the files.

    The exit code is 3 if a loss takes a service down, or its data away.

    \b
    Examples:
      skep survive shop
      skep survive -c compose.yaml shop --ignore volume
    """
    with errors_shown():
        stack = given.read()[0] if given.files or given.name is None else None
    output.show(lambda: _ask(host, given.name or "", stack, ignore))


async def _ask(host: HostOptions, name: str, stack: Stack | None, ignore: Sequence[str]) -> Shown:
    async with host.requests() as client:
        if stack is None:
            found = await client.get("/skep/what-if/survive", timeout_s=ANSWER_TIMEOUT_S, stack=name)
        else:
            plan = await plan_with_cluster(client, stack, prune=False, only=(), resolve="never")
            body = supposed_services(plan, *PlanAction)
            found = await client.post("/skep/what-if/survive", body, timeout_s=ANSWER_TIMEOUT_S)
    return survived(found, ignore)


def survived(found: Mapping[str, Any], ignore: Sequence[str] = ()) -> Shown:
    """Return the output of an answer, with exit code 3 if a loss takes a service down or its data away."""
    losses = [one for one in found["Losses"] if one["Kind"] not in ignore]
    is_fatal = any(one[field] for one in losses for field in _WORST)
    return Shown(
        data={**found, "Losses": losses},
        rows=losses,
        lines=lambda screen: _lines(found, losses, screen),
        exit_code=DIFFERS if is_fatal else 0,
    )


def _lines(found: Mapping[str, Any], losses: Sequence[Mapping[str, Any]], screen: Screen) -> Iterator[str]:
    fatal = sum(any(one[field] for field in _WORST) for one in losses)
    services = counted(len(found["Services"]), "service")
    title = f"{services}: {fatal} of {len(losses)} single losses take a service down, or its data away"
    yield screen.styled(title, bold=True)
    yield ""
    rows = [(one["Kind"], one["Name"], _seconds(one), _effect(one)) for one in losses]
    yield from table(("LOSS OF", "NAME", "RECOVERY", "EFFECT"), rows, screen, empty="Nothing to lose.")


def _seconds(one: Mapping[str, Any]) -> str:
    return duration(one["Seconds"]) if one["Seconds"] else "-"


def _effect(one: Mapping[str, Any]) -> Cell:
    found = [(words, one[field], color) for field, words, color in _EFFECTS if one[field]]
    texts = [f"{words}: {', '.join(names)}" for words, names, _ in found]
    if note := one.get("Note"):
        texts.append(note)
    return Cell("; ".join(texts) or "survived", found[0][2] if found else "")

"""``skep verify``: whether the cluster's stored state violates an invariant."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from skep.cli.endpoint import HostOptions
from skep.cli.output import OutputOptions, Screen, Shown, shows
from skep.model.task_end import printable
from skep.model.values.counts import counted

VIOLATED = 1
"""Exit code if an invariant is violated."""
CHECK_TIMEOUT_S = 90.0
"""Seconds to wait for the answer.  The manager ends after 75 seconds, and may first answer others."""


@click.command()
@shows
@click.pass_obj
def verify(host: HostOptions, output: OutputOptions) -> None:
    """Check the invariants of the cluster's state.

    A manager checks all objects. No slot, address or port has two holders, and no node is overcommitted. Every object
    that is used exists, and nothing is left over. The leader also checks them every five minutes.

    A violation is a defect of Skep or damaged data. It is reported if it lasts for ten seconds without a change of its
    objects. The exit code is 1 if there are violations.

    \b
    Examples:
      skep verify
      skep verify -o json
    """
    output.show(lambda: _ask(host))


async def _ask(host: HostOptions) -> Shown:
    async with host.requests() as client:
        return verified(await client.get("/skep/verify", timeout_s=CHECK_TIMEOUT_S))


def verified(found: Mapping[str, Any]) -> Shown:
    """Return the output of an answer, with exit code 1 if an invariant is violated."""
    return Shown(
        data=found,
        rows=found["Violations"],
        lines=lambda screen: _lines(found, screen),
        exit_code=VIOLATED if found["Count"] else 0,
    )


def _lines(found: Mapping[str, Any], screen: Screen) -> Iterator[str]:
    rules = f"{found['Rules']} rules in {found['Seconds']:g} s"
    if not found["Count"]:
        yield screen.styled(f"No invariant is violated ({rules}).", bold=True)
        return
    yield screen.styled(f"{counted(found['Count'], 'violation')} ({rules})", bold=True)
    for one in found["Violations"]:
        yield ""
        yield from violation_lines(one, screen)
    if left := found["Count"] - len(found["Violations"]):
        yield ""
        yield f"and {left} more"


def violation_lines(one: Mapping[str, Any], screen: Screen) -> Iterator[str]:
    """Yield a violation, its meaning and the advice."""
    yield from screen.fitted(printable(f"{one['Rule']}: {one['Text']}"), indent=2)
    for text in (one["Meaning"], one["Action"]):
        yield from screen.fitted(f"  {text}", indent=2)


def about(found: Sequence[Mapping[str, Any]], ids: Sequence[str]) -> Iterator[str]:
    """Yield lines about the recorded violations of the objects with these ids."""
    for one in found:
        if set(one["Subjects"]).intersection(ids):
            yield printable(f"  violates the invariant {one['Rule']}: {one['Text']}")
            yield f"    {one['Meaning']} {one['Action']}"

"""``skep runs``: what ended of a service or job, with exit codes and last lines."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from skep.cli.endpoint import HostOptions
from skep.cli.running import run_requests

_ANSWERS_WITHIN_S = 20.0
_HEAD = ("SLOT", "RUN", "STATE", "EXIT", "ENDED", "TASK")


@click.command()
@click.argument("service")
@click.option("--tail", "-n", default=3, show_default=True, help="Last lines of output of each task.")
@click.pass_obj
def runs(host: HostOptions, service: str, tail: int) -> None:
    """List ended tasks of a service or job, with exit codes and last lines.

    \b
    Examples:
      skep runs nightly
      skep runs nightly --tail 20
    """
    response = run_requests(_runs(host, service, tail))
    for line in shown(response):
        click.echo(line)


async def _runs(host: HostOptions, service: str, tail: int) -> dict[str, Any]:
    async with host.client() as client:
        path = f"/skep/services/{service}/runs"
        response: dict[str, Any] = await client.get(path, timeout_s=_ANSWERS_WITHIN_S, tail=str(tail))
        return response


def shown(response: Mapping[str, Any]) -> Iterator[str]:
    """The table, each run's lines below it."""
    rows = [_row(run) for run in response["Runs"]]
    widths = [max(map(len, column)) for column in zip(_HEAD, *rows, strict=True)]
    yield _padded(_HEAD, widths)
    for run, row in zip(response["Runs"], rows, strict=True):
        yield _padded(row, widths)
        if run.get("Err"):
            yield f"    {run['Err']}"
        yield from (f"    | {line}" for line in run["Lines"])
    if response.get("Incomplete"):
        yield f"Some lines may be missing: {response['Incomplete']}"


def _row(run: Mapping[str, Any]) -> tuple[str, ...]:
    iteration = run.get("JobIteration")
    return (
        str(run["Slot"]),
        str(iteration.get("Index", 0)) if iteration is not None else "",
        run["State"],
        str(run.get("ExitCode", "")),
        run["EndedAt"].partition(".")[0].rstrip("Z"),
        run["TaskID"],
    )


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

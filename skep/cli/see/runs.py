"""``skep runs``: ended tasks of a service or job, with exit codes and last lines."""

import re
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

import click

from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.formatting import age
from skep.cli.output import OutputOptions, Screen, Shown, shows, table
from skep.model.task_end import printable

_INCOMPLETE = "warning: incomplete log stream. some logs could not be retrieved for the following reasons: "
"""Docker's words before the reasons."""
_EXIT_CODE = re.compile(r"^task: non-zero exit \(\d+\)(: )?")
"""Docker's words for an exit code, which the column EXIT already shows."""
_HEAD = ("TASK", "NODE", "RUN", "STATE", "EXIT", "ENDED")


@click.command()
@click.argument("service")
@click.option(
    "--tail",
    "-n",
    default=3,
    show_default=True,
    metavar="N",
    help="Show this many last output lines per task.",
)
@shows
@click.pass_obj
def runs(host: HostOptions, service: str, tail: int, output: OutputOptions) -> None:
    """List ended tasks with exit codes and last lines.

    \b
    Examples:
      skep runs nightly
      skep runs nightly --tail 20
      skep runs nightly --format '{{.Name}} {{.ExitCode}}'
    """

    async def fetch() -> Shown:
        found = await _runs(host, service, tail)
        return Shown(
            data=found, rows=found["Runs"], lines=lambda screen: shown(service, found, screen, time.time())
        )

    output.show(fetch)


async def _runs(host: HostOptions, service: str, tail: int) -> dict[str, Any]:
    async with host.client() as client:
        path = f"/skep/services/{quote(service, safe='')}/runs"
        response: dict[str, Any] = await client.get(path, timeout_s=RESPONSE_TIMEOUT_S, tail=str(tail))
        found = await client.get(f"/services/{quote(service, safe='')}", timeout_s=RESPONSE_TIMEOUT_S)
    mode = found["Spec"].get("Mode") or {}
    is_global = "Global" in mode or "GlobalJob" in mode
    for run in response["Runs"]:
        run["Hostname"] = run.get("NodeName") or run.get("NodeID", "")
        run["Name"] = f"{found['Spec']['Name']}.{run['Hostname'] if is_global else run['Slot']}"
    return response


def shown(service: str, response: Mapping[str, Any], screen: Screen, now: float) -> Iterator[str]:
    """Yield the table, with each run's output below its row.

    Args:
        service: The word that the user gave for the service.
        now: Seconds since the epoch.
    """
    more = ("ID",) if screen.is_wide else ()
    if not response["Runs"]:
        yield f"No task has ended yet. Run skep service ps {service} to see its tasks."
        yield from _schedule(response, screen, now)
        return
    is_job = any(run.get("JobIteration") is not None for run in response["Runs"])
    head = [title for title in _HEAD if is_job or title != "RUN"]
    rows = [_row(run, screen, now, is_job=is_job) for run in response["Runs"]]
    lines = table((*head, *more), rows, screen)
    yield next(lines)
    for run, line in zip(response["Runs"], lines, strict=True):
        yield line
        if why := _EXIT_CODE.sub("", run.get("Err", "")):
            yield f"    {printable(why)}"
        yield from (f"    | {printable(line)}" for line in run["Lines"])
    yield from _schedule(response, screen, now)
    if response.get("Incomplete"):
        reason = response["Incomplete"].removeprefix(_INCOMPLETE)
        yield f"Some lines may be missing: {printable(reason)}"


def _schedule(response: Mapping[str, Any], screen: Screen, now: float) -> Iterator[str]:
    """Yield lines about the runs of a scheduled job: their times, reasons, and skipped runs."""
    if not response.get("Schedule"):
        return
    yield ""
    yield f"schedule: {printable(response['Schedule'])}"
    rows = [_start(one, now) for one in response.get("Starts") or ()]
    if rows:
        yield from table(("RUN", "DUE", "STARTED", "OUTCOME"), rows, screen)


def _start(start: Mapping[str, Any], now: float) -> tuple[str, ...]:
    due, missed = start.get("ScheduledAt", ""), start.get("MissedSince", "")
    is_skipped = bool(start.get("Skipped"))
    outcome = f"skipped: {start['Skipped']}" if is_skipped else start.get("Outcome", "")
    since = f"; due times since {missed} had no leader" if missed else ""
    return (
        "" if is_skipped else str((start.get("Iteration") or {}).get("Index", 0)),
        due or "on request",
        "" if is_skipped else f"{age(start['At'], now)} ago",
        f"{outcome}{since}".removeprefix("; "),
    )


def _row(run: Mapping[str, Any], screen: Screen, now: float, *, is_job: bool) -> tuple[str, ...]:
    iteration = run.get("JobIteration")
    cells = (
        run["Name"],
        run["Hostname"],
        *((str(iteration.get("Index", 0)) if iteration is not None else "",) if is_job else ()),
        run["State"],
        " ".join(filter(None, (str(run.get("ExitCode", "")), (run.get("End") or {}).get("Signal", "")))),
        f"{age(run['EndedAt'], now)} ago",
        *((run["TaskID"],) if screen.is_wide else ()),
    )
    return tuple(map(printable, cells))

"""``skep job``: jobs with their schedules, to run now or to retry."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import click

from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.formatting import age, duration, seconds_since
from skep.cli.output import Cell, OutputOptions, Screen, Shown, shows, table
from skep.cli.running import run_requests
from skep.cli.visibility import empty_text
from skep.model.task_end import printable

_HEAD = ("NAME", "SCHEDULE", "LAST RUN", "STATE", "NEXT RUN", "NOTE")
_NO_JOBS = "No jobs. Create one with skep service create --mode replicated-job IMAGE."
_COLORS = {"failed": "red", "completed": "green"}


@click.group()
def job() -> None:
    """Manage jobs and their schedules.

    A job is a service whose tasks run to completion, once or on a schedule (label skep.cron).

    \b
    Examples:
      skep job ls
      skep job run nightly
      skep job retry nightly
    """


@job.command("ls")
@shows
@click.pass_obj
def list_jobs(host: HostOptions, output: OutputOptions) -> None:
    """List jobs with their schedules and runs.

    \b
    Examples:
      skep job ls
      skep job ls --format '{{.Name}} {{.NextRun}}'
    """

    async def fetch() -> Shown:
        async with host.requests() as client:
            jobs: list[dict[str, Any]] = await client.get("/skep/jobs", timeout_s=RESPONSE_TIMEOUT_S)
            empty = "" if jobs else await empty_text(client, _NO_JOBS, "No jobs of your stacks")
        jobs.sort(key=lambda one: str(one["Name"]))
        rows = [{"Schedule": "", "NextRun": "", "LastRun": "", "Note": "", **one} for one in jobs]
        return Shown(data=jobs, rows=rows, lines=lambda screen: shown(jobs, screen, time.time(), empty))

    output.show(fetch)


def shown(
    jobs: Sequence[Mapping[str, Any]], screen: Screen, now: float, empty: str = _NO_JOBS
) -> Iterator[str]:
    """Yield the lines of the table.  ``now``: seconds since the epoch.  ``empty``: the text without jobs."""
    more = ("ID",) if screen.is_wide else ()
    return table((*more, *_HEAD), [_row(one, screen, now) for one in jobs], screen, empty=empty)


def _row(found: Mapping[str, Any], screen: Screen, now: float) -> tuple[str | Cell, ...]:
    zone = found.get("TimeZone", "UTC")
    schedule = found.get("Schedule", "") + (f" {zone}" if zone != "UTC" else "")
    last, next_run = found.get("LastRun"), found.get("NextRun")
    state = found["State"]
    return (
        *((found["ID"],) if screen.is_wide else ()),
        found["Name"],
        schedule or "-",
        f"{age(last, now)} ago" if last else "never",
        Cell(state, _COLORS.get(state, "")),
        until(next_run, now) if next_run else "-",
        found.get("Note", ""),
    )


def until(stamp: str, now: float) -> str:
    """Return the time until ``stamp``, such as ``in 4m 10s``, or ``now`` if the run is due and the leader starts it."""
    seconds = seconds_since(stamp, now)
    if seconds is None:
        return stamp
    return f"in {duration(-seconds)}" if seconds < 0 else "now"


@job.command()
@click.option("--replace", "replaces", is_flag=True, help="Stop the current run first.")
@click.argument("names", metavar="JOB...", nargs=-1, required=True)
@click.pass_obj
def run(host: HostOptions, names: tuple[str, ...], replaces: bool) -> None:
    """Start the next run of a job now.

    The schedule does not change, and a job without a schedule also works. To wait for the end of the run, use skep
    service wait.

    \b
    Examples:
      skep job run nightly
      skep job run --replace nightly
    """
    for name in names:
        found = run_requests(_post(host, name, "run", replace="true" if replaces else "false"))
        click.echo(printable(f"{found['Name']}: run {found['Iteration']} started"))


@job.command()
@click.argument("names", metavar="JOB...", nargs=-1, required=True)
@click.pass_obj
def retry(host: HostOptions, names: tuple[str, ...]) -> None:
    """Retry the failed tasks of a job's last run.

    Completed tasks are not repeated. The run keeps its spec, and the restart policy counts attempts from zero.

    \b
    Example:
      skep job retry nightly
    """
    for name in names:
        found = run_requests(_post(host, name, "retry"))
        click.echo(printable(f"{found['Name']}: retrying the failed tasks of run {found['Iteration']}"))


async def _post(host: HostOptions, name: str, verb: str, replace: str = "false") -> dict[str, Any]:
    path = f"/skep/services/{quote(name, safe='')}/{verb}"
    async with host.client() as client:
        found: dict[str, Any] = await client.post(path, timeout_s=RESPONSE_TIMEOUT_S, replace=replace)
        return found

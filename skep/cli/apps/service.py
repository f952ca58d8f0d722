"""``skep service``: docker's commands, and wait, stop and start."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import click

from skep.cli import options, passthrough
from skep.cli.endpoint import HostOptions
from skep.cli.running import run_requests
from skep.cli.stack.stack_screens import max_failures
from skep.errors import Unavailable
from skep.stack.progress import FAILURES_MAX, ServiceProgress
from skep.stack.waiting import Reasons, look_at, unfinished, wait_done


@click.group(cls=passthrough.WithDockers)
def service() -> None:
    """Manage services.

    \b
    Examples:
      skep service ls
      skep service wait web
      skep service stop web
    """


@service.command()
@options.timeout()
@max_failures
@click.argument("names", metavar="SERVICE...", nargs=-1, required=True)
@click.pass_obj
def wait(host: HostOptions, names: tuple[str, ...], timeout: float, max_failures: int) -> None:
    """Wait until services are in their desired state.

    Returns when all tasks run, or the job is complete.

    Exit code 1: an update was paused or rolled back, tasks keep failing, or the timeout is over. The error has the
    reason.

    \b
    Example:
      docker service update --detach --image web:2 web && skep service wait web
    """
    run_requests(_wait(host, names, timeout, max_failures))


_TURN_TIMEOUT_S = 15.0
"""Timeout in seconds of one request that stops or starts a service."""


@service.command()
@options.timeout("2m", "Longest time to wait for tasks to stop.")
@options.detach
@click.argument("names", metavar="SERVICE...", nargs=-1, required=True)
@click.pass_obj
def stop(host: HostOptions, names: tuple[str, ...], timeout: float, detach: bool) -> None:
    """Stop services and keep their settings.

    All tasks stop. The number of replicas, ports, addresses and data stay. Updates and rollbacks do not start a stopped
    service. For a job with a schedule, no new run starts.

    \b
    Example:
      skep service stop web db
    """
    run_requests(turn(host, names, "stop", timeout_s=timeout, waits=not detach))


@service.command()
@options.timeout()
@options.detach
@click.argument("names", metavar="SERVICE...", nargs=-1, required=True)
@click.pass_obj
def start(host: HostOptions, names: tuple[str, ...], timeout: float, detach: bool) -> None:
    """Start stopped services and wait until they run.

    \b
    Example:
      skep service start db web
    """
    run_requests(turn(host, names, "start", timeout_s=timeout, waits=not detach))


async def turn(
    host: HostOptions, names: Sequence[str], verb: Literal["stop", "start"], *, timeout_s: float, waits: bool
) -> None:
    """Stop or start services, and wait until they have done so.  All of them are requested before the wait.

    Raises:
        Unavailable: Not all were done in ``timeout_s`` seconds.
        SkepError: A request was refused.
    """
    waited = []
    async with host.client() as client:
        for name in names:
            found = await client.post(f"/skep/services/{name}/{verb}", timeout_s=_TURN_TIMEOUT_S)
            if is_job(found["Spec"]):
                click.echo(f"{found['Spec']['Name']}: {_SCHEDULES[verb]}", err=True)
            else:
                waited.append(name)
    if waits and waited:
        await _wait(host, tuple(waited), timeout_s, FAILURES_MAX)


_SCHEDULES: Mapping[str, str] = {
    "stop": "no new run starts until the job is started again",
    "start": "its schedule counts again",
}


def is_job(spec: Mapping[str, Any]) -> bool:
    """Return whether the spec of a service, as the API shows it, is a job's."""
    return not {"ReplicatedJob", "GlobalJob"}.isdisjoint(spec.get("Mode") or {})


async def _wait(host: HostOptions, names: tuple[str, ...], timeout_s: float, failures_max: int) -> None:
    shown: dict[str, str] = {}
    open_ = set(names)

    def show(name: str, text: str) -> None:
        if shown.get(name) != text:
            shown[name] = text
            click.echo(f"{name}: {text}", err=True)

    async with host.client() as client:
        reasons = Reasons(client, failures_max)

        async def look(waiting: set[str]) -> dict[str, ServiceProgress]:
            looks = {name: await look_at(client, name) for name in sorted(waiting, key=names.index)}
            found = await reasons.explain(looks)
            open_.intersection_update(name for name, progress in found.items() if not progress.is_done)
            return found

        try:
            async with asyncio.timeout(timeout_s):
                await wait_done(names, look, show)
        except TimeoutError:
            unknown = shown.get("managers", "no manager has responded")
            texts = {name: shown.get(name, unknown) for name in sorted(open_)}
            raise Unavailable(unfinished(texts, timeout_s)) from None

"""``skep stack stop`` and ``skep stack start``."""

from collections.abc import Mapping
from typing import Any, Literal

import click

from skep.cli import options
from skep.cli.apps.service import is_job, turn
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.running import run_requests
from skep.errors import NotFound
from skep.model.options.schedules import CRON
from skep.model.task_end import printable
from skep.model.values.stacks import STACK_LABEL


@click.command()
@options.timeout("2m", "Longest time to wait for tasks to stop.")
@options.detach
@click.argument("name", metavar="STACK")
@click.pass_obj
def stop(host: HostOptions, name: str, timeout: float, detach: bool) -> None:
    """Stop the services of a stack and keep their settings.

    No new run of its jobs starts. A deploy of the stack starts the services of its files.

    \b
    Example:
      skep stack stop shop
    """
    run_requests(turn_stack(host, name, "stop", timeout, waits=not detach))


@click.command()
@options.timeout()
@options.detach
@click.argument("name", metavar="STACK")
@click.pass_obj
def start(host: HostOptions, name: str, timeout: float, detach: bool) -> None:
    """Start the stopped services of a stack.

    They start in the order of their dependencies. The command waits until they run.

    \b
    Example:
      skep stack start shop
    """
    run_requests(turn_stack(host, name, "start", timeout, waits=not detach))


async def turn_stack(
    host: HostOptions, stack: str, verb: Literal["stop", "start"], timeout_s: float, *, waits: bool
) -> None:
    """Stop or start the services of a stack.  Jobs without a schedule are left to end by themselves.

    Raises:
        NotFound: The stack has no services.
        SkepError: A request was refused, or not all were done in ``timeout_s`` seconds.
    """
    async with host.client() as client:
        found = await client.get(
            "/services", filters={"label": [f"{STACK_LABEL}={stack}"]}, timeout_s=RESPONSE_TIMEOUT_S
        )
    if not found:
        raise NotFound(f"stack {stack} has no services. Show all stacks with skep stack ls.")
    specs: list[Mapping[str, Any]] = sorted(
        (one["Spec"] for one in found), key=lambda spec: str(spec["Name"])
    )
    ending = [spec["Name"] for spec in specs if is_job(spec) and CRON not in (spec.get("Labels") or {})]
    for name in ending:
        click.echo(printable(f"{name}: a job without a schedule, which ends by itself"), err=True)
    names = [spec["Name"] for spec in specs if spec["Name"] not in ending]
    await turn(host, names, verb, timeout_s=timeout_s, waits=waits)

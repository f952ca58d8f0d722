"""``skep service``: docker's commands, and wait."""

import asyncio

import click

from skep.cli import options, passthrough
from skep.cli.endpoint import HostOptions
from skep.cli.running import run_requests
from skep.cli.stack.stack_screens import max_failures
from skep.errors import Unavailable
from skep.stack.progress import ServiceProgress
from skep.stack.waiting import Reasons, look_at, unfinished, wait_done


@click.group(cls=passthrough.WithDockers)
def service() -> None:
    """Manage services.

    \b
    Examples:
      skep service ls
      skep service wait web
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

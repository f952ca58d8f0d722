"""``skep update``: pause, resume, abort and promote the update of a service, or else docker's update of containers."""

from typing import Any
from urllib.parse import quote

import click

from skep.cli import passthrough
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.running import run_requests
from skep.model.task_end import printable


class _Update(click.Group):
    """A command group that passes other words than its commands to docker's ``update CONTAINER``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_ours = not args or args[0] in {*self.commands, *self.get_help_option_names(ctx)}
        if not is_ours and not ctx.resilient_parsing:  # shell completion must not run docker
            passthrough.execute(ctx.find_object(HostOptions) or HostOptions(), ("update",), args)
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        formatter.write_text("docker update also works: skep update --memory 1g CONTAINER")


@click.group(cls=_Update)
def update() -> None:
    """Pause, resume, abort or promote service updates.

    \b
    Examples:
      skep update pause web
      skep update resume web
      skep update abort web
    """


@update.command()
@click.argument("names", metavar="SERVICE...", nargs=-1, required=True)
@click.pass_obj
def pause(host: HostOptions, names: tuple[str, ...]) -> None:
    """Pause an update or rollback.

    No more tasks are replaced until you resume or abort it. Tasks that are being replaced are completed.

    \b
    Example:
      skep update pause web
    """
    for name in names:
        service = run_requests(_post(host, name, "pause"))
        more = f"skep update resume {name}"
        if service["UpdateStatus"]["State"] == "paused":
            more += f", or skep update abort {name}"
        click.echo(f"{_line(service)}. Next: {more}")


@update.command()
@click.argument("names", metavar="SERVICE...", nargs=-1, required=True)
@click.pass_obj
def resume(host: HostOptions, names: tuple[str, ...]) -> None:
    """Resume a paused update or rollback.

    It can be paused by a user or after a failure. Earlier failures no longer count.

    \b
    Example:
      skep update resume web && skep service wait web
    """
    for name in names:
        click.echo(_line(run_requests(_post(host, name, "resume"))))


@update.command()
@click.argument("names", metavar="SERVICE...", nargs=-1, required=True)
@click.pass_obj
def abort(host: HostOptions, names: tuple[str, ...]) -> None:
    """Abort an update and return to the previous spec.

    The update can be running or paused. Unlike docker service rollback, it never undoes a completed update.

    \b
    Example:
      skep update abort web
    """
    for name in names:
        click.echo(_line(run_requests(_post(host, name, "abort"))))


@update.command()
@click.argument("names", metavar="SERVICE...", nargs=-1, required=True)
@click.pass_obj
def promote(host: HostOptions, names: tuple[str, ...]) -> None:
    """Start the next step of a canary, or switch blue-green.

    This does not wait for the time of the present step. With the label skep.update.promote=manual, each step waits for
    this command.

    \b
    Example:
      skep update promote web
    """
    for name in names:
        click.echo(_line(run_requests(_post(host, name, "promote"))))


@update.command("switch-back")
@click.argument("names", metavar="SERVICE...", nargs=-1, required=True)
@click.pass_obj
def switch_back(host: HostOptions, names: tuple[str, ...]) -> None:
    """Return connections to the old tasks of a blue-green update.

    The update is paused, and the new tasks stay. To switch again, resume it. To remove them, abort it.

    \b
    Example:
      skep update switch-back web
    """
    for name in names:
        more = f"skep update resume {name}, or skep update abort {name}"
        click.echo(f"{_line(run_requests(_post(host, name, 'switch-back')))}. Next: {more}")


async def _post(host: HostOptions, name: str, verb: str) -> dict[str, Any]:
    path = f"/skep/services/{quote(name, safe='')}/update/{verb}"
    async with host.client() as client:
        service: dict[str, Any]
        if verb == "abort":  # This aborts the present update and not a later one.
            found = await client.get(f"/services/{quote(name, safe='')}", timeout_s=RESPONSE_TIMEOUT_S)
            version = str(found["Version"]["Index"])
            service = await client.post(path, timeout_s=RESPONSE_TIMEOUT_S, version=version)
        else:
            service = await client.post(path, timeout_s=RESPONSE_TIMEOUT_S)
        return service


def _line(service: dict[str, Any]) -> str:
    status = service["UpdateStatus"]
    state = status["State"].replace("_", " ")
    return printable(f"{service['Spec']['Name']}: {state}: {status['Message']}")

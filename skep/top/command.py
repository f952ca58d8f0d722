"""The command ``skep top``.  Only this command imports Textual, when it runs."""

import os
import random
import sys
from collections.abc import Mapping

import click

from skep.cli.endpoint import HostOptions
from skep.cli.running import run_requests
from skep.errors import FailedPrecondition

_LIGHT_BACKGROUNDS = ("7", "15")


@click.command()
@click.option(
    "--theme",
    type=click.Choice(["auto", "dark", "light"]),
    default="auto",
    show_default=True,
    help="Background of the terminal. auto reads COLORFGBG and uses dark if it is unset.",
)
@click.pass_obj
def top(host: HostOptions, theme: str) -> None:
    """Show the cluster live in full screen.

    Shows services, tasks, nodes, events and logs. Press ? for all keys.

    You can also scale, update and roll back services, and drain and activate nodes. Each action shows its effects and
    asks for confirmation.

    \b
    Examples:
      skep top
      skep --context production top
      skep --host ssh://root@manager1 top --theme light
    """
    run_requests(
        _run(host, is_light=theme == "light" or (theme == "auto" and has_light_background(os.environ)))
    )


def has_light_background(environment: Mapping[str, str]) -> bool:
    """Return whether ``COLORFGBG``, as set by rxvt, Konsole and others, ends with the number of a light background."""
    return environment.get("COLORFGBG", "").rpartition(";")[2] in _LIGHT_BACKGROUNDS


async def _run(host: HostOptions, *, is_light: bool) -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise FailedPrecondition(
            "skep top needs a terminal. Run skep status to print the state of the cluster once."
        )
    from skep.aio.clock import SystemClock
    from skep.top.app import TopApp
    from skep.top.watching import LiveCluster

    endpoint = host.endpoint()
    async with endpoint.client() as client:
        name = host.context or endpoint.host
        app = TopApp(LiveCluster(client, name, SystemClock(), random.random), is_light=is_light)
        await app.run_async()
        if app.return_code:
            sys.exit(app.return_code)

"""``skep ui``: the dashboard in a browser on this machine, over the same connection as the other commands."""

import asyncio
import os
import secrets
import tempfile
import webbrowser
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from skep.aio.clock import SystemClock
from skep.api.client.raw import RawClient
from skep.cli.endpoint import HostOptions
from skep.cli.running import run_requests, say
from skep.errors import NotFound, Unavailable, Unimplemented, reason_of


@click.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    metavar="PORT",
    help="Local port to listen on. Default: any free port.",
)
@click.option("--no-browser", is_flag=True, help="Print the address without opening a browser.")
@click.pass_obj
def ui(host: HostOptions, port: int, *, no_browser: bool) -> None:
    """Open the dashboard in a browser.

    Serves the dashboard on 127.0.0.1 until Ctrl+C. The address works once, for one browser. The browser gets your
    rights.

    \b
    Examples:
      skep ui
      skep --host ssh://root@m1 ui
      skep ui --port 8765 --no-browser
    """
    run_requests(_serve(host, port, opens=not no_browser and has_browser(os.environ, os.geteuid())))


def has_browser(environment: Mapping[str, str], user: int) -> bool:
    """Return whether to open a browser: the session has a screen, and the browser would not run as root."""
    has_screen = "DISPLAY" in environment or "WAYLAND_DISPLAY" in environment
    return has_screen and user != 0


async def _serve(host: HostOptions, port: int, *, opens: bool) -> None:
    from skep.dashboard.relay import LOOPBACK, Relay

    async with host.raw_client() as client:
        await _check(client)
        relay = Relay(client, lambda: secrets.token_hex(16), SystemClock().monotonic)
        try:
            async with relay.listening(port) as address:
                click.echo(address)
                say(
                    "Open this address in a browser on this machine. It works once. Press Ctrl+C to stop the dashboard."
                )
                if opens:
                    with _opened(address) as opening:
                        await asyncio.to_thread(webbrowser.open, opening)
                        await asyncio.Event().wait()
                await asyncio.Event().wait()
        except OSError as error:
            raise Unavailable(
                f"cannot listen on {LOOPBACK}:{port}: {reason_of(error)}. Choose another --port."
            ) from error


async def _check(client: RawClient) -> None:
    """Check that the node has a dashboard.  Raises: SkepError: it does not."""
    from skep.dashboard.pages import RELAY_HEADER

    try:
        async with client.exchange("GET", "/ui/", headers={RELAY_HEADER: "1"}):
            pass
    except NotFound as error:
        raise Unimplemented("this node's version of Skep has no dashboard. Run skep upgrade.") from error


@contextmanager
def _opened(address: str) -> Iterator[str]:
    """Yield the address of a private file that redirects to ``address``.

    Every user can read the browser's arguments, so ``address`` itself must not be one of them.
    """
    with tempfile.TemporaryDirectory(prefix="skep-ui-") as directory:
        path = Path(directory, "dashboard.html")
        path.write_text(
            f'<!doctype html><title>Skep</title><meta http-equiv="refresh" content="0; url={address}">'
        )
        yield path.as_uri()

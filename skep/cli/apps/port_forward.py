"""``skep port-forward``: forwards ports of this machine to a task's container on any node."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import click
import msgspec

from skep.api.client.raw import RawClient
from skep.cli.apps.targets import find_target
from skep.cli.apps.through_docker import copy
from skep.cli.endpoint import HostOptions
from skep.cli.running import run_requests
from skep.errors import InvalidArgument, SkepError, Unavailable, reason_of
from skep.model.task_end import printable

_LOOPBACK = "127.0.0.1"


class Forward(msgspec.Struct, frozen=True):
    """A port of this machine (0 for any free one), and the port in the container."""

    address: str
    local: int
    port: int


def parse_forward(word: str) -> Forward:
    """Parse ``80``, ``8080:80``, ``:80`` (any free port here) or ``ADDRESS:8080:80``.  Raises: InvalidArgument."""
    head, _, port = word.rpartition(":")
    address, _, local = head.rpartition(":")
    local = local if head or word.startswith(":") else port
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InvalidArgument(f"invalid port {word!r}. Use [[ADDRESS:]LOCAL:]PORT, such as 8080:80.")
    if local and not (local.isascii() and local.isdigit() and int(local) < 65536):
        raise InvalidArgument(f"invalid port {word!r}. Use [[ADDRESS:]LOCAL:]PORT, such as 8080:80.")
    return Forward(address.strip("[]") or _LOOPBACK, int(local or 0), int(port))


@click.command("port-forward")
@click.argument("target", metavar="SERVICE[.SLOT]|TASK")
@click.argument("ports", metavar="[[ADDRESS:]LOCAL:]PORT...", nargs=-1, required=True)
@click.pass_obj
def port_forward(host: HostOptions, target: str, ports: Sequence[str]) -> None:
    """Forward local ports to a task's container.

    Forwards until Ctrl+C. The task can run on any node, and PORT need not be published.

    Listens on 127.0.0.1 unless you specify ADDRESS. If a task of SERVICE is replaced, new connections go to the new
    task.

    \b
    Examples:
      skep port-forward db 5432
      skep port-forward web.2 8080:80
      skep port-forward web 0.0.0.0:8080:80
    """
    run_requests(_forward_all(host, target, ports))


async def _forward_all(host: HostOptions, word: str, ports: Sequence[str]) -> None:
    forwards = [parse_forward(port) for port in ports]
    async with host.raw_client() as client, AsyncExitStack() as stack:
        target = await find_target(client, word)
        for forward in forwards:
            try:
                server = await asyncio.start_server(
                    _Port(client, word, forward.port).serve, forward.address, forward.local
                )
            except OSError as error:
                raise Unavailable(
                    f"cannot listen on {forward.address}:{forward.local}: {reason_of(error)}. Choose another port."
                ) from error
            await stack.enter_async_context(server)
            local = server.sockets[0].getsockname()[1]
            click.echo(
                f"{forward.address}:{local} -> port {forward.port} of {target.name} on {target.hostname}"
            )
        await asyncio.Event().wait()


class _Port:
    """One forwarded port."""

    def __init__(self, client: RawClient, word: str, port: int) -> None:
        self._client = client
        self._word = word
        self._port = port

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Join one connection with a new one to the container's port.  Each direction ends separately."""
        try:
            target = await find_target(self._client, self._word)
            path = f"{target.path}/port/{self._port}"
            async with (
                self._client.exchange("POST", path, upgrade=True) as there,
                asyncio.TaskGroup() as group,
            ):
                group.create_task(copy(reader, there.writer), name="to the container")
                group.create_task(copy(there.reader, writer), name="from the container")
        except SkepError as error:
            click.echo(failure_of(self._port, error), err=True)
        finally:
            writer.close()


def failure_of(port: int, error: SkepError) -> str:
    """Return the line about a failed connection, whose reason comes from a node."""
    return printable(f"connection to port {port} failed: {error}")

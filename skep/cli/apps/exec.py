"""``skep exec``: a command in the container of a task, on any node."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import click

from skep.api.client.raw import RawClient, json
from skep.cli.apps import terminal
from skep.cli.apps.targets import OrDocker, find_target_or_docker, to_docker
from skep.cli.endpoint import HostOptions
from skep.cli.running import run_requests
from skep.errors import InvalidArgument


@click.command("exec", cls=OrDocker, context_settings={"allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Keep STDIN open even if not attached.")
@click.option("-t", "--tty", is_flag=True, help="Allocate a pseudo-TTY.")
@click.option("-d", "--detach", is_flag=True, help="Detached mode: run command in the background.")
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="Set environment variables.")
@click.option("-u", "--user", default="", metavar="USER", help="Username or UID (USER[:GROUP]).")
@click.option("-w", "--workdir", default="", metavar="DIR", help="Working directory inside the container.")
@click.option("--privileged", is_flag=True, help="Give extended privileges to the command.")
@click.option("--detach-keys", default="", metavar="KEYS", help="Override the key sequence for detaching.")
@click.argument("target", metavar="SERVICE[.SLOT]|TASK")
@click.argument("command", metavar="COMMAND [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def exec_command(ctx: click.Context, /, target: str, command: Sequence[str], **options: Any) -> None:
    """Run a command in a task's container on any node.

    SERVICE alone means its running task with the lowest slot. For a global service, use SERVICE.NODE. Any other name is
    a container of this node, as in docker exec. The exit code is COMMAND's.

    \b
    Examples:
      skep exec web ls -l /
      skep exec -it web.2 sh
      cat dump.sql | skep exec -i db psql
    """
    host: HostOptions = ctx.obj
    code = run_requests(_exec(host, target, command, options))
    if code is None:
        to_docker(ctx)
    raise SystemExit(code)


async def _exec(host: HostOptions, word: str, command: Sequence[str], options: dict[str, Any]) -> int | None:
    """Run the command and return its exit code, or None without such a service or task."""
    async with host.raw_client() as client:
        target = await find_target_or_docker(client, word)
        if target is None:
            return None
        if options["tty"] and options["interactive"] and not sys.stdin.isatty():
            raise InvalidArgument("the input device is not a TTY")
        attached = not options["detach"]
        created = await client.post(
            f"{target.container}/exec",
            {
                "AttachStdin": attached and options["interactive"],
                "AttachStdout": attached,
                "AttachStderr": attached,
                "Tty": options["tty"],
                "Env": list(options["env"]),
                "User": options["user"],
                "WorkingDir": options["workdir"],
                "Privileged": options["privileged"],
                "DetachKeys": options["detach_keys"],
                "Cmd": list(command),
            },
        )
        path = f"{target.path}/exec/{created['Id']}"
        if not attached:
            await client.post(f"{path}/start", {"Detach": True, "Tty": options["tty"]})
            return 0
        await _attach(client, path, options)
        ended = await client.get(f"{path}/json")
        return int(ended["ExitCode"] or 0)


async def _attach(client: RawClient, path: str, options: dict[str, Any]) -> None:
    """Run the command with this process's input and output."""
    is_tty = options["tty"]

    async def resize(rows: int, columns: int) -> None:
        await client.post(f"{path}/resize", query={"h": str(rows), "w": str(columns)})

    start: dict[str, Any] = {"Detach": False, "Tty": is_tty}
    if is_tty:
        start["ConsoleSize"] = list(terminal.size())
    async with client.exchange("POST", f"{path}/start", json(start), upgrade=True) as stream:
        controls = terminal.controlling(resize) if is_tty and options["interactive"] else nullcontext()
        async with controls:
            await terminal.join(stream, takes_input=options["interactive"], is_tty=is_tty)

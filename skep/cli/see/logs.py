"""``skep logs``: logs of a service or task on any node, or else docker's logs of a container."""

from collections.abc import Sequence
from urllib.parse import quote

import click

from skep.cli import passthrough
from skep.cli.apps.targets import OrDocker, find_target_or_docker, or_docker, to_docker
from skep.cli.apps.through_docker import arguments_of
from skep.cli.endpoint import HostOptions
from skep.cli.running import run_requests

_VALUED = "-[a-z]*n|--tail|--since|--until"
"""Options whose value is the next word."""


@click.command(
    cls=OrDocker, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="SERVICE[.SLOT]|TASK")
@click.pass_context
def logs(ctx: click.Context, /, words: Sequence[str]) -> None:
    """Show the logs of a service or task on any node.

    Takes the options of docker service logs, such as --follow, --tail, --since and --timestamps. Any other name is a
    container of this node, as in docker logs.

    \b
    Examples:
      skep logs --follow --tail 10 web
      skep logs web.2
    """
    host: HostOptions = ctx.obj
    names = arguments_of(words, _VALUED)
    meant = run_requests(_meant(host, names[0])) if len(names) == 1 else None
    if meant is None:
        to_docker(ctx)
        return
    at = len(words) - 1 - list(reversed(words)).index(names[0])
    passthrough.execute(host, ("service", "logs"), [*words[:at], meant, *words[at + 1 :]])


async def _meant(host: HostOptions, name: str) -> str | None:
    """Return the argument of docker service logs for ``name``, or None if ``name`` may be a container."""
    async with host.raw_client() as client:
        for kind in ("services", "tasks"):
            if await or_docker(client.get(f"/{kind}/{quote(name, safe='')}")) is not None:
                return name
        task = await find_target_or_docker(client, name)
        return task.task_id if task is not None else None

"""``skep playground ...``: one command per verb."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from skep.cli.output import OutputOptions, Screen, Shown, shows, table
from skep.errors import SkepError
from skep.model.values.counts import counted
from skep.playground import names
from skep.playground.commands import find
from skep.playground.node import daemon_pid
from skep.playground.playground import API, Playground
from skep.playground.relay import LOOPBACK
from skep.playground.tls import PORT, authority_file
from skep.playground.underlay import Way

T = TypeVar("T")
Command = Callable[..., Any]

_DIRECTORY = click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/var/tmp/skep-playground"),
    show_default=True,
    help="Directory of the playground.",
)
_NAME = click.option("--name", metavar="NAME", help=f"Name of the playground.  [default: {names.DEFAULT}]")


def _verb(command: Command) -> Command:
    """Add the options that every verb has."""
    return _DIRECTORY(_NAME(command))


def _open(directory: Path, name: str | None) -> Playground:
    return Playground(directory, name, lambda line: click.echo(line, err=True))


def _finish(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` and return its result.

    An expected failure is printed as a sentence and ends the command with exit code 1.
    """
    try:
        return asyncio.run(work)
    except SkepError as error:
        raise click.ClickException(str(error)) from error


class _Verbs(click.Group):
    """The verbs, and former names of them."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Find a verb by its name or by its name in earlier versions."""
        return super().get_command(ctx, {"mend": "reconnect"}.get(cmd_name, cmd_name))


@click.group(cls=_Verbs)
def playground() -> None:
    """Run a test cluster on this machine.

    Each node runs in its own namespaces.

    \b
    Examples:
      skep playground up --managers 1 --workers 2
      eval "$(skep playground env m1)"; docker node ls
      skep playground cut w1; skep playground reconnect w1
      skep playground down
    """


@playground.command()
@click.option("--managers", default=1, show_default=True, metavar="N", help="Number of managers.")
@click.option("--workers", default=0, show_default=True, metavar="N", help="Number of workers.")
@click.option(
    "--docker-workers",
    default=0,
    show_default=True,
    metavar="N",
    help="Number of additional workers that are Docker Engines.",
)
@click.option(
    "--subnets",
    default=1,
    show_default=True,
    metavar="N",
    help="Number of routed networks to spread the nodes over.",
)
@click.option(
    "--relay/--no-relay",
    default=True,
    help="Also serve published ports on 127.0.0.1.  [default: relay]",
)
@click.option("--tls", is_flag=True, help="Also serve the managers' API to users over TLS.")
@_verb
def up(
    directory: Path,
    name: str | None,
    managers: int,
    workers: int,
    docker_workers: int,
    subnets: int,
    relay: bool,
    tls: bool,
) -> None:
    """Start a playground.

    Managers are called m1, m2, ..., workers w1, w2, ... and Docker Engines d1, d2, ... All are in one swarm and have a
    busybox image. Docker Engines run this machine's dockerd.

    \b
    Examples:
      skep playground up --managers 1 --workers 2 --dir /var/tmp/bees
      skep playground up --managers 1 --workers 1 --docker-workers 2
      skep playground up --managers 3 --tls
    """
    ground = _open(directory, name)
    cluster = _finish(
        ground.up(
            managers=managers,
            workers=workers,
            docker_workers=docker_workers,
            subnets=subnets,
            relays=LOOPBACK if relay else None,
            tls=tls,
        )
    )
    click.echo(f"{counted(len(cluster.nodes), 'node')}: {' '.join(node.name for node in cluster.nodes)}")
    click.echo(f"description: {directory.resolve() / 'cluster.json'}")
    if relay:
        click.echo("published ports are also served on 127.0.0.1: skep playground ps")
    if relay and tls:
        local = _finish(ground.wait_relayed(PORT))
        click.echo(
            f"users: skep user add NAME --role viewer --context --address tcp://127.0.0.1:{local} "
            f"--ca {authority_file(directory.resolve())}"
        )


@playground.command()
@_verb
def down(directory: Path, name: str | None) -> None:
    """Remove a playground and everything it created.

    Also works after a crash.

    \b
    Example:
      skep playground down --dir /var/tmp/bees
    """
    something = _finish(_open(directory, name).down())
    click.echo("removed" if something else "Nothing to remove.", err=True)


@playground.command()
@_verb
@shows
def ps(directory: Path, name: str | None, output: OutputOptions) -> None:
    """List the playground's nodes and published ports.

    \b
    Example:
      skep playground ps
    """

    async def fetch() -> Shown:
        cluster = _open(directory, name)
        rows = [
            {
                "Node": node.name,
                "Role": node.role,
                "State": state,
                "Address": node.addr,
                "PID": str(daemon_pid(node) or "-"),
                "Endpoint": node.endpoint,
            }
            for node, state in await cluster.states()
        ]
        ports = cluster.relayed_ports()

        def lines(screen: Screen) -> Iterator[str]:
            head = ("NODE", "ROLE", "STATE", "ADDRESS", "PID", "ENDPOINT")
            yield from table(head, [tuple(row.values()) for row in rows], screen)
            for published, url in ports.items():
                yield f"{'API over TLS' if published == API else f'published port {published}'}: {url}"

        return Shown(data={"Nodes": rows, "Ports": dict(ports)}, rows=rows, lines=lines)

    output.show(fetch)


@playground.command()
@click.argument("node")
@_verb
def kill(directory: Path, name: str | None, node: str) -> None:
    """Kill all processes of a node, as a power failure does.

    \b
    Example:
      skep playground kill w1; skep playground start w1
    """
    _finish(_open(directory, name).kill(node))


@playground.command()
@click.argument("node")
@_verb
def start(directory: Path, name: str | None, node: str) -> None:
    """Restart a killed node with its disk unchanged.

    Waits until its API responds.

    \b
    Example:
      skep playground start w1
    """
    _finish(_open(directory, name).start(node))


@playground.command()
@click.argument("node")
@click.option(
    "--only", type=click.Choice(["in", "out"]), help="Drop only packets to NODE (in) or from NODE (out)."
)
@_verb
def cut(directory: Path, name: str | None, node: str, only: Way | None) -> None:
    """Disconnect a node from the network.

    The node keeps running. To undo this, run skep playground reconnect NODE.

    \b
    Examples:
      skep playground cut w1; sleep 10; docker node ls
      skep playground cut m2 --only out
    """
    _finish(_open(directory, name).cut(node, only))


@playground.command()
@click.argument("node")
@_verb
def reconnect(directory: Path, name: str | None, node: str) -> None:
    """Reconnect a node to the network.

    \b
    Example:
      skep playground reconnect w1
    """
    _finish(_open(directory, name).reconnect(node))


@playground.command()
@click.argument("node")
@_verb
def pause(directory: Path, name: str | None, node: str) -> None:
    """Pause every process of a node.

    The node behaves like a machine that hangs. To undo this, run skep playground resume NODE.

    \b
    Example:
      skep playground pause m1; sleep 5; skep playground resume m1
    """
    _finish(_open(directory, name).pause(node))


@playground.command()
@click.argument("node")
@_verb
def resume(directory: Path, name: str | None, node: str) -> None:
    """Resume a paused node.

    \b
    Example:
      skep playground resume m1
    """
    _finish(_open(directory, name).resume(node))


@playground.command(
    "exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@_verb
@click.argument("node")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def execute(directory: Path, name: str | None, node: str, command: Sequence[str]) -> None:
    """Run a command on a node of the playground.

    The command sees the network, mounts and host name of the node.

    \b
    Examples:
      skep playground exec m1 -- ip route
      skep playground exec m1
    """
    words = [word for index, word in enumerate(command) if index or word != "--"]
    try:
        argv = _open(directory, name).command_inside(node, words or [os.environ.get("SHELL", "/bin/sh")])
        os.execv(find(argv[0]), argv)
    except SkepError as error:
        raise click.ClickException(str(error)) from error


@playground.command()
@click.argument("role", type=click.Choice(["manager", "worker"]))
@click.argument("node", required=False)
@click.option("--docker", "is_docker", is_flag=True, help="Add a Docker Engine instead of a Skep node.")
@_verb
def add(directory: Path, name: str | None, role: names.Role, node: str | None, is_docker: bool) -> None:
    """Add a machine to the playground's network.

    The machine does not join the swarm.

    \b
    Examples:
      skep playground add worker w9
      skep playground add --docker worker
    """
    new = _finish(_open(directory, name).add(role, node, "docker" if is_docker else "skep"))
    click.echo(f"{new.name} {new.addr} {new.endpoint}")


@playground.command()
@click.argument("node")
@_verb
def env(directory: Path, name: str | None, node: str) -> None:
    """Print the line that points docker at a node.

    \b
    Example:
      eval "$(skep playground env m1)"; docker service ls
    """
    try:
        endpoint = _open(directory, name).cluster().node(node).endpoint
    except SkepError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"export DOCKER_HOST={endpoint}")


@playground.command()
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_verb
def load(directory: Path, name: str | None, archive: Path) -> None:
    """Load an image archive into every node.

    Create ARCHIVE with docker save.

    \b
    Example:
      docker save nginx:latest > nginx.tar; skep playground load nginx.tar
    """
    _finish(_open(directory, name).load(archive))


@playground.command("demo")
@click.option(
    "--address",
    default=LOOPBACK,
    show_default=True,
    metavar="ADDRESS",
    help="Address of this machine to serve published ports on.",
)
@click.option(
    "--image-archive",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Load the service's image, demo/nginx:1, instead of building it.",
)
@_verb
def show(directory: Path, name: str | None, address: str, image_archive: Path | None) -> None:
    """Start a playground with a demo service.

    Prints commands to try next.

    \b
    Example:
      skep playground demo --dir /var/tmp/skep-demo
    """
    from skep.playground.demo import demo

    _finish(demo(_open(directory, name), address, image_archive))

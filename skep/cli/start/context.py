"""``skep context``: named endpoints, in the store of the docker command.  Commands that Skep does not have are
docker's.
"""

from collections.abc import Iterator
from pathlib import Path

import click

from skep.cli import passthrough
from skep.cli.endpoint import DEFAULT_HOST, ApiEndpoint, HostOptions
from skep.cli.output import OutputOptions, Screen, Shown, shows, table
from skep.cli.running import errors_shown
from skep.cli.start.contexts import DEFAULT, DockerContext, DockerContexts
from skep.errors import InvalidArgument

_FILES = {"ca": "ca.pem", "cert": "cert.pem", "key": "key.pem"}


class _Context(passthrough.WithDockers):
    dockers = "inspect, update, export, import"


@click.group(cls=_Context)
def context() -> None:
    """Manage contexts, shared with docker.

    \b
    Examples:
      skep context create prod ssh://root@manager1
      skep context use prod
    """


@context.command()
@click.option("--description", default="", help="Description of the context.")
@click.option(
    "--docker",
    "settings",
    default="",
    metavar="KEY=VALUE,...",
    help="Endpoint as in docker: host=, ca=, cert=, key=.",
)
@click.option("--use", "uses", is_flag=True, help="Make it the current context.")
@click.argument("name")
@click.argument("host", metavar="[URL]", required=False)
@click.pass_obj
def create(
    options: HostOptions, description: str, settings: str, uses: bool, name: str, host: str | None
) -> None:
    """Create a context for a node.

    URL is unix:///path, tcp://address:port or ssh://user@machine.

    \b
    Examples:
      skep context create prod ssh://root@manager1 --use
      skep context create lab --docker host=tcp://lab:2376,ca=ca.pem,cert=cert.pem,key=key.pem
    """
    with errors_shown():
        given = _settings(settings)
        url = host or given.get("host", "")
        if not url or (host and "host" in given):
            raise InvalidArgument("Specify one node, such as skep context create NAME ssh://user@machine.")
        ApiEndpoint(host=url).client()  # raises an error for an invalid address
        tls = {
            file: Path(given[key]).expanduser().read_bytes() for key, file in _FILES.items() if key in given
        }
        skips = given.get("skip-tls-verify", "").lower() in ("1", "true")
        contexts = DockerContexts(options.docker_folder)
        contexts.create(
            DockerContext(name=name, host=url, description=description, skips_verification=skips), tls
        )
        if uses:
            contexts.use(name)
    click.echo(name)


def _settings(text: str) -> dict[str, str]:
    settings = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in {"host", "skip-tls-verify", *_FILES}:
            raise InvalidArgument(
                f"invalid setting {part!r}. Use host=, ca=, cert=, key= or skip-tls-verify=."
            )
        settings[key] = value
    return settings


@context.command()
@shows
@click.pass_obj
def ls(options: HostOptions, output: OutputOptions) -> None:
    """List contexts.

    A star marks the current context.

    \b
    Example:
      skep context ls
    """

    async def fetch() -> Shown:
        contexts = DockerContexts(options.docker_folder)
        return listed(contexts.all(), options.context_name())

    output.show(fetch)


def listed(contexts: list[DockerContext], current: str) -> Shown:
    """Return the list of the default context and ``contexts``."""
    default = DockerContext(name=DEFAULT, host=DEFAULT_HOST, description="This machine's node")
    rows = [
        {"Name": one.name, "Current": one.name == current, "Description": one.description, "Host": one.host}
        for one in (default, *contexts)
    ]

    def lines(screen: Screen) -> Iterator[str]:
        cells = [
            (f"{row['Name']}{' *' if row['Current'] else ''}", str(row["Description"]), str(row["Host"]))
            for row in rows
        ]
        return table(("NAME", "DESCRIPTION", "HOST"), cells, screen)

    return Shown(data=rows, rows=rows, lines=lines)


@context.command()
@click.argument("name")
@click.pass_obj
def use(options: HostOptions, name: str) -> None:
    """Set the current context of skep and docker.

    NAME can be "default" for this machine's node.

    \b
    Example:
      skep context use prod
    """
    with errors_shown():
        DockerContexts(options.docker_folder).use(name)
    click.echo(name)
    for variable in ("SKEP_HOST", "DOCKER_HOST", "DOCKER_CONTEXT"):
        if options.environment.get(variable):
            click.echo(
                f"{variable} is set and overrides the context. Unset it, or use --context {name}.", err=True
            )


@context.command()
@click.pass_obj
def show(options: HostOptions) -> None:
    """Print the name of the current context.

    \b
    Example:
      skep context show
    """
    with errors_shown():
        current = options.context_name()
    click.echo(current)


@context.command()
@click.option("-f", "--force", is_flag=True, help="Also remove the current context.")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.pass_obj
def rm(options: HostOptions, force: bool, names: tuple[str, ...]) -> None:
    """Remove contexts from this machine.

    The clusters that they point to do not change.

    \b
    Example:
      skep context rm lab
    """
    for name in names:
        with errors_shown():
            DockerContexts(options.docker_folder).remove(name, force=force)
        click.echo(name)

"""``skep``: finds the command, or hands a Docker noun over to docker.

Commands are named by module and attribute and imported when they are run or listed, so ``skep ps`` starts as
fast as docker does and the commands of other parts (the daemon, the playground) stay out of this one's imports.
"""

import importlib
from typing import Any

import click

from skep import __version__
from skep.cli import passthrough

COMMANDS = {
    "daemon": "skep.cli.daemon:daemon",
    "playground": "skep.playground.cli:playground",
    "status": "skep.cli.status:status",
}
"""Command -> ``module:attribute``, in the order of the help."""


class Commands(click.Group):
    """Skep's own commands, and docker's nouns behind them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if location := COMMANDS.get(cmd_name):
            module, _, attribute = location.partition(":")
            command = getattr(importlib.import_module(module), attribute)
            assert isinstance(command, click.Command)
            return command
        if cmd_name in passthrough.NOUNS:
            return passthrough.command(cmd_name)
        return None

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        formatter.write_text(
            "Everything of docker works as well, against Skep's socket: skep service ls, skep node ps, skep logs, ..."
        )


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-H",
    "--host",
    metavar="URL",
    envvar=["SKEP_HOST", "DOCKER_HOST"],
    default="unix:///run/skep/skep.sock",
    show_default=True,
    show_envvar=True,
    help="The node to talk to.",
)
@click.version_option(__version__, prog_name="skep")
@click.pass_context
def main(ctx: click.Context, host: str) -> None:
    """Skep runs containers on many machines, with Docker's simplicity.

    \b
    Examples:
      skep playground up --workers 2     a cluster on this machine
      skep status                        how the cluster is
      skep service ls                    the same as docker service ls
    """
    ctx.obj = host


def run(arguments: list[str] | None = None) -> Any:
    """What ``python -m skep.cli.main`` does."""
    return main(args=arguments, prog_name="skep")


if __name__ == "__main__":
    run()

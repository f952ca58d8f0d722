"""``skep``: finds the command, or hands a Docker noun over to docker.

Commands are named by module and attribute and imported when they are run or listed, so ``skep ps`` starts as
fast as docker does and the commands of other parts (the daemon, the playground) stay out of this one's imports.
"""

import difflib
import importlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import click

from skep import __version__
from skep.cli import passthrough
from skep.cli.endpoint import DEFAULT_HOST, HostOptions


class Command(NamedTuple):
    """Where a command is found, and its line in the help (so that the help imports none of them)."""

    location: str
    summary: str


COMMANDS = {
    "daemon": Command("skep.cli.daemon:daemon", "Run this machine's node (what the systemd unit starts)."),
    "playground": Command(
        "skep.playground.cli:playground", "A cluster on this machine: each node in namespaces of its own."
    ),
    "explain": Command(
        "skep.cli.explain:explain", "Explain why a service or a task is not as its spec says."
    ),
    "doctor": Command("skep.cli.doctor:doctor", "Measure whether nodes reach each other."),
    "cluster": Command(
        "skep.cli.cluster:cluster",
        "The cluster: grace period, address pools, data keys, resumed replacement.",
    ),
    "node": Command("skep.cli.node:node", "Nodes: docker's commands, and eviction."),
    "network": Command("skep.cli.network:network", "Networks: docker's commands, and further subnets."),
    "secret": Command("skep.cli.rotation:secret", "Secrets: docker's commands, rotate and prune."),
    "config": Command("skep.cli.rotation:config", "Configs: docker's commands, rotate and prune."),
    "backup": Command("skep.cli.backup:backup", "Write the whole swarm to an encrypted file, while it runs."),
    "restore": Command("skep.cli.backup:restore", "Make this node the manager of the swarm in a backup."),
    "runs": Command("skep.cli.runs:runs", "List ended tasks with exit codes and last lines."),
    "status": Command("skep.cli.status:status", "Show the state of this node and its cluster."),
}
"""In the order of the help; ``location`` is ``module:attribute``."""


class Commands(click.Group):
    """Skep's own commands, and docker's nouns behind them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Skep's own; docker's are listed in the epilog."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command's module; None: neither ours nor docker's."""
        if entry := COMMANDS.get(cmd_name):
            module, _, attribute = entry.location.partition(":")
            command = getattr(importlib.import_module(module), attribute)
            assert isinstance(command, click.Command)
            return command
        if cmd_name in passthrough.NOUNS:
            return passthrough.command(cmd_name)
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, and similar commands, docker's too, in the error for an unknown one."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            meant = difflib.get_close_matches(
                args[0], sorted({*COMMANDS, *passthrough.NOUNS}), n=2, cutoff=0.7
            )
            if not meant:
                raise
            words = " or ".join(f"'{name}'" for name in meant)
            raise click.UsageError(f"No such command '{args[0]}'. Did you mean {words}?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From ``COMMANDS``, without an import."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])

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
    help="The node to talk to: unix:///path, tcp://address:port, ssh://user@machine.  Else SKEP_HOST, DOCKER_HOST, "
    f"or {DEFAULT_HOST}.",
)
@click.option(
    "-c",
    "--context",
    metavar="NAME",
    help="The docker context to use.  Else DOCKER_CONTEXT, or what `docker context use` chose.",
)
@click.version_option(__version__, prog_name="skep")
@click.pass_context
def main(ctx: click.Context, host: str | None, context: str | None) -> None:
    """Skep runs containers on many machines, with Docker's simplicity.

    \b
    Examples:
      skep playground up --workers 2     a cluster on this machine
      skep status                        how the cluster is
      skep service ls                    the same as docker service ls
    """
    ctx.obj = HostOptions(
        host=host or "", context=context or "", environment=os.environ, home=Path(os.path.expanduser("~"))
    )


def run(arguments: list[str] | None = None) -> Any:
    """What ``python -m skep.cli.main`` does."""
    return main(args=arguments, prog_name="skep")


if __name__ == "__main__":
    run()

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
    "exec": Command("skep.cli.exec:exec_command", "Run a command in a task's container, on any node."),
    "logs": Command("skep.cli.logs:logs", "Show the logs of a service or a task, on any node."),
    "attach": Command("skep.cli.through_docker:attach", "Attach to a task's container, on any node."),
    "cp": Command("skep.cli.through_docker:cp", "Copy files to or from a task's container, on any node."),
    "port-forward": Command(
        "skep.cli.port_forward:port_forward", "Forward ports of this machine into a task's container."
    ),
    "run": Command("skep.cli.run:run", "Run a command once, as a task of a service would."),
    "stats": Command("skep.cli.through_docker:stats", "Show what tasks' containers use, on any node."),
    "task": Command("skep.cli.through_docker:task", "Tasks: the processes in their containers."),
    "explain": Command(
        "skep.cli.explain:explain", "Explain why a service or a task is not as its spec says."
    ),
    "doctor": Command("skep.cli.doctor:doctor", "Measure whether nodes reach each other."),
    "cluster": Command(
        "skep.cli.cluster:cluster",
        "The cluster: its settings, and recovery after the loss of most managers.",
    ),
    "node": Command("skep.cli.node:node", "Nodes: docker's commands; drain, forget, evict."),
    "service": Command("skep.cli.service:service", "Services: docker's commands, and wait."),
    "update": Command("skep.cli.update:update", "Updates of services: pause, resume, abort."),
    "network": Command("skep.cli.network:network", "Networks: docker's commands, and further subnets."),
    "volume": Command("skep.cli.volume:volume", "Volumes: docker's commands, and forget."),
    "secret": Command("skep.cli.rotation:secret", "Secrets: docker's commands, rotate and prune."),
    "config": Command("skep.cli.rotation:config", "Configs: docker's commands, rotate and prune."),
    "stack": Command("skep.cli.stack:stack", "Stacks: docker's commands, Compose files read whole, plans."),
    "import": Command(
        "skep.cli.imports:imports",
        "Stack files from old Compose files, fleet's units, services, a Docker Swarm.",
    ),
    "backup": Command("skep.cli.backup:backup", "Write the whole swarm to an encrypted file, while it runs."),
    "restore": Command("skep.cli.backup:restore", "Make this node the manager of the swarm in a backup."),
    "up": Command("skep.cli.up:up", "Make machines into a cluster over ssh: look, install, start, join."),
    "upgrade": Command(
        "skep.cli.upgrade:upgrade", "Upgrade all nodes, one after the other under drain, with a way back."
    ),
    "reboot-lock": Command(
        "skep.cli.reboot_lock:reboot_lock",
        "The lock that a node takes before it reboots: one at a time is away.",
    ),
    "context": Command(
        "skep.cli.context:context", "Contexts: names for nodes, shared with docker; over ssh, too."
    ),
    "user": Command("skep.cli.user:user", "Users of the API: roles, certificates, tokens, contexts."),
    "version": Command(
        "skep.cli.version:version", "Show versions: --all of every node, else as docker version."
    ),
    "events": Command(
        "skep.cli.events:events", "Show the events of the whole cluster, and go on from any of them."
    ),
    "history": Command(
        "skep.cli.history:history", "Show what happened and why, and the requests of users; export it."
    ),
    "job": Command(
        "skep.cli.job:job", "Jobs: schedules, next and last runs; run one now, retry what failed."
    ),
    "runs": Command("skep.cli.runs:runs", "List ended tasks with exit codes and last lines."),
    "completion": Command("skep.cli.completion:completion", "Print the completion script of a shell."),
    "ui": Command("skep.cli.ui:ui", "Open the dashboard of the cluster in a browser."),
    "top": Command("skep.top.command:top", "Show the cluster live, full-screen."),
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
            "Everything of docker works as well, against Skep's socket: skep service ls, skep node ps, skep info, ..."
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
    if os.environ.get("NO_COLOR"):
        ctx.color = False  # https://no-color.org, for whatever a command prints
    ctx.obj = HostOptions(
        host=host or "", context=context or "", environment=os.environ, home=Path(os.path.expanduser("~"))
    )


def run(arguments: list[str] | None = None) -> Any:
    """What ``python -m skep.cli.main`` does."""
    return main(args=arguments, prog_name="skep")


if __name__ == "__main__":
    run()

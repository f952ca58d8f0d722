"""The ``skep`` command. It runs its own commands and passes docker's to docker.

Commands are named by module and attribute and imported only when they run, so ``skep ps`` starts as fast as docker, and
this module does not import the daemon or the playground.
"""

import difflib
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import click

from skep import __version__
from skep.cli import passthrough
from skep.cli.endpoint import DEFAULT_HOST, HostOptions


class Command(NamedTuple):
    """The location of a command, and its summary, so that the help does not import commands."""

    location: str
    summary: str


GROUPS = {
    "Start": {
        "playground": Command("skep.playground.cli:playground", "Run a test cluster on this machine."),
        "up": Command("skep.cli.start.up:up", "Turn machines into a cluster over SSH."),
        "daemon": Command("skep.configuration.command:daemon", "Run this machine's node."),
        "context": Command("skep.cli.start.context:context", "Manage contexts, shared with docker."),
        "completion": Command(
            "skep.cli.start.completion:completion", "Print the completion script of a shell."
        ),
    },
    "See": {
        "status": Command("skep.cli.see.status:status", "Show the state of the cluster."),
        "top": Command("skep.top.command:top", "Show the cluster live in full screen."),
        "ui": Command("skep.cli.see.ui:ui", "Open the dashboard in a browser."),
        "explain": Command(
            "skep.cli.see.explain:explain", "Explain why an object is not in its desired state."
        ),
        "what-if": Command("skep.cli.see.what_if:what_if", "Show what would follow from a change."),
        "survive": Command(
            "skep.cli.see.survive:survive", "Show which single loss takes a service of a stack down."
        ),
        "verify": Command("skep.cli.see.verify:verify", "Check the invariants of the cluster's state."),
        "events": Command("skep.cli.see.events:events", "Show cluster events as they happen."),
        "history": Command("skep.cli.see.history:history", "Show what happened in the cluster, and why."),
        "runs": Command("skep.cli.see.runs:runs", "List ended tasks with exit codes and last lines."),
        "logs": Command("skep.cli.see.logs:logs", "Show the logs of a service or task on any node."),
        "stats": Command(
            "skep.cli.apps.through_docker:stats", "Show resource usage of tasks' containers on any node."
        ),
    },
    "Apps": {
        "stack": Command("skep.cli.stack.stack:stack", "Deploy and manage Compose stacks."),
        "service": Command("skep.cli.apps.service:service", "Manage services."),
        "job": Command("skep.cli.apps.job:job", "Manage jobs and their schedules."),
        "update": Command("skep.cli.apps.update:update", "Pause, resume, abort or promote service updates."),
        "task": Command("skep.cli.apps.through_docker:task", "Manage tasks."),
        "secret": Command("skep.cli.apps.rotation:secret", "Manage secrets."),
        "config": Command("skep.cli.apps.rotation:config", "Manage configs."),
        "run": Command("skep.cli.apps.run:run", "Run a one-off command with a service's settings."),
        "exec": Command(
            "skep.cli.apps.exec:exec_command", "Run a command in a task's container on any node."
        ),
        "attach": Command("skep.cli.apps.through_docker:attach", "Attach to a task's container on any node."),
        "cp": Command(
            "skep.cli.apps.through_docker:cp", "Copy files to or from a task's container on any node."
        ),
        "port-forward": Command(
            "skep.cli.apps.port_forward:port_forward", "Forward local ports to a task's container."
        ),
        "fleet": Command("skep.cli.apps.fleet:fleet", "Run units with fleetctl's commands."),
        "import": Command("skep.cli.apps.imports:imports", "Convert other formats to stack files."),
    },
    "Cluster": {
        "node": Command("skep.cli.cluster.node:node", "Manage nodes."),
        "cluster": Command("skep.cli.cluster.cluster:cluster", "Manage cluster settings and recovery."),
        "network": Command("skep.cli.cluster.network:network", "Manage networks."),
        "volume": Command("skep.cli.cluster.volume:volume", "Manage volumes."),
        "user": Command("skep.cli.cluster.user:user", "Manage users of the API."),
        "door": Command("skep.cli.cluster.door:door", "Manage the front door, the cluster's HTTP proxies."),
        "certificate": Command(
            "skep.cli.cluster.certificate:certificate", "Manage certificates of host names."
        ),
        "catalog": Command("skep.cli.cluster.catalog:catalog", "Show where services are reached."),
        "balance": Command(
            "skep.cli.cluster.catalog:balance", "Balance this machine's connections over services."
        ),
        "register": Command(
            "skep.cli.cluster.catalog:register", "Register a service of this machine in the catalog."
        ),
        "notify": Command("skep.cli.cluster.notify:notify", "Manage notifications about problems."),
    },
    "Maintain": {
        "upgrade": Command(
            "skep.cli.maintain.upgrade_command:upgrade", "Upgrade all nodes one after the other."
        ),
        "rebalance": Command(
            "skep.cli.maintain.rebalance:rebalance", "Move tasks for an even spread over the nodes."
        ),
        "backup": Command("skep.cli.maintain.backup:backup", "Back up the cluster to an encrypted file."),
        "restore": Command(
            "skep.cli.maintain.backup:restore", "Restore a cluster from a backup onto this node."
        ),
        "doctor": Command("skep.cli.maintain.doctor:doctor", "Diagnose the cluster."),
        "reboot-lock": Command(
            "skep.cli.maintain.reboot_lock:reboot_lock", "Manage the cluster-wide reboot lock."
        ),
        "version": Command("skep.cli.maintain.version:version", "Show version information."),
    },
}
"""Command groups in the order of the help. ``location`` is ``module:attribute``."""
NODE_COMMANDS = ("daemon", "playground")
"""Commands that need the Python packages of the extra ``server``."""
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


class Commands(click.Group):
    """Skep's own commands, and docker's nouns behind them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List Skep's own commands. The help names docker's."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command, or None if neither Skep nor docker has it."""
        if cmd_name in NODE_COMMANDS and importlib.util.find_spec("structlog") is None:
            raise click.ClickException(
                f"skep {cmd_name} needs the Python packages of a node, which this installation does not have. "
                "Run pip install 'skep-orchestrator[server]'."
            )
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
        """Resolve as click does. The error for an unknown command suggests similar ones, including docker's."""
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
        """Write ``GROUPS``, without importing a command."""
        width = max(map(len, COMMANDS))
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), entry.summary) for name, entry in commands.items()])
        with formatter.section("Docker"):
            formatter.write_text(
                "All docker commands work against Skep's socket: skep service ls, skep node ps, skep info, skep images"
            )

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the environment variables and where to read more."""
        with formatter.section("Environment"):
            formatter.write_dl(
                [
                    ("SKEP_HOST", "Node to connect to, instead of --host."),
                    ("DOCKER_HOST", "The same, for docker and Skep."),
                    ("DOCKER_CONTEXT", "Docker context to use, instead of --context."),
                    ("NO_COLOR", "Print without colors."),
                ]
            )
        formatter.write_paragraph()
        formatter.write_text("Run 'skep COMMAND --help' for details and examples of a command.")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-H",
    "--host",
    metavar="URL",
    help="Node to connect to: unix:///path, tcp://address:port or ssh://user@machine. Default: SKEP_HOST, DOCKER_HOST, "
    f"or {DEFAULT_HOST}.",
)
@click.option(
    "-c",
    "--context",
    metavar="NAME",
    help="Docker context to use. Default: DOCKER_CONTEXT, or the current context.",
)
@click.version_option(__version__, prog_name="skep")
@click.pass_context
def main(ctx: click.Context, host: str | None, context: str | None) -> None:
    """Run containers on a cluster of machines with Docker's API.

    \b
    Examples:
      skep playground up --workers 2     start a test cluster on this machine
      skep status                        check the cluster
      skep explain web                   explain why a service is degraded
      skep service ls                    run docker service ls on the cluster
    """
    if os.environ.get("NO_COLOR"):
        ctx.color = False  # https://no-color.org, for whatever a command prints
    ctx.obj = HostOptions(
        host=host or "", context=context or "", environment=os.environ, home=Path(os.path.expanduser("~"))
    )


def run(arguments: list[str] | None = None) -> Any:
    """Run the command line, as ``python -m skep.cli.main`` does."""
    return main(args=arguments, prog_name="skep")


if __name__ == "__main__":
    run()

"""Pass-through of docker commands: ``skep service ls`` runs ``docker service ls`` against Skep's socket."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from skep.cli.endpoint import HostOptions
from skep.cli.running import errors_shown

_OBJECTS = (
    "builder compose config container context image manifest network node plugin secret service "
    "stack swarm system trust volume"
)
_ACTIONS = (
    "attach build commit cp create diff events exec export history images import info inspect "
    "kill load login logout logs pause port ps pull push rename restart rm rmi run save search "
    "start stats stop tag top unpause update version wait"
)
NOUNS = frozenset(f"{_OBJECTS} {_ACTIONS}".split())
"""Docker's top-level commands. Skep's own commands take precedence."""


def command(*nouns: str) -> click.Command:
    """Return a command that runs docker with all further arguments unchanged, including ``--help``."""

    @click.command(
        nouns[-1],
        context_settings={
            "ignore_unknown_options": True,
            "allow_interspersed_args": False,
            "help_option_names": [],
        },
    )
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    @click.pass_obj
    def run(host: HostOptions, words: Sequence[str]) -> None:
        execute(host, nouns, words)

    return run


def execute(host: HostOptions, nouns: Sequence[str], words: Sequence[str]) -> None:
    """Replace this process with ``docker NOUNS WORDS`` for the same endpoint.

    Raises: click.ClickException: docker is not installed.
    """
    docker = find_docker()
    with errors_shown():
        flags = host.endpoint().docker_flags
    os.execv(docker, [docker, *flags, *nouns, *words])


def find_docker() -> str:
    """Return the path of the docker command: the system's, or the command that ``make setup`` installs.

    Raises: click.ClickException: docker is not installed.
    """
    own = Path(sys.prefix) / "libexec" / "skep" / "docker"
    if path := shutil.which("docker"):
        return path
    if own.exists():
        return str(own)
    raise click.ClickException(
        "The docker command is not installed. Install docker-cli (Debian 13) or docker.io, or run make setup."
    )


class WithDockers(click.Group):
    """A group with docker's commands of the same noun, and Skep's own."""

    dockers = "ls, create, inspect, rm"
    """Examples for the help."""
    instead: Mapping[str, str] = {}
    """Commands to run instead of commands that neither Skep nor docker has, by name."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if other := self.instead.get(cmd_name):
            raise click.UsageError(
                f"No such command '{cmd_name}'. Run {other} {str(self.name).upper()}.", ctx
            )
        return super().get_command(ctx, cmd_name) or command(str(self.name), cmd_name)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        formatter.write_text(f"Other docker commands also work: skep {self.name} {self.dockers}")

"""Docker's nouns: ``skep service ls`` runs ``docker service ls`` against Skep's socket."""

import os
import shutil
import sys
from collections.abc import Sequence
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
"""First words that docker understands.  Those of Skep's own commands win."""


def command(*nouns: str) -> click.Command:
    """Return a command that executes docker with every argument behind ``nouns`` unchanged, ``--help`` included."""

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
    """Become ``docker NOUNS WORDS`` with the same endpoint.  Raises: click.ClickException: docker is not installed."""
    docker = find_docker()
    with errors_shown():
        flags = host.endpoint().docker_flags
    os.execv(docker, [docker, *flags, *nouns, *words])


def find_docker() -> str:
    """Return the path of the docker command: from PATH, or as unpacked by set-up into Skep's environment.

    Raises: click.ClickException: docker is not installed.
    """
    own = Path(sys.prefix) / "libexec" / "skep" / "docker"
    if path := shutil.which("docker"):
        return path
    if own.exists():
        return str(own)
    raise click.ClickException(
        "no docker command found: run `make setup`, or install docker-cli (Debian 13) or docker.io"
    )


class WithDockers(click.Group):
    """A command group that passes commands without a definition of Skep's own on to docker."""

    dockers = "ls, create, inspect, rm"
    """Some of docker's commands, for the help."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or command(str(self.name), cmd_name)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        formatter.write_text(f"Everything else is docker's: skep {self.name} {self.dockers}")

"""``skep import``: converts other formats to stack files."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from skep.cli.endpoint import HostOptions
from skep.cli.running import errors_shown, run_requests
from skep.errors import InvalidArgument
from skep.imports import fig as fig_files
from skep.imports import fleet as fleet_units
from skep.imports import inspected
from skep.imports.document import Imported
from skep.imports.swarm import SwarmExport, move_of, notes_of, objects_of
from skep.model.task_end import printable
from skep.model.values.counts import counted

_FILE_BYTES_MAX = 16 << 20
"""Fleet files and units have a few KiB.  The limit stops the command before it reads a wrong file into memory."""


@click.group("import")
def imports() -> None:
    """Convert other formats to stack files.

    Reads old Compose files, fleet units, Docker services or a whole Docker Swarm, and prints a stack file. Settings
    that cannot be converted are listed at the top of the file and on standard error.

    To import an image, use skep image import.

    \b
    Examples:
      skep import fig fig.yml >compose.yaml
      skep import fleet 'apache@.service' db.service --stack shop >compose.yaml
      docker service inspect web db | skep import service --stack shop >compose.yaml
      skep -H tcp://manager:2376 import swarm --output moved
    """


def _stack_option(command: Any) -> Any:
    return click.option(
        "--stack",
        default="",
        metavar="NAME",
        help="Name of the stack. Default: the name in the file, or its directory.",
    )(command)


def processes_option(command: Any) -> Any:
    """Add ``--processes`` to a command that reads units."""
    return click.option(
        "--processes", is_flag=True, help="Run programs of the machines for units without a container."
    )(command)


@imports.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@_stack_option
def fig(file: Path, stack: str) -> None:
    """Convert a fig.yml, or a Compose file of version 1.

    \b
    Example:
      skep import fig fig.yml --stack shop >compose.yaml
    """
    with errors_shown():
        name = "standard input" if str(file) == "-" else str(file)
        _show(fig_files.imported(text_of(file), name, stack or stack_name_of(file)))


@imports.command()
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE...",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@_stack_option
@processes_option
def fleet(files: tuple[Path, ...], stack: str, processes: bool) -> None:
    """Convert fleet units.

    Instances of a template (apache@1.service, apache@2.service) become the replicas of one service. With --processes,
    units whose command is not docker run become plain processes, which the cluster has to allow.

    \b
    Examples:
      skep import fleet apache@1.service apache@2.service db.service --stack shop >compose.yaml
      skep import fleet --processes files.service --stack shop >compose.yaml
    """
    with errors_shown():
        texts = {file.name: text_of(file) for file in files}
        name = stack or stack_name_of(files[0])
        _show(fleet_units.imported(texts, name, has_processes=processes))


@imports.command()
@click.argument(
    "file", default="-", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
)
@_stack_option
@click.option(
    "--networks",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Output of docker network inspect, to replace network IDs by names.",
)
def service(file: Path, stack: str, networks: Path | None) -> None:
    """Convert the output of docker service inspect.

    Reads FILE, or standard input.

    \b
    Example:
      docker network inspect $(docker network ls -q) >networks.json
      docker service inspect web db | skep import service --stack shop --networks networks.json >compose.yaml
    """
    with errors_shown():
        found = inspected.specs_in(text_of(file))
        name = stack or inspected.stack_name_of(spec for spec, _ in found)
        if not name:
            raise InvalidArgument("These services belong to different stacks. Choose a name with --stack.")
        _show(inspected.imported(found, name, _networks(networks)))


@imports.command()
@click.option(
    "--output",
    required=True,
    metavar="DIRECTORY",
    type=click.Path(file_okay=False, path_type=Path),
    help="New directory for the files.",
)
@click.pass_obj
def swarm(host: HostOptions, output: Path) -> None:
    """Convert a whole Docker Swarm.

    Writes stack files, configs, and MOVING.md with the next steps. The swarm does not change. The values of secrets
    cannot be read, so MOVING.md lists their names.

    \b
    Example:
      skep --context old-swarm import swarm --output moved
    """
    move = run_requests(_read_swarm(host))
    with errors_shown():
        _write(move, output)
    for stack, note in notes_of(move):
        click.echo(printable(f"{stack}: {note}"), err=True)
    click.echo(
        f"{output}: {counted(len(move.stacks), 'stack')}. The next steps are in {output / 'MOVING.md'}."
    )


async def _read_swarm(host: HostOptions) -> SwarmExport:
    async with host.client() as client:
        return move_of(await objects_of(client))


def _write(move: SwarmExport, output: Path) -> None:
    """Write the files of a move.  Raises: InvalidArgument: ``output`` already exists; OSError."""
    if output.exists() and any(output.iterdir()):
        raise InvalidArgument(f"{output} is not empty. Choose a new directory.")
    for name, content in move.files.items():
        file = output / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def _show(made: Imported) -> None:
    click.echo(made.text, nl=False)
    for note in made.notes:
        click.echo(printable(str(note)), err=True)


def text_of(file: Path) -> str:
    """Return the content of a file.  Raises: InvalidArgument: it is too large, or not a text."""
    content = sys.stdin.buffer.read(_FILE_BYTES_MAX + 1) if str(file) == "-" else _bytes(file)
    if len(content) > _FILE_BYTES_MAX:
        raise InvalidArgument(f"{file} is larger than {_FILE_BYTES_MAX >> 20} MiB. Choose a smaller file.")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidArgument(f"{file} is not UTF-8 text. Choose a text file.") from None


def _bytes(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(_FILE_BYTES_MAX + 1)


def stack_name_of(file: Path) -> str:
    """Return the name of a stack, which is the name of its file's directory, like Compose's project names."""
    name = re.sub(r"[^a-z0-9_-]", "", file.absolute().parent.name.lower()).lstrip("_-")
    return name or "stack"


def _networks(file: Path | None) -> Mapping[str, Mapping[str, Any]]:
    if file is None:
        return {}
    return inspected.networks_in(text_of(file))

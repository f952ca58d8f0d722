"""``skep version``: versions of this command and of docker, and with ``--all`` of every node."""

import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from skep import __commit__, __date__, __version__
from skep.api.http.versions import NEWEST, OLDEST
from skep.cli import passthrough
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.output import Cell, OutputOptions, Screen, Shown, shows, table
from skep.model.values.counts import counted

_GIT_TIMEOUT_S = 5.0
"""Seconds for ``git describe``, which reads local files only.  The version is shown without it."""
_GO_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}


class _OrDockers(click.Command):
    """Shows Skep's version, then docker's, which includes both client and server.  Only Skep has --all."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_ours = bool({"--all", "-a", *self.get_help_option_names(ctx)} & {*args})
        if not is_ours and not ctx.resilient_parsing:  # shell completion must not run docker
            if not args:  # with --format, only docker's output is shown
                click.echo("\n".join(own_version()))
                sys.stdout.flush()
            passthrough.execute(ctx.find_object(HostOptions) or HostOptions(), ("version",), args)
        return super().parse_args(ctx, args)


def own_version() -> Iterator[str]:
    """Yield the lines about Skep, in the form of docker's."""
    commit, date = (__commit__, __date__) if __commit__ else _checked_out()
    machine = platform.machine()
    yield "Skep:"
    for name, value in (
        ("Version", __version__),
        ("Git commit", commit),
        ("Date", date),
        ("API version", f"{OLDEST} to {NEWEST}"),
        ("Python version", platform.python_version()),
        ("OS/Arch", f"linux/{_GO_NAMES.get(machine, machine)}"),
    ):
        yield f" {name + ':':<18} {value or 'unknown'}"
    yield ""


def _checked_out() -> tuple[str, str]:
    """Return commit and date of a checkout, or empty strings without git."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return "", ""
    try:
        done = subprocess.run(
            ["git", "-C", root, "log", "-1", "--format=%h %cs"],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "", ""
    commit, _, date = done.stdout.strip().partition(" ")
    return commit, date


@click.command(cls=_OrDockers)
@click.option("-a", "--all", "all_nodes", is_flag=True, help="Show the version of every node.")
@shows
@click.pass_obj
def version(host: HostOptions, all_nodes: bool, output: OutputOptions) -> None:
    """Show version information.

    Shows Skep's version, commit, date and API versions, then docker's and the server's.

    Exit code 3, with --all: nodes have different versions.

    \b
    Examples:
      skep version
      skep version --all
      skep version --all --format '{{.Node}} {{.Version}}'
    """
    assert all_nodes, "otherwise docker's"

    async def fetch() -> Shown:
        async with host.client() as client:
            return versions(await client.get("/nodes", timeout_s=RESPONSE_TIMEOUT_S))

    output.show(fetch)


def versions(nodes: Iterable[Mapping[str, Any]]) -> Shown:
    """Return the list of the nodes' versions, with color for versions that differ from most."""
    rows = sorted(
        (
            {
                "Node": node["Description"].get("Hostname") or node["ID"],
                "Role": node["Spec"]["Role"],
                "State": node["Status"]["State"],
                "Version": (node["Description"].get("Engine") or {}).get("EngineVersion", ""),
            }
            for node in nodes
        ),
        key=lambda row: (row["Role"] != "manager", row["Node"]),
    )
    counts = Counter(row["Version"] for row in rows)
    usual = max(counts, key=lambda one: (counts[one], one), default="")

    def lines(screen: Screen) -> Iterator[str]:
        cells = [
            (
                row["Node"],
                row["Role"],
                row["State"],
                Cell(row["Version"], "" if row["Version"] == usual else "yellow"),
            )
            for row in rows
        ]
        yield from table(("NODE", "ROLE", "STATE", "VERSION"), cells, screen)
        if len(counts) > 1:
            yield (
                f"{counted(len(counts), 'version')}. This command has {__version__}. Run skep upgrade to upgrade all "
                "nodes."
            )

    data = {"Command": __version__, "Nodes": rows}
    return Shown(data=data, rows=rows, lines=lines, exit_code=3 if len(counts) > 1 else 0)

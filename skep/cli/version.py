"""``skep version``: this command's, and with ``--all`` every node's."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from skep import __version__
from skep.cli import passthrough
from skep.cli.endpoint import HostOptions
from skep.cli.formatting import counted
from skep.cli.output import Cell, Output, Screen, Shown, shows, table

_RESPONSE_TIMEOUT_S = 15.0


class _OrDockers(click.Command):
    """Without --all it is docker's command, which shows both ends of the connection."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_ours = bool({"--all", "-a", *self.get_help_option_names(ctx)} & {*args})
        if not is_ours and not ctx.resilient_parsing:  # a shell that completes the words runs nothing
            passthrough.execute(ctx.find_object(HostOptions) or HostOptions(), ("version",), args)
        return super().parse_args(ctx, args)


@click.command(cls=_OrDockers)
@click.option("-a", "--all", "all_nodes", is_flag=True, help="Every node's version.")
@shows
@click.pass_obj
def version(host: HostOptions, all_nodes: bool, output: Output) -> None:
    """Show versions: with --all of every node, else as docker version.

    Exit code 3: nodes have different versions.

    \b
    Examples:
      skep version --all
      skep version --all --format '{{.Node}} {{.Version}}'
    """
    assert all_nodes, "otherwise docker's"

    async def fetch() -> Shown:
        async with host.client() as client:
            return versions(await client.get("/nodes", timeout_s=_RESPONSE_TIMEOUT_S))

    output.show(fetch)


def versions(nodes: Iterable[Mapping[str, Any]]) -> Shown:
    """The versions of ``nodes``; those that differ from most are coloured."""
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
            yield f"{counted(len(counts), 'version')}; this command has {__version__}"

    data = {"Command": __version__, "Nodes": rows}
    return Shown(data=data, rows=rows, lines=lines, exit_code=3 if len(counts) > 1 else 0)

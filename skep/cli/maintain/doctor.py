"""``skep doctor``: problems of the cluster, measured now."""

import asyncio
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import click

from skep.cli import options
from skep.cli.cluster.certificate import certificate_problems
from skep.cli.cluster.door import certificates_of, door_problems
from skep.cli.endpoint import HostOptions
from skep.cli.output import Cell, OutputOptions, Screen, Shown, shows, table
from skep.cli.see.quorum import headers_for
from skep.errors import Unavailable
from skep.model.task_end import printable
from skep.model.values.counts import counted

_RESPONSE_TIMEOUT_S = 40.0
"""Timeout in seconds.  The manager waits 25 s for nodes, and names the nodes that need longer."""
_HEAD = ("FROM", "TO", "CHECK", "PORT", "LOSS", "RTT", "MTU", "SPEED", "WAY", "STATE")
_DIRECT = "direct"
_WELL_ROWS_MAX = 40
"""Maximum number of paths without a problem that are listed."""
_DETAIL_LINES_MAX = 20
"""Maximum number of reasons below the table.  Each reason is printed once."""

NodeResult = Mapping[str, Any]
Row = tuple[str, ...]


@click.group()
def doctor() -> None:
    """Diagnose the cluster.

    \b
    Examples:
      skep doctor network
      skep doctor door
    """


@doctor.command(cls=options.accepting({"--json": "--output=json"}))
@click.option(
    "--throughput",
    is_flag=True,
    help="Also measure throughput. Sends up to 32 MiB between each pair of nodes.",
)
@click.option("--all", "shows_all", is_flag=True, help="Show every check, not only failed ones.")
@shows
@click.pass_obj
def network(host: HostOptions, throughput: bool, shows_all: bool, *, output: OutputOptions) -> None:
    """Test whether nodes can reach each other.

    All nodes probe each other on every port, on the path that container traffic takes. Failures come first, with their
    port. In a large cluster, each node probes only some of the others.

    Exit code 1: a check failed, or a node did not respond.

    \b
    Examples:
      skep doctor network
      skep doctor network --throughput
      skep doctor network -o json | jq '.[].Paths[] | select(.Findings[].Failing)'
    """

    async def fetch() -> Shown:
        results = await _results(host, throughput=throughput)
        fails = is_too_early(results) or any(has_problem(result) for result in results)
        return Shown(
            data=results,
            rows=results,
            lines=lambda screen: shown(results, screen, shows_all=shows_all or screen.is_wide),
            exit_code=int(fails),
        )

    output.show(fetch)


@doctor.command()
@shows
@click.pass_obj
def door(host: HostOptions, *, output: OutputOptions) -> None:
    """Check routes and certificates of the front door.

    Routes with many failed requests in the last minute are also listed. Only administrators see certificates.

    Exit code 1: a problem was found.

    \b
    Example:
      skep doctor door
    """

    async def fetch() -> Shown:
        async with host.requests() as client:
            routes, certificates = await client.get("/skep/door"), await certificates_of(client)
        found = [*door_problems(routes), *certificate_problems(certificates)]
        lines = found or [f"{counted(len(routes), 'route')}: no problem found."]
        return Shown(
            data=found,
            rows=[{"Problem": one} for one in found],
            lines=lambda _: iter(map(printable, lines)),
            exit_code=int(bool(found)),
        )

    output.show(fetch)


async def _results(host: HostOptions, *, throughput: bool) -> list[NodeResult]:
    """Return every node's result, in the order of host names.  Shows progress on a terminal."""
    results: list[NodeResult] = []
    try:
        async with asyncio.timeout(_RESPONSE_TIMEOUT_S):
            total = await _collect(host, results, throughput=throughput)
    except TimeoutError:
        raise Unavailable(
            f"the probes did not finish within {_RESPONSE_TIMEOUT_S:g} s. Try again, or run skep status."
        ) from None
    if len(results) < total:
        raise Unavailable(f"the manager stopped responding after {len(results)} of {total} nodes. Try again.")
    return sorted(results, key=lambda result: (result["Hostname"], result["ID"]))


async def _collect(host: HostOptions, results: list[NodeResult], *, throughput: bool) -> int:
    """Append every result to ``results`` as it arrives, and return the number of nodes that take part."""
    method = "POST" if throughput else "GET"
    async with host.client() as client:
        headers = await headers_for(client)
        async with client.stream("/skep/doctor/network", method=method, headers=headers) as stream:
            objects = stream.objects()
            beginning = await anext(objects, None)
            if beginning is None:
                raise Unavailable("the manager sent no response. Try again.")
            total = len(beginning["Nodes"])
            with _Progress(total) as progress:
                async for result in objects:
                    results.append(result)
                    progress.show(len(results))
    return total


class _Progress:
    """Shows ``5 of 33 nodes`` on stderr, overwriting itself.  Shows nothing without a terminal."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._is_seen = sys.stderr.isatty()

    def __enter__(self) -> "_Progress":
        self.show(0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_seen:
            click.echo("\r\033[K", err=True, nl=False)

    def show(self, done: int) -> None:
        if self._is_seen:
            click.echo(f"\r\033[Kresponses from {done} of {counted(self._total, 'node')}", err=True, nl=False)


def has_problem(result: NodeResult) -> bool:
    """Return whether a check of the node fails, or it reports a condition or an error."""
    return bool(result.get("Error") or result.get("Conditions")) or any(
        finding["Failing"] for path in result["Paths"] for finding in path["Findings"]
    )


# -- for people ---------------------------------------------------------------------------------------------------


def shown(results: Sequence[NodeResult], screen: Screen, *, shows_all: bool = False) -> Iterator[str]:
    """Yield the verdict, a table of pairs with failures first, and the reasons of failures."""
    yield verdict(results)
    yield ""
    failing, well = _rows(results, shows_all=shows_all)
    if all(_way(path) == _DIRECT for result in results for path in result["Paths"]):
        failing, well = ([(*row[:-2], "", row[-1]) for row in rows] for rows in (failing, well))
    hidden = 0 if shows_all or len(well) <= _WELL_ROWS_MAX else len(well)
    listed = [*failing, *(() if hidden else well)]
    columns = [position for position in range(len(_HEAD)) if any(row[position] for row in listed)]
    cells = [
        [Cell(row[position], "red" if number < len(failing) else "") for position in columns]
        for number, row in enumerate(listed)
    ]
    if cells:
        yield from table([_HEAD[position] for position in columns], cells, screen)
    if hidden:
        yield f"{hidden} paths without problems are hidden. Use --all to show them."
    sections = (
        ("Reasons", _details(results)),
        ("Problems reported by nodes", _conditions(results)),
        ("Nodes without a response", _errors(results)),
        ("Rootless nodes, which have no overlay networks", _rootless(results)),
    )
    for title, lines in sections:
        if lines:
            yield ""
            yield f"{title}:"
            yield from (f"  {line}" for line in lines)


def verdict(results: Sequence[NodeResult]) -> str:
    """Return one sentence with the failures by port."""
    pairs = {
        tuple(sorted((result["Hostname"], path["Peer"])))
        for result in results
        for path in result["Paths"]
        if path["PeerID"] != result["ID"]
    }
    failing: dict[str, set[tuple[str, ...]]] = {}
    for result in results:
        for path in result["Paths"]:
            for finding in path["Findings"]:
                if finding["Failing"]:
                    what = f"{finding['Port']} ({finding['Check']})".strip()
                    failing.setdefault(what, set()).add(tuple(sorted({result["Hostname"], path["Peer"]})))
    silent = sum(bool(result.get("Error")) for result in results)
    looked = f"{counted(len(results), 'node')}, {counted(len(pairs), 'pair')}"
    words = [
        f"{what} fails {_where(places)}"
        for what, places in sorted(failing.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    if troubled := sum(bool(result.get("Conditions")) for result in results):
        words.append(f"{counted(troubled, 'node')} with problems")
    if silent:
        words.append(f"no response from {counted(silent, 'node')}")
    if is_too_early(results):
        words.append("the nodes do not know their peers yet, so try again in a few seconds")
    return f"{looked}: {'; '.join(words) or 'no problems found'}"


def is_too_early(results: Sequence[NodeResult]) -> bool:
    """Return whether the nodes have just joined, and have no list of peers to probe yet."""
    measured = [result for result in results if not result.get("Rootless")]
    return len(measured) > 1 and not any(result["Paths"] or result.get("Error") for result in measured)


def _where(places: Collection[tuple[str, ...]]) -> str:
    """Return the place of a failure: the only pair or node by name, or the number of places."""
    if len(places) > 1:
        return f"at {len(places)} places"
    (names,) = places
    return f"between {' and '.join(names)}" if len(names) > 1 else f"on {names[0]}"


def _rows(results: Sequence[NodeResult], *, shows_all: bool) -> tuple[list[Row], list[Row]]:
    """Return rows of failing checks, and of paths without a failure, or with ``shows_all`` of their checks."""
    failing: list[Row] = []
    well: list[Row] = []
    for result in results:
        for path in sorted(result["Paths"], key=lambda path: (path["Peer"], path["PeerID"])):
            peer = path["Peer"] if path["PeerID"] != result["ID"] else "(itself)"
            findings = path["Findings"]
            for finding in findings:
                if finding["Failing"]:
                    failing.append((result["Hostname"], peer, *_cells(finding, path), "FAILS"))
                elif shows_all:
                    well.append((result["Hostname"], peer, *_cells(finding, path), "ok"))
            if not shows_all and findings and not any(finding["Failing"] for finding in findings):
                well.append((result["Hostname"], peer, *_summary(findings, path), "ok"))
    return failing, well


def _cells(finding: NodeResult, path: NodeResult) -> Row:
    return (
        finding["Check"],
        finding["Port"],
        _loss(finding["Sent"], finding["Lost"]),
        _milliseconds(finding.get("RoundTripMs")),
        *_measures(path),
    )


def _summary(findings: Sequence[NodeResult], path: NodeResult) -> Row:
    """Return one row for all checks of a path: the loss, and the shortest round trip."""
    sent, lost = (sum(finding[word] for finding in findings) for word in ("Sent", "Lost"))
    times = [finding["RoundTripMs"] for finding in findings if finding.get("RoundTripMs") is not None]
    return (
        counted(len(findings), "check"),
        "",
        _loss(sent, lost),
        _milliseconds(min(times, default=None)),
        *_measures(path),
    )


def _measures(path: NodeResult) -> Row:
    speed = path.get("Throughput", 0)
    return str(path.get("MTU") or ""), f"{speed * 8 / 1e6:,.0f} Mbit/s" if speed else "", _way(path)


def _way(path: NodeResult) -> str:
    """Return how packets get to the peer.  An earlier manager sends nothing about it."""
    return str(path.get("Way", _DIRECT))


def _loss(sent: int, lost: int) -> str:
    return f"{100 * lost / sent:.0f} %" if sent else ""


def _milliseconds(round_trip: float | None) -> str:
    return f"{round_trip:.1f} ms" if round_trip is not None else ""


def _details(results: Sequence[NodeResult]) -> list[str]:
    """Return the reasons of failures and the repairs, each sentence once with its first pair of nodes."""
    found: dict[str, list[str]] = {}
    for result in results:
        for path in result["Paths"]:
            for finding in path["Findings"]:
                if finding.get("Detail"):
                    where = result["Hostname"]
                    if path["PeerID"] != result["ID"]:
                        where += f" -> {path['Peer']}"
                    found.setdefault(f"{finding['Check']}: {finding['Detail']}", []).append(where)
    lines = [
        f"{places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}: {sentence}"
        for sentence, places in found.items()
    ]
    if len(lines) > _DETAIL_LINES_MAX:
        return [*lines[:_DETAIL_LINES_MAX], f"and {len(lines) - _DETAIL_LINES_MAX} more (-o json)"]
    return lines


def _conditions(results: Sequence[NodeResult]) -> list[str]:
    return [f"{result['Hostname']}: {one}" for result in results for one in result.get("Conditions", ())]


def _errors(results: Sequence[NodeResult]) -> list[str]:
    return [f"{result['Hostname']}: {result['Error']}" for result in results if result.get("Error")]


def _rootless(results: Sequence[NodeResult]) -> list[str]:
    return [result["Hostname"] for result in results if result.get("Rootless")]

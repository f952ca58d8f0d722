"""``skep history``: changes of the cluster with their reasons, and the requests of users."""

import asyncio
import shlex
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import click
import msgspec

from skep.api.client.requests import Requests
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.output import Cell, OutputOptions, Screen, Shown, shows, table
from skep.cli.running import errors_shown, say
from skep.cli.see.points_in_time import local_now, moment_of
from skep.errors import InvalidArgument
from skep.model.values.counts import counted
from skep.model.values.times import SECOND_NS, unix_ns

_PAGE = 1000
"""Largest number of entries in one response of the manager."""
_ENTRIES = 50
"""Entries that are shown without ``--limit``."""
_COLORS = {"error": "red", "warning": "yellow"}


@click.command()
@click.argument("name", required=False, default="", metavar="[SERVICE|NODE|STACK]")
@click.option(
    "--since",
    default="",
    metavar="TIME",
    help="Start time: '1 hour ago', 'yesterday 14:00', '14:00', RFC 3339.",
)
@click.option("--until", default="", metavar="TIME", help="End time, written as for --since.")
@click.option("--requests", "only", flag_value="request", help="Show only requests: the audit log.")
@click.option("--changes", "only", flag_value="change", help="Show only changes, without requests.")
@click.option(
    "--limit",
    "-n",
    default=_ENTRIES,
    show_default=True,
    type=click.IntRange(1, _PAGE),
    metavar="N",
    help="Number of newest entries to show.",
)
@click.option(
    "--export",
    metavar="FILE",
    help="Write all entries to FILE as JSON lines, oldest first. - is stdout.",
)
@shows
@click.pass_obj
def history(
    host: HostOptions,
    name: str,
    since: str,
    until: str,
    only: str | None,
    limit: int,
    export: str | None,
    output: OutputOptions,
) -> None:
    """Show what happened in the cluster, and why.

    Without a name, shows the whole cluster. Includes the audit log: which users made which requests.

    \b
    Examples:
      skep history web
      skep history --requests --since '1 hour ago'
      skep history w1 --since 'yesterday 14:00' --until 'yesterday 15:00'
      skep history --export history.ndjson
    """
    now = local_now()
    kind = {"request": "--requests", "change": "--changes"}.get(only or "")
    number = f"-n {limit}" if limit != _ENTRIES else ""
    start = f"--since {shlex.quote(since)}" if since else ""
    earlier = " ".join(filter(None, ("skep history", shlex.quote(name) if name else "", kind, number, start)))

    async def fetch() -> Shown:
        query = query_of(name, since, until, only, now)
        async with host.requests() as client:
            found = await _page(client, {**query, "limit": str(limit)})
        found["Entries"].reverse()
        return Shown(
            data=found,
            rows=found["Entries"],
            lines=lambda screen: lines_of(found, screen, now, earlier, no_entries(found, name, query, now)),
        )

    if export is None:
        output.show(fetch)
        return
    with errors_shown():
        pages = _pages(host, query_of(name, since, until, only, now))
        if export == "-":
            asyncio.run(_export(pages, sys.stdout.buffer))
            return
        partial = Path(f"{export}.partial")
        with partial.open("wb") as file:
            count = asyncio.run(_export(pages, file))
        partial.replace(export)  # The file appears once it is complete.
    say(f"Wrote {counted(count, 'entry', 'entries')} to {export}")


def query_of(name: str, since: str, until: str, kind: str | None, now: datetime) -> dict[str, str]:
    """Return the parameters of ``GET /skep/history``.

    Raises: InvalidArgument: a time is invalid, or the start is after the end.
    """
    times = {word: moment_of(text, now) for word, text in (("since", since), ("until", until)) if text}
    if len(times) > 1 and unix_ns(times["since"]) > unix_ns(times["until"]):
        raise InvalidArgument(f"--since {since} is after --until {until}. Use an earlier --since")
    return {
        **times,
        **({"kind": kind} if kind else {}),
        **({"about": name} if name else {}),
    }


def no_entries(page: Mapping[str, Any], name: str, query: Mapping[str, str], now: datetime) -> str:
    """Return the line for a page without entries, with what would find some."""
    if not page["Total"]:
        return "No entries yet."
    oldest_ns = unix_ns(page["Oldest"])
    about = f" about {name}" if name else ""
    since = f"the oldest entry is from {datetime.fromtimestamp(oldest_ns / SECOND_NS, now.tzinfo):%Y-%m-%d %H:%M:%S}"
    if "until" in query and unix_ns(query["until"]) < oldest_ns:
        return f"No entries match: {since}. Try a later --until."
    if "since" in query and unix_ns(query["since"]) > oldest_ns:
        return f"No entries{about} match. Try an earlier --since: {since}."
    return f"No entries{about} match: {since}."


async def _page(client: Requests, query: Mapping[str, str]) -> Any:
    return await client.request("GET", "/skep/history", query=query, timeout_s=RESPONSE_TIMEOUT_S)


async def _pages(host: HostOptions, query: Mapping[str, str]) -> AsyncIterator[Sequence[Mapping[str, Any]]]:
    """Yield all entries in pages, oldest first."""
    wanted = {**query, "order": "asc", "limit": str(_PAGE)}
    async with host.requests() as client:
        while True:
            page = await _page(client, wanted)
            yield page["Entries"]
            if not page["Next"]:
                return
            wanted["cursor"] = page["Next"]


async def _export(pages: AsyncIterator[Sequence[Mapping[str, Any]]], file: IO[bytes]) -> int:
    """Write every entry, a page at a time, and return their number."""
    written = 0
    async for entries in pages:
        for entry in entries:
            file.write(msgspec.json.encode(entry) + b"\n")
        written += len(entries)
    return written


def lines_of(
    page: Mapping[str, Any],
    screen: Screen,
    now: datetime,
    earlier: str = "skep history",
    none: str = "No entries match.",
) -> Iterator[str]:
    """Yield the table, oldest first, with times in the zone of ``now``.

    Args:
        earlier: The command that shows earlier entries, without ``--until``.
        none: The line without entries.
    """
    if not page["Entries"]:
        yield none
        return
    more = ("ID",) if screen.is_wide else ()
    rows = [_row(entry, screen, now) for entry in page["Entries"]]
    yield from table(("TIME", *more, "BY", "EVENT"), rows, screen)
    if page["Next"]:
        oldest = datetime.fromtimestamp(unix_ns(page["Oldest"]) / SECOND_NS, now.tzinfo)
        yield f"The oldest entry is from {oldest:%Y-%m-%d %H:%M:%S}. Show earlier entries with:"
        yield f"  {earlier} --until {page['Entries'][0]['Time']}"


def _row(entry: Mapping[str, Any], screen: Screen, now: datetime) -> list[str | Cell]:
    at = datetime.fromtimestamp(unix_ns(entry["Time"]) / SECOND_NS, now.tzinfo)
    is_today = at.date() == now.date()
    # Folded requests are equal.  Folded changes need not be equal, so their messages have the number in other words.
    is_repeated = entry.get("Kind") == "request" and entry.get("Count", 1) > 1
    times = f" (×{entry['Count']})" if is_repeated else ""
    return [
        at.strftime("%H:%M:%S" if is_today and not screen.is_wide else "%Y-%m-%d %H:%M:%S"),
        *((str(entry.get("ObjectID", "")),) if screen.is_wide else ()),
        _by(entry),
        Cell(f"{entry['Message']}{times}", _COLORS.get(entry["Severity"], "")),
    ]


def _by(entry: Mapping[str, Any]) -> str:
    """Return the client of a request and its node, or the cluster for a change."""
    by = entry.get("By")
    if by is None:
        return "-"
    client = (
        by.get("User")
        or by.get("Certificate")
        or (f"uid {by['UID']}" if "UID" in by else by.get("Through", "?"))
    )
    return f"{client}@{by['Node']}" if by.get("Node") else str(client)

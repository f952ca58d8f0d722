"""``skep events``: the cluster's events, including events of tasks, without a gap after a lost connection."""

from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime
from typing import Any

import click
import msgspec

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock, SystemClock
from skep.api.client.client import ApiClient
from skep.api.client.requests import Filters, filters_of, parameters_of
from skep.cli import options
from skep.cli.endpoint import HostOptions
from skep.cli.output import OutputOptions, shows_as_it_happens
from skep.cli.running import errors_shown, run_requests
from skep.cli.see.points_in_time import local_now, moment_of
from skep.cli.see.quorum import headers_for
from skep.errors import FailedPrecondition, InvalidArgument, Unavailable
from skep.model.options.labels import LABEL_NODE_ID, LABEL_SERVICE_NAME
from skep.model.task_end import printable
from skep.model.values.times import SECOND_NS, timestamp, unix_ns

RECONNECT_S_MAX = 10.0
"""The longest pause in seconds before a new connection.  Events of the meantime follow, because the cursor is kept."""
_SWARMS_OWN = "com.docker.swarm."
_ID_CHARACTERS = 12
"""Length of Docker's short ids."""
_TOLD = ("disconnect", "gap")
"""Messages about the stream that are shown, because events of a node may be missing."""


@click.command(cls=options.accepting({"--json": "--output=json"}))
@click.option(
    "--filter",
    "-f",
    "words",
    multiple=True,
    metavar="KEY=VALUE",
    help="Filter as in docker events. Also task=NAME.",
)
@click.option("--after", default="", metavar="CURSOR", help="Start after the event with this cursor.")
@click.option(
    "--since",
    default="",
    metavar="TIME",
    help="Start in the past: 30s, '10 min ago', '14:00', RFC 3339.",
)
@click.option("--until", default="", metavar="TIME", help="End at this time, written as for --since.")
@click.option(
    "--nodes",
    default="",
    metavar="all|NODE,...",
    help="Include events of containers, images and volumes of these nodes.",
)
@shows_as_it_happens
@click.pass_obj
def events(host: HostOptions, /, words: tuple[str, ...], output: OutputOptions, **given: str) -> None:
    """Show cluster events as they happen.

    Includes the events of tasks. If the connection is lost, the command reconnects and shows the missed events. -o wide
    shows full IDs, all labels and the cursor of each event. Any manager accepts a cursor.

    \b
    Examples:
      skep events --filter type=task
      skep events --nodes all --filter event=oom
      skep events --since 1h --until now
      skep events -o json --after 1-5042
      skep events --format '{{.Type}} {{.Action}} {{.Actor.Attributes.name}}'
    """

    def show(event: Mapping[str, Any]) -> None:
        is_for_people = event.get("Type") != "stream" or event["Action"] in _TOLD
        line = f"{event['Cursor']} {whole_line_of(event)}" if output.form == "wide" else line_of(event)
        output.show_next(event, line if is_for_people else "")

    with errors_shown():
        filters, stream = filters_of(words), stream_of(given, local_now())
    run_requests(_follow(host, filters, stream, show))


class EventStream(msgspec.Struct, frozen=True, kw_only=True):
    """The start and end of a stream of events.

    Args:
        after: Cursor of the event that it follows.
        since: Unix time in seconds of the first event, without a cursor.
        until_ns: Unix time in nanoseconds at which it ends, or None if it does not.
    """

    after: str = ""
    since: str = ""
    until_ns: int | None = None
    nodes: str = ""

    def query(self, cursor: str) -> Mapping[str, str]:
        """Return the parameters of a request for the events after ``cursor``."""
        until = _unix(self.until_ns) if self.until_ns is not None else ""
        given = {
            "after": cursor,
            "since": "" if cursor else self.since,
            "until": until,
            "nodes": self.nodes,
        }
        return {key: value for key, value in given.items() if value}


def stream_of(options: Mapping[str, str], now: datetime) -> EventStream:
    """Return the stream that the command's options describe.

    Raises: InvalidArgument: a time is invalid, or the stream would end before it begins.
    """
    since = unix_ns(moment_of(options["since"], now)) if options["since"] else None
    until = unix_ns(moment_of(options["until"], now)) if options["until"] else None
    if since is not None and options["after"]:
        raise InvalidArgument("--since and --after cannot be used together")
    if until is not None and until < (since or 0):
        raise InvalidArgument(f"--since {options['since']} is after --until {options['until']}")
    begin = _unix(since) if since is not None else ""
    return EventStream(after=options["after"], since=begin, until_ns=until, nodes=options["nodes"])


def _unix(ns: int) -> str:
    return f"{ns // SECOND_NS}.{ns % SECOND_NS:09d}"


def line_of(event: Mapping[str, Any]) -> str:
    """Return an event as one line: the name before the id, without the labels that swarm mode sets on its objects."""
    actor = event["Actor"]
    attributes, id = dict(actor["Attributes"]), str(actor["ID"])
    name = str(attributes.pop("name", "")).removesuffix(f".{id}")
    if event["Type"] == "task" and (place := attributes.pop("slot", "") or attributes.get("node.name")):
        name = f"{attributes.get(LABEL_SERVICE_NAME, '')}.{place}".lstrip(".")
    subject = f"{name} ({id[:_ID_CHARACTERS]})" if name and name != id else id
    if (node := attributes.get(LABEL_NODE_ID)) and "node.name" not in attributes:
        attributes["node"] = node[:_ID_CHARACTERS]
    shown = {name: value for name, value in attributes.items() if not name.startswith(_SWARMS_OWN)}
    return _line(event, subject, " ".join(f"{name}={value}" for name, value in sorted(shown.items())))


def whole_line_of(event: Mapping[str, Any]) -> str:
    """Return an event as ``docker events`` prints it."""
    actor = event["Actor"]
    attributes = ", ".join(f"{name}={value}" for name, value in sorted(actor["Attributes"].items()))
    return _line(event, actor["ID"], f"({attributes})")


def _line(event: Mapping[str, Any], subject: str, attributes: str) -> str:
    words = (timestamp(event["timeNano"]), event["Type"], event["Action"], subject, attributes)
    return printable(" ".join(filter(None, words)))


async def _follow(
    host: HostOptions, filters: Filters, stream: EventStream, show: Callable[[Mapping[str, Any]], None]
) -> None:
    async with host.client() as client:
        await headers_for(client)  # warns without a leader, because nothing may happen then
        async for event in follow(client, filters, stream, SystemClock()):
            show(event)


async def follow(
    client: ApiClient, filters: Filters, stream: EventStream, clock: Clock
) -> AsyncIterator[Mapping[str, Any]]:
    """Yield events with their cursors until the stream's end, without a gap when the command reconnects.

    Raises: Unavailable: the first connection fails; SkepError: refused, as when events are no longer kept.
    """
    backoff, cursor, was_connected = Backoff(0.2, RECONNECT_S_MAX), stream.after, False
    while True:
        try:
            query = {**parameters_of(filters), **stream.query(cursor)}
            async with client.lines("/skep/events", query) as lines:
                was_connected = True  # perhaps for hours without an event
                async for line in lines:
                    event = msgspec.json.decode(line)
                    if "message" in event:
                        raise FailedPrecondition(event["message"])
                    cursor = event["Cursor"]
                    backoff.reset()
                    yield event
        except (Unavailable, msgspec.DecodeError):  # the connection was lost, perhaps within a line
            if not (was_connected and cursor):  # without a cursor there would be a gap
                raise
        if stream.until_ns is not None and clock.now_ns() >= stream.until_ns:
            return
        await backoff.sleep(clock)

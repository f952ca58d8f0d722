"""``skep events``: the cluster's events, tasks' among them, without a gap over a lost connection."""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import click
import msgspec

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock, SystemClock
from skep.api.client import Client
from skep.api.requests import Filters, filters_of, parameters_of
from skep.cli.endpoint import HostOptions
from skep.cli.output import Output, shows_as_it_happens
from skep.cli.running import run_requests
from skep.errors import FailedPrecondition, Unavailable
from skep.model.labels import LABEL_NODE_ID
from skep.model.task_end import printable
from skep.model.times import timestamp

RECONNECT_S_MAX = 10.0
_SWARMS_OWN = "com.docker.swarm."
_ID_CHARACTERS = 12
_TOLD = ("away", "gap")
"""Of messages about the stream: what may be missing of a node."""


@click.command()
@click.option(
    "--filter", "-f", "words", multiple=True, metavar="KEY=VALUE", help="As docker events; also task=."
)
@click.option("--after", default="", metavar="CURSOR", help="Go on after the event with this cursor.")
@click.option(
    "--nodes",
    default="",
    metavar="all|NODE,...",
    help="Those of containers, images and volumes of these nodes, too.",
)
@click.option("--json", "is_json", is_flag=True, help="As -o json: one object per line, with its cursor.")
@shows_as_it_happens
@click.pass_obj
def events(
    host: HostOptions, words: tuple[str, ...], after: str, nodes: str, *, is_json: bool, output: Output
) -> None:
    """Show the events of the whole cluster as they come, those of tasks among them.

    A lost connection is made again, and the stream goes on where it ended.  Any manager goes on from a cursor.
    With -o wide: cursors, whole ids and every label, as docker events shows them.

    \b
    Examples:
      skep events --filter type=task
      skep events --nodes all --filter event=oom
      skep events --json --after 1-5042
      skep events --format '{{.Type}} {{.Action}} {{.Actor.Attributes.name}}'
    """
    if is_json:
        output = msgspec.structs.replace(output, form="json")

    def show(event: Mapping[str, Any]) -> None:
        is_for_people = event.get("Type") != "stream" or event["Action"] in _TOLD
        line = f"{event['Cursor']} {whole_line_of(event)}" if output.form == "wide" else line_of(event)
        output.show_next(event, line if is_for_people else "")

    run_requests(_follow(host, filters_of(words), after, nodes, show))


def line_of(event: Mapping[str, Any]) -> str:
    """For people: the name before the id, and without the labels that swarm mode gives what it makes."""
    actor = event["Actor"]
    attributes, id = dict(actor["Attributes"]), str(actor["ID"])
    name = str(attributes.pop("name", "")).removesuffix(f".{id}")
    subject = f"{name} ({id[:_ID_CHARACTERS]})" if name and name != id else id
    if (node := attributes.get(LABEL_NODE_ID)) and "node.name" not in attributes:
        attributes["node"] = node[:_ID_CHARACTERS]
    shown = {name: value for name, value in attributes.items() if not name.startswith(_SWARMS_OWN)}
    return _line(event, subject, " ".join(f"{name}={value}" for name, value in sorted(shown.items())))


def whole_line_of(event: Mapping[str, Any]) -> str:
    """As ``docker events`` prints it."""
    actor = event["Actor"]
    attributes = ", ".join(f"{name}={value}" for name, value in sorted(actor["Attributes"].items()))
    return _line(event, actor["ID"], f"({attributes})")


def _line(event: Mapping[str, Any], subject: str, attributes: str) -> str:
    words = (timestamp(event["timeNano"]), event["Type"], event["Action"], subject, attributes)
    return printable(" ".join(filter(None, words)))


async def _follow(
    host: HostOptions, filters: Filters, after: str, nodes: str, show: Callable[[Mapping[str, Any]], None]
) -> None:
    async with host.client() as client:
        async for event in followed(client, filters, after, SystemClock(), nodes):
            show(event)


async def followed(
    client: Client, filters: Filters, after: str, clock: Clock, nodes: str = ""
) -> AsyncIterator[Mapping[str, Any]]:
    """Events with their cursors, without a gap, over any number of connections.

    Raises: Unavailable: the first one cannot be made; SkepError: refused, as when events are not kept any more.
    """
    backoff, cursor = Backoff(0.2, RECONNECT_S_MAX), after
    while True:
        try:
            more = {key: value for key, value in (("after", cursor), ("nodes", nodes)) if value}
            async with client.lines("/skep/events", {**parameters_of(filters), **more}) as lines:
                async for line in lines:
                    event = msgspec.json.decode(line)
                    if "message" in event:
                        raise FailedPrecondition(event["message"])
                    cursor = event["Cursor"]
                    backoff.reset()
                    yield event
        except (Unavailable, msgspec.DecodeError):  # a line that is cut off is no event
            if cursor == after:
                raise
        await backoff.sleep(clock)

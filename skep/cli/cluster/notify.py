"""``skep notify``: targets that are told about problems of the cluster."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.output import OutputOptions, Screen, Shown, shows, table
from skep.cli.running import delete_each, run_requests, say
from skep.model.options.notifications import Topic
from skep.model.task_end import printable
from skep.model.values.counts import counted
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import minute

_TEST_S = 30.0
"""Time limit in seconds for a test, which the manager itself limits to 20."""


@click.group()
def notify() -> None:
    """Manage notifications about problems.

    The leader sends a message when a problem begins, once a day while it lasts, and when it is over.

    \b
    Examples:
      skep notify add ops https://hooks.example.org/skep --secret-file key
      skep notify test ops
      skep notify ls
    """


@notify.command()
@click.option(
    "--secret", default="", metavar="SECRET", help="Key of the signature, access token, or password."
)
@click.option(
    "--secret-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Read the secret from this file, or - for standard input.",
)
@click.option(
    "--on",
    "topics",
    default="",
    metavar="TOPIC,...",
    help=f"Topics, from {', '.join(one.value for one in Topic)}. Default: all.",
)
@click.option(
    "--stack",
    "stacks",
    multiple=True,
    metavar="STACK",
    help="Only services of this stack. Repeat for several.",
)
@click.option("--allow-internal", is_flag=True, help="Allow addresses on loopback, link-local, and on nodes.")
@click.argument("name")
@click.argument("url", metavar="URL")
@click.pass_obj
def add(options: HostOptions, /, name: str, url: str, secret_file: Path | None, **wanted: Any) -> None:
    """Add a target.

    The scheme of URL chooses the form: https (signed JSON), slack+https, matrix+https, smtps or smtp.
    The URL and the secret are never shown again.

    \b
    Examples:
      skep notify add ops https://hooks.example.org/skep --secret-file key
      skep notify add chat slack+https://hooks.slack.com/services/T0/B0/XXXX --on node,service
      skep notify add room 'matrix+https://matrix.example.org/!abc:example.org' --secret-file token
      skep notify add mail 'smtps://skep@mail.example.org?from=skep@example.org&to=ops@example.org' --secret-file pw
    """
    body = _body(name, url, secret_file=secret_file, **wanted)

    async def create() -> None:
        async with options.requests() as client:
            await client.post("/skep/notify/create", body)
            if not body["Stacks"]:
                return
            found = await client.get("/services", timeout_s=RESPONSE_TIMEOUT_S)
        known = {(one["Spec"].get("Labels") or {}).get(STACK_LABEL) for one in found}
        for stack in body["Stacks"]:
            if stack not in known:
                say(f"The stack {stack} has no services yet. Run skep stack ls to see the names of stacks.")

    run_requests(create())
    click.echo(name)


def _body(
    name: str,
    url: str,
    *,
    secret: str,
    secret_file: Path | None,
    topics: str,
    stacks: tuple[str, ...],
    allow_internal: bool,
) -> dict[str, Any]:
    """Return the target in the API's form.

    Raises: click.UsageError: unknown topics, or two secrets.
    """
    if secret and secret_file is not None:
        raise click.UsageError("Use either --secret or --secret-file.")
    if secret_file is not None:
        with click.open_file(str(secret_file)) as file:
            secret = file.read().rstrip("\n")
    known = [one.value for one in Topic]
    chosen = [word for word in topics.split(",") if word]
    if unknown := [word for word in chosen if word not in known]:
        raise click.UsageError(f"Unknown topic {', '.join(unknown)}. Use {', '.join(known)}.")
    return {
        "Name": name,
        "URL": url,
        "Secret": secret,
        "On": chosen,
        "Stacks": stacks,
        "AllowInternal": allow_internal,
    }


@notify.command()
@shows
@click.pass_obj
def ls(options: HostOptions, output: OutputOptions) -> None:
    """List targets and their deliveries.

    \b
    Example:
      skep notify ls
    """

    async def fetch() -> Shown:
        async with options.requests() as client:
            return shown_targets(await client.get("/skep/notify"))

    output.show(fetch)


def shown_targets(found: list[Mapping[str, Any]]) -> Shown:
    """Return the list of targets.  A line below the table says why a target fails."""
    rows = [
        {
            "Name": one["Name"],
            "To": one["To"],
            "On": "all" if len(one["On"]) == len(Topic) else ",".join(one["On"]),
            "Stacks": ",".join(one["Stacks"]) or "-",
            "Sent": one["Sent"],
            "Waiting": one["Waiting"],
            "State": "failing" if one.get("Error") else "ok",
        }
        for one in sorted(found, key=lambda one: str(one["Name"]))
    ]

    def lines(screen: Screen) -> Iterator[str]:
        names = ("NAME", "TO", "ON", "STACKS", "SENT", "WAITING", "STATE")
        cells = [tuple(printable(str(value)) for value in row.values()) for row in rows]
        yield from table(names, cells, screen, empty="No targets. Add one with skep notify add NAME URL.")
        for one in found:
            if error := one.get("Error"):
                since = minute(str(one.get("FailingSince", "")))
                dropped = f", {counted(one['Dropped'], 'notice')} dropped" if one["Dropped"] else ""
                due = str(one.get("NextAttemptAt", ""))[11:19]
                again = f", next attempt at {due} UTC" if due else ""
                yield printable(f"{one['Name']} fails since {since}: {error}{again}{dropped}")

    return Shown(data=found, rows=rows, lines=lines)


@notify.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.pass_obj
def rm(options: HostOptions, names: tuple[str, ...]) -> None:
    """Remove targets.

    Drops messages that were not delivered yet.

    \b
    Example:
      skep notify rm ops
    """

    run_requests(delete_each(options, "/skep/notify", names))


@notify.command()
@click.argument("name")
@click.pass_obj
def test(options: HostOptions, name: str) -> None:
    """Send a test message.

    Waits until the target has accepted it, or shows the reason why it has not.

    \b
    Example:
      skep notify test ops
    """

    async def send() -> str:
        async with options.requests() as client:
            path = f"/skep/notify/{quote(name, safe='')}/test"
            return str((await client.post(path, timeout_s=_TEST_S))["ID"])

    click.echo(f"{name} accepted the test message {run_requests(send())}")

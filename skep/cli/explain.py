"""``skep explain``: why a service or a task is not as wanted."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import click

from skep.cli.endpoint import HostOptions
from skep.cli.formatting import duration
from skep.cli.quorum import headers_for
from skep.cli.running import run_requests
from skep.errors import NotFound
from skep.model.times import SECOND_NS, unix_ns

_ANSWERS_WITHIN_S = 10.0


@click.command()
@click.argument("name")
@click.pass_obj
def explain(host: HostOptions, name: str) -> None:
    """Explain why a service or a task is not as its spec says.  NAME: of a service; id or name of a task.

    \b
    Examples:
      skep explain web
      skep explain web.3.kq4d1pzqx0wjv7h2m1o9d8s3t
    """
    lines = run_requests(_ask(host, name))
    for line in lines:
        click.echo(line)


async def _ask(host: HostOptions, name: str) -> list[str]:
    """The explanation, line by line.  Raises: NotFound: there is neither such a service nor such a task."""
    async with host.client() as client:
        headers = await headers_for(client)
        get = partial(client.get, headers=headers, timeout_s=_ANSWERS_WITHIN_S)
        try:
            explanation = await get(f"/skep/services/{name}/explain")
            return list(about_service(name, explanation, time.time()))
        except NotFound:
            pass
        try:
            explanation = await get(f"/skep/tasks/{name}/explain")
        except NotFound:
            raise NotFound(f"no such service or task: {name}") from None
        return list(about_task(name, explanation))


def about_service(name: str, explanation: Mapping[str, Any], now: float) -> Iterator[str]:
    """A service's explanation as text.  ``now``: seconds since the epoch."""
    ended = explanation.get("EndedAt", "")
    ago = f", {duration(now - unix_ns(ended) / SECOND_NS)} ago" if ended else ""
    yield f"{name}: {explanation['Summary']}{ago}"
    update = explanation.get("UpdateStatus") or {}
    if update.get("Message"):
        yield f"  update: {update['Message']}"
    if progress := explanation.get("Update"):
        until = f", until {progress['Deadline']}" if progress.get("Deadline") else ""
        yield f"  update: {progress['Step']}; it waits for {progress['WaitingFor']}{until}"
    for title, reasons in (("waiting", explanation["Reasons"]), ("failed", explanation["Failures"])):
        for reason in reasons:
            yield f"  {reason['Tasks']} {title}: {reason['Summary']}  (skep explain {reason['Example']})"


def about_task(name: str, explanation: Mapping[str, Any]) -> Iterator[str]:
    """A task's explanation as text; with a table of nodes where one is waited for."""
    yield f"{name}: {explanation['State']} since {explanation['Since']}, wanted: {explanation['DesiredState']}"
    yield f"  {explanation['Summary']}"
    nodes = explanation.get("Nodes") or ()
    yield from (f"  {line}" for line in _table([_row(node) for node in nodes]))


def _row(node: Mapping[str, Any]) -> tuple[str, str]:
    return node["Hostname"] or node["NodeID"], "; ".join(node["Refusals"]) or "could take it"


def _table(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    if not rows:
        return
    width = max(len(title) for title, _ in (*rows, ("NODE", "")))
    for title, text in (("NODE", "WHY NOT"), *rows):
        yield f"{title.ljust(width)}  {text}"

"""Lets commands work without a leader.  They show the manager's last state, and print how to recover."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from skep.api.client.requests import Requests
from skep.cli.formatting import duration
from skep.errors import SkepError

STALE = {"X-Skep-Stale": "1"}
"""Header of reads that this manager serves from its replica without contacting the other managers."""
UNREACHABLE = "unreachable"
"""State of a manager that does not respond while the cluster has no leader. Its machine may be up."""
_RESPONSE_TIMEOUT_S = 5.0
"""Shorter than ``RESPONSE_TIMEOUT_S``: the response needs no leader, and is asked for when there may be none."""


async def headers_for(client: Requests) -> Mapping[str, str]:
    """Return the headers of a read: ``STALE``, with a warning on stderr, while the cluster has no leader."""
    quorum = await quorum_of(client)
    if quorum is None or quorum["HasLeader"]:
        return {}
    for line in no_leader(quorum):
        click.echo(line, err=True)
    return STALE


async def quorum_of(client: Requests) -> Mapping[str, Any] | None:
    """Return this node's manager's view of the quorum, or None without a manager that responds."""
    try:
        response: Mapping[str, Any] = await client.get("/skep/quorum", timeout_s=_RESPONSE_TIMEOUT_S)
    except SkepError:
        return None
    return response


def way_out(quorum: Mapping[str, Any]) -> str:
    """Return the command to run next without a leader.  It changes nothing."""
    if others := _with_quorum(quorum):
        return f"skep status on {others[0]}"
    managers = quorum["Managers"]
    answering = sum(bool(manager["IsReachable"]) for manager in managers)
    return "skep doctor network" if answering > len(managers) // 2 else "skep cluster recover --dry-run"


def _with_quorum(quorum: Mapping[str, Any]) -> Sequence[str]:
    """Return the managers that have contact with a quorum although this one has not."""
    return [manager["Hostname"] for manager in quorum["Managers"] if manager.get("HasQuorum")]


def silence(quorum: Mapping[str, Any], node_id: str) -> str:
    """Return for how long a manager has not responded, or an empty string for a manager that does and for a worker."""
    for manager in quorum["Managers"]:
        if manager["ID"] == node_id and not manager["IsReachable"]:
            return f"no response for {duration(float(manager.get('UnreachableSeconds') or 0))}"
    return ""


def clock_time(stamp: str) -> str:
    """Return ``13:26:18 UTC`` for a manager's time (RFC 3339, in UTC)."""
    return f"{stamp.partition('T')[2].partition('.')[0].rstrip('Z')} UTC"


def no_leader(quorum: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines about a lost leader: its time, the missing managers, and how to recover.

    If other managers have a quorum, only this one has lost its leader.
    """
    managers = quorum["Managers"]
    silent = [manager["Hostname"] for manager in managers if not manager["IsReachable"]]
    answering, needed = len(managers) - len(silent), len(managers) // 2 + 1
    verb = "responds" if answering == 1 else "respond"
    missing = f" ({', '.join(silent)} {'does' if len(silent) == 1 else 'do'} not)" if silent else ""
    since = quorum["Since"].partition(".")[0].replace("T", " ").rstrip("Z")
    if others := _with_quorum(quorum):
        names, verb = " and ".join(others), "has" if len(others) == 1 else "have"
        yield f"NO LEADER for this manager since {since} UTC: {names} {verb} contact with a quorum"
        yield "This is the last known state of this manager. You cannot change anything through it."
        if error := quorum.get("Error"):
            yield f"Error of this manager: {error}"
        else:
            yield "To find what separates it from the others, run skep doctor network."
        yield f"Until then, run your commands on {others[0]}."
        return
    yield f"NO LEADER since {since} UTC: {answering} of {len(managers)} managers {verb}{missing}"
    yield "This is the last known state. Containers keep running, but you cannot change anything."
    if error := quorum.get("Error"):
        yield f"Error of this manager: {error}"
    if answering < needed:
        count = needed - answering
        them = "it" if len(silent) == 1 else f"{count} of them"
        yield f"To recover, restart {them}, or repair the network to {them} (port 2377 and the peer port)."
        yield "If they are lost for good, run skep cluster recover. It shows a plan first."
    else:
        yield "Enough managers respond for a quorum. Run skep doctor network, and read their logs."

"""``skep cluster recover``: continues with this manager alone after the loss of the quorum, and shows a plan first."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
import msgspec

from skep.api.client.client import ApiClient
from skep.cli import options
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.formatting import duration
from skep.cli.running import errors_shown, run_requests
from skep.cli.see.quorum import STALE, quorum_of
from skep.errors import FailedPrecondition, SkepError
from skep.model.task_end import printable
from skep.model.values.counts import counted

_WORD = 11
"""Width of the first column."""
_RECOVERS_WITHIN_S = 180.0
"""Seconds for the manager to take a snapshot, restore it and start.  With a large store, each step takes up to a
minute.
"""


_OF_EVERY_NODE = ("bridge", "host", "null")


class StoredCluster(msgspec.Struct, frozen=True):
    """The number of objects in this manager's store, as far as it can be read without a leader."""

    revision: int | None = None
    counts: Mapping[str, int] | None = None


@click.command()
@options.dry_run("Show the steps without taking them.")
@click.option(
    "--advertise-addr",
    default="",
    metavar="ADDRESS",
    help="Address where other nodes reach this manager. Default: unchanged.",
)
@options.yes
@click.pass_obj
def recover(host: HostOptions, dry_run: bool, advertise_addr: str, yes: bool) -> None:
    """Recover the cluster from this manager alone.

    Use it only if more than half of the managers are lost for good. Changes that only the lost managers know are lost.

    The command shows a plan and asks for confirmation. Services, tasks and networks stay, and containers keep running.
    It is refused while enough managers respond to elect a leader.

    \b
    Examples:
      skep cluster recover --dry-run
      skep cluster recover --yes
    """
    info, quorum, kept = run_requests(_look(host))
    with errors_shown():
        check(info, quorum)
    for word, text in plan(info, quorum, kept):
        click.echo(printable(f"{word.ljust(_WORD)}{text}"))
    if dry_run:
        return
    if not yes:
        click.confirm("Continue with this manager alone?", abort=True, err=True)
    run_requests(_recover(host, advertise_addr))
    click.echo(f"{info['Name']} is now the only manager of the cluster.")
    for line in afterwards(lost(info, quorum)):
        click.echo(printable(line))


async def _look(host: HostOptions) -> tuple[Mapping[str, Any], Mapping[str, Any] | None, StoredCluster]:
    async with host.client() as client:
        info = await client.get("/info", timeout_s=RESPONSE_TIMEOUT_S)
        quorum = await quorum_of(client)
        return info, quorum, await _read_kept(client, quorum)


async def _read_kept(client: ApiClient, quorum: Mapping[str, Any] | None) -> StoredCluster:
    if quorum is None:
        return StoredCluster()
    counts: dict[str, int] = {}
    for kind in ("services", "tasks", "nodes", "networks", "secrets", "configs"):
        try:
            found = await client.get(f"/{kind}", headers=STALE, timeout_s=RESPONSE_TIMEOUT_S)
        except SkepError:
            continue
        # Every node has networks with these drivers, which are not in the store.
        counts[kind] = sum(one.get("Driver") not in _OF_EVERY_NODE for one in found)
    return StoredCluster(revision=quorum.get("Revision"), counts=counts)


def check(info: Mapping[str, Any], quorum: Mapping[str, Any] | None) -> None:
    """Check that this manager can recover the cluster.

    Raises: FailedPrecondition: nothing needs to be recovered, or not on this node.
    """
    swarm = info["Swarm"]
    match swarm.get("LocalNodeState") or "inactive":
        case "inactive":
            raise FailedPrecondition(
                "this node is not in a cluster. To restore one from a backup, run skep restore FILE."
            )
        case "locked":
            raise FailedPrecondition("this manager is locked. Run docker swarm unlock, then try again.")
    if quorum is None:
        # The manager does not serve, after a restart without a quorum or with a damaged store.  Workers have no quorum.
        if not swarm.get("ControlAvailable") and not swarm.get("Error"):
            raise FailedPrecondition("this node is a worker. Run the command on a manager.")
        return
    managers = quorum["Managers"]
    if quorum["HasLeader"]:
        raise FailedPrecondition("the cluster has a leader, so there is nothing to recover. Run skep status.")
    answering = sum(bool(manager["IsReachable"]) for manager in managers)
    if 2 * answering > len(managers):
        raise FailedPrecondition(
            f"{answering} of {len(managers)} managers respond, which is enough for a quorum. Run skep doctor "
            "network, or "
            "read their logs."
        )


def lost(info: Mapping[str, Any], quorum: Mapping[str, Any] | None) -> list[str]:
    """Return the names of the other managers, which recovery removes, or an empty list if unknown."""
    if quorum is None:
        return []
    return [one["Hostname"] for one in quorum["Managers"] if not _is_here(one, info)]


def plan(
    info: Mapping[str, Any], quorum: Mapping[str, Any] | None, kept: StoredCluster
) -> Iterator[tuple[str, str]]:
    """Yield the plan as a word and a text each: lost managers, kept state, the steps, and possible losses."""
    if quorum is None:
        peers = [one["Addr"] for one in info["Swarm"].get("RemoteManagers") or ()]
        yield "here", f"{info['Name']} is not serving: {info['Swarm'].get('Error') or 'it is starting'}"
        yield (
            "others",
            f"{', '.join(peers) or 'unknown'}. Check each of them, because this manager does not know which are lost.",
        )
        yield "kept", "the store on this manager's disk"
    else:
        yield from _managers(info, quorum)
        words = ", ".join(counted(count, kind[:-1]) for kind, count in (kept.counts or {}).items())
        number = f"revision {kept.revision}" if kept.revision else "the last revision"
        yield "kept", f"{number} of {info['Name']}" + (f": {words}" if words else "")
        others = [
            one["Hostname"] for one in quorum["Managers"] if one["IsReachable"] and not _is_here(one, info)
        ]
        if others:
            yield (
                "compare",
                f"Also run it with --dry-run on {', '.join(others)}. Recover on the manager with the highest revision.",
            )
    yield (
        "done",
        "This manager's store becomes the store of a cluster with one manager. Services, tasks and networks stay.",
    )
    yield "", "Containers keep running, and workers reconnect to this manager."
    yield "lost", "Changes that only the other managers have. These managers no longer serve if they return."
    yield "first", "Run skep backup FILE to keep a copy of the current state. It works without a leader."


def _managers(info: Mapping[str, Any], quorum: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    managers = quorum["Managers"]
    answering = sum(bool(one["IsReachable"]) for one in managers)
    verb = "responds" if answering == 1 else "respond"
    yield (
        "NO LEADER",
        f"{answering} of {len(managers)} managers {verb}, {len(managers) // 2 + 1} are needed",
    )
    for one in managers:
        name = one["Hostname"] + (f" ({one['Addr']})" if one.get("Addr") else "")
        if _is_here(one, info):
            yield "here", name
        elif one["IsReachable"]:
            yield "responds", name
        else:
            yield "LOST", f"{name}, no response for {duration(one.get('UnreachableSeconds', 0.0))}"


def _is_here(manager: Mapping[str, Any], info: Mapping[str, Any]) -> bool:
    return bool(manager["ID"] == info["Swarm"].get("NodeID"))


def afterwards(names: Sequence[str]) -> Iterator[str]:
    """Yield the remaining steps for the user."""
    if not names:
        yield "For each lost manager in skep node ls, run docker node demote NODE, then skep node forget NODE."
        return
    yield f"Remove {counted(len(names), 'lost manager')} as soon as skep node ls shows them as down:"
    for name in names:
        yield f"  docker node demote {name} && docker node rm --force {name}"
    yield (
        "If one of them returns, run docker swarm leave --force on it, and let it join again (docker swarm join-token "
        "manager)."
    )


async def _recover(host: HostOptions, advertise_addr: str) -> None:
    body = {"ListenAddr": "0.0.0.0:2377", "AdvertiseAddr": advertise_addr, "ForceNewCluster": True}
    async with host.client() as client:
        await client.post("/swarm/init", body, timeout_s=_RECOVERS_WITHIN_S)

"""``skep volume``: docker's commands, and a command that gives up local volumes of lost nodes."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

import click

from skep.api.client.client import ApiClient
from skep.api.client.updates import update
from skep.cli import passthrough
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.running import run_requests
from skep.errors import FailedPrecondition, NotFound
from skep.model.options.slot_volumes import (
    FORGOTTEN_LABEL,
    SLOT_VOLUMES_LABEL,
    forgotten_in,
    forgotten_label,
    may_be,
    slot_volumes_in,
)
from skep.model.task_end import printable
from skep.model.values.times import Timestamp, unix_ns


class _Volume(passthrough.WithDockers):
    dockers = "create, ls, inspect, update, rm, prune"


@click.group(cls=_Volume)
def volume() -> None:
    """Manage volumes.

    \b
    Examples:
      skep volume ls
      skep volume forget db-2
    """


@volume.command()
@click.option("--node", "node", metavar="NODE", default="", help="Give up the volume only on this node.")
@click.argument("name", metavar="VOLUME")
@click.pass_obj
def forget(host: HostOptions, name: str, node: str) -> None:
    """Give up a local volume on nodes that are down.

    Tasks no longer wait for these nodes and start elsewhere with an empty volume. The data stays on the nodes, but
    tasks do not move back to it when a node returns.

    \b
    Examples:
      skep volume forget db-2
      skep volume forget --node w1 db-2
    """
    for hostname in run_requests(_forget(host, name, node)):
        click.echo(printable(f"{name} on {hostname}"))


async def _forget(host: HostOptions, name: str, only: str) -> list[str]:
    done: list[str] = []
    async with host.client() as client:
        path = f"/nodes/{quote(only, safe='')}" if only else ""
        nodes = [await client.get(path, timeout_s=RESPONSE_TIMEOUT_S)] if path else await _nodes(client)
        having = [one for one in nodes if name in _volumes_of(one) or await _had(client, one, name)]
        if not having:
            where = f"{only} has no" if only else "no node has a"
            raise NotFound(
                f"{where} local volume {name} of a service. Run skep explain TASK to see which volume a task waits for."
            )
        lost = [one for one in having if one["Status"]["State"] == "down"]
        if not lost:
            where = ", ".join(sorted(_hostname(one) for one in having))
            raise FailedPrecondition(
                f"{name} is on {where}, which is not down. To remove it, run docker volume rm {name} there."
            )
        for one in lost:
            change = partial(_with_forgotten, name, await _latest_ms(client, one, name))
            await update(client, "nodes", one["ID"], change, timeout_s=RESPONSE_TIMEOUT_S)
            done.append(_hostname(one))
    return sorted(done)


async def _nodes(client: ApiClient) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = await client.get("/nodes", timeout_s=RESPONSE_TIMEOUT_S)
    return found


async def _had(client: ApiClient, node: Mapping[str, Any], name: str) -> bool:
    """Return whether a task of a lost node has had the volume.  Tasks are checked because Docker Engines report no
    volumes, and other nodes do so only after some seconds.
    """
    if node["Status"]["State"] != "down":
        return False
    specs = [task["Spec"].get("ContainerSpec") or {} for task in await _tasks_of(client, node)]
    mounts = [mount for spec in specs for mount in spec.get("Mounts") or ()]
    return any(one.get("Type") == "volume" and may_be(name, one.get("Source", "")) for one in mounts)


async def _tasks_of(client: ApiClient, node: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    filters = {"node": [node["ID"]]}
    tasks: Sequence[Mapping[str, Any]] = await client.get(
        "/tasks", filters=filters, timeout_s=RESPONSE_TIMEOUT_S
    )
    return tasks


def _volumes_of(node: Mapping[str, Any]) -> Mapping[str, int]:
    """Return the creation time of the last task that used a volume, by volume, as reported by the node."""
    labels = node["Description"].get("Engine", {}).get("Labels") or {}
    found: dict[str, int] = {}
    for one in slot_volumes_in(labels.get(SLOT_VOLUMES_LABEL, "")):
        found[one.volume] = max(found.get(one.volume, 0), one.at_ms)
    return found


async def _latest_ms(client: ApiClient, node: Mapping[str, Any], name: str) -> int:
    """Return the time up to which use is forgotten: the creation of the node's latest task, by the managers' clock."""
    tasks = await _tasks_of(client, node)
    created = [unix_ns(Timestamp(task["CreatedAt"])) // 1_000_000 for task in tasks]
    return max([_volumes_of(node).get(name, 0), *created])


def _with_forgotten(name: str, at_ms: int, node: Mapping[str, Any]) -> dict[str, Any]:
    labels = dict(node["Spec"].get("Labels") or {})
    known = forgotten_in(labels.get(FORGOTTEN_LABEL, ""))
    labels[FORGOTTEN_LABEL] = forgotten_label({**known, name: max(at_ms, known.get(name, 0))})
    return {**node["Spec"], "Labels": labels}


def _hostname(node: Mapping[str, Any]) -> str:
    return str(node["Description"].get("Hostname") or node["ID"])

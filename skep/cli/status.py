"""``skep status``: one screen about the cluster, as one of its nodes sees it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from skep.api.client import Client
from skep.cli.endpoint import HostOptions
from skep.cli.formatting import counted
from skep.cli.quorum import STALE, no_leader, quorum_of
from skep.cli.running import run_requests
from skep.errors import SkepError

_ANSWERS_WITHIN_S = 10.0
_BUSIEST = 10
"""Nodes whose load is listed."""
_EXPLAINED = 10
"""Services whose explanation is requested."""

Row = tuple[str, str]


@click.command()
@click.pass_obj
def status(host: HostOptions) -> None:
    """Show the state of this node and its cluster.

    \b
    Examples:
      skep status
      skep --host unix:///var/tmp/skep-demo/m1/skep.sock status
      skep --host ssh://root@manager1 status
    """
    rows = run_requests(_rows(host))
    width = max(len(title) for title, _ in rows)
    for title, text in rows:
        click.echo(f"{title.ljust(width)}  {text}")


async def _rows(host: HostOptions) -> list[Row]:
    """All rows.  A row that is not available has the reason: a node without a leader still has a status.

    Raises: Unavailable: the node itself does not respond.
    """
    async with host.client() as client:
        info: dict[str, Any] = await client.get("/info", timeout_s=_ANSWERS_WITHIN_S)
        quorum = await quorum_of(client) if info["Swarm"].get("ControlAvailable") else None
        if quorum is not None and not quorum["HasLeader"]:
            lines = no_leader(quorum)
            rows = [
                *about_node(info, shows_error=False),
                ("swarm", next(lines)),
                *(("", line) for line in lines),
            ]
            headers = STALE
        else:
            rows, headers = list(about_node(info)), {}
        if quorum is None:
            return rows
        try:
            return [*rows, *await _about_swarm(client, headers)]
        except SkepError as error:
            return [*rows, ("cluster", f"not known: {error}")]


async def _store(client: Client) -> Row:
    """How full this manager's copy of the store is."""
    try:
        response = await client.get("/skep/cluster/store", timeout_s=_ANSWERS_WITHIN_S)
    except SkepError as error:
        return "store", f"not known: {error}"
    return "store", f"{response['Summary']}, file {response['Size'] >> 20} MiB"


async def _about_swarm(client: Client, headers: Mapping[str, str]) -> list[Row]:
    """Raises: SkepError."""
    nodes = await client.get("/nodes", headers=headers, timeout_s=_ANSWERS_WITHIN_S)
    services = await client.get("/services", headers=headers, timeout_s=_ANSWERS_WITHIN_S, status="true")
    wanting = {service["ID"]: "" for service in services if not is_as_wanted(service)}
    for id in [*wanting][:_EXPLAINED]:
        try:
            path = f"/skep/services/{id}/explain"
            response = await client.get(path, headers=headers, timeout_s=_ANSWERS_WITHIN_S)
        except SkepError:
            continue  # it was removed meanwhile
        if response["IsAsWanted"]:
            del wanting[id]
        else:
            wanting[id] = response["Summary"]
    rows = about_cluster(nodes, is_led=not headers)
    return [*rows, await _store(client), *about_services(services, wanting)]


def about_node(info: Mapping[str, Any], *, shows_error: bool = True) -> Iterator[Row]:
    """The node itself, from ``/info``."""
    swarm = info["Swarm"]
    yield (
        "node",
        f"{info['Name']}, skep {info['ServerVersion']}, {info['NCPU']} CPUs, {info['MemTotal'] >> 20} MiB",
    )
    yield "swarm", _membership(swarm)
    if shows_error and (error := swarm.get("Error")):
        yield "error", error
    yield "containers", f"{info['ContainersRunning']} running, {counted(info['Images'], 'image')}"
    for warning in info.get("Warnings") or ():
        yield "warning", warning.removeprefix("WARNING: ")


def _membership(swarm: Mapping[str, Any]) -> str:
    state = swarm.get("LocalNodeState") or "inactive"
    id = swarm.get("NodeID", "")
    match state:
        case "inactive":
            return "inactive: docker swarm init, or docker swarm join"
        case "locked":
            return "locked: this manager waits for its key: docker swarm unlock"
        case "pending":
            return f"pending: this node ({id}) has not reached a manager yet{_looked_for(swarm)}"
        case "error":
            return f"error: this node ({id}) takes no part in the swarm"
    role = "manager" if swarm.get("ControlAvailable") else "worker"
    return f"{state}, this node is a {role} with the id {id}"


def _looked_for(swarm: Mapping[str, Any]) -> str:
    addresses = [peer["Addr"] for peer in swarm.get("RemoteManagers") or ()]
    if not addresses:
        return ""
    return (
        f'; it tries {", ".join(addresses)} (elsewhere: managers = ["address:2377"] in /etc/skep/skep.toml)'
    )


def about_cluster(nodes: Iterable[Mapping[str, Any]], *, is_led: bool = True) -> Iterator[Row]:
    """The nodes, counted by state; by name the busiest, those that are not ready, and those with a message."""
    known = sorted(nodes, key=lambda node: node["Description"].get("Hostname", ""))
    states = Counter(node["Status"]["State"] for node in known)
    yield "nodes", ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    leaders = [node for node in known if (node.get("ManagerStatus") or {}).get("Leader")]
    if is_led:
        yield "leader", leaders[0]["Description"].get("Hostname", "") if leaders else "none"
    if busy := sorted((node for node in known if node.get("Load")), key=lambda node: -node["Load"]):
        words = [f"{node['Description'].get('Hostname', node['ID'])} {node['Load']:.0%}" for node in busy]
        yield "load", ", ".join(words[:_BUSIEST]).replace("%", " %")
    for node in known:
        message = node["Status"].get("Message", "")
        if node["Status"]["State"] != "ready" or message:
            name = node["Description"].get("Hostname", node["ID"])
            yield "node", f"{name} is {node['Status']['State']}" + (f": {message}" if message else "")


def about_services(services: Iterable[Mapping[str, Any]], wanting: Mapping[str, str]) -> Iterator[Row]:
    """How many services have all their tasks; the others by name.  ``wanting``: their ids, with the reason if
    known."""
    known = sorted(services, key=lambda service: service["Spec"]["Name"])
    yield "services", f"{len(known)}, {len(known) - len(wanting)} of them as wanted"
    for service in known:
        if (reason := wanting.get(service["ID"])) is not None:
            tasks = f"{_count(service, 'RunningTasks')} of {_count(service, 'DesiredTasks')} tasks run"
            yield "service", f"{service['Spec']['Name']}: {reason or tasks}"


def is_as_wanted(service: Mapping[str, Any]) -> bool:
    """Whether as many tasks run as the service's spec asks for; of a job, whether as many have completed.

    A global job's spec does not contain its number of runs: its explanation does.
    """
    mode = service["Spec"].get("Mode") or {}
    if (job := mode.get("ReplicatedJob")) is not None:
        return _count(service, "CompletedTasks") >= int(job.get("TotalCompletions") or 0)
    if mode.get("GlobalJob") is not None:
        return False
    return _count(service, "RunningTasks") == _count(service, "DesiredTasks")


def _count(service: Mapping[str, Any], field: str) -> int:
    return int((service.get("ServiceStatus") or {}).get(field, 0))

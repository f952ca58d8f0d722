"""``skep status``: one screen about the cluster, as one of its nodes sees it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from skep.cli.asking import answer_of
from skep.cli.endpoint import HostOptions
from skep.errors import SkepError

_ANSWERS_WITHIN_S = 5.0
_BUSIEST = 10
"""Nodes whose load is listed."""


@click.command()
@click.pass_obj
def status(host: HostOptions) -> None:
    """How this node and its cluster are.

    \b
    Examples:
      skep status
      skep --host unix:///var/tmp/skep-demo/m1/skep.sock status
    """
    rows = answer_of(_ask(host))
    width = max(len(title) for title, _ in rows)
    for title, text in rows:
        click.echo(f"{title.ljust(width)}  {text}")


async def _ask(host: HostOptions) -> list[tuple[str, str]]:
    """Every row.  What cannot be answered says so in its row: a node without a leader still has a status.

    Raises: Unavailable: the node itself does not answer.
    """
    async with host.client() as client:
        info: dict[str, Any] = await client.get("/info", timeout_s=_ANSWERS_WITHIN_S)
        rows = list(about_node(info))
        if not info["Swarm"].get("ControlAvailable"):
            return rows
        try:
            nodes = await client.get("/nodes", timeout_s=_ANSWERS_WITHIN_S)
            services = await client.get("/services", timeout_s=_ANSWERS_WITHIN_S, status="true")
        except SkepError as error:
            return [*rows, ("cluster", f"not known: {error}")]
        return [*rows, *about_cluster(nodes), *about_services(services)]


def about_node(info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The node itself, from ``/info``."""
    swarm = info["Swarm"]
    yield (
        "node",
        f"{info['Name']}, skep {info['ServerVersion']}, {info['NCPU']} CPUs, {info['MemTotal'] >> 20} MiB",
    )
    state = swarm.get("LocalNodeState") or "inactive"
    if state == "inactive":
        yield "swarm", "inactive: docker swarm init, or docker swarm join"
        return
    role = "manager" if swarm.get("ControlAvailable") else "worker"
    yield "swarm", f"{state}, this node is a {role} with the id {swarm.get('NodeID', '')}"
    if error := swarm.get("Error"):
        yield "error", error
    yield "containers", f"{info['ContainersRunning']} running, {info['Images']} images"
    for warning in info.get("Warnings") or ():
        yield "warning", warning


def about_cluster(nodes: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """The nodes, counted by state; the busiest, and those that are not ready, or say what is wrong, by name."""
    known = sorted(nodes, key=lambda node: node["Description"].get("Hostname", ""))
    states = Counter(node["Status"]["State"] for node in known)
    yield "nodes", ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    leaders = [node for node in known if (node.get("ManagerStatus") or {}).get("Leader")]
    yield "leader", leaders[0]["Description"].get("Hostname", "") if leaders else "none"
    if busy := sorted((node for node in known if node.get("Load")), key=lambda node: -node["Load"]):
        words = [f"{node['Description'].get('Hostname', node['ID'])} {node['Load']:.0%}" for node in busy]
        yield "load", ", ".join(words[:_BUSIEST]).replace("%", " %")
    for node in known:
        message = node["Status"].get("Message", "")
        if node["Status"]["State"] != "ready" or message:
            yield (
                "node",
                f"{node['Description'].get('Hostname', node['ID'])} is {node['Status']['State']} {message}".strip(),
            )


def about_services(services: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """How many services have what they want; the others by name."""
    known = sorted(services, key=lambda service: service["Spec"]["Name"])
    wanting = [service for service in known if _running(service) != _wanted(service)]
    yield "services", f"{len(known)}, {len(known) - len(wanting)} of them as wanted"
    for service in wanting:
        yield (
            "service",
            f"{service['Spec']['Name']} has {_running(service)} of {_wanted(service)} tasks running",
        )


def _running(service: Mapping[str, Any]) -> int:
    return int(service.get("ServiceStatus", {}).get("RunningTasks", 0))


def _wanted(service: Mapping[str, Any]) -> int:
    return int(service.get("ServiceStatus", {}).get("DesiredTasks", 0))

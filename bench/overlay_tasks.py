"""Creates tasks on an overlay network of a cluster, in the same way on both systems, and finds their namespaces."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.cluster_lab import ClusterLab, engine, until
from bench.scenarios import WORKLOAD
from skep.playground.description import PlaygroundNode

_RUNNING_S = 180.0


class Placed(NamedTuple):
    """A running task.  ``started`` is when its node saw it run, as the API shows."""

    id: str
    node: PlaygroundNode
    address: str
    netns: Path
    container: str
    started: str


def create_network(lab: ClusterLab, name: str) -> str:
    """Create an overlay network, and return its id."""
    response: dict[str, str] = engine(lab.nodes[0]).post(
        "/networks/create", {"Name": name, "Driver": "overlay"}
    )
    return response["Id"]


def specification(
    lab: ClusterLab,
    name: str,
    network: str,
    replicas: int | None,
    *,
    constraints: Sequence[str] = (),
    has_virtual_address: bool = True,
) -> dict[str, Any]:
    """Return the specification of a service whose tasks idle.  ``replicas``: None for one on each node."""
    return {
        "Name": name,
        "TaskTemplate": {
            "ContainerSpec": {"Image": lab.image, "Command": WORKLOAD},
            "Networks": [{"Target": network}],
            "Placement": {"Constraints": list(constraints)},
        },
        "Mode": {"Global": {}} if replicas is None else {"Replicated": {"Replicas": replicas}},
        "EndpointSpec": {"Mode": "vip" if has_virtual_address else "dnsrr"},
    }


def create_service(lab: ClusterLab, requested: dict[str, Any]) -> str:
    """Create a service, and return its id."""
    response: dict[str, str] = engine(lab.nodes[0]).post("/services/create", requested)
    return response["ID"]


def scale(lab: ClusterLab, service: str, replicas: int) -> None:
    """Scale a service to that many replicas."""
    through = engine(lab.nodes[0])
    now = through.get(f"/services/{service}")
    requested = now["Spec"] | {"Mode": {"Replicated": {"Replicas": replicas}}}
    through.post(f"/services/{service}/update", requested, version=now["Version"]["Index"])


def running(lab: ClusterLab, service: str) -> list[dict[str, Any]]:
    """Return its tasks that run and have the desired state running, as the API shows."""
    tasks = engine(lab.nodes[0]).get("/tasks", filters={"service": [service]})
    return [one for one in tasks if one["Status"]["State"] == one["DesiredState"] == "running"]


def wait_running(lab: ClusterLab, service: str, count: int) -> None:
    """Wait until that many tasks run.  Raises: TimeoutError."""
    until(lambda: len(running(lab, service)) == count, f"{count} tasks run", _RUNNING_S, 0.1)


def placed(lab: ClusterLab, service: str) -> list[Placed]:
    """Return its running tasks, in the order of their nodes' names."""
    names = {id: name for name, id in lab.ids().items()}
    nodes = {node.name: node for node in lab.nodes}
    found = []
    for task in running(lab, service):
        node = nodes[names[task["NodeID"]]]
        container = task["Status"]["ContainerStatus"]["ContainerID"]
        pid = engine(node).get(f"/containers/{container}/json")["State"]["Pid"]
        address = task["NetworksAttachments"][0]["Addresses"][0].partition("/")[0]
        netns = Path(f"/proc/{pid}/ns/net")
        found.append(Placed(task["ID"], node, address, netns, container, task["Status"]["Timestamp"]))
    return sorted(found, key=lambda one: (one.node.name, one.id))

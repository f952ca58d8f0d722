"""Snapshots for ``skep top``, and a cluster that shows one and records requests."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec

from skep.top.actions import Action
from skep.top.logs import ShownLine
from skep.top.snapshot import Connection, LinkStatus, ShownTask, Snapshot, states_of
from skep.top.watching import Publish


class StillCluster:
    """Shows ``snapshot``, which never changes."""

    name = "unix:///run/skep/skep.sock"

    def __init__(self, snapshot: Snapshot, lines: tuple[ShownLine, ...] = ()) -> None:
        self.snapshot = snapshot
        self.lines = lines
        self.performed: list[Action] = []
        self.error: Exception | None = None

    async def run(self, publish: Publish) -> None:
        publish(self.snapshot)

    async def details(self, kind: str, id: str, name: str) -> list[str]:
        reasons = {one.id: one.reason for one in states_of(self.snapshot, 0.0)}
        return [f"{kind} {name}: {reasons.get(id) or 'healthy'}"]

    async def perform(self, action: Action) -> None:
        if self.error is not None:
            raise self.error
        self.performed.append(action)

    async def logs(self, kind: str, id: str) -> AsyncGenerator[ShownLine, None]:
        for line in self.lines:
            yield line


def a_node(name: str, **changes: Any) -> Mapping[str, Any]:
    """Return a ready worker.  ``changes``: ``state``, ``message``, ``availability``, ``role``, ``leader``,
    ``load``.
    """
    manager = {"Leader": bool(changes.get("leader")), "Reachability": "reachable"}
    return {
        "ID": f"id-{name}",
        "Spec": {
            "Role": changes.get("role", "worker"),
            "Availability": changes.get("availability", "active"),
            "Labels": changes.get("labels", {}),
        },
        "Description": {
            "Hostname": name,
            "Engine": {"EngineVersion": "0.1.0"},
            "Resources": {"NanoCPUs": 4 * 10**9, "MemoryBytes": 8 << 30},
            "Platform": {"OS": "linux", "Architecture": "x86_64"},
        },
        "Status": {
            "State": changes.get("state", "ready"),
            "Message": changes.get("message", ""),
            "Addr": "10.0.0.1",
        },
        "ManagerStatus": manager if changes.get("role") == "manager" else None,
        "Load": changes.get("load", 0.1),
    }


def a_service(name: str, running: int = 2, wanted: int = 2, **changes: Any) -> Mapping[str, Any]:
    """Return a replicated service.  ``changes``: ``image``, ``mode``, ``update``, ``previous``, ``settings``,
    ``health``.
    """
    spec = {
        "Name": name,
        "Labels": {},
        "TaskTemplate": {"ContainerSpec": {"Image": changes.get("image", "busybox:1@sha256:00")}},
        "Mode": changes.get("mode", {"Replicated": {"Replicas": wanted}}),
        **changes.get("settings", {}),
    }
    found = {
        "ID": f"id-{name}",
        "Version": {"Index": 7},
        "Spec": spec,
        "Endpoint": {"Ports": changes.get("ports", [])},
        "ServiceStatus": {
            "RunningTasks": running,
            "DesiredTasks": wanted,
            "CompletedTasks": 0,
            "Health": changes.get("health") or a_health("healthy" if running == wanted else "converging"),
        },
    }
    if "update" in changes:
        found["UpdateStatus"] = changes["update"]
    if "previous" in changes:
        found["PreviousSpec"] = changes["previous"]
    return found


def a_task(service: str, slot: int, node: str = "", **changes: Any) -> ShownTask:
    """Return a running task.  ``changes``: ``state``, ``desired``, ``err``, ``message``, ``cpus`` and ``memory``
    (reserved).
    """
    amounts = {"NanoCPUs": int(changes.get("cpus", 0) * 10**9), "MemoryBytes": changes.get("memory", 0)}
    raw = {
        "ID": f"id-{service}-{slot}-{node}" + changes.get("suffix", ""),
        "ServiceID": f"id-{service}",
        "NodeID": f"id-{node}" if node else "",
        "Slot": slot,
        "DesiredState": changes.get("desired", "running"),
        "Status": {
            "State": changes.get("state", "running"),
            "Timestamp": changes.get("since", "2026-01-02T03:04:05Z"),
            "Message": changes.get("message", "started"),
            "Err": changes.get("err", ""),
        },
        "Spec": {
            "ContainerSpec": {"Image": changes.get("image", "busybox:1@sha256:00")},
            "Resources": {"Reservations": amounts},
        },
    }
    return msgspec.convert(raw, ShownTask)


def a_snapshot(
    nodes: tuple[Mapping[str, Any], ...] = (),
    services: tuple[Mapping[str, Any], ...] = (),
    tasks: tuple[ShownTask, ...] = (),
    **more: Any,
) -> Snapshot:
    """Return a snapshot that is loaded and live."""
    return Snapshot(
        nodes={node["ID"]: node for node in nodes},
        services={service["ID"]: service for service in services},
        tasks={task.id: task for task in tasks},
        **({"connection": Connection(LinkStatus.LIVE), "is_loaded": True} | more),
    )


def a_health(state: str, reason: str = "", *, weight: int = 0) -> Mapping[str, Any]:
    """Return the health of a service as the API has it."""
    return {"State": state, "Reason": reason, "Weight": weight}


def a_shop() -> Snapshot:
    """Return three nodes of which one is down, and services of which two are degraded."""
    reserved = {"cpus": 0.5, "memory": 256 << 20}
    refused = "no suitable node (insufficient resources on 2 nodes)"
    needs = "needs 16 CPUs; the largest node, m1, has 2"
    crash = 'exit 3, last line "panic: no database at db:5432"; crash loop, 4 failures in a row'
    update = {"State": "updating", "Message": "update in progress"}
    prepares = a_health("converging", "m1 prepares it: image, mounts and networks", weight=4)
    return a_snapshot(
        nodes=(
            a_node("m1", role="manager", leader=True, load=0.31),
            a_node("w1", load=0.74),
            a_node("w2", state="down", message="heartbeat failure", load=0.0),
        ),
        services=(
            a_service("web", 3, 3, image="shop/web:2.1", ports=[{"PublishedPort": 8080, "TargetPort": 80}]),
            a_service("api", 4, 6, image="shop/api:7", update=update, health=prepares),
            a_service("orders", 0, 1, image="shop/orders:3", health=a_health("degraded", crash)),
            a_service("agent", 2, 2, image="shop/agent:1", mode={"Global": {}}),
            a_service("report", 0, 2, image="shop/report:1", health=a_health("degraded", needs, weight=1)),
        ),
        tasks=(
            *(
                a_task("web", slot, "m1" if slot % 2 else "w1", image="shop/web:2.1", **reserved)
                for slot in range(1, 4)
            ),
            *(a_task("api", slot, "w1", image="shop/api:7", memory=512 << 20) for slot in range(1, 5)),
            a_task("api", 5, "m1", state="preparing", message="pulling the image", memory=512 << 20),
            a_task("api", 6, state="pending", message="pending task scheduling"),
            a_task("orders", 1, "w1", state="failed", err="task: non-zero exit (3)"),
            a_task("agent", 0, "m1"),
            a_task("agent", 0, "w1"),
            a_task("report", 1, state="pending", err=refused),
            a_task("report", 2, state="pending", err=refused),
        ),
        events=tuple(
            {
                "Type": "task",
                "Action": action,
                "timeNano": 1_767_323_045_000_000_000 + number * 10**9,
                "Actor": {"ID": "id-orders-1-w1", "Attributes": attributes},
            }
            for number, (action, attributes) in enumerate(
                [("create", {}), ("start", {}), ("die", {"exitCode": "3", "cause": "exit"})]
            )
        ),
    )

"""Texts of the dialogs of ``skep top``.  Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from skep.cli.formatting import aligned, counted
from skep.model.node import plain_message
from skep.top.snapshot import Snapshot, tasks_of

_LISTED_MAX = 100
"""Tasks that the panel lists."""

HELP = (
    "1 to 5, tab      services, tasks, nodes, events, logs",
    "arrows, j, k     move; page up and down, home, end",
    "enter            why it is as it is, as skep explain says",
    "/                filter: words that a row must have; esc clears it",
    "o                what is wrong first, or by name",
    "e                tasks: those that have ended, too",
    "l                follow the logs of a service or task",
    "t                light or dark",
    "q, ctrl-c        quit",
    "",
    "Each of these says what it would do, and asks:",
    "s                scale the service",
    "u                update the service's image",
    "r                roll the service back to its previous spec",
    "d, a             drain the node, let it take tasks again",
)


def tasks_listed(snapshot: Snapshot, service: str) -> Iterator[str]:
    """Yield the tasks of a service, active ones first."""
    tasks = tasks_of(snapshot, service=service)
    if not tasks:
        return
    yield ""
    rows = [
        (snapshot.task_name(task), task.status.state, _node(snapshot, task.node_id), task.status.err)
        for task in tasks[:_LISTED_MAX]
    ]
    yield from aligned((("TASK", "STATE", "NODE", "WHY"), *rows))
    if len(tasks) > _LISTED_MAX:
        yield f"and {len(tasks) - _LISTED_MAX} more"


def _node(snapshot: Snapshot, id: str) -> str:
    return snapshot.node_name(id) if id else ""


def about_node(snapshot: Snapshot, node: Mapping[str, Any]) -> list[str]:
    """Return the lines about a node, its labels and its tasks."""
    description, status, spec = node["Description"], node["Status"], node["Spec"]
    resources, platform = description.get("Resources") or {}, description.get("Platform") or {}
    cpus, memory = int(resources.get("NanoCPUs") or 0) / 1e9, int(resources.get("MemoryBytes") or 0) >> 20
    room = f"{cpus:g} CPUs, {memory} MiB"
    words = plain_message(str(status.get("Message") or ""), str(node.get("SilentSince") or ""))
    message = f": {words}" if words else ""
    rows = [
        ("id", node["ID"]),
        ("state", f"{status['State']}{message}"),
        ("availability", str(spec.get("Availability") or "")),
        ("role", str(spec.get("Role") or "")),
        ("address", str(status.get("Addr") or "")),
        ("machine", f"{platform.get('OS', '')} {platform.get('Architecture', '')}, {room}"),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted((spec.get("Labels") or {}).items()))),
    ]
    tasks = [task for task in tasks_of(snapshot, node=node["ID"]) if task.is_active]
    listed = aligned(
        [("TASK", "STATE"), *((snapshot.task_name(task), task.status.state) for task in tasks[:_LISTED_MAX])]
    )
    return [
        *aligned([row for row in rows if row[1]]),
        "",
        counted(len(tasks), "task"),
        *(listed if tasks else ()),
        *([f"and {len(tasks) - _LISTED_MAX} more"] if len(tasks) > _LISTED_MAX else []),
    ]

"""Texts of the dialogs of ``skep top``.  Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from skep.cli.formatting import aligned
from skep.model.node import plain_message
from skep.model.values.counts import counted
from skep.top.snapshot import ReservedResources, Snapshot, cpus_of, memory_of, share_of, sum_of, tasks_of

_LISTED_MAX = 100
"""Largest number of tasks that the panel lists."""

HELP = (
    "1 to 5, tab      Switch between services, tasks, nodes, events and logs",
    "arrows, j, k     Move the cursor (also page up, page down, home, end)",
    "enter            Explain the state of the selected object",
    "/                Show only rows with some words (esc shows all rows)",
    "o                Sort by problems or by name",
    "e                Show or hide ended tasks",
    "l                Follow the logs of the service or task",
    "t                Switch between dark and light colors",
    "q, ctrl-c        Quit",
    "",
    "These keys show the effects and ask for confirmation:",
    "s                Scale the service",
    "u                Set the image of the service",
    "r                Roll the service back to its previous spec",
    "d, a             Drain or activate the node",
    "",
    "LOAD is the measured use of the busier of CPU and memory.",
    "RESERVED is what tasks reserve, and on nodes also the total.",
)


def tasks_listed(snapshot: Snapshot, service: str) -> Iterator[str]:
    """Yield the tasks of a service, active ones first."""
    tasks = tasks_of(snapshot, service=service)
    if not tasks:
        return
    yield ""
    rows = [
        (
            snapshot.task_name(task),
            task.status.state,
            _node(snapshot, task.node_id),
            snapshot.task_error(task),
        )
        for task in tasks[:_LISTED_MAX]
    ]
    yield from aligned((("TASK", "STATE", "NODE", "REASON"), *rows))
    if len(tasks) > _LISTED_MAX:
        yield f"and {len(tasks) - _LISTED_MAX} more"


def _node(snapshot: Snapshot, id: str) -> str:
    return snapshot.node_name(id) if id else ""


def about_node(snapshot: Snapshot, node: Mapping[str, Any]) -> list[str]:
    """Return the lines about a node, its labels and its tasks."""
    description, status, spec = node["Description"], node["Status"], node["Spec"]
    platform = description.get("Platform") or {}
    tasks = [task for task in tasks_of(snapshot, node=node["ID"]) if task.is_active]
    reserved = share_of(sum_of(tasks), ReservedResources(cpus_of(node), memory_of(node)))
    words = plain_message(str(status.get("Message") or ""), str(node.get("SilentSince") or ""))
    message = f": {words}" if words else ""
    rows = [
        ("id", node["ID"]),
        ("state", f"{status['State']}{message}"),
        ("availability", str(spec.get("Availability") or "")),
        ("role", str(spec.get("Role") or "")),
        ("address", str(status.get("Addr") or "")),
        ("platform", f"{platform.get('OS', '')} {platform.get('Architecture', '')}"),
        ("load", "" if node.get("Load") is None else f"{node['Load']:.0%}"),
        ("reserved", reserved),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted((spec.get("Labels") or {}).items()))),
    ]
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

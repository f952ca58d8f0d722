"""The tables of ``skep top``: the rows of each view, filtered and ordered.  Pure.

Texts are unchanged from the cluster.  The widget that paints them removes terminal control sequences.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import msgspec

from skep.cli.cluster.door import traffic_cells
from skep.cli.see.status import UNAVAILABLE, ServiceLine
from skep.errors import InvalidArgument
from skep.model.node import plain_message
from skep.model.values.counts import counted
from skep.model.values.times import SECOND_NS, timestamp, unix_ns
from skep.top.actions import image_of
from skep.top.logs import ShownLine
from skep.top.snapshot import (
    ENDED,
    ClusterHealth,
    ReservedResources,
    ShownTask,
    Snapshot,
    cpus_of,
    health_of,
    is_updating,
    memory_of,
    mode_of,
    share_of,
    states_of,
    sum_of,
)


class Tone(Enum):
    """Rating of a row.  The words of its cells say the same, for terminals without colors."""

    PLAIN = "plain"
    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"
    MUTED = "muted"


class Column(msgspec.Struct, frozen=True):
    """A column.

    Columns with the highest ``rank`` are hidden first on narrow screens.  ``is_flexible`` uses the remaining width,
    ``is_toned`` paints cells in the tone of their row, and ``is_age`` shows timestamps as ages.
    """

    title: str
    width_max: int = 40
    rank: int = 0
    is_flexible: bool = False
    is_toned: bool = False
    is_age: bool = False


class ScreenRow(msgspec.Struct, frozen=True):
    """A row.  ``order`` is its sort key, which starts with its urgency."""

    key: str
    cells: tuple[str, ...]
    tone: Tone = Tone.PLAIN
    order: tuple[Any, ...] = ()


class KnownRow(NamedTuple):
    """The cached row of a task, with its inputs."""

    task: ShownTask
    words: tuple[str, str, str]
    """The names of its service and node, and its error."""
    row: ScreenRow


class ScreenView(Enum):
    """A view of the screen.  The value is its title."""

    SERVICES = "Services"
    TASKS = "Tasks"
    NODES = "Nodes"
    EVENTS = "Events"
    LOGS = "Logs"


COLUMNS: Mapping[ScreenView, tuple[Column, ...]] = {
    ScreenView.SERVICES: (
        Column("SERVICE", 32, is_toned=True),
        Column("TASKS", 11, is_toned=True),
        Column("UPDATE", 24, rank=2),
        Column("REQUESTS", 32, rank=3),
        Column("RESERVED", 22, rank=1),
        Column("IMAGE", 36, rank=4),
        Column("PORTS", 24, rank=5),
        Column("MODE", 10, rank=6),
        Column("REASON", is_flexible=True, is_toned=True),
    ),
    ScreenView.TASKS: (
        Column("TASK", 34, is_toned=True),
        Column("STATE", 10, is_toned=True),
        Column("AGE", 8, rank=2, is_age=True),
        Column("NODE", 20, rank=1),
        Column("IMAGE", 30, rank=3),
        Column("REASON", is_flexible=True, is_toned=True),
    ),
    ScreenView.NODES: (
        Column("NODE", 28, is_toned=True),
        Column("STATE", 14, is_toned=True),
        Column("ROLE", 8, rank=2),
        Column("TASKS", 6),
        Column("LOAD", 6, rank=1),
        Column("RESERVED", 28, rank=1),
        Column("ADDRESS", 22, rank=3),
        Column("VERSION", 12, rank=4),
        Column("REASON", is_flexible=True, is_toned=True),
    ),
    ScreenView.EVENTS: (
        Column("AGE", 8, is_age=True),
        Column("TYPE", 9, rank=2),
        Column("ACTION", 10, is_toned=True),
        Column("NAME", 34),
        Column("DETAILS", is_flexible=True),
    ),
    ScreenView.LOGS: (
        Column("TIME", 12, rank=2),
        Column("TASK", 24, rank=1),
        Column("MESSAGE", is_flexible=True, is_toned=True),
    ),
}


def rows_of(view: ScreenView, snapshot: Snapshot, now: float, *, with_ended: bool = False) -> list[ScreenRow]:
    """Return all rows of any view but the logs, unordered.  ``now`` is Unix time in seconds."""
    match view:
        case ScreenView.SERVICES:
            tasks = _active_by(lambda task: task.service_id, snapshot)
            routes: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
            for route in snapshot.routes:
                routes[route["ServiceID"]].append(route)
            return [
                _service(snapshot, state, tasks[state.id], routes[state.id])
                for state in states_of(snapshot, now)
            ]
        case ScreenView.TASKS:
            return task_rows(snapshot, {}, with_ended=with_ended)
        case ScreenView.NODES:
            tasks = _active_by(lambda task: task.node_id, snapshot)
            return [_node(snapshot, node, tasks[node["ID"]]) for node in snapshot.nodes.values()]
        case ScreenView.EVENTS:
            return [_event(snapshot, place, event) for place, event in enumerate(snapshot.events)]
    return []


def _active_by(key: Callable[[ShownTask], str], snapshot: Snapshot) -> Mapping[str, list[ShownTask]]:
    found: defaultdict[str, list[ShownTask]] = defaultdict(list)
    for task in snapshot.tasks.values():
        if task.is_active:
            found[key(task)].append(task)
    return found


def task_rows(snapshot: Snapshot, known: dict[str, KnownRow], *, with_ended: bool = False) -> list[ScreenRow]:
    """Return the rows of tasks.  Rows of unchanged tasks come from ``known``, which is updated."""
    services = {id: snapshot.service_name(id) for id in snapshot.services}
    nodes = {id: snapshot.node_name(id) for id in snapshot.nodes}
    for gone in known.keys() - snapshot.tasks.keys():
        del known[gone]
    rows: list[ScreenRow] = []
    for id, task in snapshot.tasks.items():
        words = services.get(task.service_id, ""), nodes.get(task.node_id, ""), snapshot.task_error(task)
        found = known.get(id)
        if found is None or found.task is not task or found.words != words:
            known[id] = found = KnownRow(task, words, _task(snapshot, task))
        if with_ended or task.is_shown:
            rows.append(found.row)
    return rows


def chosen(rows: Iterable[ScreenRow], needle: str, *, by_name: bool = False) -> list[ScreenRow]:
    """Return the rows with all words of ``needle``, ignoring case, the most urgent first or by name."""
    words = needle.casefold().split()
    found = [row for row in rows if _has(row, words)] if words else list(rows)
    by: Callable[[ScreenRow], tuple[Any, ...]] = (
        (lambda row: row.order[1:]) if by_name else (lambda row: row.order)
    )
    return sorted(found, key=by)


def _has(row: ScreenRow, words: Sequence[str]) -> bool:
    text = "\n".join(row.cells).casefold()
    return all(word in text for word in words)


def _service(
    snapshot: Snapshot,
    state: ServiceLine,
    tasks: Sequence[ShownTask],
    routes: Sequence[Mapping[str, Any]],
) -> ScreenRow:
    service, health = snapshot.services[state.id], health_of(state)
    tone = {ClusterHealth.DEGRADED: Tone.BAD, ClusterHealth.CONVERGING: Tone.WARNING}.get(health, Tone.GOOD)
    cells = (
        state.name,
        state.tasks,
        state.update,
        requests_of(routes),
        _reserved(tasks),
        image_of(service),
        _ports(service),
        mode_of(service),
        state.reason or (state.update if is_updating(state) else ""),
    )
    return ScreenRow(state.id, cells, tone, (_URGENCY[tone], state.name, state.id))


_STAYING = frozenset({"running", "complete"})
"""Desired states of tasks that are not being stopped.  Those of jobs are to complete."""
_URGENCY = {Tone.BAD: 0, Tone.WARNING: 1, Tone.PLAIN: 2, Tone.GOOD: 2, Tone.MUTED: 3}


def requests_of(routes: Iterable[Mapping[str, Any]]) -> str:
    """Return ``12.5/s, 0.3% failed, p95 31ms`` of the busiest route, or an empty text without requests."""
    counted = [one for one in routes if one.get("RequestsPerSecond") is not None]
    if not counted:
        return ""
    rate, errors, _, p95, _ = traffic_cells(max(counted, key=lambda one: float(one["RequestsPerSecond"])))
    return f"{rate}/s, {errors} failed, p95 {p95}"


def _reserved(tasks: Sequence[ShownTask]) -> str:
    """Return ``1.5 CPUs, 512 MiB``, or an empty text if nothing is reserved."""
    found = sum_of(tasks)
    cpus = counted(float(round(found.cpus, 2)), "CPU") if found.cpus else ""
    return ", ".join(filter(None, (cpus, size_of(found.memory) if found.memory else "")))


def size_of(size: int) -> str:
    """Return ``512 MiB``, or ``1.5 GiB``."""
    return f"{round(size / (1 << 30), 1):g} GiB" if size >= 1 << 30 else f"{size >> 20} MiB"


def _ports(service: Mapping[str, Any]) -> str:
    ports = (service.get("Endpoint") or {}).get("Ports") or ()
    return " ".join(
        f"{port.get('PublishedPort', '')}->{port.get('TargetPort', '')}"
        + ("" if port.get("Protocol", "tcp") == "tcp" else f"/{port['Protocol']}")
        for port in ports
    )


def _task(snapshot: Snapshot, task: ShownTask) -> ScreenRow:
    state, status = task.status.state, task.status
    if state in ("failed", "rejected", "orphaned"):
        tone = Tone.BAD
    elif state in ENDED:
        tone = Tone.MUTED
    elif state == "running":
        tone = Tone.GOOD if task.desired_state in _STAYING else Tone.WARNING
    else:
        tone = Tone.BAD if status.err else Tone.WARNING
    why = snapshot.task_error(task) or ("" if tone is Tone.GOOD else status.message)
    if state == "running" and task.desired_state not in ("", *_STAYING):
        why = f"stopping: its desired state is {task.desired_state}"
    name = snapshot.task_name(task)
    node = snapshot.node_name(task.node_id) if task.node_id else ""
    order = (_URGENCY[tone], snapshot.service_name(task.service_id), task.slot, node, task.id)
    return ScreenRow(task.id, (name, state, status.timestamp, node, task.image, why), tone, order)


def _node(snapshot: Snapshot, node: Mapping[str, Any], tasks: Sequence[ShownTask]) -> ScreenRow:
    state, availability = str(node["Status"]["State"]), str(node["Spec"].get("Availability") or "")
    message = plain_message(str(node["Status"].get("Message") or ""), str(node.get("SilentSince") or ""))
    manager = node.get("ManagerStatus") or {}
    if manager.get("Reachability") == "unreachable" and not message:
        message = "the manager is unreachable"
    is_calm = not message and availability == "active"
    tone = Tone.BAD if state != "ready" else Tone.GOOD if is_calm else Tone.WARNING
    role = "leader" if manager.get("Leader") else str(node["Spec"].get("Role") or "")
    load = node.get("Load")
    name = snapshot.node_name(node["ID"])
    cells = (
        name,
        f"{state}, {UNAVAILABLE[availability]}" if availability in UNAVAILABLE else state,
        role,
        str(len(tasks)),
        f"{load:.0%}" if isinstance(load, int | float) and state == "ready" else "-",
        share_of(sum_of(tasks), ReservedResources(cpus_of(node), memory_of(node))),
        str(node["Status"].get("Addr") or ""),
        str((node["Description"].get("Engine") or {}).get("EngineVersion") or ""),
        message,
    )
    return ScreenRow(node["ID"], cells, tone, (_URGENCY[tone], name, node["ID"]))


_BAD_ACTIONS = frozenset({"reject", "lost", "suspend", "expire"})
_SHOWN_ELSEWHERE = ("name", "com.docker.swarm.")


def _event(snapshot: Snapshot, place: int, event: Mapping[str, Any]) -> ScreenRow:
    actor = event.get("Actor") or {}
    attributes, action = actor.get("Attributes") or {}, str(event.get("Action") or "")
    id, type = str(actor.get("ID") or ""), str(event.get("Type") or "")
    task = snapshot.tasks.get(id)
    name = (
        snapshot.task_name(task)
        if task is not None
        else str(attributes.get("name") or attributes.get("com.docker.swarm.service.name") or id)
    )
    what = ", ".join(
        f"{key}={value}" for key, value in sorted(attributes.items()) if not key.startswith(_SHOWN_ELSEWHERE)
    )
    is_failure = action == "die" and str(attributes.get("exitCode", "0")) != "0"
    tone = Tone.BAD if is_failure or action in _BAD_ACTIONS else Tone.PLAIN
    stamp = timestamp(int(event.get("timeNano") or 0)) if event.get("timeNano") else ""
    return ScreenRow(f"{place}", (stamp, type, action, name, what), tone, (0, -place))


def log_row(snapshot: Snapshot, number: int, line: ShownLine) -> ScreenRow:
    """Return a line of a log with its time and task."""
    task = snapshot.tasks.get(line.task)
    name = snapshot.task_name(task) if task is not None else line.task[:12]
    if not line.task:
        return ScreenRow(str(number), ("", "", line.text), Tone.WARNING, (0, number))
    clock = line.stamp.partition("T")[2][:12]
    return ScreenRow(str(number), (clock, name, line.text), Tone.PLAIN, (0, number))


def laid_out(columns: Sequence[Column], naturals: Sequence[int], width: int, gap: int = 2) -> list[int]:
    """Return the width of each column, or 0 for a hidden one.

    Args:
        naturals: Width of the widest cell of each column, including its title.
        width: Width of all columns, with ``gap`` between two.
    """
    widths = [
        0 if column.is_flexible else min(natural, column.width_max)
        for column, natural in zip(columns, naturals, strict=True)
    ]
    longest = max(
        (natural for column, natural in zip(columns, naturals, strict=True) if column.is_flexible), default=0
    )
    wanted = min(longest, int(width * _FLEXIBLE_SHARE))

    def used() -> int:
        return sum(one + gap for one in widths if one)

    for rank in sorted({column.rank for column in columns if column.rank}, reverse=True):
        if used() + wanted <= width:
            break
        widths = [0 if column.rank == rank else one for column, one in zip(columns, widths, strict=True)]
    rest = width - used()
    return [max(rest, 0) if column.is_flexible else one for column, one in zip(columns, widths, strict=True)]


_FLEXIBLE_SHARE = 0.6
"""Share of the width up to which a long text in the flexible column hides the columns with a rank."""


def age_of(stamp: str, now: float) -> str:
    """Return the age of an RFC 3339 timestamp as ``12s``, ``4m``, ``3h`` or ``2d``.

    Empty for an invalid timestamp.  ``now`` is Unix time in seconds.
    """
    try:
        seconds = int(max(now - unix_ns(stamp) / SECOND_NS, 0))
    except InvalidArgument:
        return ""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"

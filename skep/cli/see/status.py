"""``skep status``: shows the cluster on one screen, as one node sees it, with the reason if something is unhealthy."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

import click
import msgspec

from skep.api.client.requests import Requests
from skep.cli.cluster.door import route_notes, traffic_of
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.formatting import age
from skep.cli.output import Cell, OutputOptions, Screen, Shown, shows, table
from skep.cli.see.points_in_time import local_now, moment_or_revision
from skep.cli.see.quorum import STALE, UNREACHABLE, clock_time, no_leader, quorum_of, silence, way_out
from skep.cli.visibility import none_visible, sees_all_services
from skep.errors import PermissionDenied, SkepError
from skep.model.node import plain_message
from skep.model.node_reports.conditions import NO_MANAGER_ANSWERS
from skep.model.service import HealthState, ServiceHealth
from skep.model.task_end import printable
from skep.model.values.counts import counted
from skep.model.values.times import SECOND_NS, unix_ns

DEGRADED, LEADERLESS = 3, 4
"""Exit codes: not healthy, and no leader.  0 means healthy, and 1 that the node does not respond."""

_EARLIER_WITHIN_S = 60.0
"""Seconds for an earlier state, which the manager builds from etcd's history of all objects."""
_AT = "at"
"""The word before the time of an earlier state."""
_NODES_SHOWN, _SERVICES_SHOWN = 20, 30
"""Rows of each table.  If there are more, unhealthy ones come first.  ``-o wide`` shows all."""
_TASKS_COUNTED_MAX = 5_000
"""Tasks are counted by node only if at most this many run or have completed.  A longer list would take more time than
all other requests.
"""
_NO_SERVICES = "No services. Create one with skep service create, or deploy a stack with skep stack deploy."
_DONE = ("completed", "rollback_completed")
UNAVAILABLE = {"drain": "drained", "pause": "paused"}
"""Words for the availability of nodes that accept no tasks."""

_NODE_LOST, _ON_ITS_WAY = 2, 4
"""Weights of problems (``ServiceHealth.weight``)."""
COLORS: Mapping[HealthState, str] = {
    HealthState.HEALTHY: "",
    HealthState.CONVERGING: "yellow",
    HealthState.DEGRADED: "red",
}
"""Colors of the counts of a service or a stack."""

Row = tuple[str, str]
T = TypeVar("T", "NodeLine", "ServiceLine")


class NodeLine(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """A node of the cluster."""

    name: str
    id: str = msgspec.field(name="ID")
    role: str
    state: str
    availability: str = "active"
    tasks: int | None = None
    """Running tasks that are desired to run, or None if not counted."""
    load: float | None = None
    version: str = ""
    is_reachable: bool = True
    """Whether it is reachable as a manager."""
    reason: str = ""

    @property
    def is_healthy(self) -> bool:
        """Return whether the node is ready and reachable.

        Drained and paused nodes count as healthy, and conditions are only warnings.
        """
        return self.state == "ready" and self.is_reachable


class ServiceLine(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """A service.

    ``completed`` and ``total`` are set for a job, and for a service of which tasks have ended as intended.  ``state``,
    ``weight`` and ``since`` are the manager's (``ServiceHealth``).
    """

    name: str
    id: str = msgspec.field(name="ID")
    running: int
    desired: int
    completed: int = 0
    total: int = 0
    update: str = ""
    reason: str = ""
    state: HealthState = HealthState.HEALTHY
    is_healthy: bool = True
    image: str = ""
    weight: int = _ON_ITS_WAY
    since: str = ""

    @property
    def tasks(self) -> str:
        """Return the number of tasks, such as ``2/3``, or ``6/6 done``."""
        return f"{self.completed}/{self.total} done" if self.total else f"{self.running}/{self.desired}"


class ClusterStatus(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """The state of the cluster as reported by a manager."""

    id: str = msgspec.field(name="ID", default="")
    leader: str = ""
    as_of: str = ""
    """Time at which the leader was lost, which is the time of the rows (RFC 3339).  Empty for the present state."""
    nodes: tuple[NodeLine, ...] = ()
    services: tuple[ServiceLine, ...] = ()


class StatusScreen(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """Everything that is shown; ``-o json`` has it in this form.

    ``health``: ``healthy``, ``converging``, ``degraded`` or ``no leader``.  ``node``: facts about the node that
    responded.
    """

    health: str
    node: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    """Notes about a missing leader, about state that could not be read, and about routes that do not work."""
    cluster: ClusterStatus | None = None
    next: str = ""
    """The command to run next without a leader."""
    sees_all: bool = True
    """Whether the user sees the services of every stack."""

    @property
    def exit_code(self) -> int:
        """Return the exit code of the command."""
        return {"healthy": 0, "converging": DEGRADED, "degraded": DEGRADED}.get(self.health, LEADERLESS)


@click.command()
@click.option(
    "--at",
    "when",
    default="",
    metavar="TIME",
    help="Show an earlier state: '10 min ago', 'yesterday 14:00', '14:00', RFC 3339, revision:N.",
)
@shows
@click.pass_obj
def status(host: HostOptions, when: str, output: OutputOptions) -> None:
    """Show the state of the cluster.

    Lists nodes and services, and the reason if one is not healthy.

    Exit code 0: healthy. 3: converging or degraded. 4: the cluster has no leader. 1: the node does not respond.

    \b
    Examples:
      skep status
      skep status --watch
      skep status --at '10 min ago'
      skep status -o json | jq '.Cluster.Services[] | select(.IsHealthy | not)'
      skep --host ssh://root@manager1 status
    """

    async def fetch() -> Shown:
        found = await (_status_at(host, when) if when else _status(host))
        return Shown(data=found, lines=lambda screen: lines_of(found, screen), exit_code=found.exit_code)

    output.show(fetch)


async def _status(host: HostOptions) -> StatusScreen:
    """Return the status.  Missing parts have a reason, because even a node without a leader has a status.

    Raises: Unavailable: the node itself does not respond.
    """
    async with host.requests() as client:
        info: dict[str, Any] = await client.get("/info", timeout_s=RESPONSE_TIMEOUT_S)
        quorum = await quorum_of(client) if info["Swarm"].get("ControlAvailable") else None
        if quorum is None:
            return StatusScreen(health=node_health(info).value, node=tuple(about_node(info)))
        is_led = bool(quorum["HasLeader"])
        notes = [] if is_led else list(no_leader(quorum))
        node = [*about_node(info, shows_error=is_led), *filter(None, [await _store(client)])]
        cluster: ClusterStatus | None = None
        try:
            cluster = await _cluster(client, info, {} if is_led else STALE)
        except SkepError as error:
            notes.append(f"The state of the cluster could not be read: {error}")
        if cluster is not None and not is_led:
            cluster = as_of(cluster, quorum)
        if cluster is not None and is_led:
            notes += route_notes(await traffic_of(client))
        sees_all = cluster is None or bool(cluster.services) or await sees_all_services(client)
        health = cluster_health(cluster).value if is_led else "no leader"
        further = "" if is_led else way_out(quorum)
        return StatusScreen(
            health=health,
            node=tuple(node),
            notes=tuple(notes),
            cluster=cluster,
            next=further,
            sees_all=sees_all,
        )


async def _status_at(host: HostOptions, when: str) -> StatusScreen:
    """Return an earlier status from the store's history.

    Raises: InvalidArgument, FailedPrecondition: the time is invalid, or no longer in the history.
    """
    now = local_now()
    async with host.requests() as client:
        state = await client.get("/skep/state", timeout_s=_EARLIER_WITHIN_S, at=moment_or_revision(when, now))
    return status_of_state(state, now)


def status_of_state(state: Mapping[str, Any], now: datetime) -> StatusScreen:
    """Return the status for an earlier state (``GET /skep/state``)."""
    running = [task["NodeID"] for task in state["Tasks"] if task["State"] == "running"]
    rows = node_rows(state["Nodes"], running)
    at = datetime.fromtimestamp(unix_ns(state["Time"]) / SECOND_NS, now.tzinfo)
    cluster = ClusterStatus(
        leader=next((row.name for row in rows if row.role == "leader"), ""),
        nodes=tuple(rows),
        services=tuple(service_rows(state["Services"], at.timestamp())),
    )
    when = f"{at:%Y-%m-%d %H:%M:%S %Z} (revision {state['Revision']})"
    return StatusScreen(health=cluster_health(cluster).value, node=((_AT, when),), cluster=cluster)


def cluster_health(cluster: ClusterStatus | None) -> HealthState:
    """Return the health of the cluster: the worst of its nodes and services."""
    if cluster is None or not all(row.is_healthy for row in cluster.nodes):
        return HealthState.DEGRADED
    return worst_health(row.state for row in cluster.services)


def node_health(info: Mapping[str, Any]) -> HealthState:
    """Return the health of a node outside of a cluster or of a worker, from ``/info``.  A worker without a manager is
    degraded: nothing replaces its tasks.
    """
    state = info["Swarm"].get("LocalNodeState") or "inactive"
    is_part = state in ("active", "inactive") and not info["Swarm"].get("Error")
    is_alone = any(NO_MANAGER_ANSWERS in warning for warning in info.get("Warnings") or ())
    return HealthState.HEALTHY if is_part and not is_alone else HealthState.DEGRADED


def worst_health(states: Iterable[HealthState]) -> HealthState:
    """Return the worst of ``states``, healthy if there is none."""
    found = set(states)
    worst = (state for state in (HealthState.DEGRADED, HealthState.CONVERGING) if state in found)
    return next(worst, HealthState.HEALTHY)


def as_of(cluster: ClusterStatus, quorum: Mapping[str, Any]) -> ClusterStatus:
    """Return ``cluster`` as the state when the leader was lost, with the present reachability of the managers.

    Args:
        quorum: The response to ``GET /skep/quorum`` of a manager without a leader.
    """
    rows = []
    for row in cluster.nodes:
        silent = silence(quorum, row.id)
        role = "manager" if row.role == "leader" else row.role
        if not silent:
            rows.append(msgspec.structs.replace(row, role=role))
            continue
        why = "; ".join(filter(None, (silent, row.reason)))
        rows.append(
            msgspec.structs.replace(row, role=role, state=UNREACHABLE, is_reachable=False, reason=why)
        )
    return msgspec.structs.replace(cluster, as_of=quorum["Since"], leader="", nodes=tuple(rows))


async def _store(client: Requests) -> Row | None:
    """Return the fill level of this manager's store, or None for a user without the right to see it."""
    try:
        response = await client.get("/skep/cluster/store", timeout_s=RESPONSE_TIMEOUT_S)
    except PermissionDenied:  # users of single stacks do not see the cluster's store
        return None
    except SkepError as error:
        return "store", f"unknown: {error}"
    return "store", f"{response['Summary']}, file {response['Size'] >> 20} MiB"


async def _cluster(client: Requests, info: Mapping[str, Any], headers: Mapping[str, str]) -> ClusterStatus:
    """Read the cluster's nodes and services.  Raises: SkepError."""
    nodes = await client.get("/nodes", headers=headers, timeout_s=RESPONSE_TIMEOUT_S)
    services = await client.get(
        "/services", headers=headers, timeout_s=RESPONSE_TIMEOUT_S, status="true", health="true"
    )
    running = None
    listed = sum(_count(service, "RunningTasks") + _count(service, "CompletedTasks") for service in services)
    if listed <= _TASKS_COUNTED_MAX:
        filters = {"desired-state": ["running", "complete"]}  # the tasks of jobs are to complete
        tasks = await client.get("/tasks", filters=filters, headers=headers, timeout_s=RESPONSE_TIMEOUT_S)
        running = [task["NodeID"] for task in tasks if task["Status"]["State"] == "running"]
    rows = node_rows(nodes, running)
    leaders = [node["ID"] for node in nodes if (node.get("ManagerStatus") or {}).get("Leader")]
    return ClusterStatus(
        id=str((info["Swarm"].get("Cluster") or {}).get("ID", "")),
        leader=next((row.name for row in rows if row.id in leaders and not headers), ""),
        nodes=tuple(rows),
        services=tuple(service_rows(services, time.time())),
    )


# -- rows ------------------------------------------------------------------------------------------------------------


def about_node(info: Mapping[str, Any], *, shows_error: bool = True) -> Iterator[Row]:
    """Yield rows about the node itself, from ``/info``."""
    swarm = info["Swarm"]
    memory = info["MemTotal"] / (1 << 30)
    yield (
        "node",
        f"{info['Name']}, skep {info['ServerVersion']}, {counted(info['NCPU'], 'CPU')}, {memory:.1f} GiB",
    )
    yield "swarm", _membership(swarm)
    if shows_error and (error := swarm.get("Error")):
        yield "error", error
    yield "containers", f"{info['ContainersRunning']} running, {counted(info['Images'], 'image')}"
    for warning in info.get("Warnings") or ():
        # Docker breaks its warnings into indented lines.
        yield "warning", " ".join(warning.removeprefix("WARNING: ").split())


def _membership(swarm: Mapping[str, Any]) -> str:
    state = swarm.get("LocalNodeState") or "inactive"
    id = swarm.get("NodeID", "")
    match state:
        case "inactive":
            return "inactive. Run skep swarm init, or skep swarm join."
        case "locked":
            return "locked. Run skep swarm unlock."
        case "pending":
            return f"pending: this node ({id}) has not reached a manager yet{_looked_for(swarm)}"
        case "error":
            return f"error: this node ({id}) is not part of the swarm"
    role = "manager" if swarm.get("ControlAvailable") else "worker"
    return f"{state}, this node is a {role} with the id {id}"


def _looked_for(swarm: Mapping[str, Any]) -> str:
    addresses = [peer["Addr"] for peer in swarm.get("RemoteManagers") or ()]
    if not addresses:
        return ""
    return (
        f'. It tries {", ".join(addresses)}. To try others, set managers = ["address:2377"] in its configuration file '
        "(default: /etc/skep/skep.toml)."
    )


def node_rows(nodes: Iterable[Mapping[str, Any]], running: Sequence[str] | None = None) -> list[NodeLine]:
    """Return the nodes by name, managers first.  ``running``: node ids of all running tasks, or None if not counted."""
    rows = []
    for node in nodes:
        manager = node.get("ManagerStatus")
        role = "worker" if manager is None else "leader" if manager.get("Leader") else "manager"
        why = plain_message(node["Status"].get("Message", ""), node.get("SilentSince") or "")
        is_reachable = manager is None or manager.get("Reachability", "reachable") == "reachable"
        if manager is not None and not is_reachable:
            why = "; ".join(filter(None, (f"the manager is {manager['Reachability']}", why)))
        rows.append(
            NodeLine(
                name=node["Description"].get("Hostname") or node["ID"],
                id=node["ID"],
                role=role,
                state=node["Status"]["State"],
                availability=(node.get("Spec") or {}).get("Availability", "active"),
                tasks=running.count(node["ID"]) if running is not None else None,
                load=node.get("Load"),
                version=(node["Description"].get("Engine") or {}).get("EngineVersion", ""),
                is_reachable=is_reachable,
                reason=why,
            )
        )
    return sorted(rows, key=lambda row: (row.role == "worker", row.name, row.id))


def health_of(service: Mapping[str, Any]) -> ServiceHealth:
    """Return the manager's verdict on a service that was read with ``health=true``."""
    found = (service.get("ServiceStatus") or {}).get("Health")
    if found is None:
        reason = "its manager is older than this command and does not report health"
        return ServiceHealth(state=HealthState.CONVERGING, reason=reason, weight=_ON_ITS_WAY)
    return msgspec.convert(found, ServiceHealth)


def service_rows(services: Iterable[Mapping[str, Any]], now: float) -> Iterator[ServiceLine]:
    """Yield the services by name."""
    for service in sorted(services, key=lambda service: str(service["Spec"]["Name"])):
        health = health_of(service)
        completed, total = completion(service)
        yield ServiceLine(
            name=service["Spec"]["Name"],
            id=service["ID"],
            running=_count(service, "RunningTasks"),
            desired=_count(service, "DesiredTasks"),
            completed=completed,
            total=total,
            update=_update(service.get("UpdateStatus") or {}, now),
            reason="; ".join(filter(None, (health.reason, health.restart_summary))),
            state=health.state,
            is_healthy=health.state is HealthState.HEALTHY,
            image=_image(service),
            weight=health.weight,
            since=health.since,
        )


def _image(service: Mapping[str, Any]) -> str:
    """Return the service's image without its digest."""
    container = (service["Spec"].get("TaskTemplate") or {}).get("ContainerSpec") or {}
    return str(container.get("Image", "")).partition("@")[0]


def completion(service: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of completed tasks, and of all tasks that have to complete.

    Returns (0, 0) for a service that is not a job, unless some of its tasks have completed.
    """
    status, mode = service.get("ServiceStatus") or {}, service["Spec"].get("Mode") or {}
    completed, total = _count(service, "CompletedTasks"), int(status.get("TotalTasks", 0))
    if mode.get("ReplicatedJob") is not None:
        total = total or int(mode["ReplicatedJob"].get("TotalCompletions") or 0)
    elif mode.get("GlobalJob") is not None:
        total = total or completed + _count(service, "DesiredTasks")
    elif completed:
        total = _count(service, "DesiredTasks")
    return (completed, total) if total else (0, 0)


def _update(update: Mapping[str, Any], now: float) -> str:
    state = str(update.get("State") or "")
    words = state.replace("_", " ")
    if state in _DONE and update.get("CompletedAt"):
        return f"{words} {age(update['CompletedAt'], now)} ago"
    if state.endswith("paused") and update.get("StartedAt"):  # the time of the pause is not known
        return f"{words}, started {age(update['StartedAt'], now)} ago"
    if state and update.get("StartedAt"):
        return f"{words} for {age(update['StartedAt'], now)}"
    return words


def _count(service: Mapping[str, Any], field: str) -> int:
    return int((service.get("ServiceStatus") or {}).get(field, 0))


# -- the screen ------------------------------------------------------------------------------------------------------


def lines_of(status: StatusScreen, screen: Screen) -> Iterator[str]:
    """Yield the screen: headline, problems, nodes, services, and the command to run next."""
    health = status.health.upper()
    color = {"healthy": "green", "converging": "yellow", "degraded": "yellow"}.get(status.health, "red")
    first, *further = screen.fitted(_headline(status), indent=2)
    yield first.replace(health, screen.styled(health, color, bold=True), 1)
    yield from further
    for note in status.notes:
        yield from (screen.styled(line, "red") for line in screen.fitted(printable(note), indent=2))
    width = max(len(word) for word, _ in status.node) + 2
    for word, text in status.node:
        yield from screen.fitted(f"{word.ljust(width)}{printable(text)}", indent=width)
    if status.cluster is None:
        yield from _next(status)
        return
    is_past = bool(status.node) and status.node[0][0] == _AT
    yield ""
    at = f" AT {clock_time(status.cluster.as_of)}" if status.cluster.as_of else ""
    yield from _nodes(status.cluster.nodes, screen, at)
    yield ""
    if status.cluster.services:
        yield from _services(status.cluster.services, screen, at, shows_images=is_past or screen.is_wide)
    else:
        yield (
            "No services."
            if is_past
            else _NO_SERVICES
            if status.sees_all
            else none_visible("No services of your stacks")
        )
    yield from _next(status)


def _next(status: StatusScreen) -> Iterator[str]:
    """Yield the command to run next if the cluster is unhealthy."""
    if status.next:
        yield f"Next: {status.next}"
        return
    if status.cluster is None or not (name := worst(status.cluster)):
        return
    is_past = bool(status.node) and status.node[0][0] == _AT
    yield f"Next: skep {'history' if is_past else 'explain'} {printable(name)}"


def worst(cluster: ClusterStatus) -> str:
    """Return the name of the worst problem: the oldest failed service, else a lost node, else a converging service.

    A node is named by its ID if another one has its name, as after a machine has left and joined again.
    """
    bad = [row for row in cluster.services if not row.is_healthy]
    bad.sort(key=lambda row: (row.weight, row.since or "~", row.name))
    names = Counter(row.name for row in cluster.nodes)
    lost = [row.id if names[row.name] > 1 else row.name for row in cluster.nodes if not row.is_healthy]
    # If services are degraded because of a lost node, the node comes first.
    is_own = bool(bad) and (bad[0].weight < _NODE_LOST or not lost)
    return bad[0].name if is_own else lost[0] if lost else ""


def _headline(status: StatusScreen) -> str:
    words = [f"cluster  {status.health.upper()}"]
    if (cluster := status.cluster) is not None:
        managers = [row for row in cluster.nodes if row.role != "worker"]
        leader = f" (leader {printable(cluster.leader)})" if cluster.leader else ""
        workers = len(cluster.nodes) - len(managers)
        ready = sum(row.state == "ready" for row in cluster.nodes)
        well = sum(row.is_healthy for row in cluster.services)
        nodes = f"{ready} of {counted(len(cluster.nodes), 'node')} ready"
        if cluster.as_of:
            words.append(f"as of {clock_time(cluster.as_of)}:")
        words.append(f"{counted(len(managers), 'manager')}{leader}, {counted(workers, 'worker')}, {nodes}")
        words.append(f"{well} of {counted(len(cluster.services), 'service')} healthy")
    return "  ".join(words)


def _nodes(rows: Sequence[NodeLine], screen: Screen, at: str) -> Iterator[str]:
    shown = _first(rows, _NODES_SHOWN, screen)
    cells: list[list[str | Cell]] = [
        [
            row.name,
            row.role,
            Cell(_state(row), "" if row.state == "ready" else "red"),
            "-" if row.tasks is None else str(row.tasks),
            "-" if row.load is None or row.state != "ready" else f"{row.load:.0%}",
            *([row.id, row.version] if screen.is_wide else []),
            Cell(row.reason, "yellow"),
        ]
        for row in shown
    ]
    more = ["ID", "VERSION"] if screen.is_wide else []
    yield from table(("NODE", "ROLE", f"STATE{at}", "TASKS", "LOAD", *more, "REASON"), cells, screen)
    if len(shown) < len(rows):
        yield f"{counted(len(rows) - len(shown), 'more node')}. To show all, run skep status -o wide."


def _state(row: NodeLine) -> str:
    state = row.state if row.state == "ready" else row.state.upper()
    return f"{state}, {UNAVAILABLE[row.availability]}" if row.availability in UNAVAILABLE else state


def _services(rows: Sequence[ServiceLine], screen: Screen, at: str, *, shows_images: bool) -> Iterator[str]:
    shown = _first(rows, _SERVICES_SHOWN, screen)
    cells: list[list[str | Cell]] = [
        [
            row.name,
            Cell(row.tasks, COLORS[row.state]),
            row.update,
            *([row.id] if screen.is_wide else []),
            *([row.image] if shows_images else []),
            Cell(row.reason, "yellow"),
        ]
        for row in shown
    ]
    more = [*(["ID"] if screen.is_wide else []), *(["IMAGE"] if shows_images else [])]
    yield from table(("SERVICE", f"TASKS{at}", "UPDATE", *more, "REASON"), cells, screen)
    if len(shown) < len(rows):
        yield f"{counted(len(rows) - len(shown), 'more service')}. To show all, run skep status -o wide."


def _first(rows: Sequence[T], most: int, screen: Screen) -> Sequence[T]:
    """Return all rows, or as many as fit on a screen, unhealthy ones first."""
    if screen.is_wide or len(rows) <= most:
        return rows
    return sorted(rows, key=lambda row: row.is_healthy)[:most]

"""The state of a cluster that ``skep top`` shows, and its changes by events.  Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import msgspec

from skep.cli.see.status import NodeLine, ServiceLine, node_rows, service_rows
from skep.model.node_reports.node_refusals import is_no_node
from skep.model.service import HealthState
from skep.model.values.counts import counted
from skep.model.values.encoding import go_name

ENDED = frozenset({"complete", "shutdown", "failed", "rejected", "remove", "orphaned"})
_WANTED = frozenset({"running", "ready", "complete"})
_TASK_SERVICE = "com.docker.swarm.service.id"
_NO_NODES: Mapping[str, Mapping[str, Any]] = {}
_NAMED_MAX = 3
"""Largest number of objects of a kind that the headline names.  It counts the others."""
_NANO = 1e9
"""Docker's unit of processors is a billionth."""


class LinkStatus(Enum):
    """State of the connection to the node."""

    CONNECTING = "connecting"
    LIVE = "live"
    LOST = "lost"


class Connection(msgspec.Struct, frozen=True):
    """The state of the connection.  ``reason``: why it was lost.  ``retry_s``: seconds until the next attempt."""

    link: LinkStatus = LinkStatus.CONNECTING
    reason: str = ""
    retry_s: float = 0.0


class _ContainerStatus(msgspec.Struct, frozen=True, rename=go_name, gc=False):
    exit_code: int = 0


class _TaskStatus(msgspec.Struct, frozen=True, rename=go_name):
    state: str = "new"
    timestamp: str = ""
    message: str = ""
    err: str = ""
    container_status: _ContainerStatus | None = None


class _ContainerSpec(msgspec.Struct, frozen=True, rename=go_name, gc=False):
    image: str = ""


class _Amounts(msgspec.Struct, frozen=True, rename=go_name, gc=False):
    nano_cpus: int = msgspec.field(name="NanoCPUs", default=0)
    memory_bytes: int = 0


class _Resources(msgspec.Struct, frozen=True, rename=go_name):
    reservations: _Amounts | None = None


class _TaskSpec(msgspec.Struct, frozen=True, rename=go_name):
    container_spec: _ContainerSpec | None = None
    resources: _Resources | None = None


class ReservedResources(NamedTuple):
    """CPUs, and bytes of memory."""

    cpus: float = 0.0
    memory: int = 0


class ShownTask(msgspec.Struct, frozen=True, rename=go_name):
    """The shown fields of a task.  Ten thousand complete tasks would use a hundred times the memory."""

    id: str
    service_id: str = ""
    node_id: str = ""
    slot: int = 0
    desired_state: str = ""
    status: _TaskStatus = _TaskStatus()
    spec: _TaskSpec = _TaskSpec()

    @property
    def image(self) -> str:
        """The image without the digest."""
        container = self.spec.container_spec
        return container.image.partition("@")[0] if container is not None else ""

    @property
    def reserved(self) -> "ReservedResources":
        """The CPUs and memory that the scheduler keeps free for the task on its node."""
        resources = self.spec.resources
        amounts = (resources.reservations if resources is not None else None) or _Amounts()
        return ReservedResources(amounts.nano_cpus / _NANO, amounts.memory_bytes)

    @property
    def is_settled(self) -> bool:
        """Whether every further change has an event.  Changes before a task runs have none."""
        state = self.status.state
        return state in ENDED or (state == "running" and self.desired_state == "running")

    @property
    def is_shown(self) -> bool:
        """Whether it matters now: it is starting, runs, or ended unexpectedly."""
        has_failed = self.status.state in ("failed", "rejected", "orphaned")
        return not self.is_settled or self.is_active or (has_failed and self.desired_state in _WANTED)

    @property
    def is_active(self) -> bool:
        """Whether it has not ended and should not end."""
        return self.status.state not in ENDED and self.desired_state in _WANTED


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All shown objects.

    Nodes, services and routes are in the API's form.  ``without_leader`` has the text of ``skep status`` without a
    leader, and is empty otherwise.
    """

    nodes: Mapping[str, Mapping[str, Any]] = _NO_NODES
    services: Mapping[str, Mapping[str, Any]] = _NO_NODES
    tasks: Mapping[str, ShownTask] = {}
    events: tuple[Mapping[str, Any], ...] = ()
    routes: tuple[Mapping[str, Any], ...] = ()
    without_leader: tuple[str, ...] = ()
    connection: Connection = Connection()
    is_loaded: bool = False

    def service_name(self, id: str) -> str:
        """Return a service's name, or its id if it was removed."""
        service = self.services.get(id)
        return str(service["Spec"]["Name"]) if service is not None else id

    def node_name(self, id: str) -> str:
        """Return a node's host name, or its id if it was removed."""
        node = self.nodes.get(id)
        return str(node["Description"].get("Hostname") or id) if node is not None else id

    def task_name(self, task: ShownTask) -> str:
        """Return a name like ``web.3``, ``web.m1`` for a global service, or ``web.<id>`` before a task of a global
        service has a node.
        """
        where = self._slot(task) or (self.node_name(task.node_id) if task.node_id else task.id)
        return f"{self.service_name(task.service_id)}.{where}"

    def task_error(self, task: ShownTask) -> str:
        """Return why a task does not run.  Of one that no node accepts, the reason of its service has the needs."""
        error = task.status.err
        if not is_no_node(error):
            return error
        service = self.services.get(task.service_id) or {}
        reason = str(((service.get("ServiceStatus") or {}).get("Health") or {}).get("Reason") or "")
        return reason if reason.startswith("needs ") else error

    def _slot(self, task: ShownTask) -> str:
        """Return the slot of a task, or an empty text for a task of a global service.  The slots of jobs begin at 0."""
        service = self.services.get(task.service_id)
        is_job = service is not None and "ReplicatedJob" in service["Spec"].get("Mode", {})
        return str(task.slot) if task.slot or is_job else ""


class Touched(msgspec.Struct, frozen=True):
    """Ids of the objects to read again."""

    nodes: frozenset[str] = frozenset()
    services: frozenset[str] = frozenset()
    tasks: frozenset[str] = frozenset()

    def __or__(self, other: "Touched") -> "Touched":
        return Touched(self.nodes | other.nodes, self.services | other.services, self.tasks | other.tasks)

    def __bool__(self) -> bool:
        return bool(self.nodes or self.services or self.tasks)


def touched_by(event: Mapping[str, Any]) -> Touched:
    """Return the objects that an event changed.  A task also changes the counts of its service."""
    actor = event.get("Actor") or {}
    id = str(actor.get("ID") or "")
    match event.get("Type"):
        case "task":
            service = str((actor.get("Attributes") or {}).get(_TASK_SERVICE) or "")
            return Touched(services=frozenset({service} - {""}), tasks=frozenset({id} - {""}))
        case "service":
            return Touched(services=frozenset({id} - {""}))
        case "node":
            return Touched(nodes=frozenset({id} - {""}))
    return Touched()


def mode_of(service: Mapping[str, Any]) -> str:
    """Return ``replicated``, ``global``, ``job`` or ``global job``."""
    mode = service["Spec"].get("Mode") or {}
    words = {"Global": "global", "ReplicatedJob": "job", "GlobalJob": "global job"}
    return next((word for key, word in words.items() if mode.get(key) is not None), "replicated")


def tasks_of(snapshot: Snapshot, *, service: str = "", node: str = "") -> list[ShownTask]:
    """Return the tasks of a service or node by name, active ones first."""
    found = (
        task
        for task in snapshot.tasks.values()
        if (not service or task.service_id == service) and (not node or task.node_id == node)
    )
    return sorted(found, key=lambda task: (task.status.state in ENDED, *_order(snapshot, task)))


def _order(snapshot: Snapshot, task: ShownTask) -> tuple[str, int, str, str]:
    return snapshot.service_name(task.service_id), task.slot, task.node_id, task.id


class ClusterHealth(Enum):
    """Health of the cluster, as the headline names it."""

    HEALTHY = "Healthy"
    CONVERGING = "Converging"
    DEGRADED = "Degraded"
    LEADERLESS = "No leader"


def states_of(snapshot: Snapshot, now: float) -> list[ServiceLine]:
    """Return the services by name, with the verdict of ``skep status``.  ``now`` is Unix time in seconds."""
    return list(service_rows(snapshot.services.values(), now))


def is_updating(row: ServiceLine) -> bool:
    """Return whether an update or a rollback replaces tasks now."""
    return row.update.startswith(("updating", "rollback started"))


_HEALTH = {
    HealthState.HEALTHY: ClusterHealth.HEALTHY,
    HealthState.CONVERGING: ClusterHealth.CONVERGING,
    HealthState.DEGRADED: ClusterHealth.DEGRADED,
}


def health_of(row: ServiceLine) -> ClusterHealth:
    """Return the health of a service in the words of the headline."""
    return _HEALTH[row.state]


def headline(snapshot: Snapshot, services: Iterable[ServiceLine]) -> tuple[ClusterHealth, str]:
    """Return the health of the cluster and its reasons, the worst first.  Only the first sentence has details."""
    if snapshot.without_leader:
        return ClusterHealth.LEADERLESS, " ".join(f"{line}." for line in snapshot.without_leader[:2])
    nodes = node_rows(snapshot.nodes.values())
    found = {health: [row for row in services if health_of(row) is health] for health in ClusterHealth}
    down = [row for row in nodes if row.state != "ready"]
    unreachable = [row for row in nodes if row.state == "ready" and not row.is_healthy]
    degraded, converging = found[ClusterHealth.DEGRADED], found[ClusterHealth.CONVERGING]
    warned = [row for row in nodes if row.is_healthy and row.reason]
    groups: list[tuple[Sequence[NodeLine] | Sequence[ServiceLine], str, str]] = [
        (down, "node", "down" if all(row.state == "down" for row in down) else "not ready"),
        (unreachable, "manager", "unreachable"),
        (degraded, "service", "degraded"),
        (converging, "service", "converging"),
        (warned, "node", "ready with a warning"),
    ]
    sentences: list[str] = []
    for rows, noun, state in groups:
        if rows:
            sentences.append(_about(rows, noun, state, has_reason=not sentences))
    health = (
        ClusterHealth.DEGRADED
        if down or unreachable or degraded
        else ClusterHealth.CONVERGING
        if converging
        else ClusterHealth.HEALTHY
    )
    return health, " ".join(sentences) or "All nodes and services are in their desired state."


def _about(
    rows: Sequence[NodeLine] | Sequence[ServiceLine], noun: str, state: str, *, has_reason: bool
) -> str:
    """Return a sentence that names the objects, with the reason if there is only one."""
    if len(rows) == 1:
        reason = f": {rows[0].reason}" if rows[0].reason and has_reason else ""
        return f"{noun.capitalize()} {rows[0].name} is {state}{reason}."
    names = [row.name for row in rows[:_NAMED_MAX]]
    more = f" and {len(rows) - _NAMED_MAX} more" if len(rows) > _NAMED_MAX else ""
    return f"{counted(len(rows), noun)} are {state} ({', '.join(names)}{more})."


def summary(snapshot: Snapshot, services: Sequence[ServiceLine]) -> list[tuple[str, str]]:
    """Return the counts below the headline, the most important first, as pairs of a noun and its counts."""
    ready = sum(node["Status"]["State"] == "ready" for node in snapshot.nodes.values())
    healthy = sum(row.is_healthy for row in services)
    tasks = Counter(_kind(task) for task in snapshot.tasks.values())
    shown = [f"{tasks[kind]} {kind}" for kind in ("running", "starting", "pending") if tasks[kind]]
    usable = {id: node for id, node in snapshot.nodes.items() if node["Status"]["State"] == "ready"}
    reserved = sum_of(task for task in snapshot.tasks.values() if task.node_id in usable)
    total = ReservedResources(sum(map(cpus_of, usable.values())), sum(map(memory_of, usable.values())))
    return [
        ("Nodes", f"{ready}/{len(snapshot.nodes)} ready"),
        ("Services", f"{healthy}/{len(services)} healthy" if services else "none"),
        ("Tasks", ", ".join(shown) or "none"),
        ("Reserved", share_of(reserved, total)),
    ]


def cpus_of(node: Mapping[str, Any]) -> float:
    """Return the number of CPUs that a node offers to tasks."""
    return int((node["Description"].get("Resources") or {}).get("NanoCPUs") or 0) / _NANO


def memory_of(node: Mapping[str, Any]) -> int:
    """Return the bytes of memory that a node offers to tasks."""
    return int((node["Description"].get("Resources") or {}).get("MemoryBytes") or 0)


def sum_of(tasks: Iterable[ShownTask]) -> ReservedResources:
    """Return what the active ones of ``tasks`` reserve together."""
    found = [task.reserved for task in tasks if task.is_active]
    return ReservedResources(sum(one.cpus for one in found), sum(one.memory for one in found))


def share_of(part: ReservedResources, whole: ReservedResources) -> str:
    """Return ``1.5/4 CPUs, 0.8/7.8 GiB``."""
    return f"{_number(part.cpus)}/{_number(whole.cpus)} CPUs, {_gib(part.memory)}/{_gib(whole.memory)} GiB"


def _number(value: float) -> str:
    return f"{round(value, 2):g}"


def _gib(size: int) -> str:
    return f"{round(size / (1 << 30), 1):g}"


def _kind(task: ShownTask) -> str:
    state = task.status.state
    if state in ENDED:
        return "ended"
    if state == "running":
        return "running"
    return "pending" if state in ("new", "allocated", "pending") else "starting"

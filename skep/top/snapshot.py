"""The state of a cluster that ``skep top`` shows, and its changes by events.  Pure."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import msgspec

from skep.cli.status import is_service_healthy, node_rows
from skep.model.encoding import go_name

ENDED = frozenset({"complete", "shutdown", "failed", "rejected", "remove", "orphaned"})
_WANTED = frozenset({"running", "ready", "complete"})
_TASK_SERVICE = "com.docker.swarm.service.id"
_NO_NODES: Mapping[str, Mapping[str, Any]] = {}


class Link(Enum):
    """State of the connection to the node."""

    CONNECTING = "connecting"
    LIVE = "live"
    LOST = "lost"


class Connection(msgspec.Struct, frozen=True):
    """The connection.  ``reason`` tells why it was lost, ``retry_s`` the seconds until the next attempt."""

    link: Link = Link.CONNECTING
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


class _TaskSpec(msgspec.Struct, frozen=True, rename=go_name):
    container_spec: _ContainerSpec | None = None


class Task(msgspec.Struct, frozen=True, rename=go_name):
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
    def is_settled(self) -> bool:
        """Whether only an event can change it.  Changes before a task runs have no events."""
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

    Nodes and services are in the API's form.  ``reasons`` explains services that are not in their desired state, by id,
    as in ``skep explain``.  ``without_leader`` has the text of ``skep status`` without a leader, and is empty
    otherwise.
    """

    nodes: Mapping[str, Mapping[str, Any]] = _NO_NODES
    services: Mapping[str, Mapping[str, Any]] = _NO_NODES
    tasks: Mapping[str, Task] = {}
    reasons: Mapping[str, str] = {}
    events: tuple[Mapping[str, Any], ...] = ()
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

    def task_name(self, task: Task) -> str:
        """Return a name like ``web.3``, ``web.m1`` for a global service, or ``web.<id>`` before that has a node."""
        where = task.slot or (self.node_name(task.node_id) if task.node_id else task.id)
        return f"{self.service_name(task.service_id)}.{where}"


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


def tasks_of(snapshot: Snapshot, *, service: str = "", node: str = "") -> list[Task]:
    """Return the tasks of a service or node by name, active ones first."""
    found = (
        task
        for task in snapshot.tasks.values()
        if (not service or task.service_id == service) and (not node or task.node_id == node)
    )
    return sorted(found, key=lambda task: (task.status.state in ENDED, *_order(snapshot, task)))


def _order(snapshot: Snapshot, task: Task) -> tuple[str, int, str, str]:
    return snapshot.service_name(task.service_id), task.slot, task.node_id, task.id


def summary(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Return the summary for the top line, as pairs of a noun and its counts."""
    nodes = Counter(str(node["Status"]["State"]) for node in snapshot.nodes.values())
    wanted = sum(1 for service in snapshot.services.values() if is_service_healthy(service))
    tasks = Counter(_kind(task) for task in snapshot.tasks.values())
    shown = [f"{tasks[kind]} {kind}" for kind in ("run", "start", "wait") if tasks[kind]]
    return [
        ("nodes", ", ".join(f"{count} {state}" for state, count in sorted(nodes.items())) or "none"),
        ("services", f"{wanted} of {len(snapshot.services)} as wanted" if snapshot.services else "none"),
        ("tasks", ", ".join(shown) or "none"),
    ]


def _kind(task: Task) -> str:
    state = task.status.state
    if state in ENDED:
        return "ended"
    if state == "running":
        return "run"
    return "wait" if state in ("new", "allocated", "pending") else "start"


def headlines(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    """Yield each problem as a kind and a sentence, as in ``skep status``, the most serious first."""
    yield from (("swarm", line) for line in snapshot.without_leader[:1])
    for row in node_rows(snapshot.nodes.values()):
        if row.reason or not row.is_healthy:
            yield "node", f"{row.name} is {row.state}" + (f": {row.reason}" if row.reason else "")
    for id, service in sorted(snapshot.services.items(), key=lambda item: str(item[1]["Spec"]["Name"])):
        if reason := snapshot.reasons.get(id):
            yield "service", f"{service['Spec']['Name']}: {reason}"


def unexplained(services: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the ids of services that need an explanation, by name."""
    wanting = (service for service in services if not is_service_healthy(service))
    return [service["ID"] for service in sorted(wanting, key=lambda service: str(service["Spec"]["Name"]))]

"""Builds rows from objects: the rows that an event affects, and all rows of an earlier state as a snapshot.

Level-triggered: an event names keys, and each row is rebuilt from the current state of the store.
"""

from collections.abc import Iterator, Mapping, Sequence

from skep.aio.clock import Clock
from skep.aio.time_slices import TimeSlices
from skep.manager.control.tasks import is_up_to_date
from skep.manager.diagnosis.reasons import loop_ends_ns
from skep.manager.diagnosis.service_health import status_with_health
from skep.manager.view.cluster import stored_cluster_row
from skep.manager.view.rows import (
    RevisionRow,
    Row,
    is_shown,
    network_row,
    networks_of,
    node_row,
    payload_row,
    revision_of,
    service_row,
    stack_row,
    task_row,
    volume_row,
)
from skep.manager.view.table import CLUSTER_KEY, Key, RowTableState
from skep.model.network import Network
from skep.model.node import Node, NodeState, differ_in_load_alone
from skep.model.options.slot_volumes import differ_in_slots_alone
from skep.model.secret import Config, Secret
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.ids import ConfigId, NetworkId, NodeId, SecretId, ServiceId, TaskId, VolumeId
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import SECOND_NS
from skep.model.volume import Volume
from skep.store.interface import Event, Object, Updated, View

WATCHED: tuple[type[Object], ...] = (Service, Task, Node, Network, Secret, Config, Volume, Swarm)
GLOBALS = Key("globals", "")
"""A pseudo key for all global services, whose wanted tasks depend on the nodes."""
_KIND_OF: Mapping[type[Object], str] = {
    Node: "nodes",
    Task: "tasks",
    Network: "networks",
    Secret: "secrets",
    Config: "configs",
    Volume: "volumes",
    Service: "services",
}


def all_keys(view: View) -> Iterator[Key]:
    """Yield the keys of all possible rows except stacks, which come from their services and configs."""
    yield CLUSTER_KEY
    for kind, name in _KIND_OF.items():
        yield from (Key(name, id) for id in view.ids(kind))


def affected_by(event: Event, view: View) -> Iterator[Key]:
    """Yield the keys of the rows that ``event`` may have changed."""
    old, new = (event.old, event.new) if isinstance(event, Updated) else (None, event.object)
    if isinstance(new, Swarm):
        yield CLUSTER_KEY
        # The reason of tasks on lost nodes has the freeze.
        if not isinstance(old, Swarm) or old.freeze != new.freeze:
            for node in view.find(Node):
                if node.status.state is NodeState.DOWN:
                    yield from _of_tasks(view.find(Task, node_id=node.id))
        return
    yield Key(_KIND_OF[type(new)], new.id)  # type: ignore[attr-defined]
    match old, new:
        case _, Task():
            yield Key("services", new.service_id)
        case _, Service():
            if not isinstance(old, Service) or old.spec_version != new.spec_version:
                yield from (Key("tasks", task.id) for task in view.find(Task, service_id=new.id))
        case Node(), Node() if differ_in_load_alone(old, new) or differ_in_slots_alone(old, new):
            return
        case _, Node():
            yield CLUSTER_KEY
            yield GLOBALS
            if not isinstance(old, Node) or old.status.state is not new.status.state:
                yield from _of_tasks(view.find(Task, node_id=new.id))
        case _, Volume():
            used = {one.node_id for one in new.publish_status}
            for node_id in sorted(used):  # a task that waits for the volume shows its status
                yield from _of_tasks([task for task in view.find(Task, node_id=node_id) if task.volumes])
        case _:
            return


def _of_tasks(tasks: Sequence[Task]) -> Iterator[Key]:
    for task in tasks:
        yield Key("tasks", task.id)
        yield Key("services", task.service_id)


class RowBuilder:
    """Builds rows.

    It keeps facts that cannot be looked up in the store: which services name a network, secret, config or stack, and
    which configs record revisions of a stack.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._named: dict[str, frozenset[Key]] = {}
        """The keys that a service names, by service."""
        self._users: dict[Key, set[str]] = {}
        self._revisions: dict[str, dict[str, RevisionRow]] = {}
        """Revisions by stack and config."""
        self._records: dict[str, str] = {}
        """The stack of each config that records a revision."""
        self._loops_end: dict[str, int] = {}
        """Unix time in nanoseconds at which the next running task of a service ends its crash loop, by service."""

    def next_due_ns(self) -> int | None:
        """Return the Unix time at which a row may change without a change in the store, or None."""
        return min(self._loops_end.values(), default=None)

    def due(self, now_ns: int) -> set[Key]:
        """Return the keys of rows that may have changed by ``now_ns`` without a change in the store."""
        return {Key("services", id) for id, ends_ns in self._loops_end.items() if ends_ns <= now_ns}

    async def service(self, view: View, id: str, now_ns: int) -> tuple[Row | None, frozenset[Key]]:
        """Return the row of a service, or None if it does not exist, and the keys that it names now but did not before,
        or the reverse.
        """
        service = view.lookup(Service, ServiceId(id))
        if service is not None and service.removed_at is not None:
            service = None
        self._loops_end.pop(id, None)
        named = _named_by(service) if service is not None else frozenset[Key]()
        before = self._named.pop(id, frozenset[Key]())
        if named:
            self._named[id] = named
        for key in before - named:
            self._users[key].discard(id)
            if not self._users[key]:
                del self._users[key]
        for key in named - before:
            self._users.setdefault(key, set()).add(id)
        if service is None:
            return None, before ^ named
        status = await status_with_health(view, service, now_ns, self._clock)
        ends = [loop_ends_ns(task, now_ns) for task in view.find(Task, service_id=service.id)]
        if found := [one for one in ends if one is not None]:
            self._loops_end[id] = min(found)
        return service_row(service, status), before ^ named

    def row(self, view: View, key: Key) -> tuple[Row | None, frozenset[Key]]:
        """Return the row of another kind, or None, and the keys of affected rows.  The cluster's row is built
        elsewhere.
        """
        match key.kind:
            case "nodes":
                node = view.lookup(Node, NodeId(key.id))
                return (node_row(node) if node is not None else None), frozenset()
            case "tasks":
                return self._task(view, TaskId(key.id)), frozenset()
            case "networks":
                network = view.lookup(Network, NetworkId(key.id))
                return (
                    network_row(network, self._users_of(key)) if network is not None else None
                ), frozenset()
            case "secrets":
                secret = view.lookup(Secret, SecretId(key.id))
                return (payload_row(secret, self._users_of(key)) if secret is not None else None), frozenset()
            case "configs":
                return self._config(view, key)
            case "volumes":
                volume = view.lookup(Volume, VolumeId(key.id))
                return (volume_row(volume) if volume is not None else None), frozenset()
            case "stacks":
                return self._stack(key), frozenset()
        raise AssertionError(f"rows of {key.kind} are made elsewhere")

    def _task(self, view: View, id: TaskId) -> Row | None:
        task = view.lookup(Task, id)
        if task is None or not is_shown(task):
            return None
        return task_row(view, task, is_current=is_up_to_date(view, task))

    def _config(self, view: View, key: Key) -> tuple[Row | None, frozenset[Key]]:
        config = view.lookup(Config, ConfigId(key.id))
        record = revision_of(config) if config is not None else None
        touched = set()
        if (stack := self._records.pop(key.id, None)) is not None:
            del self._revisions[stack][key.id]
            touched.add(Key("stacks", stack))
        if record is not None:
            stack, revision = record
            self._records[key.id] = stack
            self._revisions.setdefault(stack, {})[key.id] = revision
            touched.add(Key("stacks", stack))
        if config is None or record is not None:
            return None, frozenset(touched)
        return payload_row(config, self._users_of(key)), frozenset(touched)

    def _stack(self, key: Key) -> Row | None:
        services, revisions = self._users_of(key), self._revisions.get(key.id, {})
        if not services and not revisions:
            self._revisions.pop(key.id, None)
            return None
        return stack_row(key.id, services, revisions.values())

    def _users_of(self, key: Key) -> tuple[str, ...]:
        return tuple(sorted(self._users.get(key, ())))


def _named_by(service: Service) -> frozenset[Key]:
    container = service.spec.task_template.container_spec
    named = [Key("networks", id) for id in networks_of(service)]
    if container is not None:
        named += [Key("secrets", one.secret_id) for one in container.secrets]
        named += [Key("configs", one.config_id) for one in container.configs]
    if stack := service.spec.labels.get(STACK_LABEL):
        named.append(Key("stacks", stack))
    return frozenset(named)


async def snapshot_of(view: View, incarnation: int, at_s: float, clock: Clock) -> bytes:
    """Return all rows of ``view`` as one JSON object.  ``at_s`` is its Unix time in seconds."""
    now_ns = int(at_s * SECOND_NS)
    table, builder, slices = RowTableState(incarnation), RowBuilder(clock), TimeSlices(clock)
    keys = [key for key in all_keys(view) if key not in (CLUSTER_KEY, GLOBALS)]
    stacks: set[Key] = set()
    for key in sorted(keys, key=lambda key: key.kind != "services"):
        # Services come first, because other rows name them.
        if key.kind == "services":
            row, touched = await builder.service(view, key.id, now_ns)
            stacks |= {one for one in touched if one.kind == "stacks"}
        else:
            row, touched = builder.row(view, key)
            stacks |= touched
        table.put(key, row)
        await slices.yield_if_due()
    for key in stacks:
        table.put(key, builder.row(view, key)[0])
    table.put(CLUSTER_KEY, stored_cluster_row(view))
    table.step(view.revision, at_s)
    return table.snapshot()

"""Rows of the dashboard, one for each object, small and without secrets.  Pure.

No row has environment variables, commands, or the data of secrets and configs.  Times are Unix times in seconds, or 0
if there is no time.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec import UNSET, UnsetType

from skep.errors import InvalidArgument
from skep.manager.control.tasks import known_status
from skep.manager.diagnosis.reasons import CauseKind, failure_of, problem_of
from skep.manager.routes.representations import path_message, slot_in
from skep.model.history import masked, masked_text
from skep.model.network import Network, is_ingress
from skep.model.networks.data_planes import driver_of
from skep.model.networks.overlays import is_encrypted
from skep.model.node import Node, NodeState, plain_message
from skep.model.node_reports.conditions import condition_messages
from skep.model.options.labels import STACK_CHANGES, STACK_REVISION, STACK_STATE
from skep.model.options.slot_volumes import slot_volumes_of
from skep.model.secret import Config, Secret
from skep.model.service import PortConfig, Service, ServiceHealth, ServiceStatus, UpdateStatus
from skep.model.task import Task, TaskState
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import SECOND_NS, unix_ns
from skep.model.volume import Volume
from skep.store.interface import View
from skep.store.kinds import spec_of

"""The label that names the stack of an object."""
_TEXT_MAX = 500
"""Longest reason or error in a row, in characters.  An error may contain a megabyte of a container's output."""
_LABELS_MAX = 32
"""Largest number of an object's labels in one row."""
_FAILING_MAX = 50
"""Largest number of a node's failing paths in one row."""
_VOLUMES_MAX = 100
"""Largest number of a node's volumes in one row."""
_REVISIONS_MAX = 20
"""Largest number of a stack's revisions in one row."""
_NANO = 1e9
"""Docker's unit of processors is a billionth."""


class Row(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The row of one object.  ``id`` is unique among the rows of its kind."""

    id: str


class FailingRow(msgspec.Struct, frozen=True, gc=False):
    """A check of the probes that fails from a node to ``peer``."""

    peer: str
    check: str
    port: str


class LocalVolumeRow(msgspec.Struct, frozen=True, gc=False):
    """A node-local volume with the data of a service's slot.  ``used_at`` is the time when a task last got it."""

    name: str
    service: str
    slot: int
    used_at: float


class NodeRow(Row, frozen=True, kw_only=True, gc=False):
    """The row of a node.

    ``manager`` is its reachability, empty for a worker.  ``load`` is 0 to 1, or None if unknown.
    ``last_heartbeat_at`` is the last heartbeat of a node that is down.
    """

    name: str
    role: str
    manager: str
    leader: bool
    state: str
    availability: str
    address: str
    engine: str
    os: str
    arch: str
    labels: Mapping[str, str]
    cpus: float
    memory: int
    load: float | None
    failing_checks: tuple[FailingRow, ...]
    volumes: tuple[LocalVolumeRow, ...]
    reason: str
    last_heartbeat_at: float
    version: int


class PortRow(msgspec.Struct, frozen=True, gc=False):
    """A published port."""

    published: int
    target: int
    protocol: str
    mode: str


class UpdateRow(msgspec.Struct, frozen=True, gc=False):
    """The last update.  ``state`` is the same as in Docker's API."""

    state: str
    message: str
    started_at: float
    completed_at: float


class ServiceRow(Row, frozen=True, kw_only=True, gc=False):
    """The row of a service.

    ``completed`` counts completed tasks, and ``total`` the tasks that a job needs.  One-shot services complete as well.
    ``state`` is healthy, converging or degraded.  ``reason`` is the same as in ``skep explain``, and ``since`` when
    it began.
    """

    name: str
    stack: str
    image: str
    mode: str
    desired: int
    running: int
    completed: int
    total: int
    state: str
    reason: str
    since: float
    ports: tuple[PortRow, ...]
    networks: tuple[str, ...]
    secrets: tuple[str, ...]
    configs: tuple[str, ...]
    update: UpdateRow | None
    can_roll_back: bool
    version: int
    updated_at: float


class TaskRow(Row, frozen=True, kw_only=True, gc=False):
    """The row of a task.

    ``current`` tells whether it matches its service's current spec.  ``ports`` are published on its node only.
    """

    service: str
    slot: int
    node: str
    state: str
    desired_state: str
    error: str
    message: str
    since: float
    health: str
    image: str
    current: bool
    ports: tuple[PortRow, ...] | UnsetType = UNSET


class NetworkRow(Row, frozen=True, kw_only=True, gc=False):
    """The row of a network.  ``services`` has the ids of the services that name it."""

    name: str
    stack: str
    driver: str
    encrypted: bool
    ingress: bool
    internal: bool
    attachable: bool
    subnets: tuple[str, ...]
    services: tuple[str, ...]


class PayloadRow(Row, frozen=True, kw_only=True, gc=False):
    """A secret or a config, without its data."""

    name: str
    stack: str
    created_at: float
    updated_at: float
    labels: Mapping[str, str]
    services: tuple[str, ...]


class VolumeRow(Row, frozen=True, kw_only=True, gc=False):
    """A cluster volume."""

    name: str
    stack: str
    driver: str
    nodes: tuple[str, ...]
    state: str
    availability: str
    reason: str


class RevisionRow(msgspec.Struct, frozen=True, gc=False, order=True):
    """A deploy of a stack.  ``state`` tells how the deploy ended, ``changes`` what it planned."""

    number: int
    state: str
    changes: str
    created_at: float


class StackRow(Row, frozen=True, kw_only=True, gc=False):
    """The row of a stack, whose id is its name.

    ``revision`` is the last recorded one.  ``revisions`` has the newest first.
    """

    name: str
    services: tuple[str, ...]
    revision: int | None
    revisions: tuple[RevisionRow, ...]


class ManagersRow(msgspec.Struct, frozen=True, gc=False):
    """The managers.  ``leader`` is the id of the leader's node, or empty without a leader."""

    total: int
    reachable: int
    leader: str


class ClusterRow(Row, frozen=True, kw_only=True, gc=False):
    """The row of the cluster.  ``replacement_suspended`` tells why tasks of lost nodes are not replaced now, and is
    empty otherwise.
    """

    name: str
    managers: ManagersRow
    warnings: tuple[str, ...]
    replacement_suspended: str


def node_row(node: Node) -> NodeRow:
    """Return the row of ``node``."""
    status, described, manager = node.status, node.description, node.manager_status
    is_ready = status.state is NodeState.READY
    reasons = (
        plain_message(status.message),
        path_message(node) if is_ready else "",
        *condition_messages(described),
    )
    return NodeRow(
        id=node.id,
        name=node.spec.name or described.hostname or node.id,
        role=node.spec.role.value,
        manager=manager.reachability.value if manager is not None else "",
        leader=manager is not None and manager.leader,
        state=status.state.value,
        availability=node.spec.availability.value,
        address=status.addr,
        engine=described.engine.engine_version,
        os=described.platform.os,
        arch=described.platform.architecture,
        labels=_labels(node.spec.labels),
        cpus=described.resources.nano_cpus / _NANO,
        memory=described.resources.memory_bytes,
        load=node.load,
        failing_checks=tuple(
            FailingRow(one.hostname or one.peer, one.check, one.port)
            for one in node.failing_paths[:_FAILING_MAX]
        )
        if is_ready
        else (),
        volumes=_local_volumes(node),
        reason=_cut("; ".join(filter(None, reasons))),
        last_heartbeat_at=seconds(node.silent_since) if status.state is NodeState.DOWN else 0.0,
        version=node.version.index,
    )


def _local_volumes(node: Node) -> tuple[LocalVolumeRow, ...]:
    """Return the volumes that were used last.  A node has thousands at most."""
    known = sorted(slot_volumes_of(node), key=lambda one: -one.at_ms)[:_VOLUMES_MAX]
    return tuple(LocalVolumeRow(one.volume, one.service, one.slot, one.at_ms / 1000) for one in known)


def service_row(service: Service, status: ServiceStatus) -> ServiceRow:
    """Return the row of ``service``.  ``status`` has its health."""
    spec = service.spec
    container, health = spec.task_template.container_spec, status.health or ServiceHealth()
    return ServiceRow(
        id=service.id,
        name=spec.name,
        stack=spec.labels.get(STACK_LABEL, ""),
        image=_image(container.image if container is not None else ""),
        mode=spec.mode.name,
        desired=status.desired_tasks,
        running=status.running_tasks,
        completed=status.completed_tasks,
        total=status.total_tasks,
        state=health.state.value,
        reason=_cut(health.reason),
        since=seconds(health.since),
        ports=_ports(service.endpoint.ports),
        networks=networks_of(service),
        secrets=tuple(one.secret_id for one in container.secrets) if container is not None else (),
        configs=tuple(one.config_id for one in container.configs) if container is not None else (),
        update=_update(service.update_status),
        can_roll_back=service.previous_spec is not None,
        version=service.version.index,
        updated_at=seconds(service.updated_at),
    )


def _ports(ports: Sequence[PortConfig]) -> tuple[PortRow, ...]:
    return tuple(
        PortRow(port.published_port, port.target_port, port.protocol, port.publish_mode.value)
        for port in ports
    )


def networks_of(service: Service) -> tuple[str, ...]:
    """Return the ids of the networks that the service names."""
    attached = (*service.spec.task_template.networks, *service.spec.networks)
    return tuple(dict.fromkeys(one.target for one in attached))


def is_shown(task: Task) -> bool:
    """Return whether a task matters now: it has not ended, or no other task has replaced it."""
    return task.is_wanted or not task.status.state.is_terminal


def task_row(view: View, task: Task, *, is_current: bool) -> TaskRow:
    """Return the row of ``task``."""
    status = known_status(view, task)
    known = task if status is task.status else msgspec.structs.replace(task, status=status)
    container = task.spec.container_spec
    has_check = container is not None and container.healthcheck is not None
    return TaskRow(
        id=task.id,
        service=task.service_id,
        slot=task.shown_slot,
        node=task.node_id,
        state=status.state.value,
        desired_state=task.desired_state.value,
        error=_cut(_error(view, known)),
        message=_cut(status.message),
        since=seconds(status.timestamp),
        health=_health(task) if has_check else "",
        image=_image(container.image if container is not None else ""),
        current=is_current,
        ports=_ports(status.port_status.ports) or UNSET,
    )


_HEALTH: Mapping[TaskState, str] = {TaskState.STARTING: "starting", TaskState.RUNNING: "healthy"}


def _health(task: Task) -> str:
    return "unhealthy" if task.is_failing else _HEALTH.get(task.status.state, "")


def _error(view: View, task: Task) -> str:
    status = task.status
    if status.state in (TaskState.FAILED, TaskState.REJECTED):
        return failure_of(task)[1]
    if task.preemption is not None:
        return task.preemption.words
    if task.is_active and (task.is_failing or status.state is not TaskState.RUNNING):
        slot = slot_in(view, task)
        ids = {task.node_id, *(one.node_id for one in slot)}
        known = {id: node for id in ids if (node := view.lookup(Node, id)) is not None}
        # For a pending task no nodes are passed, because a reason may name the largest node, which may not be among
        # these few. Reading all nodes would cost too much, because every waiting task has a row.
        is_pending = status.state is TaskState.PENDING
        spec = spec_of(view, task) if is_pending else None
        problem = problem_of(task, slot, {} if is_pending else known, spec=spec)
        if problem.kind == CauseKind.PROGRESSING.value:
            return status.err or problem.restart_summary
        return "; ".join(filter(None, (problem.reason, problem.restart_summary)))
    return status.err


def network_row(network: Network, services: Sequence[str]) -> NetworkRow:
    """Return the row of ``network``.  ``services`` name it."""
    ipam = network.ipam_options or network.spec.ipam_options
    return NetworkRow(
        id=network.id,
        name=network.spec.name,
        stack=network.spec.labels.get(STACK_LABEL, ""),
        driver=driver_of(network),
        encrypted=is_encrypted(network),
        ingress=is_ingress(network),
        internal=network.spec.internal,
        attachable=network.spec.attachable,
        subnets=tuple(one.subnet for one in ipam.configs) if ipam is not None else (),
        services=tuple(services),
    )


def payload_row(payload: Secret | Config, services: Sequence[str]) -> PayloadRow:
    """Return the row of a secret or config.  ``services`` name it."""
    return PayloadRow(
        id=payload.id,
        name=payload.spec.name,
        stack=payload.spec.labels.get(STACK_LABEL, ""),
        created_at=seconds(payload.created_at),
        updated_at=seconds(payload.updated_at),
        labels=_labels(payload.spec.labels),
        services=tuple(services),
    )


def volume_row(volume: Volume) -> VolumeRow:
    """Return the row of ``volume``."""
    used = tuple(one.node_id for one in volume.publish_status)
    state = "in use" if used else "created"
    if volume.info is None or not volume.info.volume_id:
        state = "creating"
    if volume.pending_delete:
        state = "removing"
    reasons = (volume.message, *(one.message for one in volume.publish_status))
    return VolumeRow(
        id=volume.id,
        name=volume.spec.name,
        stack=volume.spec.labels.get(STACK_LABEL, ""),
        driver=volume.spec.driver.name,
        nodes=used,
        state=state,
        availability=volume.spec.availability.value,
        reason=_cut("; ".join(filter(None, dict.fromkeys(reasons)))),
    )


def revision_of(config: Config) -> tuple[str, RevisionRow] | None:
    """Return the stack and the revision that ``config`` records, or None for any other config."""
    labels = config.spec.labels
    stack, number = labels.get(STACK_LABEL, ""), labels.get(STACK_REVISION, "")
    if not stack or not (number.isascii() and number.isdigit() and len(number) < 10):
        return None
    state, changes = _cut(labels.get(STACK_STATE, "")), _cut(labels.get(STACK_CHANGES, ""))
    return stack, RevisionRow(int(number), state, changes, seconds(config.created_at))


def stack_row(name: str, services: Sequence[str], revisions: Iterable[RevisionRow]) -> StackRow:
    """Return the row of a stack."""
    newest = tuple(sorted(revisions, reverse=True)[:_REVISIONS_MAX])
    number = newest[0].number if newest else None
    return StackRow(id=name, name=name, services=tuple(services), revision=number, revisions=newest)


def seconds(stamp: str | None) -> float:
    """Return a Unix time in seconds, or 0 for an empty stamp and for Go's zero time."""
    try:
        return max(unix_ns(stamp) / SECOND_NS, 0.0) if stamp else 0.0
    except InvalidArgument:  # a Docker node's timestamp
        return 0.0


def _update(status: UpdateStatus | None) -> UpdateRow | None:
    if status is None or status.state is None:
        return None
    begun, ended = seconds(status.started_at), seconds(status.completed_at)
    return UpdateRow(status.state.value, _cut(status.message), begun, ended)


def _image(image: str) -> str:
    return image.partition("@")[0]


def _labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    return {
        name: masked(f"{name}={labels[name]}")[len(name) + 1 :][:_TEXT_MAX]
        for name in sorted(labels)[:_LABELS_MAX]
    }


def _cut(text: str) -> str:
    """Cut a text and mask credentials, because an error may quote a command or a URL."""
    if "=" in text or "://" in text:
        text = masked_text(text[: 4 * _TEXT_MAX])
    return text if len(text) <= _TEXT_MAX else text[: _TEXT_MAX - 1] + "…"

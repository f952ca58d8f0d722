"""A node's assignments: its tasks, with the secrets and configs they need.

A node receives everything once per stream (``everything``), then only differences (``difference``).  Both return the
message and a ``SentState`` for the next comparison.

* A task is sent from ASSIGNED on, until its record is deleted.  An ended task stays, with its stored status: a node
  that lost its state would otherwise run it again.
* The status, which the node itself reports, is never sent back, except by ``everything``.
* A task is sent again when service labels change that affect a running task (``sent_labels``).
* A task of a global service has its node before it is assigned.  While its status is unreadable it may still wait for a
  port or for its predecessor, so it is not sent.  If the node has the task, the node keeps it and reports its status.
* Secrets and configs are sent with the first task that needs them, and removed with the last such task that still runs.
* Certificates and challenges of the front door (``model.door.payloads``) are secrets that all tasks of the front door
  need, and no others.

Source: swarmkit, manager/dispatcher/assignments.go.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import msgspec
from msgspec.structs import replace

from skep.manager.nodes.trust import trust_of
from skep.model.assignment import AssignmentSet, ConfigFile, SecretFile
from skep.model.door.payloads import is_door_file
from skep.model.door.settings import is_door
from skep.model.needs import images_of
from skep.model.networks.data_planes import is_docker_node, is_overlay
from skep.model.node import Node
from skep.model.options.labels import DRAIN, sent_labels
from skep.model.permissions.registry_auth import address_of, is_for
from skep.model.secret import Config, Secret
from skep.model.service import PortConfig, PublishMode, Service, ServiceSpec
from skep.model.task import AssignedTask, Task, TaskState
from skep.model.values.ids import ConfigId, NodeId, SecretId, TaskId, VolumeId
from skep.model.volume import PublishState, PublishStatus, Volume, VolumeAssignment, VolumeInfo
from skep.store.interface import View
from skep.store.kinds import (
    Payload,
    has_unknown_service,
    has_unknown_spec,
    has_unreadable_spec,
    has_unreadable_status,
    present_spec,
    previous_registry_auth_id,
    registry_auth_id,
    spec_of,
)
from skep.store.schema import UNREAD_STATUS

DoorFilesIn: TypeAlias = Callable[[View], Mapping[SecretId, SecretFile]]
"""Returns the certificates and challenges of the front door (``acme.door_files``)."""
VolumesOf: TypeAlias = Callable[[NodeId], Iterable[VolumeId]]
"""Returns the volumes that may concern a node.  Without it all volumes are checked."""


class SentState(msgspec.Struct, frozen=True, kw_only=True):
    """Assignments that one node received on one stream."""

    tasks: Mapping[TaskId, Task] = {}
    labels: Mapping[TaskId, Mapping[str, str]] = {}
    """The ``sent_labels`` of tasks that have some."""
    secrets: frozenset[SecretId] = frozenset()
    configs: frozenset[ConfigId] = frozenset()
    proxies: frozenset[TaskId] = frozenset()
    """Tasks of the front door that have not ended."""
    volumes: Mapping[VolumeId, VolumeAssignment] = {}
    """Volumes published on the node."""
    leaving: Mapping[VolumeId, VolumeAssignment] = {}
    """Volumes that the node should unpublish, whether it has them or not.  It confirms that in a report."""


def _no_door(_: View) -> Mapping[SecretId, SecretFile]:
    return {}


def everything(
    view: View, node_id: NodeId, volumes_of: VolumesOf | None = None, door_files: DoorFilesIn = _no_door
) -> tuple[AssignmentSet, SentState]:
    """Return all assignments of a node, as the first message of a stream.

    If tasks in the store are unreadable, their nodes are unknown, so the message removes nothing from the node.  The
    same holds if a task is not sent because its status or spec is unreadable: the node may have it.
    """
    placed = [_with_spec(view, task, None) for task in view.find(Task, node_id=node_id)]
    tasks = {task.id: task for task in placed if _is_due(view, task)}
    is_known = not any(
        has_unreadable_status(view, task) or _lacks_data(view, task)
        for task in placed
        if task.id not in tasks
    )
    volumes, leaving = _volumes_on(view, node_id, volumes_of)
    proxies = frozenset(id for id, task in tasks.items() if _is_proxy(view, task, was=False))
    door = door_files(view) if proxies else {}
    sent = SentState(
        tasks=tasks,
        labels={id: labels for id, task in tasks.items() if (labels := _sent_labels(view, task, {}))},
        secrets=_secrets_of(tasks.values()) | _secrets_for(volumes) | door.keys(),
        configs=_configs_of(tasks.values()),
        proxies=proxies,
        volumes=volumes,
        leaving=leaving,
    )
    complete = is_known and not view.unreadable(Task)
    return _message(view, SentState(), sent, tasks.values(), door, complete=complete), sent


def difference(
    view: View,
    node_id: NodeId,
    sent: SentState,
    changed: Iterable[TaskId],
    volumes_of: VolumesOf | None = None,
    door_files: DoorFilesIn = _no_door,
) -> tuple[AssignmentSet | None, SentState]:
    """Return the message after ``changed`` tasks changed, or None if the node needs none."""
    tasks, labels, proxies = dict(sent.tasks), dict(sent.labels), set(sent.proxies)
    updated: list[Task] = []
    referring = False
    for id in sorted(set(changed)):
        task, before = view.lookup(Task, id), tasks.pop(id, None)
        labels_before = labels.pop(id, {})
        proxies.discard(id)
        referring = referring or _refers(before)
        if task is None or task.node_id != node_id:
            continue
        task = _with_spec(view, task, before)
        if not _is_due(view, task) and (before is None or not _is_held_back(view, task)):
            continue
        tasks[id] = task
        if _is_proxy(view, task, was=id in sent.proxies):
            proxies.add(id)
        if labels_now := _sent_labels(view, task, labels_before):
            labels[id] = labels_now
        referring = referring or _refers(task)
        if before is None or sent_fields(before) != sent_fields(task) or labels_before != labels_now:
            updated.append(task)
    # Checking all tasks of the node is the expensive part, and most tasks need neither secrets nor configs.
    volumes, leaving = _volumes_on(view, node_id, volumes_of)
    if referring or volumes != sent.volumes:
        secrets = _secrets_of(tasks.values()) | _secrets_for(volumes)
        now = SentState(tasks=tasks, secrets=secrets, configs=_configs_of(tasks.values()))
    else:
        others = frozenset(id for id in sent.secrets if not is_door_file(id))
        now = SentState(tasks=tasks, secrets=others, configs=sent.configs)
    door = door_files(view) if proxies else {}
    now = replace(now, labels=labels, volumes=volumes, leaving=leaving)
    now = replace(now, proxies=frozenset(proxies), secrets=now.secrets | door.keys())
    message = _message(view, sent, now, updated, door, complete=False)
    is_empty = not (
        message.tasks
        or message.removed_tasks
        or message.secrets
        or message.removed_secrets
        or message.configs
        or message.removed_configs
        or message.volumes
        or message.removed_volumes
    )
    return (None if is_empty else message), now


def sent_fields(task: Task) -> tuple[Any, ...]:
    """Return the fields of a task that are sent to its node: all except the node's own reports and the write stamps."""
    return (
        task.desired_state,
        task.spec_version,
        task.spec,
        task.networks_attachments,
        task.generic_resources,
        task.volumes,
        task.labels,
        task.service_id,
        task.slot,
        task.job_iteration,
    )


def affects_node(old: Task, new: Task) -> bool:
    """Whether a change of a task may have to be sent to its node.  Cheap, since it runs for every commit."""
    return (
        sent_fields(old) != sent_fields(new)
        or old.node_id != new.node_id
        or _is_sent(old) != _is_sent(new)
        or old.status.state.is_terminal != new.status.state.is_terminal
        or old.status == UNREAD_STATUS
    )


def _is_sent(task: Task) -> bool:
    return bool(task.status.state >= TaskState.ASSIGNED)


def _may_wait(view: View, task: Task) -> bool:
    """Whether the task may not be assigned yet although its status, which is unreadable, says so.

    A task of a service that is not global gets its node with the assignment.
    """
    return task.status.state is TaskState.ASSIGNED and not task.slot and has_unreadable_status(view, task)


def _with_spec(view: View, task: Task, before: Task | None) -> Task:
    """Return ``task`` with a readable spec if possible.

    An unreadable spec is replaced by the same spec of the service, or by the spec of ``before``, as the node has it.
    """
    if not has_unreadable_spec(view, task):
        return task
    if (present := present_spec(view.lookup(Service, task.service_id), task)) is not None:
        return replace(task, spec=present.task_template)
    return replace(task, spec=before.spec) if before is not None else task


def _lacks_spec(view: View, task: Task) -> bool:
    """Whether the task should run but its spec is unknown, so that it looks empty."""
    return task.is_wanted and has_unknown_spec(view, task)


def _lacks_networks(view: View, task: Task) -> bool:
    """Whether the task should run but its networks are unknown, so that it would start without any."""
    return (
        task.is_wanted and not task.networks_attachments and "networks" in view.damaged(Task).get(task.id, ())
    )


def _lacks_data(view: View, task: Task) -> bool:
    """Whether the task should run but data that its node needs is unknown."""
    return (
        _lacks_spec(view, task)
        or _lacks_networks(view, task)
        or (task.is_wanted and has_unknown_service(view, task))
    )


def _is_held_back(view: View, task: Task) -> bool:
    """Whether the task may be assigned but is not sent because a part of it is unreadable."""
    return _may_wait(view, task) or _lacks_data(view, task)


def _is_due(view: View, task: Task) -> bool:
    """Whether to send the task to the node now.

    A docker node must have an address of its own on a network before the first task on that network arrives, otherwise
    the task fails there ("failed to find a load balancer IP").  The allocator writes the address a moment after the
    assignment.
    """
    if _is_held_back(view, task):
        return False
    if not _is_sent(task) or task.status.state > TaskState.ASSIGNED or not task.networks_attachments:
        return _is_sent(task)
    node = view.lookup(Node, task.node_id)
    if node is None or not is_docker_node(node):
        return True
    has = {attachment.network.id for attachment in node.attachments if attachment.network is not None}
    networks = (attachment.network for attachment in task.networks_attachments)
    return all(network is None or not is_overlay(network) or network.id in has for network in networks)


def _message(
    view: View,
    before: SentState,
    now: SentState,
    updated: Iterable[Task],
    door: Mapping[SecretId, SecretFile],
    *,
    complete: bool,
) -> AssignmentSet:
    tasks = tuple(_assigned(view, task) for task in updated)
    return AssignmentSet(
        complete=complete,
        revision=view.revision,
        tasks=tasks,
        removed_tasks=tuple(sorted(before.tasks.keys() - now.tasks.keys())),
        secrets=tuple(_secret_files(view, sorted(now.secrets - before.secrets), door)),
        removed_secrets=tuple(sorted(before.secrets - now.secrets)),
        configs=tuple(_config_files(view, sorted(now.configs - before.configs))),
        removed_configs=tuple(sorted(before.configs - now.configs)),
        volumes=tuple(one for id, one in sorted(now.volumes.items()) if before.volumes.get(id) != one),
        removed_volumes=_removed_volumes(before, now),
        registry_auths=_registry_auths(view, tasks),
    )


def _assigned(view: View, task: Task) -> AssignedTask:
    service = view.lookup(Service, task.service_id)
    task = replace(task, slot=task.shown_slot)
    if service is None:
        return AssignedTask(task=task)
    return AssignedTask(
        task=task,
        service_name=service.spec.name,
        service_labels=_labels_of(service),
        ports=_ports_of(view, service, task),
        virtual_ips=service.endpoint.virtual_ips,
        trust=trust_of(view, service, task),
    )


def _labels_of(service: Service) -> Mapping[str, str]:
    if service.removed_at is None:
        return service.spec.labels
    return {**service.spec.labels, DRAIN: "0s"}  # a removed service is not drained


def _sent_labels(view: View, task: Task, before: Mapping[str, str]) -> Mapping[str, str]:
    """Return the service's sent labels, or ``before``, which the node keeps, while the service is unreadable."""
    service = view.lookup(Service, task.service_id)
    return before if service is None else sent_labels(_labels_of(service))


def _ports_of(view: View, service: Service, task: Task) -> tuple[PortConfig, ...]:
    """Return the published ports as allocated, or as in the spec: host-mode ports need no allocation.

    A task of another spec version has the host-mode ports of its own spec, by which it was scheduled.
    """
    ports = service.endpoint.ports or _requested_ports(service.spec)
    if task.spec_version == service.spec_version or (spec := spec_of(view, task)) is None:
        return ports
    own = (port for port in _requested_ports(spec) if port.publish_mode is PublishMode.HOST)
    return (*(port for port in ports if port.publish_mode is not PublishMode.HOST), *own)


def _requested_ports(spec: ServiceSpec) -> tuple[PortConfig, ...]:
    return spec.endpoint_spec.ports if spec.endpoint_spec is not None else ()


def _needs(task: Task) -> bool:
    return bool(task.status.state <= TaskState.RUNNING)


def _is_proxy(view: View, task: Task, *, was: bool) -> bool:
    """Return whether a task belongs to the front door and needs its certificates.

    Engines of Docker could not use them.  While the service is unreadable, the former result ``was`` stays.
    """
    if not _needs(task):
        return False
    if (service := view.lookup(Service, task.service_id)) is None:
        return was
    node = view.lookup(Node, task.node_id)
    return is_door(service.spec.labels) and node is not None and not is_docker_node(node)


def _refers(task: Task | None) -> bool:
    container = task.spec.container_spec if task is not None else None
    return container is not None and bool(container.secrets or container.configs)


def _secrets_of(tasks: Iterable[Task]) -> frozenset[SecretId]:
    return frozenset(
        reference.secret_id
        for task in tasks
        if task.spec.container_spec is not None and _needs(task)
        for reference in task.spec.container_spec.secrets
    )


def _configs_of(tasks: Iterable[Task]) -> frozenset[ConfigId]:
    return frozenset(
        reference.config_id
        for task in tasks
        if task.spec.container_spec is not None and _needs(task)
        for reference in task.spec.container_spec.configs
    )


def _volumes_on(
    view: View, node_id: NodeId, volumes_of: VolumesOf | None
) -> tuple[dict[VolumeId, VolumeAssignment], dict[VolumeId, VolumeAssignment]]:
    """Return the volumes that the node should have, and the volumes that it should unpublish.

    Source: swarmkit, manager/dispatcher/assignments.go (addOrUpdateVolume).
    """
    has: dict[VolumeId, VolumeAssignment] = {}
    leaving: dict[VolumeId, VolumeAssignment] = {}
    ids = view.ids(Volume) if volumes_of is None else volumes_of(node_id)
    for id in ids:
        volume = view.lookup(Volume, id)
        status = volume.status_on(node_id) if volume is not None else None
        if volume is None or status is None or volume.info is None:
            continue
        if status.state is PublishState.PUBLISHED:
            has[volume.id] = _volume_assignment(volume, volume.info, status)
        elif status.state is PublishState.PENDING_NODE_UNPUBLISH:
            leaving[volume.id] = _volume_assignment(volume, volume.info, status)
    return has, leaving


def _volume_assignment(volume: Volume, info: VolumeInfo, status: PublishStatus) -> VolumeAssignment:
    return VolumeAssignment(
        id=volume.id,
        volume_id=info.volume_id,
        driver=volume.spec.driver,
        volume_context=info.volume_context,
        publish_context=status.publish_context,
        access_mode=volume.spec.access_mode,
        secrets=volume.spec.secrets,
    )


def _removed_volumes(before: SentState, now: SentState) -> tuple[VolumeAssignment, ...]:
    """Return the volumes to unpublish now, including volumes that were removed from the store with force."""
    gone = {id: one for id, one in before.volumes.items() if id not in now.volumes and id not in now.leaving}
    new = {id: one for id, one in now.leaving.items() if id not in before.leaving}
    return tuple(one for _, one in sorted({**gone, **new}.items()))


def _secrets_for(volumes: Mapping[VolumeId, VolumeAssignment]) -> frozenset[SecretId]:
    """Return the secrets that drivers need for the volumes."""
    return frozenset(SecretId(secret.secret) for one in volumes.values() for secret in one.secrets)


def _secret_files(
    view: View, ids: Iterable[SecretId], door: Mapping[SecretId, SecretFile]
) -> Iterator[SecretFile]:
    """Yield the files of secrets.

    A secret that does not exist, is unreadable or has no data (SwarmKit's driver secrets may have none) is left out.
    Its task fails at start with a message that names it.

    Source: swarmkit, manager/dispatcher/assignments.go (assignSecret).
    """
    for id in ids:
        if id in door:
            yield door[id]
            continue
        payload_id = f"secret/{id}"
        secret, payload = view.lookup(Secret, id), view.lookup(Payload, payload_id)
        if secret is not None and payload is not None and payload_id not in view.unreadable(Payload):
            spec = secret.spec
            yield SecretFile(id=id, name=spec.name, data=payload.data, templating=spec.templating)


def _config_files(view: View, ids: Iterable[ConfigId]) -> Iterator[ConfigFile]:
    for id in ids:
        config = view.lookup(Config, id)
        if config is not None:
            spec = config.spec
            yield ConfigFile(id=id, name=spec.name, data=spec.data, templating=spec.templating)


def _registry_auths(view: View, tasks: Iterable[AssignedTask]) -> dict[TaskId, str]:
    auths = {}
    for assigned in tasks:
        task = assigned.task
        if task.service_id and _needs(task) and (auth := _registry_auth(view, task)):
            auths[task.id] = auth
    return auths


def _registry_auth(view: View, task: Task) -> str:
    """Return the credentials for the registry of the task's image, of the current or the previous spec.

    A run of a scheduled job keeps its spec while the service already has another one.
    """
    ids = registry_auth_id(task.service_id), previous_registry_auth_id(task.service_id)
    found = (view.lookup(Payload, id) for id in ids)
    known = [one.data.decode("ascii", errors="ignore") if one is not None else "" for one in found]
    image = next(iter(images_of(task.spec)), "")
    return next((one for one in known if one and is_for(address_of(one), image)), known[0])

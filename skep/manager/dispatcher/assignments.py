"""Assignments of a node: its tasks, with the secrets and configs they need.

A node is sent everything once per stream (``everything``), then only differences (``difference``).  Both give the
message and a ``SentState`` to compare with the next time.

* A task is sent from ASSIGNED on, until its record is deleted.  An ended task stays, with its stored status: a node
  that lost its state would otherwise run it again.
* What the node itself reports (the status) is never sent back, except in ``everything``.
* Secrets and configs are sent with the first task that needs them, and removed with the last that still runs.

Source: swarmkit, manager/dispatcher/assignments.go.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from skep.model.assignment import AssignmentSet, ConfigFile, SecretFile
from skep.model.ids import ConfigId, NodeId, SecretId, TaskId
from skep.model.labels import DRAIN
from skep.model.node import Node
from skep.model.planes import is_docker_node, is_overlay
from skep.model.secret import Config, Secret
from skep.model.service import PortConfig, Service
from skep.model.task import AssignedTask, Task, TaskState
from skep.store.interface import View
from skep.store.kinds import Payload, registry_auth_id


class SentState(msgspec.Struct, frozen=True, kw_only=True):
    """What one node was sent on one stream."""

    tasks: Mapping[TaskId, Task] = {}
    secrets: frozenset[SecretId] = frozenset()
    configs: frozenset[ConfigId] = frozenset()


def everything(view: View, node_id: NodeId) -> tuple[AssignmentSet, SentState]:
    """All assignments of a node, as the first message of a stream.

    If tasks in the store cannot be read, their nodes are not known: then nothing is removed from the node.
    """
    tasks = {task.id: task for task in view.find(Task, node_id=node_id) if _is_due(view, task)}
    sent = SentState(tasks=tasks, secrets=_secrets_of(tasks.values()), configs=_configs_of(tasks.values()))
    return _message(view, SentState(), sent, tasks.values(), complete=not view.unreadable(Task)), sent


def difference(
    view: View, node_id: NodeId, sent: SentState, changed: Iterable[TaskId]
) -> tuple[AssignmentSet | None, SentState]:
    """The message after ``changed`` tasks changed; None: nothing the node needs."""
    tasks = dict(sent.tasks)
    updated: list[Task] = []
    referring = False
    for id in sorted(set(changed)):
        task, before = view.lookup(Task, id), tasks.pop(id, None)
        referring = referring or _refers(before)
        if task is None or task.node_id != node_id or not _is_due(view, task):
            continue
        tasks[id] = task
        referring = referring or _refers(task)
        if before is None or sent_fields(before) != sent_fields(task):
            updated.append(task)
    # Going through all tasks of the node is the expensive part, and most tasks need neither secrets nor configs.
    now = (
        SentState(tasks=tasks, secrets=_secrets_of(tasks.values()), configs=_configs_of(tasks.values()))
        if referring
        else SentState(tasks=tasks, secrets=sent.secrets, configs=sent.configs)
    )
    message = _message(view, sent, now, updated, complete=False)
    is_empty = not (
        message.tasks
        or message.removed_tasks
        or message.secrets
        or message.removed_secrets
        or message.configs
        or message.removed_configs
    )
    return (None if is_empty else message), now


def sent_fields(task: Task) -> tuple[Any, ...]:
    """The fields of a task that are sent to its node: all but what the node reports itself and the write stamps."""
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
    """Whether a change of a task may have to be sent to its node; cheap, called for every commit."""
    return (
        sent_fields(old) != sent_fields(new)
        or old.node_id != new.node_id
        or _is_sent(old) != _is_sent(new)
        or old.status.state.is_terminal != new.status.state.is_terminal
    )


def _is_sent(task: Task) -> bool:
    return bool(task.status.state >= TaskState.ASSIGNED)


def _is_due(view: View, task: Task) -> bool:
    """Whether the task is to be sent to the node now.

    A docker node must have an address of its own on a network before the first task on it arrives, else the task
    fails there ("failed to find a load balancer IP"); the allocator writes that a moment after the assignment.
    """
    if not _is_sent(task) or task.status.state > TaskState.ASSIGNED or not task.networks_attachments:
        return _is_sent(task)
    node = view.lookup(Node, task.node_id)
    if node is None or not is_docker_node(node):
        return True
    has = {attachment.network.id for attachment in node.attachments if attachment.network is not None}
    networks = (attachment.network for attachment in task.networks_attachments)
    return all(network is None or not is_overlay(network) or network.id in has for network in networks)


def _message(
    view: View, before: SentState, now: SentState, updated: Iterable[Task], *, complete: bool
) -> AssignmentSet:
    tasks = tuple(_assigned(view, task) for task in updated)
    return AssignmentSet(
        complete=complete,
        revision=view.revision,
        tasks=tasks,
        removed_tasks=tuple(sorted(before.tasks.keys() - now.tasks.keys())),
        secrets=tuple(_secret_files(view, sorted(now.secrets - before.secrets))),
        removed_secrets=tuple(sorted(before.secrets - now.secrets)),
        configs=tuple(_config_files(view, sorted(now.configs - before.configs))),
        removed_configs=tuple(sorted(before.configs - now.configs)),
        registry_auths=_registry_auths(view, tasks),
    )


def _assigned(view: View, task: Task) -> AssignedTask:
    service = view.lookup(Service, task.service_id)
    task = replace(task, slot=task.shown_slot)
    if service is None:
        return AssignedTask(task=task)
    labels = service.spec.labels
    if service.removed_at is not None:
        labels = {
            **labels,
            DRAIN: "0s",
        }  # a removed service is not drained
    return AssignedTask(
        task=task,
        service_name=service.spec.name,
        service_labels=labels,
        ports=_ports_of(service),
        virtual_ips=service.endpoint.virtual_ips,
    )


def _ports_of(service: Service) -> tuple[PortConfig, ...]:
    """Published ports: as allocated, else as in the spec (host-mode ports need no allocation)."""
    if service.endpoint.ports:
        return service.endpoint.ports
    return service.spec.endpoint_spec.ports if service.spec.endpoint_spec else ()


def _needs(task: Task) -> bool:
    return bool(task.status.state <= TaskState.RUNNING)


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


def _secret_files(view: View, ids: Iterable[SecretId]) -> Iterator[SecretFile]:
    """A secret that does not exist, or cannot be read, is left out: its task fails at start with a message that names
    it."""
    for id in ids:
        payload_id = f"secret/{id}"
        secret, payload = view.lookup(Secret, id), view.lookup(Payload, payload_id)
        if secret is not None and payload_id not in view.unreadable(Payload):
            yield SecretFile(
                id=id,
                name=secret.spec.name,
                data=payload.data if payload is not None else b"",
                templating=secret.spec.templating,
            )


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
        payload = view.lookup(Payload, registry_auth_id(task.service_id)) if task.service_id else None
        if payload is not None and _needs(task):
            auths[task.id] = payload.data.decode("ascii", errors="ignore")
    return auths

"""What the allocator may give: each grant is data first, and one small transaction when it is applied."""

from typing import TypeAlias, assert_never

import msgspec
from msgspec.structs import replace

from skep.model.ids import ServiceId
from skep.model.service import Endpoint, Service
from skep.model.task import NetworkAttachment, Task, TaskState, TaskStatus
from skep.model.times import Timestamp
from skep.store.interface import Transaction

PENDING = "pending task scheduling"
"""What a task says between the allocator and the scheduler (swarmkit's words)."""


class GiveEndpoint(msgspec.Struct, frozen=True):
    """A service gets its ports."""

    service: Service
    endpoint: Endpoint


class Release(msgspec.Struct, frozen=True):
    """A task has all it needs and goes on to the scheduler."""

    task: Task
    attachments: tuple[NetworkAttachment, ...] = ()


class Explain(msgspec.Struct, frozen=True):
    """A task has to wait; ``reason`` is what the user reads on it."""

    task: Task
    reason: str


Grant: TypeAlias = GiveEndpoint | Release | Explain


def apply(tx: Transaction, grant: Grant, now: Timestamp) -> None:
    """Write ``grant``, unless what it was decided on is no longer so."""
    match grant:
        case GiveEndpoint(wanted, endpoint):
            service = tx.lookup(Service, wanted.id)
            if service is not None and service.spec_version == wanted.spec_version:
                tx.put(replace(service, endpoint=endpoint))
        case Release(wanted_task, attachments):
            task = tx.lookup(Task, wanted_task.id)
            if task is not None and task.status.state is TaskState.NEW:
                status = TaskStatus(timestamp=now, state=TaskState.PENDING, message=PENDING)
                tx.put(replace(task, status=status, networks_attachments=attachments))
        case Explain(wanted_task, reason):
            task = tx.lookup(Task, wanted_task.id)
            if task is not None and task.status.state is TaskState.NEW and task.status.err != reason:
                tx.put(replace(task, status=replace(task.status, timestamp=now, err=reason)))
        case _:
            assert_never(grant)


def service_of(grant: Grant) -> ServiceId:
    """The service that a grant is about."""
    return grant.service.id if isinstance(grant, GiveEndpoint) else grant.task.service_id

"""Quotas: what the services of a stack may take together, checked when a service is created or changed."""

from collections.abc import Iterator

import msgspec
from msgspec.structs import replace

from skep.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from skep.manager.control.new_objects import stack_of
from skep.model.autoscaling import with_replicas
from skep.model.ids import IdSource, QuotaId
from skep.model.node import Node
from skep.model.quota import QuotaSpec, QuotaState, StackQuota
from skep.model.service import Service, ServiceSpec
from skep.model.times import Timestamp
from skep.store.interface import Transaction, View
from skep.store.level import USERS

_MEBIBYTE = 1 << 20


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Of all tasks that services are to have; the fields of ``QuotaSpec``."""

    tasks: int = 0
    nano_cpus: int = 0
    memory_bytes: int = 0
    ports: int = 0

    def plus(self, other: "Usage") -> "Usage":
        """Both together."""
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


def usage_of(spec: ServiceSpec, nodes: int) -> Usage:
    """What a service takes.  ``nodes``: how many there are, each with a task of a global service."""
    job = spec.mode.replicated_job
    if spec.mode.name in ("global", "global-job"):
        tasks = nodes
    else:
        tasks = spec.replicas if job is None else job.max_concurrent or job.total_completions or 1
    resources = spec.task_template.resources
    reserved = resources.reservations if resources is not None else None
    return Usage(
        tasks=tasks,
        nano_cpus=tasks * (reserved.nano_cpus if reserved is not None else 0),
        memory_bytes=tasks * (reserved.memory_bytes if reserved is not None else 0),
        ports=len(spec.endpoint_spec.ports) if spec.endpoint_spec is not None else 0,
    )


def refusal(quota: QuotaSpec, before: Usage, others: Usage, wanted: Usage, *, reserves: bool = True) -> str:
    """Why a service may not take ``wanted``; empty: it may.  What takes no more than ``before`` is never refused.

    Args:
        before: what the service took until now.
        others: what the other services of the stack take.
        reserves: whether the service reserves what the quota bounds.
    """
    if not reserves and wanted != before:
        return (
            f"the stack {quota.name} has a quota of reservations: its services have to reserve "
            f"{' and '.join(_needed(quota))}"
        )
    for name, noun, scale in _BOUNDS:
        bound, used, want = getattr(quota, name), getattr(others, name), getattr(wanted, name)
        if bound and used + want > bound and want > getattr(before, name):
            return (
                f"the quota of the stack {quota.name} is exceeded: {want / scale:g} {noun} wanted, "
                f"{used / scale:g} used by its other services, the limit is {bound / scale:g}"
            )
    return ""


def check_quota(tx: Transaction, spec: ServiceSpec, present: Service | None = None) -> None:
    """Raises: PermissionDenied: the service would take more than its stack may have."""
    quota = quota_of(tx, stack_of(spec.labels))
    if quota is None:
        return
    if why := _refusal(tx, quota.spec, spec, present, _others(tx, quota.spec, present)):
        raise PermissionDenied(why)
    tx.put(replace(quota, changes=quota.changes + 1))


def replicas_within_quota(view: View, service: Service, replicas: int) -> tuple[int, str]:
    """The most tasks up to ``replicas`` to which a service may be scaled, and why not more; never fewer than it has."""
    quota, most = quota_of(view, stack_of(service.spec.labels)), service.spec.replicas
    if quota is None or replicas <= most:
        return replicas, ""
    others = _others(view, quota.spec, service)

    def why_not(number: int) -> str:
        return _refusal(view, quota.spec, with_replicas(service.spec, number), service, others)

    if not (why := why_not(replicas)):
        return replicas, ""
    refused = replicas
    while refused - most > 1:
        middle = (most + refused) // 2
        if why_not(middle):
            refused = middle
        else:
            most = middle
    return most, why


def _others(view: View, quota: QuotaSpec, present: Service | None) -> Usage:
    """What the other services of the stack take."""
    nodes, others = len(view.ids(Node)), Usage()
    for service in _services(view, quota.name):
        if present is None or service.id != present.id:
            others = others.plus(usage_of(service.spec, nodes))
    return others


def _refusal(view: View, quota: QuotaSpec, spec: ServiceSpec, present: Service | None, others: Usage) -> str:
    nodes = len(view.ids(Node))
    was_in_it = present is not None and stack_of(present.spec.labels) == quota.name
    before = usage_of(present.spec, nodes) if present is not None and was_in_it else Usage()
    wanted = usage_of(spec, nodes)
    reserves = all(getattr(wanted, name) for name in _needed_fields(quota)) or not wanted.tasks
    return refusal(quota, before, others, wanted, reserves=reserves)


def set_quota(tx: Transaction, spec: QuotaSpec, *, new_id: IdSource, now: Timestamp) -> StackQuota:
    """Set the quota of a stack; what its services take already stays.  Raises: InvalidArgument; FailedPrecondition."""
    if tx.level < USERS:
        raise FailedPrecondition("quotas need managers of this version: upgrade the others first")
    bounds = [getattr(spec, name) for name, _, _ in _BOUNDS]
    if any(not 0 <= bound < 2**53 for bound in bounds) or not any(bounds):
        raise InvalidArgument("a quota needs a bound: tasks, cpus, memory or ports")
    present = quota_of(tx, spec.name)
    if present is None:
        return tx.put(StackQuota(id=QuotaId(new_id()), created_at=now, updated_at=now, spec=spec))
    return tx.put(replace(present, updated_at=now, spec=spec))


def remove_quota(tx: Transaction, stack: str) -> None:
    """Raises: NotFound."""
    quota = quota_of(tx, stack)
    if quota is None:
        raise NotFound(f"stack {stack} has no quota")
    tx.delete(StackQuota, quota.id)


def quota_of(view: View, stack: str) -> StackQuota | None:
    """The quota of a stack; None: it has none."""
    found = view.find(StackQuota, name=stack.lower()) if stack else ()
    return next((one for one in found if one.spec.name == stack), None)


def quota_state(view: View, quota: StackQuota) -> QuotaState:
    """With what is taken of it."""
    used, nodes = Usage(), len(view.ids(Node))
    for service in _services(view, quota.spec.name):
        used = used.plus(usage_of(service.spec, nodes))
    return QuotaState(quota=quota.spec, used=QuotaSpec(name=quota.spec.name, **msgspec.structs.asdict(used)))


_BOUNDS = (
    ("tasks", "tasks", 1),
    ("nano_cpus", "reserved CPUs", 1_000_000_000),
    ("memory_bytes", "MiB of reserved memory", _MEBIBYTE),
    ("ports", "published ports", 1),
)


def _needed_fields(quota: QuotaSpec) -> list[str]:
    return [name for name in ("nano_cpus", "memory_bytes") if getattr(quota, name)]


def _needed(quota: QuotaSpec) -> list[str]:
    return [{"nano_cpus": "CPUs", "memory_bytes": "memory"}[name] for name in _needed_fields(quota)]


def _services(view: View, stack: str) -> Iterator[Service]:
    for service in view.find(Service):
        if service.removed_at is None and stack_of(service.spec.labels) == stack:
            yield service

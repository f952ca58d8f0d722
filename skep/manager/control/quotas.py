"""Quotas of stacks, and bounds of users: set, remove, show, and check when an object is created or changed."""

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import msgspec
from msgspec.structs import replace

from skep.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from skep.manager.services.quotas import (
    BOUNDS,
    StackUsage,
    claim,
    claim_of_users,
    claim_service,
    most_of_services,
    quota_of,
    usage_of_file,
    usage_of_network,
    usage_of_stack,
)
from skep.manager.services.routes import exposed, hosts_in
from skep.model.door.routes import why_no_host
from skep.model.network import Network, NetworkSpec
from skep.model.quota import QuotaSpec, QuotaState, StackQuota
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import Service, ServiceSpec
from skep.model.values.ids import IdSource, QuotaId
from skep.model.values.stacks import stack_of
from skep.model.values.times import Timestamp
from skep.store.interface import Transaction, View
from skep.store.level import USERS

HOSTS_MAX = 100
"""Hosts of one quota.  Each new route is compared with the hosts of all quotas."""

P = ParamSpec("P")
R = TypeVar("R")


def check_quota(tx: Transaction, spec: ServiceSpec, present: Service | None = None) -> None:
    """Check a service against its stack's quota.  Raises: PermissionDenied."""
    _require(claim_service(tx, spec, present))


def check_network_quota(tx: Transaction, spec: NetworkSpec, present: Network | None = None) -> None:
    """Check a network against its stack's quota.  Raises: PermissionDenied."""
    before = usage_of_network(tx, present.spec, present) if present is not None else StackUsage()
    wanted = usage_of_network(tx, spec, present)
    _require(claim(tx, stack_of(spec.labels), before, wanted, id=present.id if present is not None else ""))


def check_file_quota(
    tx: Transaction,
    spec: SecretSpec | ConfigSpec,
    data_bytes: int,
    present: Secret | Config | None = None,
) -> None:
    """Check a secret or config against its stack's quota.  Raises: PermissionDenied."""
    stack = stack_of(spec.labels)
    if present is not None and stack_of(present.spec.labels) == stack:
        return
    _require(claim(tx, stack, StackUsage(), usage_of_file(spec, data_bytes)))


Measure = Callable[[View, str], StackUsage]
"""Returns the usage of a stack by the objects of some kinds."""


def bounded(
    operation: Callable[Concatenate[Transaction, P], R],
    stack: str,
    *,
    is_admin: bool,
    measure: Measure = most_of_services,
) -> Callable[Concatenate[Transaction, P], R]:
    """Return ``operation`` with the bounds of users below administrator (``quotas.UserBounds``).

    Authorization checks the same bounds earlier.  Only the transaction knows about requests at the same time.

    Args:
        stack: Stack of the object that the operation writes.
        measure: Usage that the operation may change.
    """
    if is_admin:
        return operation

    def run(tx: Transaction, /, *args: P.args, **kwargs: P.kwargs) -> R:
        before = measure(tx, stack)
        result = operation(tx, *args, **kwargs)
        _require(claim_of_users(tx, stack, before, measure(tx, stack)))
        return result

    return run


def _require(why: str) -> None:
    if why:
        raise PermissionDenied(why)


def set_quota(tx: Transaction, spec: QuotaSpec, *, new_id: IdSource, now: Timestamp) -> StackQuota:
    """Set the quota of a stack.  Its services keep their current resources.  Raises: InvalidArgument;
    FailedPrecondition.
    """
    if tx.level < USERS:
        raise FailedPrecondition("quotas need managers of this version: upgrade the others first")
    bounds = [getattr(spec, name) for name, *_ in BOUNDS]
    if any(not 0 <= bound < 2**53 for bound in bounds) or not (any(bounds) or spec.hosts):
        raise InvalidArgument(
            "a quota needs a limit: tasks, cpus, memory, ports, networks, addresses, secrets, configs, data, services "
            "or hosts"
        )
    present = quota_of(tx, spec.name)
    _check_hosts(tx, spec)
    if present is None:
        return tx.put(StackQuota(id=QuotaId(new_id()), created_at=now, updated_at=now, spec=spec))
    return tx.put(replace(present, updated_at=now, spec=spec))


def _check_hosts(tx: Transaction, spec: QuotaSpec) -> None:
    """Check the hosts of a quota.  Raises: InvalidArgument: one is invalid, or in the quota of another stack."""
    if len(spec.hosts) > HOSTS_MAX:
        raise InvalidArgument(f"a quota has at most {HOSTS_MAX} hosts")
    owners = {host: one.spec.name for one in tx.find(StackQuota) for host in one.spec.hosts}
    for host in spec.hosts:
        if (reason := why_no_host(host)) or host != host.lower():
            raise InvalidArgument(f"invalid host {host[:100]!r}: {reason or 'write it in lower case'}")
        if owners.get(host, spec.name) != spec.name:
            raise InvalidArgument(f"the host {host} is in the quota of the stack {owners[host]}")


def remove_quota(tx: Transaction, stack: str) -> None:
    """Remove the quota of a stack.  Raises: NotFound."""
    quota = quota_of(tx, stack)
    if quota is None:
        raise NotFound(f"stack {stack} has no quota")
    tx.delete(StackQuota, quota.id)


def quota_state(view: View, quota: StackQuota) -> QuotaState:
    """Return a quota with its usage."""
    name, used = quota.spec.name, usage_of_stack(view, quota.spec.name)
    in_stack = (one for one in exposed(view) if stack_of(one.spec.labels) == name)
    hosts = tuple(sorted({host for one in in_stack for host in hosts_in(one.spec)}))
    return QuotaState(
        quota=quota.spec, used=QuotaSpec(name=name, hosts=hosts, **msgspec.structs.asdict(used))
    )

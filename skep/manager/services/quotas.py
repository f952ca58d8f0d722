"""Resource usage of stacks, and the checks of their quotas.

A quota is checked in the transaction that creates or changes an object.  The leader's rollback is checked like a user's
request.
"""

from collections.abc import Collection, Iterator
from ipaddress import IPv4Network, IPv6Network

import msgspec
from msgspec.structs import replace

from skep.errors import Unavailable
from skep.manager.cluster import known_cluster
from skep.model.network import IPAMOptions, Network, NetworkSpec, network_of
from skep.model.node import Node
from skep.model.options.autoscaling import autoscaling_of, with_replicas
from skep.model.quota import QuotaSpec, StackQuota
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import Service, ServiceSpec
from skep.model.swarm import DEFAULT_SUBNET_SIZE
from skep.model.values.ids import ServiceId
from skep.model.values.stacks import stack_of
from skep.store.interface import Transaction, View
from skep.store.kinds import Payload, users_claim_id
from skep.store.schema import stack_index

_MEBIBYTE = 1 << 20
"""Unit of memory and data in messages about quotas."""
USERS_TASKS_MAX = 20_000
"""Tasks of a stack's services for users below administrator, if the stack has no quota of tasks.

A manager loads each task in its memory, and a service may have 100,000 replicas.
"""
_USER_LIMITS = QuotaSpec(
    tasks=USERS_TASKS_MAX,
    networks=100,
    addresses=1 << 16,
    secrets=1_000,
    configs=1_000,
    data_bytes=64 << 20,
    services=1_000,
)
"""Bounds for users below administrator in a stack without a quota.

All stacks share the address pools, the VXLAN ids and the store.  A /16 is 256 networks of the default size, and the
store has 4 GiB by default.
"""


class StackUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Resources that services and other objects use, in the fields of ``QuotaSpec``."""

    tasks: int = 0
    nano_cpus: int = 0
    memory_bytes: int = 0
    ports: int = 0
    networks: int = 0
    addresses: int = 0
    secrets: int = 0
    configs: int = 0
    data_bytes: int = 0
    services: int = 0

    def plus(self, other: "StackUsage") -> "StackUsage":
        """Return the sum of two usages."""
        return StackUsage(
            **{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__}
        )


def usage_of(spec: ServiceSpec, nodes: int) -> StackUsage:
    """Return the usage of a service.  On each of the ``nodes``, a global service has one task."""
    job = spec.mode.replicated_job
    if spec.mode.name in ("global", "global-job"):
        tasks = nodes
    else:
        tasks = spec.replicas if job is None else job.max_concurrent or job.total_completions or 1
    resources = spec.task_template.resources
    reserved = resources.reservations if resources is not None else None
    return StackUsage(
        tasks=tasks,
        nano_cpus=tasks * (reserved.nano_cpus if reserved is not None else 0),
        memory_bytes=tasks * (reserved.memory_bytes if reserved is not None else 0),
        ports=len(spec.endpoint_spec.ports) if spec.endpoint_spec is not None else 0,
        services=1,
    )


def usage_of_network(view: View, spec: NetworkSpec, given: Network | None = None) -> StackUsage:
    """Return the usage of a network, which includes the IPv4 addresses of its subnets.

    Args:
        given: The network with the subnets that it has, or None if it is new.
    """
    return StackUsage(networks=1, addresses=_addresses(spec, given, _pool_addresses(view)))


def _pool_addresses(view: View) -> int:
    """Return the number of addresses of a subnet from the default pools."""
    swarm = known_cluster(view)
    return 1 << (32 - (swarm.subnet_size if swarm is not None else DEFAULT_SUBNET_SIZE))


def _addresses(spec: NetworkSpec, given: Network | None, of_pool: int) -> int:
    requested, blank = _ipv4(spec.ipam_options)
    allocated, _ = _ipv4(given.ipam_options if given is not None else None)
    is_overlay = spec.driver_configuration is None or spec.driver_configuration.name == "overlay"
    # The pool provides a subnet if the spec has none, and for each config without a subnet.
    to_come = max(blank, not requested) - len(allocated - requested) if is_overlay else 0
    return sum(subnet.num_addresses for subnet in requested | allocated) + max(to_come, 0) * of_pool


def _ipv4(options: IPAMOptions | None) -> tuple[set[IPv4Network | IPv6Network], int]:
    """Return the IPv4 subnets and the number of configs without a subnet."""
    configs = options.configs if options is not None else ()
    named = {network_of(config.subnet) for config in configs if config.subnet and ":" not in config.subnet}
    return named, sum(not config.subnet for config in configs)


def usage_of_file(spec: SecretSpec | ConfigSpec, data_bytes: int) -> StackUsage:
    """Return the usage of a secret or config."""
    if isinstance(spec, SecretSpec):
        return StackUsage(secrets=1, data_bytes=data_bytes)
    return StackUsage(configs=1, data_bytes=data_bytes)


def usage_of_stack(view: View, stack: str, *, without: str = "") -> StackUsage:
    """Return the usage of all objects of a stack.

    Args:
        without: Id of an object that does not count.
    """
    nodes, used = len(view.ids(Node)), StackUsage()
    for service in _services(view, stack):
        if service.id != without:
            used = used.plus(usage_of(service.spec, nodes))
    return used.plus(usage_of_others(view, stack, without))


def usage_of_others(view: View, stack: str, without: str = "") -> StackUsage:
    """Return the usage of all objects but the services."""
    stack, of_pool = stack_index(stack), _pool_addresses(view)
    # A stack may have thousands of networks, so these are added up without a struct for each.
    networks = [one for one in view.find(Network, stack=stack) if one.id != without]
    addresses = sum(_addresses(one.spec, one, of_pool) for one in networks)
    used = StackUsage(networks=len(networks), addresses=addresses)
    for secret in view.find(Secret, stack=stack):
        if secret.id != without:
            payload = view.lookup(Payload, f"secret/{secret.id}")
            used = used.plus(usage_of_file(secret.spec, len(payload.data) if payload is not None else 0))
    for config in view.find(Config, stack=stack):
        if config.id != without:
            used = used.plus(usage_of_file(config.spec, len(config.spec.data)))
    return used


def refusal(quota: QuotaSpec, before: StackUsage, others: StackUsage, wanted: StackUsage) -> str:
    """Return why a quota does not allow ``wanted``, or an empty string.  It never refuses less than ``before``.

    Args:
        before: The object's usage until now.
        others: The usage of the stack's other objects.
    """
    for name in _needed_fields(quota):
        # A service without a reservation adds nothing to the sum, so dropping a reservation counts as using more.
        is_more = wanted.tasks > before.tasks or getattr(before, name)
        if wanted.tasks and not getattr(wanted, name) and is_more:
            return (
                f"the stack {quota.name} has a quota of reservations: its services have to reserve "
                f"{' and '.join(_needed(quota))}"
            )
    for name, noun, scale, owners in BOUNDS:
        bound, used, want = getattr(quota, name), getattr(others, name), getattr(wanted, name)
        if bound and used + want > bound and want > getattr(before, name):
            return (
                f"the quota of the stack {quota.name} is exceeded: {want / scale:g} {noun} wanted, "
                f"{used / scale:g} used by its other {owners}, the limit is {bound / scale:g}"
            )
    return ""


def claim(tx: Transaction, stack: str, before: StackUsage, wanted: StackUsage, *, id: str = "") -> str:
    """Claim an object's usage.  Returns why the quota of the stack does not allow it, or an empty string.

    Args:
        id: Id of the object, or an empty string if it is new.
    """
    quota = quota_of(tx, stack)
    if quota is None:
        return ""
    if why := refusal(quota.spec, before, usage_of_stack(tx, stack, without=id), wanted):
        return why
    tx.put(replace(quota, changes=quota.changes + 1))
    return ""


def claim_service(tx: Transaction, spec: ServiceSpec, present: Service | None = None) -> str:
    """Claim a service's usage in place of the usage of ``present``.  See ``claim``."""
    stack = stack_of(spec.labels)
    if quota_of(tx, stack) is None:
        return ""
    nodes = len(tx.ids(Node))
    was_in_it = present is not None and stack_of(present.spec.labels) == stack
    before = usage_of(present.spec, nodes) if present is not None and was_in_it else StackUsage()
    return claim(tx, stack, before, usage_of(spec, nodes), id=present.id if present is not None else "")


class UserBounds:
    """Bounds for users below administrator.  A stack's usage is counted once for all objects of a request.

    Args:
        removed: Services that do not count, because the request removes them first.
    """

    def __init__(self, view: View, removed: Collection[ServiceId] = ()) -> None:
        self._view = view
        self._removed = frozenset(removed)
        self._used: dict[str, StackUsage] = {}
        self._tasks: dict[str, dict[str, int]] = {}
        """Tasks of each service by stack and name, with the services that the request has so far."""

    def refusal(self, stack: str, wanted: StackUsage) -> str:
        """Return why only an administrator may add an object to a stack, or an empty string."""
        if stack not in self._used:
            self._used[stack] = usage_of_others(self._view, stack)
        return _refusal_of_users(self._view, stack, StackUsage(), wanted, self._used[stack])

    def service_refusal(self, spec: ServiceSpec) -> str:
        """Return why only an administrator may create or change a service, or an empty string.

        A service with the name of ``spec`` in its stack counts as the one to change.
        """
        stack, nodes = stack_of(spec.labels), len(self._view.ids(Node))
        if stack not in self._tasks:
            self._tasks[stack] = {
                one.spec.name: tasks_at_most(one.spec, nodes)
                for one in _services(self._view, stack)
                if one.id not in self._removed
            }
        tasks = self._tasks[stack]
        # A service without a name gets one later.  Names have no spaces.
        name = spec.name or f"unnamed {len(tasks)}"
        before = StackUsage(tasks=tasks.get(name, 0), services=int(name in tasks))
        others = StackUsage(tasks=sum(tasks.values()) - before.tasks, services=len(tasks) - before.services)
        wanted = StackUsage(tasks=tasks_at_most(spec, nodes), services=1)
        tasks[name] = wanted.tasks
        return _refusal_of_users(self._view, stack, before, wanted, others)


def most_of_services(view: View, stack: str) -> StackUsage:
    """Return the most that the services of a stack may use without another request."""
    nodes, found = len(view.ids(Node)), list(_services(view, stack))
    return StackUsage(tasks=sum(tasks_at_most(one.spec, nodes) for one in found), services=len(found))


def claim_of_users(tx: Transaction, stack: str, before: StackUsage, after: StackUsage) -> str:
    """Claim a change of a stack's usage for a user below administrator.  Returns the reason of a refusal, or an empty
    string.

    Two concurrent claims conflict, as in ``claim``, so that they cannot pass together.
    """
    if why := _refusal_of_users(tx, stack, before, after, StackUsage()):
        return why
    id = users_claim_id(stack)
    last = tx.lookup(Payload, id)
    tx.put(Payload(id=id, data=b"%d" % (int(last.data) + 1 if last is not None else 1)))
    return ""


def tasks_at_most(spec: ServiceSpec, nodes: int) -> int:
    """Return the largest number of tasks that a service may get without another request.

    Autoscaling may create as many as its label allows.  The store keeps the record of each completed task of a job's
    run, so all completions count and not only the concurrent ones.
    """
    tasks = usage_of(spec, nodes).tasks
    scaling, job = autoscaling_of(spec.labels), spec.mode.replicated_job
    if scaling is not None and spec.mode.replicated is not None:
        return max(tasks, scaling.most)
    return max(tasks, job.total_completions or 0) if job is not None else tasks


def _refusal_of_users(
    view: View, stack: str, before: StackUsage, wanted: StackUsage, others: StackUsage
) -> str:
    """Return why a user may not add or change an object.  It never refuses less than ``before``.

    If the stack's quota has a bound, it replaces the default bound.
    """
    quota = quota_of(view, stack)
    own = quota.spec if quota is not None else QuotaSpec()
    left = {name: getattr(_USER_LIMITS, name) for name, *_ in BOUNDS if not getattr(own, name)}
    for name, noun, scale, _ in BOUNDS:
        bound, present = left.get(name, 0), getattr(before, name)
        used, more = getattr(others, name) + present, getattr(wanted, name) - present
        if bound and more > 0 and used + more > bound:
            who = f"the stack {stack}" if stack else "the cluster outside of stacks"
            remedy = "an administrator can set a quota" if stack else "only administrators may add more"
            return (
                f"{who} has {used / scale:.9g} {noun} and may have {bound / scale:g} without a quota, "
                f"{more / scale:.9g} more wanted: {remedy}"
            )
    return ""


def replicas_within_quota(view: View, service: Service, replicas: int) -> tuple[int, str]:
    """Return the number of tasks up to ``replicas`` that the quota allows a service, and why not more.

    The number is never below the service's current number.
    """
    quota, most = quota_of(view, stack_of(service.spec.labels)), service.spec.replicas
    if quota is None or replicas <= most:
        return replicas, ""
    others, nodes = usage_of_stack(view, quota.spec.name, without=service.id), len(view.ids(Node))
    before = usage_of(service.spec, nodes)

    def why_not(number: int) -> str:
        return refusal(quota.spec, before, others, usage_of(with_replicas(service.spec, number), nodes))

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


def quota_of(view: View, stack: str) -> StackQuota | None:
    """Return the quota of a stack, or None without one.

    Raises: Unavailable: It cannot be read, so that its limits are unknown.
    """
    found = view.find(StackQuota, name=stack.lower()) if stack else ()
    quota = next((one for one in found if one.spec.name == stack), None)
    if quota is None and stack and (why := view.why_unreadable(StackQuota, stack)):
        raise Unavailable(
            f"the quota of the stack {stack} cannot be read here: {why}. Try again, which may reach another manager."
        )
    return quota


BOUNDS = (
    ("tasks", "tasks", 1, "services"),
    ("nano_cpus", "reserved CPUs", 1_000_000_000, "services"),
    ("memory_bytes", "MiB of reserved memory", _MEBIBYTE, "services"),
    ("ports", "published ports", 1, "services"),
    ("networks", "networks", 1, "objects"),
    ("addresses", "addresses", 1, "networks"),
    ("secrets", "secrets", 1, "objects"),
    ("configs", "configs", 1, "objects"),
    ("data_bytes", "MiB of secrets and configs", _MEBIBYTE, "secrets and configs"),
    ("services", "services", 1, "services"),
)
"""For each bound: its field, the noun and the unit that show it, and the other objects that count."""


def _needed_fields(quota: QuotaSpec) -> list[str]:
    return [name for name in ("nano_cpus", "memory_bytes") if getattr(quota, name)]


def _needed(quota: QuotaSpec) -> list[str]:
    return [{"nano_cpus": "CPUs", "memory_bytes": "memory"}[name] for name in _needed_fields(quota)]


def _services(view: View, stack: str) -> Iterator[Service]:
    return (service for service in view.find(Service, stack=stack_index(stack)) if service.removed_at is None)

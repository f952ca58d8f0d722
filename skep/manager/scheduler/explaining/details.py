"""Explains why one node refuses one task, with the compared values."""

from collections.abc import Iterator

from skep.manager.scheduler.nodes.accounting import Account
from skep.manager.scheduler.nodes.affinity import AffinityRule, domain_of
from skep.manager.scheduler.nodes.requirements import Requirements
from skep.model.needs import CPU_NANO, kept_words, kind_and_amount
from skep.model.networks.data_planes import is_docker_node
from skep.model.node import NodeState
from skep.model.node_reports.conditions import disk_pressure
from skep.model.node_reports.rootless import lacking, refused_by_mapping
from skep.model.options.constraints import meets
from skep.model.options.labels import IGNORE_PATHS, RESERVE_CPUS, RESERVE_MEMORY
from skep.model.permissions.rights import missing_devices, rights_text
from skep.model.values.counts import counted

_MEBIBYTE = 1024**2
"""Unit of memory in explanations, as in ``docker stats``."""


def readiness(requirements: Requirements, account: Account, copies: int) -> str:
    """Return the node's state, or its availability if that is the reason."""
    node = account.node
    if node.status.state is not NodeState.READY:
        return f"the node is {node.status.state.value}" + (
            f" ({node.status.message})" if node.status.message else ""
        )
    return f"the node's availability is {node.spec.availability.value}"


def disk(requirements: Requirements, account: Account, copies: int) -> str:
    """Return the node's own description of its full disk."""
    return f"disk full: {disk_pressure(account.node.description)}"


def shortages(requirements: Requirements, account: Account, copies: int) -> str:
    """Return the amounts that the task needs, and the amounts that the node has left."""
    return f"insufficient resources: {amounts_missing(requirements, account)}"


def amounts_missing(requirements: Requirements, account: Account) -> str:
    """Return the resources of which the node has too little left, with both amounts."""
    return "; ".join(
        f"{wanted} requested, {free} not reserved{kept}"
        for wanted, free, _, kept in _shortages(requirements, account)
    )


def amounts_left(requirements: Requirements, account: Account) -> str:
    """Return the node's remaining amounts of the resources of which it has too little."""
    found = [*_shortages(requirements, account)]
    left = ", ".join(f"{free} {unit}" for _, free, unit, _ in found)
    return f"{left} not reserved{''.join(kept for *_, kept in found)}"


def unmet_constraints(requirements: Requirements, account: Account, copies: int) -> str:
    """Return the constraints that the node does not meet."""
    unmet = [one for one in requirements.constraints if not meets((one,), account.node)]
    return f"constraints not satisfied: {', '.join(one.text for one in unmet)}"


def plugins(requirements: Requirements, account: Account, copies: int) -> str:
    """Return the required plugins, of which at least one is missing."""
    return f"missing plugin: it needs {', '.join(f'{kind} {name}' for kind, name in requirements.plugins)}"


def rootless(requirements: Requirements, account: Account, copies: int) -> str:
    """Return the needs that the node does not meet, because an ordinary user runs it."""
    needs = lacking(requirements.rootless, account.node.description.engine.labels)
    return f"not possible in rootless mode: {', '.join(needs)}"


def mapped_users(requirements: Requirements, account: Account, copies: int) -> str:
    """Return the needs that the node refuses, because it maps the users of containers."""
    needs = refused_by_mapping(requirements.rootless, account.node.description.engine.labels)
    return f"not possible with userns-remap: {', '.join(needs)}"


def data_plane(requirements: Requirements, account: Account, copies: int) -> str:
    """Return the kind of nodes that the task's overlay networks belong to."""
    return f"its overlay networks belong to {' and '.join(sorted(requirements.planes))} nodes"


def paths(requirements: Requirements, account: Account, copies: int) -> str:
    """Return which overlay traffic to which nodes fails, and the label that allows the task nevertheless."""
    failing = [one.summary for one in account.node.cut_off if one.check in requirements.paths]
    return f"{'; '.join(failing)} (set the node's label {IGNORE_PATHS}=true to allow it)"


def platform(requirements: Requirements, account: Account, copies: int) -> str:
    """Return the required platforms and the node's platform."""
    wanted = ", ".join(f"{one.os or 'any'}/{one.architecture or 'any'}" for one in requirements.platforms)
    actual = account.node.description.platform
    return f"unsupported platform: {wanted} required, the node is {actual.os}/{actual.architecture}"


def rights(requirements: Requirements, account: Account, copies: int) -> str:
    """Return the rights over the machine that the node does not allow."""
    refused = requirements.rights.kinds - account.given_rights
    if is_docker_node(account.node):
        return f"rights over the machine not allowed: {rights_text(refused)} (a Docker Engine allows none)"
    return f"rights over the machine not allowed: {rights_text(refused)} (the node's setting `allow`)"


def devices(requirements: Requirements, account: Account, copies: int) -> str:
    """Return the devices that the node does not have."""
    missing = missing_devices(requirements.rights, account.node.description.engine.labels)
    return f"missing device: {', '.join(missing)}"


def ports(requirements: Requirements, account: Account, copies: int) -> str:
    """Return the host-mode ports that are in use on the node, and by what."""
    taken = [
        f"{number}/{protocol}"
        + ("" if account.host_ports[protocol, number] else " (by a plain container or another program)")
        for protocol, number in requirements.host_ports
        if account.has_port((protocol, number))
    ]
    return f"host-mode port already in use: {', '.join(taken)}"


def unknown(requirements: Requirements, account: Account, copies: int) -> str:
    """Return the number of the node's tasks that may hold something that the task needs."""
    tasks = counted(account.unknown, "task")
    return f"the reservations of {tasks} are unreadable: they may include the ports and resources it needs"


def replicas(requirements: Requirements, account: Account, copies: int) -> str:
    """Return how many tasks of the service the node has."""
    return f"max replicas per node: the node runs {copies} of {requirements.max_replicas}"


def affinity(requirements: Requirements, account: Account, copies: int) -> str:
    """Return which services have no task in the node's domain."""
    missing = [
        f"service {one.name} does not exist"
        if not one.services
        else f"no task of {one.name} {_where(one, account)}"
        for one in requirements.rules.hard
        if not one.is_apart and not account.domains.is_met(one, requirements.service_id, account)
    ]
    return f"affinity: {', '.join(missing)}"


def anti_affinity(requirements: Requirements, account: Account, copies: int) -> str:
    """Return which services have a task in the node's domain, and which service declares the rule."""
    found = [
        f"a task of {one.name} {_where(one, account)}"
        + ("" if one.is_declared else f" (a label of {one.name})")
        for one in requirements.rules.hard
        if one.is_apart and account.domains.has_neighbor(one, account)
    ]
    return f"anti-affinity: {', '.join(found)}"


def max_skew(requirements: Requirements, account: Account, copies: int) -> str:
    """Return the number of tasks in the node's domain, and the smallest number in a domain."""
    domains, id = account.domains, requirements.service_id
    found = []
    for one in requirements.rules.skews:
        if domains.is_within(one, id, requirements.constraints, account):
            continue
        counts, domain = domains.counts(id, one.topology), domain_of(account.node, one.topology)
        eligible = domains.eligible(one.topology, requirements.constraints)
        if domain not in eligible:
            found.append(
                f"no open node in {one.topology} {domain}" if domain else f"the node has no {one.topology}"
            )
            continue
        least = min(eligible, key=lambda name: (counts.get(name, 0), name))
        found.append(
            f"{one.topology} {domain} has {counted(counts.get(domain, 0), 'task')} and {least} has "
            f"{counts.get(least, 0)}, the largest difference is {one.limit}"
        )
    return f"max skew: {', '.join(found)}"


def _where(rule: AffinityRule, account: Account) -> str:
    if not rule.topology:
        return "on the node"
    domain = domain_of(account.node, rule.topology)
    return f"in {rule.topology} {domain}" if domain else f"because the node has no {rule.topology}"


def cluster_volumes(requirements: Requirements, account: Account, copies: int) -> str:
    """Return why the node cannot mount the task's cluster volumes."""
    chosen = account.volumes.choose(requirements.cluster_volumes, account.node)
    return chosen if isinstance(chosen, str) else ""


def _shortages(requirements: Requirements, account: Account) -> Iterator[tuple[str, str, str, str]]:
    """Yield the wanted amount with its unit, the amount that is left, the unit, and the system's reserve."""
    if requirements.nano_cpus > account.free_nano_cpus:
        wanted, free = requirements.nano_cpus / CPU_NANO, max(account.free_nano_cpus, 0) / CPU_NANO
        yield counted(wanted, "CPU"), f"{free:g}", "CPUs", kept_words(account.node, RESERVE_CPUS)
    if requirements.memory_bytes > account.free_memory_bytes:
        wanted, free = requirements.memory_bytes / _MEBIBYTE, max(account.free_memory_bytes, 0) / _MEBIBYTE
        kept = kept_words(account.node, RESERVE_MEMORY)
        yield f"{wanted:.0f} MiB of memory", f"{free:.0f}", "MiB of memory", kept
    for resource in requirements.generic:
        if not account.generic.has(resource):
            kind, amount = kind_and_amount(resource)
            yield f"{amount} {kind}", f"{max(account.generic.free(kind), 0)}", kind, ""

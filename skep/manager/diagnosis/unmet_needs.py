"""Adds to the reason why a task has no node what the task needs, read from its spec.

The scheduler stores only how many nodes each filter refused, like SwarmKit.  Pure.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final

from skep.aio.clock import Clock
from skep.aio.time_slices import TimeSlices
from skep.manager.services.resources import GenericStock
from skep.model.needs import (
    CPU_NANO,
    Plugin,
    capacity_of,
    cluster_mounts,
    has_plugin,
    host_ports,
    kept_words,
    kind_and_amount,
    plugins_of,
    reservations_of,
)
from skep.model.node import Node
from skep.model.node_reports.node_refusals import NodeRefusal, node_refusals_in
from skep.model.options.affinity import affinities_of
from skep.model.options.constraints import is_satisfied, label_of, parsed, unknown_key
from skep.model.options.labels import RESERVE_CPUS, RESERVE_MEMORY
from skep.model.permissions.rights import missing_devices, rights_of, rights_text
from skep.model.service import GenericResource, Placement, ServiceSpec
from skep.model.task import Task
from skep.model.values.counts import counted

NO_ADDRESSES: Final = "no available IPv"
"""Words of the allocator's error about a network without free addresses."""
_MEBIBYTE: Final = 1 << 20
"""Unit of memory in explanations, as in ``docker stats``."""
_PLUGIN_TYPES: Final = {"Log": "log driver", "Network": "network driver", "Volume": "volume driver"}


async def has_full_network(task: Task, tasks: Iterable[Task], clock: Clock) -> bool:
    """Return whether ``task`` waits for an address of a network on which no task is stopping.  Yields to the event
    loop between ``tasks``, which are all tasks of the cluster.
    """
    if NO_ADDRESSES not in task.status.err:
        return False
    slices = TimeSlices(clock)
    for one in tasks:
        if not one.is_wanted and not one.status.state.is_terminal and _is_on(one, task.status.err):
            return False
        await slices.yield_if_due()
    return True


def more_addresses(task: Task) -> str:
    """Return the command that adds addresses to the network for which ``task`` waits, or an empty text."""
    if NO_ADDRESSES not in task.status.err:
        return ""
    network = task.status.err.rpartition(": ")[2].rpartition(" (")[0]
    return f"skep network update --subnet-add SUBNET {network} adds addresses"


def _is_on(task: Task, err: str) -> bool:
    """Return whether the task has an address of the network that ``err`` ends with."""
    return any(
        one.network is not None and err.endswith(f"({one.network.id})") for one in task.networks_attachments
    )


def fits_no_node(task: Task, nodes: Collection[Node], spec: ServiceSpec | None = None) -> str:
    """Return that no node is as large as a pending ``task`` needs, or has its plugins, or that its service has more
    tasks than fit on all nodes.  Empty if it waits for another reason.

    Such a task waits for a new node, because the end of another task does not help.

    Args:
        spec: Spec of its service, or None to judge the task alone.
    """
    refusals = node_refusals_in(task.status.err)
    if spec is not None and (too_many := _too_many_tasks(refusals, nodes, spec)):
        return too_many
    if nodes and NodeRefusal.PLUGIN in refusals:
        missing = [one for one in plugins_of(task) if not any(has_plugin(node, one) for node in nodes)]
        if missing:
            return f"needs {_plugin_names(missing)}; no node has {'it' if len(missing) == 1 else 'them'}"
    if not nodes or NodeRefusal.RESOURCES not in refusals:
        return ""
    needs = reservations_of(task.spec)
    by_name = sorted(nodes, key=lambda node: (node.description.hostname, node.id))
    cpus = f" {_cpus_unit(needs.nano_cpus)}"
    sizes: list[tuple[int, Callable[[Node], int], Callable[[int], str], str, str]] = [
        (needs.nano_cpus, lambda node: capacity_of(node).nano_cpus, _number, RESERVE_CPUS, cpus),
        (
            needs.memory_bytes,
            lambda node: capacity_of(node).memory_bytes,
            _memory,
            RESERVE_MEMORY,
            " of memory",
        ),
    ]
    for kind, amount in _amounts(needs.generic_resources).items():
        sizes.append((amount, lambda node, kind=kind: _offered(node, kind), str, "", f" {kind}"))  # type: ignore[misc]
    for wanted, size, words, label, unit in sizes:
        largest = max(by_name, key=size)
        most = size(largest)
        if wanted <= most:
            continue
        name = largest.shown_name
        kept = kept_words(largest, label)
        has = f"the largest node, {name}, has {words(most)}{kept}" if most or kept else "no node has any"
        return f"needs {words(wanted)}{unit}; {has}"
    return ""


def _too_many_tasks(refusals: Collection[NodeRefusal], nodes: Collection[Node], spec: ServiceSpec) -> str:
    """Return that a replicated service has more tasks than its host-mode ports or its limit per node allow on the nodes
    that meet its constraints, or an empty text.
    """
    if spec.mode.replicated is None:
        return ""
    placement = spec.task_template.placement or Placement()
    ports = host_ports(spec)
    if ports and NodeRefusal.HOST_PORT in refusals:
        limit, why = 1, f"its host-mode {_ports(ports)}"
    elif placement.max_replicas and NodeRefusal.MAX_REPLICAS in refusals:
        limit, why = placement.max_replicas, "its limit of replicas per node"
    else:
        return ""
    fitting = [node for node in nodes if is_satisfied(placement.constraints, node)]
    replicas = spec.mode.replicated.replicas
    if not fitting or replicas is None or replicas <= limit * len(fitting):
        return ""
    needed = counted(-(-replicas // limit), "node")
    has = counted(len(fitting), "node")
    meet = "meets" if len(fitting) == 1 else "meet"
    there_are = f"{has} {meet} its constraints" if placement.constraints else f"the cluster has {has}"
    return f"needs {needed}, because {why} allows {counted(limit, 'task')} per node; {there_are}"


def _ports(ports: Collection[tuple[str, int]]) -> str:
    named = ", ".join(f"{number}/{protocol}" for protocol, number in ports)
    return f"port{'s' if len(ports) > 1 else ''} {named}"


def with_needs(task: Task, spec: ServiceSpec | None = None, *further: str) -> str:
    """Return why no node takes a pending ``task``: its needs of the kinds that its error names, then the error.

    The error only counts nodes, and screens cut the end of a long text.

    Args:
        spec: Spec of its service, with the host-mode ports and affinities that its own spec does not have.
        further: More about the needs, or empty texts.
    """
    refusals = node_refusals_in(task.status.err)
    needs = ", ".join((*_needs(task, refusals, spec), *_placement_needs(refusals, spec)))
    parts = (f"needs {needs}", *further, task.status.err) if needs else (task.status.err, *further)
    return "; ".join(filter(None, parts))


def unknown_names(task: Task, spec: ServiceSpec | None, nodes: Collection[Node]) -> str:
    """Return the keys and labels in the placement of a pending ``task`` that no node has, if they keep it waiting.

    Args:
        nodes: All nodes of the cluster, or none if they are not at hand.
    """
    refusals = node_refusals_in(task.status.err)
    found: list[str] = []
    if NodeRefusal.CONSTRAINTS in refusals and task.spec.placement is not None:
        found += [unknown_key(one, nodes) for one in parsed(task.spec.placement.constraints)]
    declared = affinities_of(spec.labels if spec is not None else {})
    topologies = [one.topology for one in declared.skews if NodeRefusal.MAX_SKEW in refusals]
    topologies += [one.topology for one in declared.near if NodeRefusal.AFFINITY in refusals and one.topology]
    for topology in dict.fromkeys(topologies):
        if nodes and not any(label_of(node, topology) for node in nodes):
            found.append(f"no node has {topology}")
    return "; ".join(filter(None, found))


def _placement_needs(refusals: Collection[NodeRefusal], spec: ServiceSpec | None) -> Iterator[str]:
    """Yield what the service's affinities and its largest skew ask of a node."""
    declared = affinities_of(spec.labels if spec is not None else {})
    if NodeRefusal.AFFINITY in refusals:
        yield from (f"{_domain(one.topology)} with a task of {one.service}" for one in declared.near)
    if NodeRefusal.ANTI_AFFINITY in refusals:
        yield from (f"{_domain(one.topology)} without a task of {one.service}" for one in declared.apart)
    if NodeRefusal.MAX_SKEW in refusals:
        for skew in declared.skews:
            yield f"{_domain(skew.topology)} with at most {counted(skew.limit, 'task')} more than any other"


def _domain(topology: str) -> str:
    """Return ``a node``, ``a node.labels.zone`` or ``an engine.labels.rack``."""
    return f"{'an' if topology.lower().startswith('e') else 'a'} {topology or 'node'}"


def _needs(task: Task, refusals: Collection[NodeRefusal], spec: ServiceSpec | None) -> Iterator[str]:
    placement, reserved = task.spec.placement or Placement(), reservations_of(task.spec)
    if NodeRefusal.RESOURCES in refusals:
        if reserved.nano_cpus:
            yield _cpus(reserved.nano_cpus)
        if reserved.memory_bytes:
            yield f"{_memory(reserved.memory_bytes)} of memory"
        yield from (f"{amount} {kind}" for kind, amount in _amounts(reserved.generic_resources).items())
    if NodeRefusal.PLUGIN in refusals and (plugins := plugins_of(task)):
        yield _plugin_names(plugins)
    if NodeRefusal.CONSTRAINTS in refusals:
        yield from placement.constraints
    if NodeRefusal.HOST_PORT in refusals and (ports := host_ports(spec)):
        yield _ports(ports)
    if NodeRefusal.MAX_REPLICAS in refusals and placement.max_replicas:
        yield f"at most {placement.max_replicas} of its service per node"
    if NodeRefusal.PLATFORM in refusals:
        yield " or ".join(f"{one.os or 'any'}/{one.architecture or 'any'}" for one in placement.platforms)
    rights = rights_of(task.spec.container_spec)
    if NodeRefusal.RIGHTS in refusals:
        yield f"nodes that allow {rights_text(rights.kinds)}"
    if NodeRefusal.DEVICE in refusals:
        yield from missing_devices(rights, {})
    if NodeRefusal.CLUSTER_VOLUMES in refusals:
        yield from (f"the volume {one.source}" for one in cluster_mounts(task.spec))


def _plugin_names(plugins: Iterable[Plugin]) -> str:
    return " and ".join(f"the {_PLUGIN_TYPES.get(type, 'plugin')} {name}" for type, name in plugins)


def _amounts(resources: Iterable[GenericResource]) -> Counter[str]:
    """Return the amount of each kind of generic resource."""
    found: Counter[str] = Counter()
    for one in resources:
        kind, amount = kind_and_amount(one)
        found[kind] += amount
    return found


def _offered(node: Node, kind: str) -> int:
    return GenericStock(node.description.resources.generic_resources).free(kind)


def _cpus(nano: int) -> str:
    return counted(nano / CPU_NANO, "CPU")


def _number(nano: int) -> str:
    return f"{nano / CPU_NANO:g}"


def _cpus_unit(nano: int) -> str:
    return "CPU" if nano == CPU_NANO else "CPUs"


def _memory(size: int) -> str:
    return f"{size // _MEBIBYTE} MiB"

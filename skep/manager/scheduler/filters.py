"""Filters: which nodes can take a task, and in Docker's words why the others cannot.

A table, first refusal wins.  The order is swarmkit's, so that an explanation counts each node under the same heading.

Source: swarmkit, manager/scheduler/{filter,pipeline}.go.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import msgspec

from skep.manager.scheduler import details
from skep.manager.scheduler.accounting import Account
from skep.manager.scheduler.requirements import Requirements
from skep.model.constraints import meets
from skep.model.ids import NodeId
from skep.model.labels import ignores_paths
from skep.model.node import Availability, EnginePlugin, NodeState
from skep.model.planes import DOCKER, SKEP, plane_of_node
from skep.model.service import Platform

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class Filter(msgspec.Struct, frozen=True):
    """One reason to refuse a node."""

    applies: Callable[[Requirements], bool]
    """Whether the requirements ask for anything here."""
    passes: Callable[[Requirements, Account, int], bool]
    """Whether the node will do; the number is how many tasks of the service it is meant to run already."""
    refusal: str
    """With ``{nodes}`` for "1 node" or "3 nodes"."""
    detail: Callable[[Requirements, Account, int], str]
    """The same of one node, with what was looked at."""
    is_lasting: bool = False
    """Whether it looks at the node alone, not at what its tasks have left."""


def _is_ready(wish: Requirements, account: Account, copies: int) -> bool:
    node = account.node
    return node.status.state is NodeState.READY and node.spec.availability is Availability.ACTIVE


def _has_resources(wish: Requirements, account: Account, copies: int) -> bool:
    return (
        wish.nano_cpus <= account.free_nano_cpus
        and wish.memory_bytes <= account.free_memory_bytes
        and all(map(account.generic.has, wish.generic))
    )


def _has_plugins(wish: Requirements, account: Account, copies: int) -> bool:
    plugins = account.node.description.engine.plugins
    return all(_has_plugin(type, name, plugins) for type, name in wish.plugins)


def _has_plugin(type: str, name: str, plugins: tuple[EnginePlugin, ...]) -> bool:
    names = [plugin.name for plugin in plugins if plugin.type == type]
    if type == "Log" and not names:
        # An older engine that does not list its log drivers.
        return True
    return name in names or f"{name}:latest" in names


def _is_on_plane(plane: str) -> Callable[[Requirements, Account, int], bool]:
    return lambda wish, account, copies: plane_of_node(account.node) == plane


def _is_reached(wish: Requirements, account: Account, copies: int) -> bool:
    node = account.node
    if not node.cut_off or ignores_paths(node.spec.labels):
        return True
    return not any(one.check in wish.paths for one in node.cut_off)


def _meets_constraints(wish: Requirements, account: Account, copies: int) -> bool:
    return meets(wish.constraints, account.node)


def _is_platform(wish: Requirements, account: Account, copies: int) -> bool:
    actual = account.node.description.platform
    return any(_fits(wanted, actual) for wanted in wish.platforms)


def _fits(wanted: Platform, actual: Platform) -> bool:
    architecture = _ARCHITECTURES.get(wanted.architecture, wanted.architecture)
    actual_architecture = _ARCHITECTURES.get(actual.architecture, actual.architecture)
    return architecture in ("", actual_architecture) and wanted.os in ("", actual.os)


def _has_ports(wish: Requirements, account: Account, copies: int) -> bool:
    return not any(account.host_ports[port] for port in wish.host_ports)


def _is_below_max_replicas(wish: Requirements, account: Account, copies: int) -> bool:
    return copies < wish.max_replicas


def _has_cluster_volumes(wish: Requirements, account: Account, copies: int) -> bool:
    """There are no cluster volumes here, as in a cluster of engines where nobody has made any."""
    return False


FILTERS = (
    Filter(
        lambda wish: True,
        _is_ready,
        "{nodes} not available for new tasks",
        details.readiness,
        is_lasting=True,
    ),
    Filter(
        lambda wish: bool(wish.nano_cpus or wish.memory_bytes or wish.generic),
        _has_resources,
        "insufficient resources on {nodes}",
        details.shortages,
    ),
    # Not SwarmKit's, which has one data plane.  Before plugins, whose refusal says less.
    Filter(
        lambda wish: DOCKER in wish.planes,
        _is_on_plane(DOCKER),
        "overlay network belongs to docker nodes, which does not fit {nodes}",
        details.data_plane,
        is_lasting=True,
    ),
    Filter(
        lambda wish: SKEP in wish.planes,
        _is_on_plane(SKEP),
        "overlay network belongs to skep nodes, which does not fit {nodes}",
        details.data_plane,
        is_lasting=True,
    ),
    # Not SwarmKit's: it never finds out.
    Filter(
        lambda wish: bool(wish.paths),
        _is_reached,
        "overlay traffic fails on {nodes}",
        details.paths,
        is_lasting=True,
    ),
    Filter(
        lambda wish: bool(wish.plugins),
        _has_plugins,
        "missing plugin on {nodes}",
        details.plugins,
        is_lasting=True,
    ),
    Filter(
        lambda wish: bool(wish.constraints),
        _meets_constraints,
        "scheduling constraints not satisfied on {nodes}",
        details.unmet_constraints,
        is_lasting=True,
    ),
    Filter(
        lambda wish: bool(wish.platforms),
        _is_platform,
        "unsupported platform on {nodes}",
        details.platform,
        is_lasting=True,
    ),
    Filter(
        lambda wish: bool(wish.host_ports),
        _has_ports,
        "host-mode port already in use on {nodes}",
        details.ports,
    ),
    Filter(
        lambda wish: bool(wish.max_replicas),
        _is_below_max_replicas,
        "max replicas per node limit exceed",  # Docker's spelling
        details.replicas,
    ),
    Filter(
        lambda wish: bool(wish.cluster_volumes),
        _has_cluster_volumes,
        "cannot fulfill requested CSI volume mounts on {nodes}",
        details.cluster_volumes,
        is_lasting=True,
    ),
)


def filters_for(wish: Requirements) -> tuple[Filter, ...]:
    """Those of ``FILTERS`` that the requirements are about."""
    return tuple(filter for filter in FILTERS if filter.applies(wish))


def explanation(wish: Requirements, accounts: Iterable[Account], copies: Counter[NodeId]) -> str:
    """Which filter refused how many nodes, most first: ``insufficient resources on 2 nodes; ...``.

    Empty if no node was refused (there is none, or some would do).
    """
    filters = filters_for(wish)
    refused: Counter[Filter] = Counter()
    for account in accounts:
        refusing = (one for one in filters if not one.passes(wish, account, copies[account.node.id]))
        if (first := next(refusing, None)) is not None:
            refused[first] += 1
    by_count = sorted(refused.items(), key=lambda item: (-item[1], FILTERS.index(item[0])))
    return "; ".join(
        filter.refusal.format(nodes="1 node" if count == 1 else f"{count} nodes")
        for filter, count in by_count
    )

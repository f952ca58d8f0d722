"""Filters decide which nodes can run a task, and why the others cannot.

The first filter that refuses a node determines the reason.  The order is swarmkit's, so that an explanation counts each
node under the same reason as swarmkit does.

Source: swarmkit, manager/scheduler/{filter,pipeline}.go.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import msgspec

from skep.aio.time_slices import STEP, SlicedWork, run_at_once
from skep.manager.scheduler.explaining import details
from skep.manager.scheduler.nodes.accounting import Account
from skep.manager.scheduler.nodes.requirements import Requirements
from skep.model.needs import has_plugin
from skep.model.networks.data_planes import DOCKER, SKEP, plane_of_node
from skep.model.node import takes_tasks
from skep.model.node_reports.conditions import DISK_PRESSURE_LABEL
from skep.model.node_reports.node_refusals import NodeRefusal, refusals_text
from skep.model.node_reports.rootless import lacking, refused_by_mapping
from skep.model.options.constraints import meets
from skep.model.options.labels import ignores_paths
from skep.model.permissions.rights import missing_devices
from skep.model.service import Platform
from skep.model.values.ids import NodeId

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class Filter(msgspec.Struct, frozen=True):
    """A condition that excludes nodes."""

    applies: Callable[[Requirements], bool]
    """Whether the filter is relevant for the requirements."""
    passes: Callable[[Requirements, Account, int], bool]
    """Whether the node passes.  The number is the node's count of the service's wanted tasks."""
    refusal: NodeRefusal
    detail: Callable[[Requirements, Account, int], str]
    """Returns the refusal of one node, with the compared values."""
    is_lasting: bool = False
    """Whether the filter depends on the node alone, not on the reservations of its tasks."""


def _is_ready(requirements: Requirements, account: Account, copies: int) -> bool:
    return takes_tasks(account.node)


def _has_disk(requirements: Requirements, account: Account, copies: int) -> bool:
    return DISK_PRESSURE_LABEL not in account.node.description.engine.labels


def _has_resources(requirements: Requirements, account: Account, copies: int) -> bool:
    return (
        requirements.nano_cpus <= account.free_nano_cpus
        and requirements.memory_bytes <= account.free_memory_bytes
        and all(map(account.generic.has, requirements.generic))
    )


def _is_known(requirements: Requirements, account: Account, copies: int) -> bool:
    return not account.unknown


def _has_plugins(requirements: Requirements, account: Account, copies: int) -> bool:
    return all(has_plugin(account.node, one) for one in requirements.plugins)


def _runs_rootless(requirements: Requirements, account: Account, copies: int) -> bool:
    return not lacking(requirements.rootless, account.node.description.engine.labels)


def _runs_mapped(requirements: Requirements, account: Account, copies: int) -> bool:
    return not refused_by_mapping(requirements.rootless, account.node.description.engine.labels)


def _is_on_plane(plane: str) -> Callable[[Requirements, Account, int], bool]:
    return lambda requirements, account, copies: plane_of_node(account.node) == plane


def _is_reached(requirements: Requirements, account: Account, copies: int) -> bool:
    node = account.node
    if not node.cut_off or ignores_paths(node.spec.labels):
        return True
    return not any(one.check in requirements.paths for one in node.cut_off)


def _meets_constraints(requirements: Requirements, account: Account, copies: int) -> bool:
    return meets(requirements.constraints, account.node)


def _is_platform(requirements: Requirements, account: Account, copies: int) -> bool:
    actual = account.node.description.platform
    return any(_fits(wanted, actual) for wanted in requirements.platforms)


def _fits(wanted: Platform, actual: Platform) -> bool:
    architecture = _ARCHITECTURES.get(wanted.architecture, wanted.architecture)
    actual_architecture = _ARCHITECTURES.get(actual.architecture, actual.architecture)
    return architecture in ("", actual_architecture) and wanted.os in ("", actual.os)


def _gives_rights(requirements: Requirements, account: Account, copies: int) -> bool:
    return requirements.rights.kinds <= account.given_rights


def _has_devices(requirements: Requirements, account: Account, copies: int) -> bool:
    return not missing_devices(requirements.rights, account.node.description.engine.labels)


def _asks_for_rights(requirements: Requirements) -> bool:
    return bool(requirements.rights.kinds)


def _has_ports(requirements: Requirements, account: Account, copies: int) -> bool:
    return not any(map(account.has_port, requirements.host_ports))


def _is_below_max_replicas(requirements: Requirements, account: Account, copies: int) -> bool:
    return copies < requirements.max_replicas


def _is_near(requirements: Requirements, account: Account, copies: int) -> bool:
    return all(
        account.domains.is_met(one, requirements.service_id, account)
        for one in requirements.rules.hard
        if not one.is_apart
    )


def _is_apart(requirements: Requirements, account: Account, copies: int) -> bool:
    return not any(
        one.is_apart and account.domains.has_neighbor(one, account) for one in requirements.rules.hard
    )


def _is_within_skew(requirements: Requirements, account: Account, copies: int) -> bool:
    return all(
        account.domains.is_within(one, requirements.service_id, requirements.constraints, account)
        for one in requirements.rules.skews
    )


def _has_cluster_volumes(requirements: Requirements, account: Account, copies: int) -> bool:
    return not isinstance(account.volumes.choose(requirements.cluster_volumes, account.node), str)


FILTERS = (
    Filter(
        lambda requirements: True,
        _is_ready,
        NodeRefusal.NOT_READY,
        details.readiness,
        is_lasting=True,
    ),
    Filter(
        lambda requirements: bool(
            requirements.nano_cpus or requirements.memory_bytes or requirements.generic
        ),
        _has_resources,
        NodeRefusal.RESOURCES,
        details.shortages,
    ),
    # Not in SwarmKit, which places such tasks on rootless nodes, where they do not work.  Comes before plugins.
    Filter(
        lambda requirements: bool(requirements.rootless),
        _runs_rootless,
        NodeRefusal.ROOTLESS,
        details.rootless,
        is_lasting=True,
    ),
    # Not in SwarmKit, which places such tasks on nodes with userns-remap, where they are rejected.
    Filter(
        lambda requirements: bool(requirements.rootless),
        _runs_mapped,
        NodeRefusal.MAPPED_USERS,
        details.mapped_users,
        is_lasting=True,
    ),
    # Not in SwarmKit, which has one data plane.  Comes before plugins, whose refusal is less specific.
    Filter(
        lambda requirements: DOCKER in requirements.planes,
        _is_on_plane(DOCKER),
        NodeRefusal.DOCKER_NETWORK,
        details.data_plane,
        is_lasting=True,
    ),
    Filter(
        lambda requirements: SKEP in requirements.planes,
        _is_on_plane(SKEP),
        NodeRefusal.SKEP_NETWORK,
        details.data_plane,
        is_lasting=True,
    ),
    # Not in SwarmKit, which does not probe paths.
    Filter(
        lambda requirements: bool(requirements.paths),
        _is_reached,
        NodeRefusal.PATHS,
        details.paths,
        is_lasting=True,
    ),
    Filter(
        lambda requirements: bool(requirements.plugins),
        _has_plugins,
        NodeRefusal.PLUGIN,
        details.plugins,
        is_lasting=True,
    ),
    Filter(
        lambda requirements: bool(requirements.constraints),
        _meets_constraints,
        NodeRefusal.CONSTRAINTS,
        details.unmet_constraints,
        is_lasting=True,
    ),
    Filter(
        lambda requirements: bool(requirements.platforms),
        _is_platform,
        NodeRefusal.PLATFORM,
        details.platform,
        is_lasting=True,
    ),
    # Not in SwarmKit, whose services have no rights over the machine.
    Filter(
        _asks_for_rights,
        _gives_rights,
        NodeRefusal.RIGHTS,
        details.rights,
        is_lasting=True,
    ),
    Filter(
        _asks_for_rights,
        _has_devices,
        NodeRefusal.DEVICE,
        details.devices,
        is_lasting=True,
    ),
    # Not in SwarmKit, which does not check disks.  Comes after permanent reasons.
    Filter(
        lambda requirements: requirements.needs_disk,
        _has_disk,
        NodeRefusal.DISK,
        details.disk,
        is_lasting=True,
    ),
    Filter(
        lambda requirements: bool(requirements.host_ports),
        _has_ports,
        NodeRefusal.HOST_PORT,
        details.ports,
    ),
    # Not in SwarmKit, which does not serve with damaged data (decision 21).
    Filter(
        lambda requirements: bool(
            requirements.nano_cpus or requirements.memory_bytes or requirements.host_ports
        ),
        _is_known,
        NodeRefusal.UNKNOWN_SPECS,
        details.unknown,
    ),
    Filter(
        lambda requirements: bool(requirements.max_replicas),
        _is_below_max_replicas,
        NodeRefusal.MAX_REPLICAS,
        details.replicas,
    ),
    # Not in SwarmKit, which has no affinity.  ``Neighborhood`` applies the same rules to many nodes at once.
    Filter(
        lambda requirements: any(not one.is_apart for one in requirements.rules.hard),
        _is_near,
        NodeRefusal.AFFINITY,
        details.affinity,
    ),
    Filter(
        lambda requirements: any(one.is_apart for one in requirements.rules.hard),
        _is_apart,
        NodeRefusal.ANTI_AFFINITY,
        details.anti_affinity,
    ),
    Filter(
        lambda requirements: bool(requirements.rules.skews),
        _is_within_skew,
        NodeRefusal.MAX_SKEW,
        details.max_skew,
    ),
    Filter(
        lambda requirements: bool(requirements.cluster_volumes),
        _has_cluster_volumes,
        NodeRefusal.CLUSTER_VOLUMES,
        details.cluster_volumes,
    ),
)


def filters_for(requirements: Requirements) -> tuple[Filter, ...]:
    """Return the filters that are relevant for the requirements."""
    return tuple(filter for filter in FILTERS if filter.applies(requirements))


def first_refusing(requirements: Requirements, account: Account, copies: int) -> Filter | None:
    """Return the first filter that the node does not pass, or None."""
    for filter in filters_for(requirements):
        if not filter.passes(requirements, account, copies):
            return filter
    return None


def explanation(requirements: Requirements, accounts: Iterable[Account], copies: Counter[NodeId]) -> str:
    """Run ``explaining`` without pauses."""
    return run_at_once(explaining(requirements, accounts, copies))


def explaining(
    requirements: Requirements, accounts: Iterable[Account], copies: Counter[NodeId]
) -> SlicedWork[str]:
    """Count the nodes that each filter refused, largest count first: ``insufficient resources on 2 nodes; ...``.

    The text is empty without nodes, or if every node passes.
    """
    filters = filters_for(requirements)
    refused: Counter[Filter] = Counter()
    for number, account in enumerate(accounts, 1):
        if number % STEP == 0:
            yield
        refusing = (one for one in filters if not one.passes(requirements, account, copies[account.node.id]))
        if (first := next(refusing, None)) is not None:
            refused[first] += 1
    by_count = sorted(refused.items(), key=lambda item: (-item[1], FILTERS.index(item[0])))
    return refusals_text((filter.refusal, count) for filter, count in by_count)

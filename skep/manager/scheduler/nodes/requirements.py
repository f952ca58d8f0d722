"""The requirements that a task has of a node.  Tasks of one service and version share them, so they are derived
once.
"""

from collections.abc import Callable, Iterable, Iterator

import msgspec

from skep.manager.scheduler.nodes.affinity import NO_RULES, AffinityRules
from skep.model.needs import (
    ClusterMount,
    HostPort,
    Plugin,
    cluster_mounts,
    host_ports,
    plugins_of,
    reservations_of,
)
from skep.model.network import Network
from skep.model.networks.data_planes import is_overlay, plane_of
from skep.model.networks.overlays import is_encrypted
from skep.model.networks.paths import PathCheck
from skep.model.node_reports.rootless import RootlessNeeds, rootless_needs
from skep.model.options.constraints import Constraint, parsed
from skep.model.permissions.rights import MachineRights, rights_of
from skep.model.service import (
    GenericResource,
    Placement,
    Platform,
    ServiceSpec,
)
from skep.model.task import NetworkAttachment, Task
from skep.model.values.ids import NetworkId, ServiceId
from skep.model.values.meta import Version
from skep.store.interface import View
from skep.store.kinds import spec_of


class Requirements(msgspec.Struct, frozen=True, kw_only=True, cache_hash=True):
    """Inputs of filters and preferences."""

    service_id: ServiceId
    version: int
    nano_cpus: int = 0
    memory_bytes: int = 0
    generic: tuple[GenericResource, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    spread_over: tuple[str, ...] = ()
    platforms: tuple[Platform, ...] = ()
    plugins: tuple[Plugin, ...] = ()
    host_ports: tuple[HostPort, ...] = ()
    max_replicas: int = 0
    planes: tuple[str, ...] = ()
    """Data planes of the task's overlay networks.  Empty while none of these networks has one."""
    paths: tuple[PathCheck, ...] = ()
    """Checks of overlay and ingress traffic that must pass on the node."""
    rights: MachineRights = MachineRights()
    """Rights over the node that the task's containers need, such as ``privileged``."""
    cluster_volumes: tuple[ClusterMount, ...] = ()
    rules: AffinityRules = NO_RULES
    """Affinities to other services, and their anti-affinities to this one."""
    topologies: tuple[str, ...] = ()
    """Labels by which the rules divide the nodes, in addition to ``spread_over``."""
    rootless: RootlessNeeds = RootlessNeeds()
    """Needs that a rootless node or a node with mapped users may not meet."""
    needs_disk: bool = True
    """Whether the node's disk must have free space.  True for every new task (``staying``)."""


def requirements_of(
    task: Task,
    service_spec: ServiceSpec | None,
    planes: tuple[str, ...] = (),
    rules: AffinityRules = NO_RULES,
) -> Requirements:
    """Return the requirements of ``task``.

    Args:
        service_spec: The spec it was made from, for its host-mode ports.
        planes: Current data planes of its overlay networks (``planes_of``).
        rules: The rules for its service (``AffinityIndex.of``).

    Raises:
        InvalidArgument: A constraint or a label cannot be parsed.  The API rejects such specs.
    """
    spec = task.spec
    placement = spec.placement or Placement()
    reservations = reservations_of(spec)
    # Going to the domain with the fewest tasks first keeps the skew small, so that few tasks are refused.
    levels = [one.topology for one in rules.skews]
    levels += [over.spread.spread_descriptor for over in placement.preferences if over.spread]
    spread_over = tuple(dict.fromkeys(levels)) if rules.skews else tuple(levels)
    rights = rights_of(spec.container_spec)
    return Requirements(
        service_id=task.service_id,
        version=(task.spec_version or Version()).index,
        nano_cpus=reservations.nano_cpus,
        memory_bytes=reservations.memory_bytes,
        generic=reservations.generic_resources,
        constraints=parsed(placement.constraints),
        spread_over=spread_over,
        platforms=placement.platforms,
        plugins=plugins_of(task),
        host_ports=host_ports(service_spec),
        max_replicas=placement.max_replicas,
        planes=planes,
        paths=paths_of(one.network for one in task.networks_attachments),
        rights=rights,
        cluster_volumes=cluster_mounts(spec),
        rules=rules,
        rootless=rootless_needs(spec, task.networks_attachments, service_spec, rights),
        topologies=tuple(one for one in rules.topologies if one not in spread_over) if rules else (),
    )


class RequirementsCache:
    """Cache of the last ``requirements_of``, because tasks without a service often come in series with equal specs."""

    def __init__(self) -> None:
        self._last: tuple[Task, ServiceSpec | None, Requirements] | None = None
        self._attachments: tuple[NetworkAttachment, ...] = ()
        self._revision = 0
        self._planes: tuple[str, ...] = ()
        """Data planes of ``_attachments`` at ``_revision``."""

    def of(self, task: Task, view: View, rules: AffinityRules = NO_RULES) -> Requirements:
        """Return the requirements of ``task`` in ``view``, with the ``rules`` for its service."""
        service_spec = spec_of(view, task) if task.spec_version is not None else None
        planes = self._planes_of(task, view) if task.networks_attachments else ()
        if self._last is not None:
            known, known_spec, requirements = self._last
            if (
                service_spec is known_spec
                and planes == requirements.planes
                and rules == requirements.rules
                and task.spec == known.spec
                and task.service_id == known.service_id
                and task.spec_version == known.spec_version
                and task.networks_attachments == known.networks_attachments
            ):
                return requirements
        requirements = requirements_of(task, service_spec, planes, rules)
        self._last = task, service_spec, requirements
        return requirements

    def _planes_of(self, task: Task, view: View) -> tuple[str, ...]:
        if task.networks_attachments is not self._attachments or view.revision != self._revision:
            self._planes = planes_of(task, lambda network_id: view.lookup(Network, network_id))
            self._attachments, self._revision = task.networks_attachments, view.revision
        return self._planes


def overlays_of(attachments: Iterable[NetworkAttachment]) -> Iterator[NetworkId]:
    """Yield the overlay networks among a task's networks, except the ingress network, which is on both data planes."""
    for attachment in attachments:
        network = attachment.network
        if network is not None and is_overlay(network) and not network.spec.ingress:
            yield network.id


def paths_of(networks: Iterable[Network | None]) -> tuple[PathCheck, ...]:
    """Return the checks between nodes that traffic on the ``networks`` depends on."""
    overlays = (network for network in networks if network is not None and is_overlay(network))
    return tuple(
        sorted({PathCheck.ENCRYPTED if is_encrypted(one) else PathCheck.OVERLAY for one in overlays})
    )


def planes_of(task: Task, network: Callable[[NetworkId], Network | None]) -> tuple[str, ...]:
    """Return the data planes of the task's overlay networks, sorted, without undecided networks."""
    found = (network(id) for id in overlays_of(task.networks_attachments))
    return tuple(sorted({plane_of(one) for one in found if one is not None} - {""}))

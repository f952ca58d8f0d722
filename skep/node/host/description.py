"""The description of a node (resources, labels, plug-ins) that it reports to the managers when it registers."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from skep import __version__
from skep.agent.tasks.cluster_volumes import ClusterVolumes
from skep.configuration.configuration import Configuration
from skep.engine.containers.container import Container
from skep.engine.engine import Engine
from skep.engine.log_drivers.drivers import log_drivers
from skep.engine.log_drivers.options import JOURNAL
from skep.model.networks.data_planes import (
    DATA_PATH_LABEL,
    IMAGES_LABEL,
    LOCAL_ADDRESSES_LABEL,
    NAT_LABEL,
    NODE_LABEL,
    PATHS_LABEL,
)
from skep.model.networks.routes import ROUTES_LABEL, routes_label
from skep.model.networks.used_ports import PORTS_LABEL, UsedPort, ports_label
from skep.model.node import EngineDescription, EnginePlugin, NodeDescription
from skep.model.node_reports.conditions import BOOT_LABEL, ConditionName
from skep.model.node_reports.description_size import size_condition, within_size
from skep.model.node_reports.rootless import ROOTLESS_LABEL, rootless_label
from skep.model.options.constraints import FACT_LABEL
from skep.model.options.secret_env import PLUGIN as SECRET_ENV
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL, SlotVolume, slot_volumes_label
from skep.model.permissions.rights import ALLOW_LABEL, CDI_LABEL, DEVICES_LABEL, MORE, reported_rights
from skep.model.service import GenericResource, NamedResource, Platform, Resources
from skep.model.values.user_map import MAPPED, USERS_LABEL, UserMap
from skep.node.host.conditions import Conditions
from skep.node.host.features import Features, labels
from skep.node.host.machine import Machine
from skep.node.host.machine_resources import ResourceReader

_NETWORKS = ("bridge", "host", "ipvlan", "macvlan", "null")
_ROOTLESS_NETWORKS = ("bridge", "null")
"""Drivers of networks on a rootless node, which has no interfaces of the machine."""
_PLUGINS = (
    EnginePlugin(type="Volume", name="local"),
    EnginePlugin(type=SECRET_ENV[0], name=SECRET_ENV[1]),
)
_OVERLAY = EnginePlugin(type="Network", name="overlay")
_LIST_BYTES_MAX = 16_384
"""Limit in bytes for a label that lists devices."""
_OVERLAY_NEEDS = ("veth", "bridge", "vxlan", "nftables")
"""Kernel features that overlay networks need.

If one is missing, the overlay plugin is not listed, so that managers place tasks with overlay networks elsewhere.
"""


def port_labels(
    containers: Iterable[Container], mesh: frozenset[UsedPort], listening: frozenset[UsedPort]
) -> Mapping[str, str]:
    """Return the label that lists ports in use by something other than a task.

    These are the ports on which programs of this machine listen, and the ports that plain containers publish.

    Args:
        mesh: Ports of the routing mesh.  They are left out, because every node serves them.
        listening: Ports on which any program of this machine listens.
    """
    by_tasks: set[UsedPort] = set(mesh)
    by_others: set[UsedPort] = set()
    for container in containers:
        ports = container.sandbox.ports if container.sandbox is not None else ()
        owner = by_tasks if container.plain is None else by_others
        owner.update((port.protocol, port.published_port) for port in ports)
    label = ports_label(listening - by_tasks | by_others)
    return {PORTS_LABEL: label} if label else {}


def volume_labels(uses: Mapping[str, Mapping[str, int]]) -> Mapping[str, str]:
    """Return the label that lists the service slots with data in this node's volumes.

    ``uses`` has, by volume and ``service.slot``, the time when the slot last used the volume.
    """
    found = (
        SlotVolume(volume, service, int(slot), at_ms)
        for volume, users in uses.items()
        for user, at_ms in users.items()
        for service, _, slot in (user.rpartition("."),)
        if slot.isascii() and slot.isdigit()
    )
    label = slot_volumes_label(found)
    return {SLOT_VOLUMES_LABEL: label} if label else {}


def user_labels(users: UserMap | None) -> Mapping[str, str]:
    """Return the labels of a node that maps its containers' ``users``, one of which is ``node.facts.userns``."""
    return {USERS_LABEL: MAPPED, f"{FACT_LABEL}userns": MAPPED} if users is not None else {}


def volume_drivers(engine: Engine | None) -> Sequence[str]:
    """Return this node's volume plugins."""
    return engine.volumes.plugins.drivers if engine is not None else ()


def with_plugins(
    description: NodeDescription, engine: Engine | None, cluster_volumes: ClusterVolumes | None = None
) -> NodeDescription:
    """Return ``description`` with the node's volume plugins and its drivers of cluster volumes."""
    if cluster_volumes is not None:
        description = replace(description, csi_info=cluster_volumes.drivers)
    plugins = tuple(EnginePlugin(type="Volume", name=name) for name in volume_drivers(engine))
    all = (*description.engine.plugins, *plugins)
    return replace(description, engine=replace(description.engine, plugins=all)) if plugins else description


def within_bounds(description: NodeDescription, conditions: Conditions) -> NodeDescription:
    """Return ``description``, cut to the size that a manager accepts.  A condition names the parts that were cut."""
    bounded = within_size(description)
    text = size_condition(bounded) if bounded is not description else ""
    conditions.report(ConditionName.DESCRIPTION_SIZE, text)
    return bounded


def has_overlays(features: Features) -> bool:
    """Return whether this node can have overlay networks.  Other nodes cannot send packets to a rootless node."""
    return not features.is_rootless and all(map(features.has, _OVERLAY_NEEDS))


def listed(names: Iterable[str]) -> str:
    """Return ``names`` separated by commas, as many as fit into a label."""
    kept: list[str] = []
    left = _LIST_BYTES_MAX
    for name in names:
        left -= len(name.encode()) + 1
        if left < 0:
            return ",".join([*kept, MORE])
        if "," not in name:
            kept.append(name)
    return ",".join(kept)


def generic_resources(configuration: Configuration, units: Iterable[str]) -> tuple[GenericResource, ...]:
    """Return the resources that services can reserve: configured resources and CDI ``units``.

    A unit ``acme.com/gpu=0`` is the resource ``0`` of the kind ``acme.com/gpu``.  Configured kinds have no slash.
    """
    named = ((kind, name) for kind, _, name in (unit.partition("=") for unit in units))
    return (
        *configuration.generic_resources,
        *(GenericResource(named_resource_spec=NamedResource(kind=kind, value=name)) for kind, name in named),
    )


def _fact_labels(machine: Machine, features: Features) -> Mapping[str, str]:
    """Return the labels that constraints read as ``node.facts.NAME``."""
    facts = {
        "kernel": machine.kernel,
        "cgroup": str(features.cgroup_version),
        "distribution": machine.distribution,
        "distribution-version": machine.os_version,
        "rootless": "true" if features.is_rootless else "",
    }
    return {FACT_LABEL + name: value for name, value in facts.items() if value}


class NodeDescriber:
    """Builds the node's description on request.

    Args:
        offers: Reads the machine's files.
        further_labels: Returns the labels of the node's other parts, for example its encryption method for overlay
            networks.
        image_port: Returns the port on which the node serves images to other nodes, or 0.
        has_probes: Whether the node probes other nodes.
    """

    def __init__(
        self,
        machine: Machine,
        features: Features,
        offers: ResourceReader,
        conditions: Conditions,
        further_labels: Callable[[], Mapping[str, str]],
        *,
        image_port: Callable[[], int],
        has_probes: bool,
    ) -> None:
        self._machine = machine
        self._features = features
        self._offers = offers
        self._conditions = conditions
        self._further_labels = further_labels
        self._image_port = image_port
        self._has_probes = has_probes

    def _offer_labels(self, configuration: Configuration) -> Mapping[str, str]:
        """Return the labels of devices and rights that tasks may get on this machine."""
        if configuration.executor != "oci":
            return {}
        return {
            ALLOW_LABEL: reported_rights(configuration.allow),
            DEVICES_LABEL: listed(self._offers.present.devices),
            CDI_LABEL: listed(self._offers.present.cdi_devices),
        }

    def _plugins(self, journal: Path) -> tuple[EnginePlugin, ...]:
        names = _ROOTLESS_NETWORKS if self._features.is_rootless else _NETWORKS
        networks = tuple(EnginePlugin(type="Network", name=name) for name in names)
        logs = tuple(EnginePlugin(type="Log", name=name) for name in log_drivers(journal))
        return (*networks, *_PLUGINS, *logs, *((_OVERLAY,) if has_overlays(self._features) else ()))

    def describe(
        self, data_path_addr: str = "", journal: Path = JOURNAL, local: Collection[str] = ()
    ) -> NodeDescription:
        """Return the description.

        ``data_path_addr`` is the address to which other nodes send VXLAN packets.  Empty for the address from which the
        node connects to the managers.  ``local`` has the addresses of this machine from which it connects to them.
        ``journal`` is the socket of the machine's journal, which may be missing.
        """
        configuration = self._offers.configuration()
        own = {
            NODE_LABEL: "true",
            **self._offer_labels(configuration),
            # A rootless node sees only the routes of its own namespace, so it holds no failover addresses.
            ROUTES_LABEL: routes_label(() if self._features.is_rootless else self._offers.present.routes),
            **_fact_labels(self._machine, self._features),
        }
        if self._machine.boot_id:
            own[BOOT_LABEL] = self._machine.boot_id
        if self._features.is_rootless:
            own[ROOTLESS_LABEL] = rootless_label(self._features.controllers, self._features.ports_from)
        if self._has_probes:
            own[PATHS_LABEL] = "1"
        if port := self._image_port():
            own[IMAGES_LABEL] = str(port)
        if data_path_addr:
            own[DATA_PATH_LABEL] = data_path_addr
        if local:
            own[LOCAL_ADDRESSES_LABEL] = ",".join(sorted(local))
        if configuration.behind_nat:
            own[NAT_LABEL] = configuration.behind_nat
        return NodeDescription(
            hostname=self._machine.hostname,
            platform=Platform(architecture=self._machine.architecture, os="linux"),
            resources=Resources(
                nano_cpus=self._machine.nano_cpus,
                memory_bytes=self._machine.memory_bytes,
                generic_resources=generic_resources(configuration, self._offers.present.cdi_units),
            ),
            engine=EngineDescription(
                engine_version=__version__,
                labels={
                    **labels(self._features),
                    **configuration.labels,
                    **self._further_labels(),
                    **own,
                    **self._conditions.labels(),
                },
                plugins=self._plugins(journal),
            ),
        )

    def describe_all(
        self,
        data_path_addr: str,
        engine: Engine | None,
        cluster_volumes: ClusterVolumes | None,
        local: Collection[str],
    ) -> NodeDescription:
        """Return the complete description: with plugins and cluster volume drivers, and cut to the size that a manager
        accepts.
        """
        description = with_plugins(self.describe(data_path_addr, local=local), engine, cluster_volumes)
        return within_bounds(description, self._conditions)

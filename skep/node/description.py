"""What a node reports of itself to the managers when it registers."""

from collections.abc import Callable, Iterable, Mapping

from skep import __version__
from skep.configuration.configuration import Configuration
from skep.engine.cdi import described
from skep.engine.container import Container
from skep.engine.create import LOG_DRIVERS
from skep.engine.devices import device_paths
from skep.linux.ports import read_listening_ports
from skep.linux.routes import read_routes
from skep.model.node import EngineDescription, EnginePlugin, NodeDescription
from skep.model.planes import DATA_PATH_LABEL, IMAGES_LABEL, NODE_LABEL, PATHS_LABEL
from skep.model.rights import ALLOW_LABEL, CDI_LABEL, DEVICES_LABEL, MORE, is_listed, rights_text
from skep.model.routes import ROUTES_LABEL, MachineRoute, routes_label
from skep.model.service import Platform, Resources
from skep.model.used_ports import PORTS_LABEL, UsedPort, ports_label
from skep.node.conditions import Conditions
from skep.node.features import Features, labels
from skep.node.machine import Machine

_PLUGINS = (
    *(EnginePlugin(type="Network", name=name) for name in ("bridge", "host", "ipvlan", "macvlan", "null")),
    *(EnginePlugin(type="Log", name=name) for name in LOG_DRIVERS),
    EnginePlugin(type="Volume", name="local"),
)
_OVERLAY = EnginePlugin(type="Network", name="overlay")
_LIST_BYTES_MAX = 16_384
"""Of a label with devices."""
_OVERLAY_NEEDS = ("veth", "bridge", "vxlan", "nftables")
"""Without one of these the overlay plugin is not listed, so that tasks on overlay networks are placed elsewhere."""


def port_labels(containers: Iterable[Container], mesh: frozenset[UsedPort]) -> Mapping[str, str]:
    """The label of the ports that no task has: what listens on this machine, and what plain containers publish.

    ``mesh``: ports of the routing mesh, which serves them on every node: each node would report each.
    """
    by_tasks: set[UsedPort] = set(mesh)
    by_others: set[UsedPort] = set()
    for container in containers:
        ports = container.sandbox.ports if container.sandbox is not None else ()
        owner = by_tasks if container.plain is None else by_others
        owner.update((port.protocol, port.published_port) for port in ports)
    label = ports_label(read_listening_ports() - by_tasks | by_others)
    return {PORTS_LABEL: label} if label else {}


def has_overlays(features: Features) -> bool:
    """Whether this machine can have overlay networks."""
    return all(map(features.has, _OVERLAY_NEEDS))


def listed(names: Iterable[str]) -> str:
    """Names for a label, separated by commas, as many as fit."""
    kept: list[str] = []
    left = _LIST_BYTES_MAX
    for name in names:
        left -= len(name.encode()) + 1
        if left < 0:
            return ",".join([*kept, MORE])
        if "," not in name:
            kept.append(name)
    return ",".join(kept)


class NodeDescriber:
    """Makes the description, at any time.

    Args:
        configuration: gives the present one, which may be reloaded.
        further_labels: give those of its parts, such as how this node encrypts overlay networks.
        image_port: gives where it serves its images to other nodes; 0: it does not.
        has_probes: whether it probes other nodes.
    """

    def __init__(
        self,
        machine: Machine,
        features: Features,
        configuration: Callable[[], Configuration],
        conditions: Conditions,
        further_labels: Callable[[], Mapping[str, str]],
        *,
        image_port: Callable[[], int],
        has_probes: bool,
    ) -> None:
        self._machine = machine
        self._features = features
        self._configuration = configuration
        self._conditions = conditions
        self._further_labels = further_labels
        self._image_port = image_port
        self._has_probes = has_probes

    def _offers(self, configuration: Configuration) -> Mapping[str, str]:
        """What of this machine tasks may be given."""
        if configuration.executor != "oci":
            return {}
        return {
            ALLOW_LABEL: rights_text(configuration.allow),
            DEVICES_LABEL: listed(path for path in device_paths() if is_listed(path)),
            CDI_LABEL: listed(sorted(described(configuration.cdi_spec_dirs))),
        }

    def describe(self, data_path_addr: str = "") -> NodeDescription:
        """``data_path_addr``: where VXLAN packets are to be sent; empty: to the address that the node connects from."""
        configuration = self._configuration()
        own = {
            NODE_LABEL: "true",
            **self._offers(configuration),
            ROUTES_LABEL: routes_label(MachineRoute(*one) for one in read_routes()),
        }
        if self._has_probes:
            own[PATHS_LABEL] = "1"
        if port := self._image_port():
            own[IMAGES_LABEL] = str(port)
        if data_path_addr:
            own[DATA_PATH_LABEL] = data_path_addr
        return NodeDescription(
            hostname=self._machine.hostname,
            platform=Platform(architecture=self._machine.architecture, os="linux"),
            resources=Resources(
                nano_cpus=self._machine.nano_cpus,
                memory_bytes=self._machine.memory_bytes,
                generic_resources=configuration.generic_resources,
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
                plugins=(*_PLUGINS, _OVERLAY) if has_overlays(self._features) else _PLUGINS,
            ),
        )

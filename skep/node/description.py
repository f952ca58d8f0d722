"""What a node reports of itself to the managers when it registers."""

from collections.abc import Callable, Mapping

from skep import __version__
from skep.configuration.configuration import Configuration
from skep.engine.create import LOG_DRIVERS
from skep.linux.routes import read_routes
from skep.model.node import EngineDescription, EnginePlugin, NodeDescription
from skep.model.planes import DATA_PATH_LABEL, IMAGES_LABEL, NODE_LABEL, PATHS_LABEL
from skep.model.routes import ROUTES_LABEL, MachineRoute, routes_label
from skep.model.service import Platform, Resources
from skep.node.conditions import Conditions
from skep.node.features import Features, labels
from skep.node.machine import Machine

_PLUGINS = (
    *(EnginePlugin(type="Network", name=name) for name in ("bridge", "host", "null")),
    *(EnginePlugin(type="Log", name=name) for name in LOG_DRIVERS),
    EnginePlugin(type="Volume", name="local"),
)
_OVERLAY = EnginePlugin(type="Network", name="overlay")
_OVERLAY_NEEDS = ("veth", "bridge", "vxlan", "nftables")
"""Without one of these the overlay plugin is not listed, so that tasks on overlay networks are placed elsewhere."""


def has_overlays(features: Features) -> bool:
    """Whether this machine can have overlay networks."""
    return all(map(features.has, _OVERLAY_NEEDS))


class NodeDescriber:
    """Makes the description, at any time.

    Args:
        configuration: gives the present one, which may be reloaded.
        encryption_labels: give how this node encrypts overlay networks, with its public keys.
        image_port: gives where it serves its images to other nodes; 0: it does not.
        has_probes: whether it probes other nodes.
    """

    def __init__(
        self,
        machine: Machine,
        features: Features,
        configuration: Callable[[], Configuration],
        conditions: Conditions,
        encryption_labels: Callable[[], Mapping[str, str]],
        *,
        image_port: Callable[[], int],
        has_probes: bool,
    ) -> None:
        self._machine = machine
        self._features = features
        self._configuration = configuration
        self._conditions = conditions
        self._encryption_labels = encryption_labels
        self._image_port = image_port
        self._has_probes = has_probes

    def describe(self, data_path_addr: str = "") -> NodeDescription:
        """``data_path_addr``: where VXLAN packets are to be sent; empty: to the address that the node connects from."""
        configuration = self._configuration()
        own = {NODE_LABEL: "true", ROUTES_LABEL: routes_label(MachineRoute(*one) for one in read_routes())}
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
                    **self._encryption_labels(),
                    **own,
                    **self._conditions.labels(),
                },
                plugins=(*_PLUGINS, _OVERLAY) if has_overlays(self._features) else _PLUGINS,
            ),
        )

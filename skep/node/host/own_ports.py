"""The ports that this machine's own daemon uses, according to its configuration and its membership."""

from collections.abc import Callable, Mapping
from contextlib import suppress

from skep import bootstrap
from skep.agent.session.session_state import SessionState
from skep.configuration.configuration import Configuration, TcpHost
from skep.errors import SkepError
from skep.model.networks.addresses import parted
from skep.model.networks.reserved_ports import (
    GOSSIP_PORT,
    IMAGES_PORT,
    ReservedPorts,
    default_peer_addr,
    of_data_path,
)
from skep.model.networks.used_ports import RESERVED_LABEL, UsedPort, ports_label
from skep.node.cluster.local import LocalNode, read_local_node


class OwnPorts:
    """The ports that the daemon uses now.

    ``configuration`` returns the present configuration, which may be reloaded.
    """

    def __init__(self, configuration: Callable[[], Configuration], session: SessionState) -> None:
        self._configuration = configuration
        self._session = session

    def present(self) -> ReservedPorts:
        """Return the ports that no container of this machine may publish."""
        configuration, node, peer_addr = self._configuration(), None, ""
        with suppress(SkepError):  # the membership reports why the file cannot be read
            node = read_local_node(configuration.paths.node_json)
        if node is not None and node.is_manager:
            # the manager process reports the error, or this node is just becoming a manager
            with suppress(SkepError):
                peer_addr = bootstrap.load(configuration.paths.manager_config).peer_listen
        return own_ports(configuration, node, self._session.data_path_port, peer_addr)

    def labels(self) -> Mapping[str, str]:
        """Return the engine label that reports the ports."""
        label = ports_label(self.present())
        return {RESERVED_LABEL: label} if label else {}


def own_ports(
    configuration: Configuration, node: LocalNode | None, data_path_port: int = 0, peer_addr: str = ""
) -> ReservedPorts:
    """Return the ports that a node's daemon uses or will use.

    Args:
        node: The node as a member, or None outside of a cluster.
        data_path_port: UDP port of the cluster's overlay networks, or 0 if not known yet.
        peer_addr: Address of a manager's etcd for its peers, or empty if not known yet.
    """
    found: dict[UsedPort, str] = {}
    for host in configuration.api_hosts:
        if isinstance(host, TcpHost):
            found["tcp", host.port] = "the API"
    for address, use in ((configuration.dashboard, "the dashboard"), (configuration.metrics_addr, "metrics")):
        if address is not None:
            found["tcp", address[1]] = use
    if node is None:
        return found
    found["tcp", configuration.image_port or IMAGES_PORT] = "images between nodes"
    found |= of_data_path(data_path_port or configuration.data_path_port, configuration.wireguard_port)
    if node.is_manager and node.listen_addr:
        peer_addr = peer_addr or configuration.peer_addr or default_peer_addr(node.listen_addr)
        found["tcp", int(parted(node.listen_addr)[1])] = "managers"
        found["tcp", int(parted(peer_addr)[1])] = "etcd"
        found["tcp", GOSSIP_PORT] = "docker nodes"
    return found

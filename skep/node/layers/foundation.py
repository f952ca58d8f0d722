"""The lowest layer of a node: its configuration, environment, ports and events, and its connections to managers."""

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial

import structlog

from skep import bootstrap
from skep.agent.images import ClusterSources
from skep.agent.session.last_seen import LastSeenFile
from skep.agent.session.session_state import SessionState
from skep.api.client.client import ApiClient
from skep.api.telemetry.otlp import exporter_to
from skep.configuration.configuration import Configuration, TcpHost
from skep.engine.confinement.cgroups import Cgroups
from skep.errors import SkepError
from skep.linux.processes import boot_id
from skep.model.networks.addresses import parted
from skep.model.networks.reserved_ports import (
    GOSSIP_PORT,
    IMAGES_PORT,
    IMAGES_USE,
    ReservedPorts,
    default_peer_addr,
    of_data_path,
)
from skep.model.networks.used_ports import RESERVED_LABEL, UsedPort, ports_label
from skep.node.cluster.local import LocalNode, read_local_node
from skep.node.docker.docker_engine import docker_engine_at
from skep.node.events import NodeEvents
from skep.node.host.environment import NodeEnvironment

log = structlog.get_logger()


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
    found["tcp", configuration.image_port or IMAGES_PORT] = IMAGES_USE
    found |= of_data_path(data_path_port or configuration.data_path_port, configuration.wireguard_port)
    if node.is_manager and node.listen_addr:
        peer_addr = peer_addr or configuration.peer_addr or default_peer_addr(node.listen_addr)
        found["tcp", int(parted(node.listen_addr)[1])] = "managers"
        found["tcp", int(parted(peer_addr)[1])] = "etcd"
        found["tcp", GOSSIP_PORT] = "docker nodes"
    return found


class Foundation:
    """Parts that every other layer of the node uses."""

    def __init__(self, configuration: Configuration, environment: NodeEnvironment) -> None:
        clock = environment.clock
        self.configuration = configuration
        """The present configuration, which a reload replaces."""
        self.environment = environment
        self.paths = configuration.paths
        self.clock = clock
        self.cgroups = Cgroups(configuration.cgroup_parent)
        self.events = NodeEvents(clock)
        self.session = SessionState(clock, LastSeenFile(self.paths.last_seen, clock.since_boot, boot_id()))
        self.own_ports = OwnPorts(self.present_configuration, self.session)
        self.image_sources = ClusterSources(self.session)
        self.manager_api = ApiClient.local(self.paths.manager_socket, "the manager of this node")
        self.docker = docker_engine_at(configuration.engine_socket)
        self.exporter = exporter_to(
            configuration.trace_endpoint,
            "node",
            environment.machine.hostname,
            clock,
            environment.random.random,
        )

    def present_configuration(self) -> Configuration:
        """Return the configuration, which may have been reloaded."""
        return self.configuration

    async def open_apis(self, stack: AsyncExitStack) -> None:
        """Connect to the manager's API, and to the API of the machine's Docker Engine if there is one."""
        await stack.enter_async_context(self.manager_api)
        if self.docker is not None:
            await stack.enter_async_context(self.docker.api)
            if not await self.docker.read_version():
                log.warning(
                    "the docker engine does not respond yet", socket=str(self.configuration.engine_socket)
                )

    def run(self, run: Callable[..., None]) -> None:
        """Export traces and follow the Docker Engine, if they are configured."""
        if self.exporter is not None:
            run(self.exporter.run, "export of traces")
        if self.docker is not None:
            random = self.environment.random.random
            run(partial(self.docker.follow, self.clock, random), "docker engine")

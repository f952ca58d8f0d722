"""The lowest layer of a node: its configuration and environment, its events, and its connections to managers."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import structlog

from skep.agent.images import ClusterSources
from skep.agent.session.last_seen import LastSeenFile
from skep.agent.session.session_state import SessionState
from skep.api.client.client import ApiClient
from skep.api.telemetry.otlp import exporter_to
from skep.configuration.configuration import Configuration
from skep.engine.confinement.cgroups import Cgroups
from skep.linux.processes import boot_id
from skep.node.docker.docker_engine import docker_engine_at
from skep.node.events import NodeEvents
from skep.node.host.environment import NodeEnvironment
from skep.node.host.own_ports import OwnPorts

log = structlog.get_logger()


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

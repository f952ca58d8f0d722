"""An engine with the node's real address pools and ports, and stubs for the kernel, net process and managers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Network, IPv6Network
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.formats.networks import IPAMBody, NetworkBody, SubnetBody
from skep.dataplane.container_network import ContainerNetwork
from skep.dataplane.endpoint_allocation import EndpointAllocation
from skep.dataplane.gateway import Gateway
from skep.dataplane.local.endpoints import LocalEndpoints
from skep.dataplane.local.networks import LocalNetworks
from skep.engine.containers.container import Container, PlainOptions
from skep.errors import AlreadyExists, NotFound
from skep.model.networks.sandbox import (
    Endpoint,
    EndpointConfig,
    EndpointRequest,
    NetworkMode,
    PublishedPort,
    Sandbox,
)
from skep.model.networks.tables import NetworkHead, Segment
from skep.model.service import PublishMode
from skep.model.values.ids import ContainerId, NetworkId, TaskId, new_container_id
from tests.support.engine.oci_rig import Machine, memory_engine, new_container
from tests.support.engine.stub_engine import Steps
from tests.support.managers.wire_rig import until

PORT = ("tcp", 8080, "")
OVERLAY = NetworkHead(id=NetworkId("over"), name="over", segments=(Segment("10.0.9.0/24", "10.0.9.1", 4097),))


async def nothing(*_: object) -> None:
    """Do nothing, successfully."""


class NetPorts:
    """Stub of the net process, which outlives the node process.  ``fails``: errors of the next releases."""

    def __init__(self) -> None:
        self.steps = Steps()
        self.keys: set[tuple[str, int, str]] = set()
        self.fails: list[Exception] = []

    async def reserve(
        self, protocol: str, port: int, address: str = "", target: tuple[str, int] | None = None
    ) -> int:
        if (protocol, port, address) in self.keys:
            raise AlreadyExists(f"Bind for {address}:{port} failed: port is already allocated")
        self.keys.add((protocol, port, address))
        await self.steps.begin("answer reservation")
        return port

    async def release(self, protocol: str, port: int, address: str = "") -> None:
        if self.fails:
            raise self.fails.pop()
        await self.steps.begin("release")
        self.keys.discard((protocol, port, address))

    async def list_held(self) -> Iterable[tuple[str, int, str]]:
        await self.steps.begin("list")
        return tuple(self.keys)


class Cluster:
    """Provides endpoints of the network ``over``."""

    def __init__(self) -> None:
        self._numbers = count(2)
        self.held: dict[TaskId, ContainerId] = {}

    def restore(self, held: Iterable[tuple[TaskId, ContainerId]]) -> None:
        self.held.update(held)

    async def take(self, container_id: ContainerId, request: EndpointRequest) -> EndpointConfig:
        if request.network != OVERLAY.name:
            raise NotFound(f"network {request.network} not found")
        number = next(self._numbers)
        self.held[TaskId(f"t{number}")] = container_id
        return EndpointConfig(
            head=OVERLAY, addresses=(f"10.0.9.{number}/24",), attachment=TaskId(f"t{number}")
        )

    async def give_back(self, id: TaskId) -> None:
        self.held.pop(id, None)


class Wires:
    """Stub of ``Overlays``.  ``during``: called once, in the middle of the next change."""

    def __init__(self) -> None:
        self._numbers = count()
        self.ports: dict[tuple[str, ContainerId], Endpoint] = {}
        self.during: Callable[[], Awaitable[object]] | None = None
        self.restore, self.begin = lambda _: None, nothing

    async def _change(self) -> None:
        during, self.during = self.during, None
        await asyncio.sleep(0)
        if during is not None:
            await during()

    async def connect(
        self, id: ContainerId, netns: Path, configs: Sequence[EndpointConfig], *, first: str = "eth0"
    ) -> tuple[Endpoint, ...]:
        made = tuple(
            Endpoint(config=config, interface=f"eth{number}", port=f"vs{next(self._numbers)}", mac_address="")
            for number, config in enumerate(configs, int(first.removeprefix("eth")))
        )
        self.ports.update(((one.network_id, id), one) for one in made)
        try:
            await self._change()
        except BaseException:
            self.disconnect(id, made)
            raise
        return made

    async def settle_container(self, id: ContainerId, sandbox: Sandbox) -> None:
        await asyncio.sleep(0)

    async def change(self, id: ContainerId, gone: Iterable[Endpoint], sandbox: Sandbox) -> None:
        for one in gone:
            self.ports.pop((one.network_id, id), None)
        await self._change()

    def disconnect(self, id: ContainerId, endpoints: Sequence[Endpoint]) -> None:
        for one in endpoints:
            self.ports.pop((one.network_id, id), None)

    def holders(self) -> Iterable[ContainerId]:
        return {id for _, id in self.ports}

    async def sweep(self) -> None:
        """Do nothing, because no namespace is pinned."""

    def endpoints_of(self, id: ContainerId) -> tuple[Endpoint, ...]:
        return tuple(one for (_, owner), one in self.ports.items() if owner == id)


class Home:
    """Stub of the node's own namespace."""

    def __init__(self) -> None:
        self.steps = Steps()

    def set_part(self, *_: object) -> None:
        """Do nothing, without rules."""

    def expect_removal(self, _: str) -> None:
        """Do nothing, without links."""

    async def apply(self) -> None:
        await self.steps.begin("apply")

    async def remove(self, _: str) -> None:
        await self.steps.begin("remove")


class MemoryGateway(Gateway):
    """A gateway without the kernel."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.steps = Steps()

    async def cut(self, container_id: ContainerId, sandbox: Sandbox) -> None:
        """Disconnect the container, whose link does not exist."""
        await self.disconnect(container_id)

    async def _choose_subnets(self) -> tuple[IPv4Network, IPv6Network | None]:
        await self.steps.begin("choose")
        return IPv4Network("172.18.0.0/16"), None


class LabNetwork(ContainerNetwork):
    """The container network of a ``Lab``.  ``has_all``: whether the namespace of each container exists."""

    has_all = False

    def is_present(self, sandbox: Sandbox) -> bool:
        return self.has_all


class Lab:
    """One node process.  ``machine`` and ``ports`` outlive it."""

    def __init__(self, directory: Path, machine: Machine, ports: NetPorts) -> None:
        self.machine, self.ports, self.cluster, self.wires = machine, ports, Cluster(), Wires()
        self.home = Home()
        spaces: Any = SimpleNamespace(
            home=Path("/none"),
            path=lambda name: Path("/none", name),
            create=self._netns,
            destroy=nothing,
            pinned=list,
        )
        self.spaces = spaces
        deferred: Any = SimpleNamespace(soon=lambda *_: None)
        self.gateway = MemoryGateway(
            namespaces=spaces, home=self.home, deferred=deferred, ports=ports, state=directory / "gateway"
        )
        self.local = LocalNetworks(
            directory / "local", self.gateway, clock=SystemClock(), new_id=new_container_id
        )
        self.endpoints = LocalEndpoints(self.local, directory / "tables", None)
        overlays: Any = self.wires
        replies: Any = SimpleNamespace(remove=lambda _: None)
        self.network = LabNetwork(
            namespaces=spaces,
            gateway=self.gateway,
            overlays=overlays,
            allocation=EndpointAllocation(self.endpoints, self.cluster),
            reply_routing=replies,
            naming=None,
            show_condition=lambda _: None,
        )
        # A quick clock's sweeps would hide leftovers.
        self.engine = memory_engine(directory, machine, self.network, clock=SystemClock())

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Lab"]:
        async with self.engine.running():
            if not self.local.bridges():
                for name, subnet in (("front", "10.5.0.0/24"), ("back", "10.6.0.0/24")):
                    body = NetworkBody(
                        name=name,
                        driver="bridge",
                        internal=name == "back",
                        ipam=IPAMBody(config=(SubnetBody(subnet=subnet),)),
                    )
                    await self.local.add(body, (), ())
            yield self

    async def run(self, name: str) -> ContainerId:
        """Run a container on the bridge that publishes port 8080."""
        id = await self.create(name)
        await self.engine.start(id)
        return id

    async def create(self, name: str, *, publishes: bool = True) -> ContainerId:
        """Create such a container without starting it."""
        port = PublishedPort(
            protocol="tcp", target_port=80, published_port=8080, publish_mode=PublishMode.HOST
        )
        new = replace(new_container(name), plain=PlainOptions(mode=NetworkMode.BRIDGE))
        made = await self.engine.add(replace(new, config=replace(new.config, ports=(port,) * publishes)))
        return made.id

    async def connect(self, id: ContainerId, network: str, address: str = "") -> None:
        await self.engine.networks.connect(id, EndpointRequest(network=network, address=address))

    async def end(self, id: ContainerId) -> None:
        """End its process, and return when that is recorded and its networks are free for others."""
        self.machine.end(id)
        await self.engine.wait(id)
        await until(lambda: not self.engine.lifecycle.locks.is_held(id))

    def held(self) -> Mapping[str, object]:
        """Return what the parts of the data plane hold, with the owners, sorted."""
        pools = [pool for pools in self.endpoints.pools.values() for pool in pools]
        return {
            "addresses": sorted((str(one), owner) for pool in pools for one, owner in pool.used.items()),
            "gateway": sorted(self.gateway.users()),
            "ports": sorted(self.ports.keys),
            "cluster": sorted(self.cluster.held.items()),
            "wires": sorted((network, id, one.port) for (network, id), one in self.wires.ports.items()),
        }

    def recorded(self) -> Mapping[str, object]:
        """Return the same according to the records of the running containers."""
        runs: list[tuple[Container, Sandbox]] = [
            (one, one.sandbox) for one in self.engine.list() if one.is_running and one.sandbox is not None
        ]
        endpoints = [(one.id, endpoint) for one, sandbox in runs for endpoint in sandbox.endpoints]
        return {
            "addresses": sorted(
                (endpoint.address, id) for id, endpoint in endpoints if not endpoint.config.attachment
            ),
            "gateway": sorted(one.id for one, sandbox in runs if sandbox.address),
            "ports": sorted(
                (port.protocol, port.published_port, port.host_ip) for _, one in runs for port in one.ports
            ),
            "cluster": sorted(
                (endpoint.config.attachment, id) for id, endpoint in endpoints if endpoint.config.attachment
            ),
            "wires": sorted((endpoint.network_id, id, endpoint.port) for id, endpoint in endpoints),
        }

    async def _netns(self, id: str, sysctls: Mapping[str, str], *_: object) -> Path:
        return Path("/none", id)

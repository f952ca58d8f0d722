"""A host-mode port is in force only while the node holds its socket, also after a crash of the net process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from skep.aio.clock import SystemClock
from skep.dataplane.container_network import ContainerNetwork
from skep.dataplane.endpoint_allocation import EndpointAllocation
from skep.dataplane.local.endpoints import LocalEndpoints
from skep.dataplane.local.networks import LocalNetworks
from skep.dataplane.netns.nft_table import NftTable
from skep.errors import AlreadyExists
from skep.model.networks.sandbox import Endpoint, EndpointConfig, PublishedPort, Sandbox, SandboxConfig
from skep.model.service import PublishMode
from skep.model.values.ids import ContainerId, TaskId, new_container_id
from tests.support.engine.container_networks import OVERLAY, Cluster, MemoryGateway, NetPorts, Wires, nothing

ONE = ContainerId("c" * 64)
WEB = PublishedPort(protocol="tcp", published_port=8080, target_port=80, publish_mode=PublishMode.HOST)
SANDBOX = Sandbox(
    netns="/none", address="172.18.0.5", prefix_length=16, gateway="172.18.0.1", mac_address="02:42:ac:12:00:05",
    network="skep-gw", interface="eth1", port="g1", ports=(WEB,),
)  # fmt: skip


class PortsBesideAProgram(NetPorts):
    """``programs``: what another program of the machine has."""

    def __init__(self) -> None:
        super().__init__()
        self.programs: set[tuple[str, int, str]] = set()

    async def reserve(
        self, protocol: str, port: int, address: str = "", target: tuple[str, int] | None = None
    ) -> int:
        if (protocol, port, address) in self.programs:
            raise AlreadyExists("Bind for 0.0.0.0:8080 failed: port is already allocated")
        return await super().reserve(protocol, port, address, target)


class Home:
    """Shows which host ports the rules lead to containers."""

    def __init__(self) -> None:
        self.led: set[str] = set()

    def set_part(self, _part: str, _state: object, *tables: NftTable) -> None:
        self.led = {text for table in tables for name, text in table.elements if name == "host_ports"}

    apply = staticmethod(nothing)


def a_gateway(directory: Path, ports: NetPorts) -> tuple[MemoryGateway, Home]:
    home, spaces = Home(), SimpleNamespace(home=Path("/none"))
    made: dict[str, Any] = {"namespaces": spaces, "home": home, "deferred": None}
    return MemoryGateway(ports=ports, state=directory / "gateway", **made), home


async def test_a_port_that_a_program_took_while_nothing_held_it_is_not_led_to_the_container(
    tmp_path: Path,
) -> None:
    ports = PortsBesideAProgram()
    ports.programs.add(("tcp", 8080, ""))
    gateway, home = a_gateway(tmp_path, ports)
    await gateway.restore({ONE: SANDBOX})
    assert home.led == set()
    await gateway.sweep()
    assert home.led == set()
    ports.programs.clear()
    await gateway.sweep()
    assert (len(home.led), ports.keys) == (1, {("tcp", 8080, "")})


async def test_a_port_that_the_net_process_lost_is_held_again_or_no_longer_led(tmp_path: Path) -> None:
    ports = PortsBesideAProgram()
    gateway, home = a_gateway(tmp_path, ports)
    await gateway.restore({ONE: SANDBOX})
    assert len(home.led) == 1
    ports.keys.clear()
    await gateway.sweep()
    assert (len(home.led), ports.keys) == (1, {("tcp", 8080, "")})
    ports.keys.clear()
    ports.programs.add(("tcp", 8080, ""))
    await gateway.sweep()
    assert home.led == set()


async def test_a_container_whose_networks_are_unknown_keeps_its_ports_and_its_address(tmp_path: Path) -> None:
    """Its record has an invalid address on an overlay.  It runs, so nothing of it belongs to others."""
    ports, cluster = NetPorts(), Cluster()
    ports.keys.add(("tcp", 8080, ""))
    gateway, home = a_gateway(tmp_path, ports)
    config = EndpointConfig(head=OVERLAY, addresses=("10.0.9.300/24",), attachment=TaskId("t1"))
    endpoint = Endpoint(config=config, interface="eth0", port="vs0", mac_address="02:00:00:00:00:02")
    sandbox = msgspec.structs.replace(SANDBOX, address="172.18.0.2", endpoints=(endpoint,))
    networks = LocalNetworks(tmp_path / "local", None, clock=SystemClock(), new_id=new_container_id)
    replies: Any = SimpleNamespace()
    overlays: Any = Wires()
    spaces: Any = SimpleNamespace(pinned=list)
    network = ContainerNetwork(
        namespaces=spaces,
        gateway=gateway,
        overlays=overlays,
        allocation=EndpointAllocation(LocalEndpoints(networks, tmp_path / "tables", None), cluster),
        reply_routing=replies,
        naming=None,
        show_condition=lambda _: None,
    )
    await network.restore([(SandboxConfig(id=ONE, name="one"), sandbox)])
    assert (len(home.led), ports.keys) == (1, {("tcp", 8080, "")})
    assert cluster.held == {TaskId("t1"): ONE}
    next_one = await gateway.connect(ContainerId("d" * 64), Path("/none"), "eth0", ())
    assert next_one.address == "172.18.0.3"

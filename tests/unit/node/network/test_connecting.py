"""What a node does for the containers of an earlier process, with stand-ins for the parts that touch the kernel."""

from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from msgspec.structs import replace

from skep.model.ids import ContainerId
from skep.node.network.connecting import ContainerNetwork
from skep.node.network.nft import NftFailed
from skep.node.oci.container import ConnectedPlace, Container, Endpoint, Place
from tests.unit.node.network.overlay.test_wanted import HEAD
from tests.unit.node.oci.test_records import a_container


async def nothing(*_: Any) -> None:
    """Succeeds."""


class Mesh:
    """Of a node on which the first container has made its namespace unusable."""

    def __init__(self) -> None:
        self.joined_by: list[str] = []

    async def joined(self, id: ContainerId, netns: Path, *_: Any, **__: Any) -> None:
        if netns == Path("/netns/0"):
            raise NftFailed("Operation not permitted")
        self.joined_by.append(id)


class Naming:
    """Notes for whom names are served again."""

    def __init__(self) -> None:
        self.served: list[str] = []

    async def restore(self, live: Collection[Container]) -> None:
        self.served = [one.id for one in live]


def on_the_ingress_network(number: int) -> Container:
    place = Place(head=replace(HEAD, is_ingress=True), addresses=(f"10.0.0.{number + 2}/24",))
    connected = ConnectedPlace(
        place=place, interface="eth0", port=f"vs{number}", mac_address="02:00:00:00:00:02"
    )
    endpoint = Endpoint(netns=f"/netns/{number}", places=(connected,))
    return replace(a_container(name=f"c{number}", endpoint=endpoint), id=ContainerId(f"{number}" * 64))


async def test_a_container_that_made_its_namespace_unusable_keeps_no_other_from_its_network() -> None:
    mesh, naming = Mesh(), Naming()
    part = SimpleNamespace(
        path=Path("/home"), restore=nothing, begin=nothing, watch=nothing, repairs=None, pinned=list
    )
    parts: dict[str, Any] = dict.fromkeys(
        ("namespaces", "home", "gateway", "local", "healing", "settling", "prober", "joining"), part
    )
    overlays = SimpleNamespace(restore=lambda _: None, begin=nothing)
    network = ContainerNetwork(**parts, overlays=overlays, mesh=mesh, naming=naming)  # type: ignore[arg-type]
    live = [on_the_ingress_network(number) for number in (0, 1)]
    await network.restore(live)
    assert mesh.joined_by == [live[1].id]
    assert naming.served == [one.id for one in live]

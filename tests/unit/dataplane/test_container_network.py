"""What a node does for the containers of an earlier process, with stand-ins for the parts that touch the kernel."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from skep.dataplane.container_network import ContainerNetwork
from skep.dataplane.dataplane import DataPlane, Host, NetProcess
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.kernel.nft import NftFailed
from skep.dataplane.netns.write import KernelRefused
from skep.dataplane.overlays import Overlays
from skep.dataplane.wireguard.tunnels import NO_ENCRYPTION
from skep.model.networks.sandbox import Endpoint, EndpointConfig, Sandbox, SandboxConfig
from skep.model.values.ids import ContainerId
from skep.paths import Paths
from tests.support.engine.oci_rig import QuickClock
from tests.support.engine.runc_lab import no_cluster
from tests.support.networks.reservations import OwnReservations
from tests.unit.dataplane.plan.test_overlay import HEAD


async def nothing(*_: Any) -> None:
    """Succeeds."""


class ReplyRouting:
    """Of a node on which the first container has made its namespace unusable."""

    def __init__(self) -> None:
        self.routed: list[str] = []

    async def add(self, id: ContainerId, *_: Any) -> None:
        if id.startswith("0"):
            raise NftFailed("Operation not permitted")
        self.routed.append(id)

    def remove(self, id: ContainerId) -> None:
        pass


class NameRegistration:
    """Records the containers whose names are served again."""

    def __init__(self) -> None:
        self.served: list[str] = []

    async def restore(self, live: Sequence[tuple[SandboxConfig, Sandbox]]) -> None:
        self.served = [config.id for config, _ in live]


def on_the_ingress_network(number: int) -> tuple[SandboxConfig, Sandbox]:
    place = EndpointConfig(head=replace(HEAD, is_ingress=True), addresses=(f"10.0.0.{number + 2}/24",))
    connected = Endpoint(config=place, interface="eth0", port=f"vs{number}", mac_address="02:00:00:00:00:02")
    sandbox = Sandbox(netns=f"/netns/{number}", endpoints=(connected,))
    return SandboxConfig(id=ContainerId(f"{number}" * 64), name=f"c{number}"), sandbox


PARTS = ("namespaces", "gateway", "allocation")


def network_of(parts: dict[str, Any], show_condition: Any = lambda _: None, **more: Any) -> ContainerNetwork:
    return ContainerNetwork(**parts, **more, show_condition=show_condition)


async def test_a_part_that_fails_is_started_again_and_ends_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: Counter[str] = Counter()
    bugs = {name: [KeyError("bug"), OSError(24, "no descriptor")] for name in ("_healer", "mesh")}

    def part(name: str) -> Any:
        async def run(*_: object) -> None:
            begun[name] += 1
            if bugs.get(name):
                raise bugs[name].pop()
            await asyncio.Event().wait()

        return SimpleNamespace(run=run, restore=nothing)

    paths = Paths(tmp_path / "data", tmp_path / "run")
    namespaces = Namespaces(paths.netns)
    ports = OwnReservations(namespaces)
    host = Host(paths=paths, namespaces=namespaces, clock=QuickClock(), rng=lambda: 0.5)
    plane = DataPlane(host, NetProcess(ports, ports), no_cluster(), NO_ENCRYPTION)
    for name in ("_healer", "_deferred", "mesh", "prober", "tunnels"):
        monkeypatch.setattr(plane, name, part(name))
    async with asyncio.timeout(30), plane.running():
        while begun != {"_healer": 3, "mesh": 3, "_deferred": 1, "prober": 1, "tunnels": 1}:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("odd", ["10.0.0.2", "10.0.0.300/24", "", "fd00::/129"])
async def test_a_container_with_odd_addresses_is_left_alone_and_the_others_are_restored(odd: str) -> None:
    replies, naming, said, destroyed = ReplyRouting(), NameRegistration(), list[str](), list[str]()
    (bad, sandbox), (good, sound) = on_the_ingress_network(1), on_the_ingress_network(2)
    (endpoint,) = sandbox.endpoints
    endpoints = (replace(endpoint, config=replace(endpoint.config, addresses=(odd, "nothing"))),)
    sandbox = replace(sandbox, endpoints=endpoints)

    async def destroy(id: str) -> None:
        destroyed.append(id)
        raise OSError(5, "Input/output error")

    part = SimpleNamespace(
        restore=nothing,
        pinned=lambda: [bad.id, good.id, "gone", "stray"],
        destroy=destroy,
        leave=nothing,
        disconnect=nothing,
    )
    began: list[str] = []

    async def begin(live: dict[ContainerId, Sandbox]) -> None:
        began.extend(live)

    overlays = SimpleNamespace(
        restore=lambda _: None,
        begin=begin,
        disconnect=lambda *_: None,
        reconciler_of=lambda _: None,
        endpoints_of=lambda _: (),
    )
    parts = dict.fromkeys(PARTS, part)
    network = network_of(
        parts, overlays=overlays, reply_routing=replies, naming=naming, show_condition=said.append
    )
    for _ in range(2):
        await network.restore([(bad, sandbox), (good, sound)])
    assert began == [good.id] * 2
    assert naming.served == [good.id]
    assert destroyed == ["gone", "stray"] * 2
    assert len(said) == 1
    assert bad.id[:12] in said[0]
    await network.detach(bad.id, sandbox)
    assert said[-1] == ""


async def test_a_container_that_made_its_namespace_unusable_keeps_no_other_from_its_network() -> None:
    replies, naming = ReplyRouting(), NameRegistration()
    part = SimpleNamespace(restore=nothing, pinned=list)
    parts: dict[str, Any] = dict.fromkeys(PARTS, part)
    overlays = SimpleNamespace(restore=lambda _: None, begin=nothing, reconciler_of=lambda _: None)
    network = network_of(parts, overlays=overlays, reply_routing=replies, naming=naming)
    live = [on_the_ingress_network(number) for number in (0, 1)]
    await network.restore(live)
    assert replies.routed == [live[1][0].id]
    assert naming.served == [config.id for config, _ in live]


async def test_a_container_that_could_not_leave_a_network_keeps_the_others(tmp_path: Path) -> None:
    """The kernel refuses the removal of a network.  The container runs, and its other networks are maintained."""

    async def refuse() -> None:
        raise KernelRefused("the device is busy")

    home: Any = SimpleNamespace(has_part=lambda _: True, remove_part=lambda _: None, apply=refuse)
    watched: list[object] = []

    async def watch(one: object) -> None:
        watched.append(one)

    healer: Any = SimpleNamespace(repairs=None, watch=watch, expect=lambda _: None, forget=watched.remove)
    nobody: Any = SimpleNamespace()
    overlays = Overlays(
        namespaces=Namespaces(tmp_path),
        pins=Namespaces(tmp_path),
        home=home,
        healer=healer,
        deferred=nobody,
        tunnels=nobody,
        measurements=nobody,
    )
    config, sandbox = on_the_ingress_network(1)
    overlays.restore({config.id: sandbox})
    await overlays.begin({config.id: sandbox})
    left = replace(sandbox, endpoints=())
    with pytest.raises(KernelRefused, match="busy"):
        await overlays.change(config.id, sandbox.endpoints, left)
    assert overlays.reconciler_of(config.id) in watched

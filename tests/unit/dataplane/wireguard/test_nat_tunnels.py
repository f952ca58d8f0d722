"""The tunnels of one node through NAT, without a device."""

from pathlib import Path

import pytest

from skep.aio.clock import SystemClock
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.observation import Scope
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.netns.state import Link
from skep.dataplane.plan import nat
from skep.dataplane.underlays import find, prefix_lengths
from skep.dataplane.wireguard.methods import EncryptionRefusal
from skep.dataplane.wireguard.nat_tunnels import TunnelsThroughNat
from skep.dataplane.wireguard.tunnels import Options
from skep.linux.network.route_lookup import source_address
from skep.model.networks.data_planes import TUNNEL_LABEL
from skep.model.networks.paths import NatPeer, NatTunnels, PathPeer, ProbeTargets
from skep.model.networks.wireguard import EncryptionMethod
from skep.model.node import EngineDescription, NodeDescription
from skep.model.node_reports.conditions import ConditionName, condition_label, network_conditions
from skep.model.values.ids import NodeId
from skep.paths import Paths

TARGETS = ProbeTargets(node=PathPeer(node_id=NodeId("n1"), hostname="n1", data_path="192.0.2.1"))


def tunnels(tmp_path: Path, method: EncryptionMethod | EncryptionRefusal) -> TunnelsThroughNat:
    paths = Paths(tmp_path / "data", tmp_path / "run")
    paths.run.mkdir(exist_ok=True)
    paths.nat_key.parent.mkdir(exist_ok=True, parents=True)
    options = Options(method=method, since_boot=lambda: 1.0)
    return TunnelsThroughNat(
        paths, Namespaces(paths.netns), options, Repairs(), SystemClock(), lambda: 0.5, dict
    )


def test_the_key_stays_over_processes_until_the_node_leaves_its_cluster(tmp_path: Path) -> None:
    """Else it would be the key of two nodes, of which managers accept the first."""
    first = tunnels(tmp_path, EncryptionMethod.USER_SPACE)
    key = first.labels()[TUNNEL_LABEL]
    first.set_targets(TARGETS)
    assert first.labels()[TUNNEL_LABEL] == key
    second = tunnels(tmp_path, EncryptionMethod.USER_SPACE)
    assert second.labels()[TUNNEL_LABEL] == key
    second.set_targets(None)
    assert second.labels()[TUNNEL_LABEL] != key


def test_a_node_without_wireguard_publishes_no_key(tmp_path: Path) -> None:
    assert tunnels(tmp_path, EncryptionRefusal("no WireGuard")).labels() == {}


@pytest.mark.needs("root")
@pytest.mark.parametrize("address", ["10.0.0.5", "203.0.113.9"], ids=["own", "translated"])
async def test_the_state_is_applied_whether_or_not_the_machine_has_its_address(
    tmp_path: Path, address: str
) -> None:
    """Routes need a source address that the machine has."""
    pins = Namespaces(tmp_path / "netns")
    await pins.create("machine", {})
    home = pins.path("machine")
    try:
        async with pins.netlink(home) as route:
            for name, addresses in (("eth0", ("10.0.0.5",)), ("wg3", ())):
                await route.link("add", ifname=name, kind="bridge")
                (index,) = await route.link_lookup(ifname=name)
                await route.link("set", index=index, state="up")
                for one in addresses:
                    await route.addr("add", index=index, address=one, prefixlen=24)
        peer = NatPeer(node_id=NodeId("v"), key=b"k" * 32, port=4802, endpoint="", addresses=("244.6.81.11",))
        found = nat.sound(NatTunnels(address=address, peers=(peer,)))
        assert found is not None
        scope = Scope(has_own_routes=False, is_exclusive=True)
        reconciler = NetnsReconciler("test", home, pins, Repairs(), scope)
        for _ in range(2):  # the address that the device has does not count as the machine's
            underlays = await pins.run(home, find, {address}, "wg3")
            assert (address in underlays) is (address == "10.0.0.5")
            state = nat.tunnel_state(
                found, Link(name="wg3", kind="bridge", mtu=1340), has_address=address in underlays
            )
            reconciler.set_part("nat", state, nat.tunnel_filter(found, "wg3", (("udp", 4789),)))
            await reconciler.apply()
            assert await pins.run(home, source_address, "244.6.81.11") == address
        assert (await pins.run(home, prefix_lengths))["10.0.0.5"] == 24
    finally:
        await pins.destroy("machine")


def test_what_tunnels_lack_is_shown_by_the_doctor() -> None:
    labels = {condition_label(ConditionName.NAT_TUNNELS): "they leave out 7 nodes"}
    description = NodeDescription(hostname="n1", engine=EngineDescription(labels=labels))
    assert network_conditions(description) == ("they leave out 7 nodes",)

"""The tunnels of one node through NAT, without a device."""

from pathlib import Path

from skep.aio.clock import SystemClock
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.wireguard.methods import EncryptionRefusal
from skep.dataplane.wireguard.nat_tunnels import TunnelsThroughNat
from skep.dataplane.wireguard.tunnels import Options
from skep.model.networks.data_planes import TUNNEL_LABEL
from skep.model.networks.paths import PathPeer, ProbeTargets
from skep.model.networks.wireguard import EncryptionMethod
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

"""Failover addresses in a simulated cluster: moved in time, and the rule finds an address on two machines."""

import pytest

from sim.cluster import SimulatedCluster
from skep.manager.failover import decision
from skep.manager.failover.editing import add_address
from skep.model.networks.failover import AddressRequest
from skep.model.values.ids import NodeId
from tests.support.builders import a_service_spec

ADDRESS = "192.168.7.100"
MOVED_S_MAX = 3.0


def with_an_address(cluster: SimulatedCluster) -> NodeId:
    """Let a node hold an address, and return the node."""
    cluster.hold_addresses()
    cluster.create(a_service_spec("web", is_global=True))
    cluster.run_until(lambda: cluster.running("web") == len(cluster.workers), within_s=20)
    cluster.write(lambda tx: add_address(tx, AddressRequest(address=f"{ADDRESS}/24")))
    cluster.run_until(lambda: bool(holders(cluster)), within_s=5)
    (holder,) = holders(cluster)
    return holder


def holders(cluster: SimulatedCluster) -> list[NodeId]:
    return list(cluster.addresses.holders(ADDRESS))


@pytest.mark.parametrize("seed", range(3))
def test_an_address_moves_within_three_seconds(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=seed, skew=True) as cluster:
        holder = with_an_address(cluster)
        cluster.links.cut([holder], cluster.managers)
        cluster.run_until(lambda: bool({*holders(cluster)} - {holder}), within_s=MOVED_S_MAX)
        cluster.links.restore()
        cluster.run_for(10.0)
        assert holder not in holders(cluster)
        assert cluster.observer.violations == []


def test_two_holders_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a lease that ends before kernels drop addresses."""
    monkeypatch.setattr(decision, "LEASE_S", 0.7)
    with SimulatedCluster(managers=1, workers=3) as cluster:
        holder = with_an_address(cluster)
        cluster.links.cut([holder], cluster.managers)
        cluster.run_for(2.0)
        assert any(f"has {ADDRESS} while {holder} has it" in one for one in cluster.observer.violations)

"""What the dry run accepts is tried at the end of a simulated life, also if no service there is steady."""

from random import Random

from sim.cluster import SimulatedCluster
from sim.faults.trial import PLACED_S, try_an_update
from sim.users.users import Users
from sim.world.storage import SimulatedStorage
from skep.model.service import Service


def test_a_service_is_created_where_none_can_be_updated() -> None:
    with SimulatedCluster(managers=3, workers=3, seed=4, storage=SimulatedStorage()) as cluster:
        cluster.run_for(5.0)
        began = cluster.loop.time()
        try_an_update(cluster, Users(cluster, Random(4)), Random(4))
        assert cluster.loop.time() - began >= PLACED_S
        assert len(cluster.view.find(Service)) == 1
        assert cluster.observer.violations == []

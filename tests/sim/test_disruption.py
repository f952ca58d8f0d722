"""Most nodes go down at once: nothing is replaced, in a new cluster and by a new leader as well."""

from functools import partial

import pytest

from sim.cluster import SimulatedCluster
from sim.world.committed import Change
from skep.errors import FailedPrecondition
from skep.manager.control.nodes import remove_node
from skep.model.node import Node, NodeState
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId
from skep.store.interface import View
from tests.support.builders import a_service_spec

WORKERS, REPLICAS = 6, 18


def down(cluster: SimulatedCluster) -> list[NodeId]:
    return [node.id for node in cluster.view.find(Node) if node.status.state is NodeState.DOWN]


def is_frozen(cluster: SimulatedCluster) -> bool:
    return any(swarm.freeze is not None for swarm in cluster.view.find(Swarm))


def cut_five(cluster: SimulatedCluster) -> None:
    cluster.links.cut(list(cluster.managers), list(cluster.workers)[:5])


def start(cluster: SimulatedCluster, *, age_s: float) -> int:
    """Run a service until the cluster has this age; gives how many tasks it has made."""
    cluster.create(a_service_spec("web", replicas=REPLICAS))
    cluster.run_until(lambda: cluster.running("web") == REPLICAS, within_s=age_s)
    cluster.run_for(age_s - cluster.loop.time())
    return cluster.created("web")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("age_s", [15.0, 30.0, 100.0])
def test_five_of_six_workers_that_are_cut_off_keep_their_tasks(seed: int, age_s: float) -> None:
    with SimulatedCluster(managers=3, workers=WORKERS, seed=seed) as cluster:
        created = start(cluster, age_s=age_s)
        cut_five(cluster)
        cluster.run_until(lambda: len(down(cluster)) == 5, within_s=60)
        cluster.run_for(30)
        assert is_frozen(cluster)
        assert cluster.created("web") == created
        for id in down(cluster):  # also the one that was marked down after the freeze had begun
            with pytest.raises(FailedPrecondition, match="or use --force"):
                cluster.write(partial(remove_node, id=id, force=False, now_ns=0))
        cluster.links.restore()
        cluster.run_until(lambda: not is_frozen(cluster) and not down(cluster), within_s=120)
        cluster.run_for(30)
        assert cluster.created("web") == created, "no task moved"


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("fallen", [2, 3, 4, 5])
def test_a_leader_that_dies_amid_the_disruption_leaves_it_to_the_next(seed: int, fallen: int) -> None:
    """It dies at the commit that marks that many down: noticed perhaps, and not written."""
    with SimulatedCluster(managers=3, workers=WORKERS, seed=seed) as cluster:
        created = start(cluster, age_s=100.0)
        killed = list[NodeId]()

        def kill_leader(change: Change, view: View) -> None:
            if not killed and len(down(cluster)) >= fallen:
                assert not is_frozen(cluster)
                killed.append(cluster.leader)
                cluster.kill_manager(cluster.leader)

        cluster.committed.watchers.append(kill_leader)
        cut_five(cluster)
        cluster.run_until(lambda: bool(killed), within_s=60)
        cluster.run_until(lambda: len(down(cluster)) == 5, within_s=60)
        cluster.run_for(30)
        assert cluster.created("web") == created
        assert is_frozen(cluster)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_freeze_is_written_right_after_the_commit_that_completes_the_disruption(seed: int) -> None:
    """Until then only the leader knows it, and a user may remove nodes that are cut off without force."""
    with SimulatedCluster(managers=3, workers=WORKERS, seed=seed) as cluster:
        start(cluster, age_s=100.0)
        at: dict[bool, float] = {}

        def note(change: Change, view: View) -> None:
            if 2 * len(down(cluster)) > len(view.find(Node)):
                at.setdefault(is_frozen(cluster), change.time_s)

        cluster.committed.watchers.append(note)
        cut_five(cluster)
        cluster.run_until(lambda: is_frozen(cluster), within_s=60)
        assert at[True] - at[False] < 0.05  # two writes, and no pause


@pytest.mark.parametrize("seed", [1, 2])
def test_a_leader_that_dies_after_the_failure_of_one_node_is_followed_by_one_that_replaces_its_tasks(
    seed: int,
) -> None:
    with SimulatedCluster(managers=3, workers=WORKERS, seed=seed) as cluster:
        start(cluster, age_s=100.0)
        cluster.kill_node(next(iter(cluster.workers)))
        cluster.run_until(lambda: len(down(cluster)) == 1, within_s=60)
        cluster.crash(cluster.leader)
        cluster.run_until(lambda: cluster.running("web") == REPLICAS and bool(down(cluster)), within_s=60)
        on_it = cluster.view.find(Node)
        assert on_it
        cluster.run_for(60)
        assert not is_frozen(cluster)

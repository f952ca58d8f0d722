"""The root is rotated in a simulated cluster while nodes are cut off."""

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.users.operators import Operators
from sim.users.users import Users
from sim.world.certificates import root
from sim.world.committed import Change
from sim.world.storage import SimulatedStorage
from skep.errors import FailedPrecondition, Unavailable
from skep.manager.control.swarm import Rotations, update_swarm
from skep.model.node import Node
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId
from skep.model.values.times import moment
from skep.security.trust import is_issued_by
from skep.store.interface import Transaction, View

W1 = NodeId("w1")


def rotate(cluster: SimulatedCluster, number: int) -> None:
    """``docker swarm ca --rotate`` at any manager, once.  Raises: SkepError: it is refused."""

    def body(tx: Transaction) -> None:
        (swarm,) = tx.find(Swarm)
        forced = replace(swarm.spec.ca_config, force_rotate=swarm.spec.ca_config.force_rotate + 1)
        update_swarm(
            tx,
            replace(swarm.spec, ca_config=forced),
            swarm.version.index,
            Rotations(),
            new_id=lambda: f"token{number}",
            now=moment(cluster.clocks[cluster.managers[0]].now_ns()),
            new_root=lambda: root(number),
        )

    async def once() -> None:
        store = cluster.running_managers[cluster.leader].store
        assert store is not None
        await store.barrier()
        await store.update(body)

    cluster.do(once())


def swarm_of(cluster: SimulatedCluster) -> Swarm:
    (swarm,) = cluster.view.find(Swarm)
    return swarm


def is_rotated(cluster: SimulatedCluster) -> bool:
    swarm = swarm_of(cluster)
    nodes = cluster.view.find(Node)
    return swarm.rotation is None and all(
        node.description.tls_info.trust_root in ("", swarm.tls_info.trust_root) for node in nodes
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_node_that_is_cut_off_at_the_end_of_a_rotation_survives_the_next_one(seed: int) -> None:
    """It trusts the root before until it returns, and counts as ready until its grace period is over."""
    with SimulatedCluster(managers=3, workers=3, seed=seed, storage=SimulatedStorage()) as cluster:
        Operators(cluster, Users(cluster), lambda: ())

        def cut_off(change: Change, view: View) -> None:
            node, swarm = view.get(Node, W1), view.find(Swarm)[0]
            if swarm.rotation is not None and is_issued_by(node.description.tls_info, swarm.tls_info):
                cluster.committed.watchers.remove(cut_off)
                cuts.append(cluster.links.cut([W1], cluster.managers))

        cuts: list[object] = []
        cluster.committed.watchers.append(cut_off)
        rotate(cluster, 1)
        cluster.run_until(lambda: swarm_of(cluster).rotation is None, within_s=30)
        assert cuts
        assert cluster.is_ready(W1)
        with pytest.raises(
            Unavailable, match=r"nodes have not yet taken the root of the last rotation.*: w1"
        ):
            rotate(cluster, 2)
        cluster.run_until(lambda: not cluster.is_ready(W1), within_s=30)
        with pytest.raises(FailedPrecondition, match=r"unavailable nodes still trust the root before.*: w1"):
            rotate(cluster, 2)
        cluster.links.restore()
        cluster.run_until(lambda: is_rotated(cluster), within_s=60)
        rotate(cluster, 2)
        cluster.run_until(lambda: is_rotated(cluster), within_s=60)
        cluster.run_until(lambda: all(map(cluster.is_ready, cluster.workers)), within_s=30)
        assert cluster.nodes[W1].has_session

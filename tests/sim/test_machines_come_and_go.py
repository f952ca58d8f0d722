"""Machines join and leave, nodes are removed, promoted and demoted: members, nodes and tasks are as they should be."""

from collections.abc import Coroutine

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.faults.restore import restore
from sim.users.operators import GIVEN_UP_S, Operators
from sim.users.users import Users
from sim.world.committed import Change
from sim.world.versions import FIELD, UnknownFieldsAreKept
from skep.model.node import Availability, Node, NodeRole
from skep.model.values.ids import NodeId
from skep.store.state import State
from skep.store.tables import KeyChange
from tests.support.builders import a_service_spec
from tests.support.managers.sim_services import with_replicas

W1, W9, M2, M9 = NodeId("w1"), NodeId("w9"), NodeId("m2"), NodeId("m9")


def operators_of(cluster: SimulatedCluster) -> Operators:
    return Operators(cluster, Users(cluster), lambda: [*cluster.managers, *cluster.workers])


def done(cluster: SimulatedCluster, *actions: Coroutine[None, None, None]) -> None:
    """Let time pass until all is done, one after the other, and everything has settled."""
    for action in actions:
        cluster.do(action)
    cluster.run_for(10)
    cluster.check_invariants()


def voters(cluster: SimulatedCluster) -> set[str]:
    return {member.id for member in cluster.raft.voters}


def test_workers_come_and_go_and_their_tasks_move() -> None:
    with SimulatedCluster(managers=3, workers=3, seed=1) as cluster:
        cluster.create(a_service_spec("everywhere", is_global=True))
        operators = operators_of(cluster)
        done(cluster, operators.join_worker(W9))
        assert cluster.running("everywhere") == 4
        done(cluster, operators.leave_worker(W1), operators.remove_worker(NodeId("w2")))
        assert {task.node_id for task in cluster.wanted("everywhere")} == {"w3", "w9"}
        assert {node.id for node in cluster.view.find(Node)} == {"m1", "m2", "m3", "w3", "w9"}


@pytest.mark.parametrize("managers", [1, 3])
def test_a_manager_that_joins_and_a_worker_that_is_promoted_get_their_votes(managers: int) -> None:
    with SimulatedCluster(managers=managers, workers=3, seed=2) as cluster:
        cluster.create(a_service_spec("web", replicas=6))
        cluster.run_until(lambda: cluster.running("web") == 6, within_s=10)
        operators = operators_of(cluster)
        done(cluster, operators.join_manager(M9), operators.promote(W1))
        assert voters(cluster) == {*(f"m{number + 1}" for number in range(managers)), M9, W1}
        assert cluster.created("web") == 6
        others = [id for id in cluster.managers if id != cluster.leader]
        cluster.crash(cluster.leader)
        if len(others) > 1:
            cluster.run_until(lambda: cluster.raft.has_quorum, within_s=5)


def test_a_promotion_of_unknown_outcome_goes_on_until_it_is_committed() -> None:
    """The operator would remove the node otherwise, which is refused once it is to be a manager."""
    with SimulatedCluster(managers=3, workers=3, seed=2) as cluster:
        operators = operators_of(cluster)
        cluster.run_for(2)
        leader = cluster.leader
        cluster.raft.hang(leader)
        promotion = cluster.loop.create_task(operators.promote(W1))
        cluster.run_for(15)
        assert cluster.view.get(Node, W1).spec.role is NodeRole.WORKER
        assert not promotion.done()
        cluster.raft.resume(leader)
        cluster.run_until(promotion.done, within_s=20)
        assert W1 in cluster.managers


class RefusedAfterAnUnknownOutcome(Users):
    """The first change of a role has no response; further ones are refused until after ``GIVEN_UP_S``."""

    requested_at: float | None = None

    async def set_role(self, id: NodeId, role: NodeRole) -> bool | None:
        now = self._cluster.loop.time()
        if self.requested_at is None:
            self.requested_at = now
            return None
        return await super().set_role(id, role) if now > self.requested_at + GIVEN_UP_S + 5 else False


def test_a_demotion_of_unknown_outcome_is_not_given_up() -> None:
    """The machine would count as a manager for ever, if it were committed later: seed 8003356 at commit 7b34ef5a."""
    with SimulatedCluster(managers=3, workers=3, seed=2) as cluster:
        users = RefusedAfterAnUnknownOutcome(cluster)
        operators = Operators(cluster, users, lambda: cluster.managers)
        done(cluster, operators.demote(M2))
        assert M2 not in cluster.managers
        assert M2 not in cluster.raft.members


def test_managers_are_demoted_to_the_last_which_stays() -> None:
    with SimulatedCluster(managers=3, workers=3, seed=3) as cluster:
        cluster.create(a_service_spec("web", replicas=6))
        cluster.run_until(lambda: cluster.running("web") == 6, within_s=10)
        operators = operators_of(cluster)
        done(cluster, operators.promote(W1))
        done(cluster, *(operators.demote(id) for id in (NodeId("m1"), M2, W1, NodeId("m3"))))
        assert voters(cluster) == set(cluster.managers) == {"m3"}
        node = cluster.view.get(Node, W1)
        assert node.spec.role is NodeRole.WORKER
        assert node.manager_status is None
        assert cluster.view.lookup(Node, "m1") is None
        assert cluster.created("web") == 6
        assert cluster.running("web") == 6


def test_a_manager_that_leaves_takes_its_vote_along_also_the_one_that_leads() -> None:
    with SimulatedCluster(managers=3, workers=2, seed=4) as cluster:
        operators = operators_of(cluster)
        cluster.run_for(2)
        leader = cluster.leader
        done(cluster, operators.leave_manager(leader))
        assert leader not in voters(cluster)
        assert cluster.view.lookup(Node, leader) is None
        assert cluster.raft.has_quorum


@pytest.mark.parametrize("managers", [1, 3])
def test_a_restore_goes_on_from_its_snapshot_on_every_node(managers: int) -> None:
    with SimulatedCluster(managers=managers, workers=3, seed=5) as cluster:
        cluster.create(a_service_spec("web", replicas=6))
        cluster.run_until(lambda: cluster.running("web") == 6, within_s=10)
        revision, before = cluster.raft.kv.revision, {task.id for task in cluster.wanted("web")}
        cluster.create(a_service_spec("later", replicas=3))
        cluster.update("web", lambda spec: with_replicas(spec, 2))
        cluster.run_until(
            lambda: cluster.running("later") == 3 and cluster.containers("web") == 2, within_s=20
        )
        restore(cluster, revision)
        assert cluster.service("later") is None
        cluster.run_until(
            lambda: (
                cluster.running("web") == cluster.containers("web") == 6 and not cluster.containers("later")
            ),
            within_s=30,
        )
        assert {task.id for task in cluster.wanted("web")} & before
        cluster.run_for(10)
        cluster.check_invariants()


def test_an_older_manager_keeps_the_fields_that_a_newer_one_writes() -> None:
    with SimulatedCluster(managers=3, workers=3, seed=6) as cluster:
        operators = operators_of(cluster)
        upgraded = next(id for id in cluster.managers if id != cluster.leader)
        done(cluster, operators.upgrade(upgraded))
        store = cluster.running_managers[upgraded].store
        assert store is not None
        written = set[str]()
        cluster.committed.watchers.append(lambda change, _: written.update(keys_with_field(change)))
        cluster.do(store.update(lambda tx: tx.put(named(tx.get(Node, W1), "tomorrow"))))
        assert written == {"o/node/w1"}
        cluster.crash(upgraded)
        written.clear()
        cluster.set_availability(W1, Availability.PAUSE)
        cluster.run_for(5)
        assert "o/node/w1" in written
        assert not [one for one in cluster.observer.violations if "lost what" in one]


def named(node: Node, name: str) -> Node:
    return replace(node, spec=replace(node.spec, name=name))


def keys_with_field(change: Change) -> set[str]:
    return {one.key for one in change.keys if one.value is not None and f'"{FIELD}"'.encode() in one.value}


def test_a_lost_field_is_noticed() -> None:
    rule, key = UnknownFieldsAreKept(lambda _: False), "o/node/w1"
    kept = KeyChange(key, b'{"ID":"w1","NewerVersion":true}', 2)
    lost = KeyChange(key, b'{"ID":"w1"}', 3)
    view = State()
    assert not list(rule(Change(0.0, M2, M2, 1, 2, (kept,), ()), view))
    assert list(rule(Change(0.0, M2, M2, 1, 3, (lost,), ()), view))
    assert not list(rule(Change(0.0, M2, M2, 1, 4, (lost,), ()), view))

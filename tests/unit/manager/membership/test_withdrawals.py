"""Members are removed by a leader that still is one, by what a quorum says, and no later ones of the same name."""

from collections.abc import Awaitable, Callable, Mapping, Set
from random import Random

import pytest
from msgspec.structs import replace

from skep.manager.membership.loop import ManagerReconciler
from skep.manager.membership.roles import LEARNING_S
from skep.model.node import ManagerStatus, Node, NodeRole, Reachability
from skep.model.values.ids import NodeId
from skep.store.etcd.membership import RaftMember
from skep.store.interface import NotLeader
from skep.store.memory import MemoryCluster, MemoryStore
from tests.support.builders import a_node
from tests.unit.manager.membership.test_votes import HandClock

OWN, OTHER, THIRD, FOURTH = (NodeId(f"m{number}") for number in range(1, 5))


def a_member(name: str, id: int, *, is_learner: bool = False) -> RaftMember:
    return RaftMember(name=name, url=f"https://{name}:2378", id=id, is_learner=is_learner)


class Consensus:
    """``local``: the members as this manager knows them; ``current``: as a quorum does."""

    def __init__(self, local: tuple[RaftMember, ...], current: tuple[RaftMember, ...]) -> None:
        self.local, self.current = local, current
        self.removed: list[int] = []

    async def all(self, *, is_current: bool = False) -> tuple[RaftMember, ...]:
        return self.current if is_current else self.local

    async def remove(self, member: RaftMember) -> None:
        self.removed.append(member.id)

    async def add(self, name: str, url: str) -> tuple[RaftMember, ...]:
        raise NotImplementedError

    async def promote(self, name: str) -> None:
        raise NotImplementedError

    async def move_leader(self, to: RaftMember) -> None:
        raise NotImplementedError


class Hearing:
    """All but the fourth are reachable."""

    def __init__(self) -> None:
        self.there: Set[NodeId] = {OTHER, THIRD}

    def silent(self, now: float) -> Mapping[NodeId, float]:
        return {}

    def reachable(self, now: float) -> Set[NodeId]:
        return self.there

    async def ask(self) -> Set[NodeId]:
        return self.there


class Rig:
    """The loop of a leader that is ``m1``; ``m2`` is to be no manager."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.cluster = MemoryCluster()
        self.store = MemoryStore(self.clock, self.cluster)
        self.terms = self.store.terms(OWN, "127.0.0.1:2377")

    async def managers(
        self, consensus: Consensus, *wanted: NodeId, hearing: Hearing | None = None
    ) -> ManagerReconciler:
        for id in (OWN, OTHER, THIRD, FOURTH):
            role = NodeRole.MANAGER if id in wanted else NodeRole.WORKER
            node = a_node(id)
            await self.store.update(lambda tx, node=node: tx.put(node))  # type: ignore[misc]
            await self.store.update(
                lambda tx, node=node, role=role: tx.put(replace(node, spec=replace(node.spec, role=role)))  # type: ignore[misc]
            )
        return ManagerReconciler(
            await anext(self.terms), OWN, consensus, hearing or Hearing(), self.clock, Random(1)
        )


VOTERS = (a_member(OWN, 1), a_member(OTHER, 2), a_member(THIRD, 3))


async def test_a_member_that_is_to_go_is_removed():
    rig = Rig()
    consensus = Consensus(VOTERS, VOTERS)
    managers = await rig.managers(consensus, OWN, THIRD)
    await managers.check()
    assert consensus.removed == [2]


async def test_a_later_member_of_the_same_name_is_judged_anew_and_an_old_one_that_is_out_stays_out():
    rig = Rig()
    consensus = Consensus(VOTERS, (a_member(OWN, 1), a_member(THIRD, 3)))
    managers = await rig.managers(consensus, OWN, THIRD)
    await managers.check()
    assert consensus.removed == []


async def test_a_former_leader_removes_no_member():
    rig = Rig()
    consensus = Consensus(VOTERS, VOTERS)
    managers = await rig.managers(consensus, OWN, THIRD)
    other = MemoryStore(rig.clock, rig.cluster)
    rig.cluster.stand(other, OTHER)
    rig.cluster.elect(OTHER, quietly=True)
    with pytest.raises(NotLeader):
        await managers.check()
    assert consensus.removed == []


async def test_a_leader_that_is_deposed_after_its_last_look_removes_no_member():
    """The removal itself is not fenced, but the write before it is."""
    rig = Rig()
    other = MemoryStore(rig.clock, rig.cluster)

    class Deposing(Hearing):
        async def ask(self) -> Set[NodeId]:
            rig.cluster.stand(other, OTHER)
            rig.cluster.elect(OTHER, quietly=True)
            return self.there

    consensus = Consensus(VOTERS, VOTERS)
    managers = await rig.managers(consensus, OWN, THIRD, hearing=Deposing())
    status = ManagerStatus(addr="m2:2377", reachability=Reachability.REACHABLE)
    await rig.store.update(lambda tx: tx.put(replace(tx.get(Node, OTHER), manager_status=status)))
    with pytest.raises(NotLeader):
        await managers.check()
    assert consensus.removed == []
    assert rig.store.view().get(Node, OTHER).manager_status == status


async def test_a_quorum_is_judged_by_what_a_quorum_says_of_the_members():
    """By the old list two reachable members stay; in fact the third was replaced by a new, unreachable one."""
    rig = Rig()
    consensus = Consensus(VOTERS, (a_member(OWN, 1), a_member(OTHER, 2), a_member(FOURTH, 4)))
    managers = await rig.managers(consensus, OWN, THIRD, FOURTH)
    await managers.check()
    assert consensus.removed == []


class Joining(Consensus):
    """A node is recorded as a manager and becomes a member just before the members are read."""

    def __init__(self, members: tuple[RaftMember, ...], record: Callable[[], Awaitable[object]]) -> None:
        super().__init__(members, members)
        self._record = record

    async def all(self, *, is_current: bool = False) -> tuple[RaftMember, ...]:
        if is_current:
            await self._record()
        return await super().all(is_current=is_current)


async def test_a_member_that_has_just_joined_stays_though_the_leader_is_behind():
    rig = Rig()
    other, fifth = MemoryStore(rig.clock, rig.cluster), a_node(NodeId("m5"))
    joined = replace(fifth, spec=replace(fifth.spec, role=NodeRole.MANAGER))

    async def record() -> None:
        rig.store.faults.lag_s = 0.02
        await other.update(lambda tx: tx.put(fifth))
        await other.update(lambda tx: tx.put(joined))

    consensus = Joining((*VOTERS, a_member("m5", 5)), record)
    managers = await rig.managers(consensus, OWN, OTHER, THIRD)
    await managers.check()
    assert consensus.removed == []


async def test_a_manager_that_falls_silent_while_the_leader_waits_does_not_count_for_the_quorum():
    rig = Rig()
    hearing = Hearing()

    class Waiting(Consensus):
        async def all(self, *, is_current: bool = False) -> tuple[RaftMember, ...]:
            hearing.there = {OTHER} if is_current else hearing.there
            return await super().all(is_current=is_current)

    consensus = Waiting(VOTERS, VOTERS)
    managers = await rig.managers(consensus, OWN, THIRD, hearing=hearing)
    await managers.check()
    assert consensus.removed == []


async def test_a_manager_that_has_died_a_moment_ago_does_not_count_for_the_quorum():
    class Dead(Hearing):
        async def ask(self) -> Set[NodeId]:
            return self.there - {THIRD}

    rig = Rig()
    consensus = Consensus(VOTERS, VOTERS)
    managers = await rig.managers(consensus, OWN, THIRD, hearing=Dead())
    await managers.check()
    assert consensus.removed == []


async def test_a_learner_that_has_just_got_its_vote_is_not_overdue():
    rig = Rig()
    learning = (a_member(OWN, 1), a_member(OTHER, 2), a_member(THIRD, 3, is_learner=True))
    consensus = Consensus(learning, learning)
    managers = await rig.managers(consensus, OWN, OTHER, THIRD)
    await managers.check()
    rig.clock.time += LEARNING_S
    consensus.current = VOTERS
    await managers.check()
    assert consensus.removed == []
    consensus.current = consensus.local
    await managers.check()
    rig.clock.time += LEARNING_S
    await managers.check()
    assert consensus.removed == [3]

"""The level of the data is raised only while every manager's node is well: a former version cannot read it then."""

from msgspec.structs import replace

from skep.manager.membership.loop import ManagerReconciler
from skep.manager.membership.manager_changes import SOUND_S
from skep.model.node import ManagerStatus, Node, NodeState, NodeStatus
from skep.store.interface import Transaction
from skep.store.level import LEVEL, LOWEST
from tests.unit.manager.membership.test_withdrawals import OTHER, OWN, THIRD, VOTERS, Consensus, Rig

IDS = (OWN, OTHER, THIRD)


async def a_leader(rig: Rig) -> ManagerReconciler:
    managers = await rig.managers(Consensus(VOTERS, VOTERS), *IDS)

    def report(tx: Transaction) -> None:
        for id in IDS:
            tx.put(replace(tx.get(Node, id), manager_status=ManagerStatus(level=LEVEL)))

    await rig.store.update(report)
    return managers


async def show(rig: Rig, state: NodeState) -> None:
    await rig.store.update(lambda tx: tx.put(replace(tx.get(Node, THIRD), status=NodeStatus(state=state))))


async def check_after(rig: Rig, managers: ManagerReconciler, seconds: float) -> int:
    rig.clock.time += seconds
    await managers.check()
    return rig.store.view().level


async def test_the_level_is_raised_when_all_nodes_have_been_ready_for_a_while() -> None:
    rig = Rig()
    managers = await a_leader(rig)
    assert await check_after(rig, managers, 0.0) == LOWEST
    assert await check_after(rig, managers, SOUND_S - 1) == LOWEST
    assert await check_after(rig, managers, 1.0) == LEVEL


async def test_the_node_of_the_last_manager_that_does_not_come_up_keeps_the_level() -> None:
    rig = Rig()
    managers = await a_leader(rig)
    await show(rig, NodeState.DOWN)
    assert await check_after(rig, managers, 10 * SOUND_S) == LOWEST
    await show(rig, NodeState.READY)
    assert await check_after(rig, managers, 0.0) == LOWEST
    assert await check_after(rig, managers, SOUND_S / 2) == LOWEST
    await show(rig, NodeState.DOWN)  # it fails again before it was well for long enough
    assert await check_after(rig, managers, SOUND_S / 2) == LOWEST
    await show(rig, NodeState.READY)
    assert await check_after(rig, managers, 1.0) == LOWEST
    assert await check_after(rig, managers, SOUND_S) == LEVEL

"""A manager that is silent on the link and takes sessions all the same keeps its nodes."""

import asyncio
from random import Random

from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.dispatcher.node_sessions.adoption import (
    KEEP_S,
    KEEP_S_MAX,
    LivingManagers,
    SessionAdoption,
    orphans,
)
from skep.model.node import ManagerStatus, Node, SessionOwner
from skep.model.values.ids import NodeId, SessionId, new_id
from skep.store.memory import MemoryStore
from tests.support.builders import a_node

LEADER, CUT, DEAD = NodeId("m1"), NodeId("m2"), NodeId("m3")
MANAGERS = [replace(a_node(id), manager_status=ManagerStatus()) for id in (LEADER, CUT, DEAD)]


def held(node: str, manager: NodeId, session: int) -> Node:
    return replace(
        a_node(node), session=SessionOwner(manager_id=manager, session_id=SessionId(f"s{session}"))
    )


def test_sessions_of_before_the_silence_prove_nothing() -> None:
    proofs = LivingManagers()
    nodes = [held("w1", DEAD, 1), held("w2", DEAD, 2)]
    for now in (0.0, 0.2, 60.0):
        assert proofs.living(nodes, [DEAD], now) == frozenset()


def test_one_that_takes_a_session_lives_and_another_silent_one_does_not() -> None:
    proofs = LivingManagers()
    assert proofs.living([held("w1", CUT, 1), held("w2", DEAD, 2)], [CUT, DEAD], 0.0) == frozenset()
    adopted = [held("w1", LEADER, 3), held("w2", LEADER, 4)]
    assert proofs.living(adopted, [CUT, DEAD], 0.2) == frozenset()
    back = [held("w1", CUT, 5), held("w2", LEADER, 4)]
    assert proofs.living(back, [CUT, DEAD], 0.4) == {CUT}
    assert proofs.living(back, [CUT, DEAD], 0.4 + KEEP_S / 2) == {CUT}
    assert proofs.living(back, [CUT, DEAD], 0.5 + KEEP_S) == frozenset(), "it may have died since"


def test_a_node_that_reaches_only_a_manager_cut_off_from_the_leader_changes_hands_ever_more_rarely() -> None:
    proofs = LivingManagers()
    manager, session, hands = CUT, 0, 0
    for tick in range(5 * 600):  # ten minutes of looks
        now = tick / 5
        node = held("w1", manager, session)
        living = proofs.living([*MANAGERS, node], [CUT], now)
        if manager == LEADER:
            manager, session = CUT, session + 1  # it registers where it can
        elif orphans([*MANAGERS, node], {CUT} - living, LEADER):
            manager, session, hands = LEADER, session + 1, hands + 1
    assert hands <= 5 + 600 / KEEP_S_MAX


def test_a_manager_that_is_reachable_again_starts_anew() -> None:
    proofs = LivingManagers()
    now = 0.0
    for session in range(8):
        proofs.living([held("w1", CUT, 2 * session)], [CUT], now)
        proofs.living([held("w1", CUT, 2 * session + 1)], [CUT], now + 0.2)
        now += 100.0
    assert proofs.living([], [], now) == frozenset()
    proofs.living([held("w1", CUT, 98)], [CUT], now + 1.0)
    proofs.living([held("w1", CUT, 99)], [CUT], now + 1.2)
    assert proofs.living([held("w1", CUT, 99)], [CUT], now + 1.3 + KEEP_S) == frozenset()


def test_the_leader_leaves_a_session_alone_that_a_silent_manager_took_after_it() -> None:
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    store = MemoryStore(clock)
    adoption = SessionAdoption(store, LEADER, lambda _now: {CUT: 9.0}, clock, new_id, Random(1))

    async def owner_in(seconds: float) -> NodeId:
        await clock.sleep(seconds)
        return store.view().get(Node, NodeId("w1")).session.manager_id

    async def live() -> list[NodeId]:
        await store.update(lambda tx: [tx.put(node) for node in [*MANAGERS, held("w1", CUT, 1)]])
        running = asyncio.create_task(adoption.run())
        first = await owner_in(1)
        await store.update(lambda tx: tx.put(held("w1", CUT, 2)))
        owners = [first, await owner_in(1), await owner_in(KEEP_S)]
        running.cancel()
        await asyncio.wait([running])
        return owners

    owners = loop.run_until_complete(live())
    loop.close()
    assert owners == [LEADER, CUT, LEADER]

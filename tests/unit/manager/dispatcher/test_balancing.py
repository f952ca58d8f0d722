"""When a manager sends nodes on to others."""

import asyncio
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.dispatcher.node_sessions.balancing import Balancing
from skep.manager.dispatcher.node_sessions.sessions import Sessions
from skep.model.node import ManagerStatus, Node, NodeRole, Reachability, SessionOwner
from skep.model.swarm import DEFAULT_SWARM_SPEC, Swarm
from skep.model.values.ids import ClusterId, NodeId
from skep.security.authority import Authority
from skep.security.trust import root_digest, tls_info
from skep.store.memory import MemoryStore
from tests.support.builders import a_node
from tests.support.store.damage_rigs import put_all

M1, M2 = NodeId("m1"), NodeId("m2")
ROOT = Authority.create().root_pem
WORKERS = [NodeId(f"w{number:02}") for number in range(40)]


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    made = VirtualLoop()
    yield made
    made.close()


def a_manager(id: NodeId, peer_roots: str) -> Node:
    status = ManagerStatus(addr=f"{id}:2377", reachability=Reachability.REACHABLE)
    return replace(a_node(id, role=NodeRole.MANAGER), manager_status=status, peer_roots=peer_roots)


def test_no_node_is_sent_on_while_an_etcd_has_to_restart_for_a_new_root(loop: VirtualLoop) -> None:
    """It may find no manager that takes it."""
    clock = VirtualClock(loop)
    store = MemoryStore(clock)
    swarm = Swarm(id=ClusterId("s1"), spec=DEFAULT_SWARM_SPEC, tls_info=tls_info(ROOT))
    present, former = root_digest(ROOT), "the former"
    workers = [replace(a_node(id), session=SessionOwner(manager_id=M1)) for id in WORKERS]
    sent_on: list[NodeId] = []
    balancing = Balancing(store, M1, Sessions(), clock, redirect=sent_on.append, movable=lambda: WORKERS)

    async def live() -> None:
        await put_all(store, swarm, a_manager(M1, present), a_manager(M2, former), *workers)
        await clock.sleep(60)
        assert sent_on == []
        await put_all(store, a_manager(M2, present))
        await clock.sleep(60)
        assert sent_on

    running = loop.create_task(balancing.run())
    loop.run_until_complete(live())
    running.cancel()
    loop.run_until_complete(asyncio.wait([running]))

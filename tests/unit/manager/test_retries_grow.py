"""A store that takes no write is asked again later and later, and never by two managers at the same moments."""

import asyncio
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, cast

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.errors import Unavailable
from skep.manager.ca.loop import CertificateAuthority
from skep.manager.dispatcher.node_sessions.adoption import SessionAdoption
from skep.manager.gossip.keys import GossipKeyRotation
from skep.manager.manager_status import ManagerStatusWriter
from skep.manager.membership.loop import ManagerReconciler
from skep.manager.membership.peer_addresses import PeerAddresses, sync_peer_addresses
from skep.manager.probes.loop import OverlayAvoidance
from skep.model.node import CutOff, ManagerStatus, Node, NodeRole, NodeSpec, SessionOwner
from skep.model.swarm import RootRotation, Swarm, SwarmSpec
from skep.model.values.ids import ClusterId, NodeId, SessionId, new_id
from skep.security.authority import Authority
from skep.security.tokens import new_join_tokens
from skep.security.trust import tls_info
from skep.store.memory import MemoryStore
from tests.support.builders import a_node

OWN = NodeId("m1")


class Refusing:
    """A store that shows everything and takes no write; ``asked``: when it was asked."""

    def __init__(self, store: MemoryStore, now: Callable[[], float]) -> None:
        self.asked: list[float] = []
        self._store = store
        self._now = now

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def _refuse(self) -> Unavailable:
        self.asked.append(self._now())
        return Unavailable("no leader")

    async def update(self, *_: Any, **__: Any) -> Any:
        raise self._refuse()

    async def update_each(self, _body: Any, items: Any) -> Any:
        items = list(items)
        return [self._refuse()] * len(items) if items else []

    async def all(self, *_: Any, **__: Any) -> Any:
        raise self._refuse()


class Hearing:
    def silent(self, now: float) -> dict[NodeId, float]:
        return {NodeId("m2"): 9.0}

    def reachable(self, now: float) -> set[NodeId]:
        return set()

    async def ask(self) -> set[NodeId]:
        return set()


Loop = Callable[[Any, VirtualClock, Random], Coroutine[Any, Any, None]]
LOOPS: dict[str, Loop] = {
    "presence": lambda store, clock, random: ManagerStatusWriter(
        store, OWN, "a:1", "a:2", clock, random
    ).run(),
    "certificates": lambda store, clock, random: CertificateAuthority(store, clock, new_id, random).run(),
    "gossip": lambda store, clock, random: GossipKeyRotation(store, clock, new_id, random).run(),
    "paths": lambda store, clock, random: OverlayAvoidance(store, clock, random).run(),
    "adoption": lambda store, clock, random: SessionAdoption(
        store, OWN, Hearing().silent, clock, new_id, random
    ).run(),
    "managers": lambda store, clock, random: ManagerReconciler(
        store, OWN, cast("Any", store), Hearing(), clock, random
    ).run(),
    "addresses": lambda store, clock, random: sync_peer_addresses(
        PeerAddresses((), lambda _: None), store, cast("Any", store), clock, random
    ),
}


async def founded(store: MemoryStore) -> None:
    authority, following = Authority.create(), Authority.create()
    root = authority.root_pem
    lost = SessionOwner(manager_id=NodeId("m2"), session_id=SessionId("s"))
    swarm = Swarm(
        id=ClusterId("c"),
        spec=SwarmSpec(),
        tls_info=tls_info(root),
        join_tokens=new_join_tokens(root),
        rotation=RootRotation(root=following.root_pem.decode(), cross_signed=""),
    )
    manager = Node(
        id=OWN, spec=NodeSpec(role=NodeRole.MANAGER), manager_status=ManagerStatus(addr="a:1", leader=True)
    )
    other = replace(manager, id=NodeId("m2"), manager_status=ManagerStatus(addr="b:1"))
    cut = replace(a_node("w1"), session=lost, cut_off=(CutOff(check="udp"),))
    await store.update(lambda tx: [tx.put(one) for one in (swarm, manager, other, cut)])


def asked(name: str, seed: int) -> list[float]:
    """Seconds between attempts."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    clock = VirtualClock(loop)

    async def run() -> list[float]:
        store = MemoryStore(clock)
        await founded(store)
        refusing = Refusing(store, loop.time)
        running = asyncio.create_task(LOOPS[name](refusing, clock, Random(seed)))
        while len(refusing.asked) < 8:
            await asyncio.sleep(0.05)
            assert not running.done(), running.result()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return [later - earlier for earlier, later in zip(refusing.asked, refusing.asked[1:], strict=False)]

    try:
        return loop.run_until_complete(run())
    finally:
        loop.close()
        asyncio.set_event_loop(None)


@pytest.mark.parametrize("name", LOOPS)
def test_attempts_in_vain_come_later_and_later(name: str) -> None:
    gaps = asked(name, 1)
    assert min(gaps[-2:]) > 2 * gaps[0]
    assert gaps != asked(name, 2), "and not at the moments of another manager"

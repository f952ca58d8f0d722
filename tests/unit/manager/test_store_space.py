"""The order in which the leader looks after the room of the stores, and how often."""

import asyncio
from collections.abc import Sequence

import pytest

from skep.aio.clock import SystemClock
from skep.errors import Unavailable
from skep.manager.storage.store_space import StoreSpace
from skep.model.node import NodeRole
from skep.model.values.ids import ClusterId, NodeId
from skep.security.identity import NodeIdentity
from skep.store.etcd.membership import RaftMember
from skep.store.space import MemberSpace
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.client import ManagerChannel

OWN, OTHER = NodeId("m1"), NodeId("m2")


class Over(Exception):
    """Everything that the test is about has happened."""


class QuickClock(SystemClock):
    """A clock whose time passes at once in every wait."""

    def __init__(self, until: float) -> None:
        self.now = 0.0
        self._until = until

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > self._until:
            raise Over
        await asyncio.sleep(0)


class FullStore:
    """What lives in it is large, and so much is written that there is always some history to cut."""

    def __init__(self, clock: QuickClock, *, size: int, in_use: int) -> None:
        self._clock = clock
        self.size, self.in_use = size, in_use
        self.compacted: list[float] = []
        self.defragmented: list[float] = []
        self.is_disk_full = False

    async def space(self) -> MemberSpace:
        return MemberSpace(size=self.size, in_use=self.in_use, quota=100)

    async def compact(self, kept_revisions: int) -> bool:
        self.compacted.append(self._clock.now)
        return True

    async def defragment(self) -> None:
        self.defragmented.append(self._clock.now)
        if self.is_disk_full:
            raise Unavailable("no space left on device")
        self.size = self.in_use


class Members:
    def __init__(self, *names: NodeId) -> None:
        self._names = names
        self.handed_over: list[str] = []

    async def all(self, *, is_current: bool = False) -> Sequence[RaftMember]:
        return [RaftMember(name=name, url="", id=number) for number, name in enumerate(self._names)]

    async def move_leader(self, to: RaftMember) -> None:
        self.handed_over.append(to.name)


def nobody(_: NodeId) -> ManagerChannel:
    raise Unavailable("there is no other manager")


async def kept(
    store: FullStore, members: Members, clock: QuickClock, keeper: type[StoreSpace] = StoreSpace
) -> None:
    """Until the clock's time is over."""
    with pytest.raises(Over):
        await keeper(store, OWN, members, nobody, clock).keep()  # type: ignore[arg-type]


async def test_a_full_store_that_is_written_to_is_defragmented_all_the_same():
    clock = QuickClock(20)
    store = FullStore(clock, size=95, in_use=72)
    await kept(store, Members(OWN), clock)
    assert store.defragmented


async def test_a_replica_has_time_to_load_a_large_store_between_two_cuts_of_history():
    clock = QuickClock(300)
    store = FullStore(clock, size=65, in_use=65)
    await kept(store, Members(OWN), clock)
    pauses = [later - sooner for sooner, later in zip(store.compacted, store.compacted[1:], strict=False)]
    assert pauses
    assert min(pauses) >= 30


async def test_history_is_cut_as_soon_as_it_grows_where_that_is_enough():
    clock = QuickClock(60)
    store = FullStore(clock, size=65, in_use=65)

    async def compact(kept_revisions: int) -> bool:
        store.in_use = 10
        return await FullStore.compact(store, kept_revisions)

    async def space() -> MemberSpace:
        store.in_use += 15
        return await FullStore.space(store)

    store.compact, store.space = compact, space  # type: ignore[method-assign]
    await kept(store, Members(OWN), clock)
    assert len(store.compacted) >= 3


async def test_a_defragmentation_that_fails_is_tried_more_and_more_seldom():
    clock = QuickClock(600)
    store = FullStore(clock, size=95, in_use=40)
    store.is_disk_full = True
    await kept(store, Members(OWN), clock)
    assert 5 <= len(store.defragmented) <= 20


async def test_an_alarm_that_comes_back_at_once_is_not_cleared_without_an_end():
    clock = QuickClock(20)
    store = FullStore(clock, size=10, in_use=5)
    disarmed = []

    async def space() -> MemberSpace:
        return MemberSpace(size=10, in_use=5, quota=100, has_alarm=True)

    async def disarm() -> None:
        disarmed.append(clock.now)
        if len(disarmed) > 100:
            raise Over

    store.space, store.disarm = space, disarm  # type: ignore[method-assign, attr-defined]
    async with asyncio.timeout(5):
        await kept(store, Members(OWN), clock)
    assert len(disarmed) == len({*disarmed}) > 1


async def test_a_leader_that_is_reelected_at_once_transfers_leadership_again():
    class Keeper(StoreSpace):
        async def _others(self, names: Sequence[str]) -> dict[NodeId, MemberSpace]:
            return {OTHER: MemberSpace(size=10, in_use=10, quota=100)}

    clock, members = QuickClock(30), Members(OWN, OTHER)
    async with asyncio.timeout(5):
        await kept(FullStore(clock, size=95, in_use=40), members, clock, Keeper)
    assert members.handed_over[:2] == [OTHER, OTHER]


async def test_a_store_is_not_defragmented_twice_at_one_time():
    clock, is_done = QuickClock(30), asyncio.Event()
    store = FullStore(clock, size=95, in_use=40)

    async def defragment() -> None:
        store.defragmented.append(0.0)
        await is_done.wait()

    store.defragment = defragment  # type: ignore[method-assign]
    keeper = StoreSpace(store, OWN, Members(OWN), nobody, clock)  # type: ignore[arg-type]
    request = skep.StoreSpaceRequest(defragment=True)
    leader = NodeIdentity(node_id=OTHER, cluster_id=ClusterId("c"), role=NodeRole.MANAGER)
    caller = Caller(identity=leader, address="10.0.0.2", disconnect=lambda: None)
    first = asyncio.create_task(keeper.answer(request, caller))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="already being defragmented"):
        await keeper.answer(request, caller)
    is_done.set()
    assert (await first).size == 95
    assert len(store.defragmented) == 1

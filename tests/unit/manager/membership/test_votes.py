"""A manager that asks for its vote is kept waiting while it catches up, and not for ever."""

import socket
from collections.abc import Sequence

import pytest

from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition, Unavailable
from skep.manager.membership.peer_addresses import PeerAddresses
from skep.manager.membership.peer_ports import unreachable_peers
from skep.manager.membership.service import CATCH_UP_S, MembersService
from skep.model.node import NodeRole
from skep.model.values.ids import ClusterId, NodeId
from skep.security.identity import NodeIdentity
from skep.store.etcd.errors import NoMember, StillLearning
from skep.store.etcd.membership import RaftMember
from skep.store.etcd.peers import EtcdPeer
from skep.store.memory import MemoryStore
from skep.wire import skep_pb2 as pb
from skep.wire.access import Caller

M2 = NodeId("m2")
CALLER = Caller(
    identity=NodeIdentity(node_id=M2, cluster_id=ClusterId("c"), role=NodeRole.MANAGER),
    address="127.0.0.1",
    disconnect=lambda: None,
)


class HandClock(SystemClock):
    """Time passes only in ``sleep``."""

    def __init__(self) -> None:
        self.time = 0.0

    def monotonic(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


class Learning:
    """A consensus in which one member learns until ``caught_up_at``, or is out (``is_out``)."""

    def __init__(self, clock: HandClock, caught_up_at: float, *, is_out: bool = False) -> None:
        self.voters: list[str] = []
        self._clock = clock
        self._caught_up_at = caught_up_at
        self._is_out = is_out

    async def promote(self, name: str) -> None:
        if self._clock.time < self._caught_up_at:
            raise StillLearning("this manager has not caught up yet")
        if self._is_out:
            raise NoMember(name)
        self.voters.append(name)

    async def all(self, *, is_current: bool = False) -> tuple[RaftMember, ...]:
        raise NotImplementedError

    async def add(self, name: str, url: str) -> tuple[RaftMember, ...]:
        raise NotImplementedError

    async def remove(self, member: RaftMember) -> None:
        raise NotImplementedError

    async def move_leader(self, to: RaftMember) -> None:
        raise NotImplementedError


def asked(clock: HandClock, consensus: Learning, port: int = 0) -> MembersService:
    store = MemoryStore(clock)
    known = (EtcdPeer(name=M2, url=f"https://m2:{port}", ip="127.0.0.1"),) if port else ()
    return MembersService(
        store, consensus, PeerAddresses(known, _forget), bytes, _keep, ClusterId("c"), clock
    )


async def _keep(_: bytes) -> None:
    pass


def _forget(_: Sequence[object]) -> None:
    pass


async def test_it_gets_its_vote_when_it_has_caught_up():
    clock = HandClock()
    consensus = Learning(clock, caught_up_at=1.0)
    await asked(clock, consensus).promote(pb.PromoteMemberRequest(), CALLER)
    assert consensus.voters == [M2]
    assert clock.time < 1.1


async def test_one_that_takes_longer_has_to_ask_again():
    clock = HandClock()
    consensus = Learning(clock, caught_up_at=60.0)
    with pytest.raises(StillLearning):
        await asked(clock, consensus).promote(pb.PromoteMemberRequest(), CALLER)
    assert consensus.voters == []
    assert CATCH_UP_S <= clock.time < CATCH_UP_S + 0.1


async def test_a_learner_that_is_removed_gets_an_error():
    clock = HandClock()
    with pytest.raises(FailedPrecondition, match="removed while it was joining"):
        await asked(clock, Learning(clock, 0.5, is_out=True)).promote(pb.PromoteMemberRequest(), CALLER)


async def test_the_error_of_an_unreachable_manager_names_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    clock = HandClock()
    service = asked(clock, Learning(clock, caught_up_at=1e9), port)
    with pytest.raises(
        Unavailable, match=rf"cannot reach 127.0.0.1:{port} \(etcd's peers\): connection refused"
    ):
        await service.promote(pb.PromoteMemberRequest(), CALLER)


async def test_a_manager_that_is_reached_is_only_late() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        clock = HandClock()
        service = asked(clock, Learning(clock, caught_up_at=1e9), server.getsockname()[1])
        with pytest.raises(StillLearning):
            await service.promote(pb.PromoteMemberRequest(), CALLER)


async def test_a_manager_names_the_ways_that_are_closed_from_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed, socket.create_server(("127.0.0.1", 0)) as server:
        ports = {"m1": server.getsockname()[1], "m3": closed.getsockname()[1], M2: 1}
        closed.close()
        peers = [
            EtcdPeer(name=name, url=f"https://{name}:{port}", ip="127.0.0.1") for name, port in ports.items()
        ]
        assert await unreachable_peers(peers, M2) == (
            f"this manager cannot reach 127.0.0.1:{ports['m3']} (etcd's peers): connection refused: "
            "open these ports in the firewall"
        )
        assert await unreachable_peers(peers[:1], M2) == ""

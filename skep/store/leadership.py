"""Terms of leadership, as both stores know them.

The leader is whoever wrote the leader key last; the revision of that write is the fence which every write of
that term's loops compares.
"""

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import ParamSpec, TypeVar

import msgspec

from skep.model.ids import NodeId
from skep.store.interface import Object, View, Watch
from skep.store.replica import Replica
from skep.store.updates import Updater, Updating

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


class LeaderRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the leader key says.

    ``term``: grows with each election (raft's term beside etcd); ``nonce``: of this claim alone.
    """

    node: NodeId
    addr: str = ""
    term: int = 0
    nonce: str = ""


def leader_named(record: bytes | None) -> NodeId | None:
    """The node that the leader key names."""
    return msgspec.json.decode(record, type=LeaderRecord).node if record else None


class TermState:
    """Whether a term still lasts.  ``fence``: revision of the leader key that opened it."""

    def __init__(self, number: int, fence: int) -> None:
        self.number = number
        self.fence = fence
        self._lost = asyncio.Event()

    @property
    def is_lost(self) -> bool:
        """Whether it is over."""
        return self._lost.is_set()

    def lose(self) -> None:
        """It is over; saying so twice is harmless."""
        self._lost.set()

    async def wait_lost(self) -> None:
        """Return when it is over."""
        await self._lost.wait()


class FencedTerm(Updating):
    """One term on one replica; its updater proposes behind the fence.  Implements ``interface.Term``."""

    def __init__(self, replica: Replica, state: TermState, updater: Updater) -> None:
        self._replica = replica
        self._state = state
        self._updater = updater

    @property
    def number(self) -> int:
        return self._state.number

    @property
    def fence(self) -> int:
        """Revision of the leader key that opened it."""
        return self._state.fence

    def view(self) -> View:
        return self._replica.state

    def watch(self, *kinds: type[Object]) -> AbstractAsyncContextManager[Watch]:
        return self._replica.watch(*kinds)

    async def confirm(self) -> None:
        await self._updater.confirm()

    async def wait_lost(self) -> None:
        await self._state.wait_lost()

"""Turns of queries at hosts: bounded by host and in all, and fair among stacks.

Several stacks often share a Prometheus.  A stack with few questions there is asked first, so that slow queries of other
stacks do not delay it.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec


class Turn(msgspec.Struct, frozen=True):
    """A question that waits or is asked."""

    host: str
    stack: str


class QueryTurns:
    """Places for questions, ``at_host`` at each host and ``at_once`` in all."""

    def __init__(self, at_host: int, at_once: int) -> None:
        self._at_host = at_host
        self._at_once = at_once
        self._asked: Counter[Turn] = Counter()
        self._hosts: Counter[str] = Counter()
        self._stacks: Counter[str] = Counter()
        self._waiting: dict[asyncio.Future[None], Turn] = {}
        """In the order of their arrival."""
        self._last: dict[Turn, int] = {}
        """When each stack that asks or waits at a host had its last turn there, as a count of all turns."""
        self._count = 0

    @asynccontextmanager
    async def take(self, turn: Turn) -> AsyncIterator[None]:
        """Hold a place during the block."""
        granted = asyncio.get_running_loop().create_future()
        self._waiting[granted] = turn
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            if self._waiting.pop(granted, None) is None:  # the place was granted in the same moment
                self._release(turn)
            self._forget(turn)
            raise
        try:
            yield
        finally:
            self._release(turn)

    def _grant(self) -> None:
        while self._hosts.total() < self._at_once:
            free = [
                one
                for one, turn in self._waiting.items()
                if self._hosts[turn.host] < self._at_host and not one.done()  # a cancelled one leaves soon
            ]
            if not free:
                return
            granted = min(free, key=lambda one: self._order(self._waiting[one]))
            turn = self._waiting.pop(granted)
            self._count += 1
            self._last[turn] = self._count
            self._asked[turn] += 1
            self._hosts[turn.host] += 1
            self._stacks[turn.stack] += 1
            granted.set_result(None)

    def _order(self, turn: Turn) -> tuple[int, int, int]:
        return self._asked[turn], self._stacks[turn.stack], self._last.get(turn, 0)

    def _release(self, turn: Turn) -> None:
        for counter, key in ((self._hosts, turn.host), (self._stacks, turn.stack)):
            counter[key] -= 1
            if not counter[key]:
                del counter[key]
        self._asked[turn] -= 1
        if not self._asked[turn]:
            del self._asked[turn]
        self._forget(turn)
        self._grant()

    def _forget(self, turn: Turn) -> None:
        if turn not in self._asked and turn not in self._waiting.values():
            self._last.pop(turn, None)

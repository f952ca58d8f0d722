"""Registrations when thousands of nodes come back at once."""

import asyncio
from random import Random

import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.errors import RetryLater
from skep.manager.dispatcher.node_sessions.admission import (
    AT_ONCE_MAX,
    FIRST_RATE,
    HOLD_S,
    LONGEST_S,
    SHORTEST_S,
    RegistrationQueue,
    next_retry_at,
    rate,
)
from skep.manager.nodes.heartbeats import SUSPENDED_S_MAX, suspension_left

NODES = 5000


def test_the_rate_is_measured_once_there_is_something_to_measure():
    assert rate(500, 0.1) == FIRST_RATE
    assert rate(500, 2.0) == 250.0
    assert rate(0, 60.0) == 1.0, "never zero: at least one node has to try"


def test_retry_times_of_nodes_are_spread():
    reported = 0.0
    for number in range(1, 101):
        reported = next_retry_at(100.0, 50, reported, 50.0, 0.0)
        assert reported == pytest.approx(100.0 + (50 + number) / 50.0)


def test_retry_times_are_bounded():
    assert next_retry_at(100.0, 0, 0.0, 1000.0, 0.5) == 100.0 + SHORTEST_S
    late = [next_retry_at(100.0, 5000, 0.0, 1.0, rng) - 100.0 for rng in (0.0, 0.5, 1.0)]
    assert late == [LONGEST_S * part for part in (0.5, 0.75, 1.0)], "and not all of them at the same moment"


def test_silence_does_not_go_uncounted_for_ever():
    left_s, counted_s = SUSPENDED_S_MAX, 0.0
    for _ in range(10_000):
        left_s = suspension_left(left_s, 1.0, is_overloaded=True)
        counted_s += left_s <= 0
    assert counted_s == 10_000 - SUSPENDED_S_MAX + 1
    assert suspension_left(0.0, 100.0, is_overloaded=False) == pytest.approx(10.0)
    assert suspension_left(SUSPENDED_S_MAX, 100.0, is_overloaded=False) == SUSPENDED_S_MAX


class Crowded:
    """Nodes that come back to one manager that takes ``write_s`` for a registration, on virtual time."""

    def __init__(self, write_s: float, *, obedient: bool = True) -> None:
        self.loop = VirtualLoop()
        clock = VirtualClock(self.loop)
        self.random = Random(1)
        self.admission = RegistrationQueue(clock, self.random)
        self.write_s = write_s
        self.obedient = obedient
        self.at_work = self.most_at_work = self.reported = self.asked = 0
        self.back: list[float] = []

    async def node(self) -> None:
        while True:
            self.asked += 1
            try:
                async with self.admission.slot():
                    self.at_work += 1
                    self.most_at_work = max(self.most_at_work, self.at_work)
                    try:
                        await asyncio.sleep(self.write_s)
                    finally:
                        self.at_work -= 1
                self.back.append(self.loop.time())
                return
            except RetryLater as later:
                assert self.admission.is_overloaded()
                self.reported += 1
                await asyncio.sleep(later.after_s if self.obedient else self.random.uniform(1.0, 2.0))

    def run(self, nodes: int) -> None:
        async def all_at_once() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(nodes):
                    group.create_task(self.node())

        self.loop.run_until_complete(all_at_once())


@pytest.mark.parametrize(("write_s", "obedient"), [(0.02, True), (0.3, True), (0.3, False)])
def test_thousands_at_once_are_taken_in_one_after_another_without_a_pause(write_s, obedient):
    """Older nodes pass the word over and ask again by their own back-off."""
    crowded = Crowded(write_s, obedient=obedient)
    crowded.run(NODES)
    assert len(crowded.back) == NODES
    assert crowded.most_at_work == AT_ONCE_MAX
    least_s = NODES / AT_ONCE_MAX * write_s
    # Nothing stands idle while nodes stay away: at most a longest wait beside what the work takes.
    assert max(crowded.back) - min(crowded.back) <= 1.25 * least_s + LONGEST_S
    assert crowded.asked <= NODES * (2 + least_s / HOLD_S)
    if write_s == 0.02:
        assert crowded.reported == 0, (
            "a node that is accepted within its time in the queue gets no retry time"
        )
    crowded.loop.close()


def test_a_node_that_leaves_the_line_gives_its_place_up():
    crowded = Crowded(0.1)

    async def some_leave() -> None:
        nodes = [asyncio.create_task(crowded.node()) for _ in range(3 * AT_ONCE_MAX)]
        await asyncio.sleep(0.05)
        for node in nodes[::2]:
            node.cancel()
        await asyncio.gather(*nodes, return_exceptions=True)
        assert not crowded.admission.is_overloaded()
        async with crowded.admission.slot():
            pass

    crowded.loop.run_until_complete(some_leave())
    assert len(crowded.back) == 3 * AT_ONCE_MAX // 2
    assert crowded.admission.running_count == 0
    crowded.loop.close()

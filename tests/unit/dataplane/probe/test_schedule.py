"""How often a peer is asked."""

import asyncio
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sim.world.time import VirtualClock, VirtualLoop
from skep.dataplane.probe.measurements import Measurements, Offload
from skep.dataplane.probe.prober import PEERS_AT_FULL_RATE, PERIOD_S, URGENT_S, PathProber, pause_s
from skep.model.networks.paths import PathFinding, PathPeer, ProbeTargets
from skep.model.values.ids import NodeId

CHANCES = st.floats(0, 1)


@given(st.integers(0, PEERS_AT_FULL_RATE), CHANCES, CHANCES)
def test_what_is_closed_is_settled_in_time(peers: int, before: float, after: float) -> None:
    """Closed just after a round, found in the next, confirmed in the one behind it."""
    assert pause_s(peers, before, is_settled=True) + pause_s(peers, after, is_settled=False) <= 20


@given(st.integers(1, 5000), CHANCES)
def test_more_peers_are_asked_less_often_each_and_not_more_in_all(peers: int, rng: float) -> None:
    rounds_per_s = peers / pause_s(peers, rng, is_settled=True)
    assert rounds_per_s <= PEERS_AT_FULL_RATE / (0.75 * PERIOD_S) + 1e-9


@given(st.integers(0, PEERS_AT_FULL_RATE), CHANCES, CHANCES, st.booleans())
def test_without_a_manager_a_silent_peer_is_found_within_seconds(
    peers: int, first: float, second: float, is_settled: bool
) -> None:
    """All are probed at once when it becomes urgent, and a verdict needs two rounds."""
    pauses = [pause_s(peers, random, is_settled=is_settled, is_urgent=True) for random in (first, second)]
    assert sum(pauses) <= 5


class Paths:
    """A data path that counts the rounds of one peer."""

    failure = ""
    measured = Measurements()
    offload = Offload()
    rounds = 0

    async def apply(self, _targets: object) -> str:
        return ""

    async def findings(self, _peer: object, *, is_thorough: bool) -> tuple[PathFinding, ...]:
        self.rounds += 1
        return ()

    def close(self) -> None:
        pass


class NoPorts:
    async def findings(self, *_: object) -> tuple[PathFinding, ...]:
        return ()


async def nothing() -> None:
    pass


def test_a_peer_whose_next_round_is_far_is_probed_at_once_when_it_becomes_urgent(tmp_path: Path) -> None:
    loop = VirtualLoop()
    paths: Any = Paths()
    ports: Any = NoPorts()

    async def body() -> None:
        clock = VirtualClock(loop)
        prober = PathProber(paths, ports, tmp_path / "paths", nothing, clock, lambda: 0.5)
        peer = PathPeer(node_id=NodeId("p"), hostname="p", data_path="192.0.2.2")
        node = PathPeer(node_id=NodeId("me"), hostname="me", data_path="192.0.2.1")
        prober.set_targets(ProbeTargets(node=node, peers=(peer,)))
        running = asyncio.ensure_future(prober.run())
        await clock.sleep(30)
        before = paths.rounds
        prober.set_urgent(True)
        await clock.sleep(0.1)
        assert paths.rounds == before + 1
        await clock.sleep(2 * URGENT_S)
        assert paths.rounds == before + 3
        prober.set_urgent(False)
        await clock.sleep(PERIOD_S / 2)
        before = paths.rounds
        await clock.sleep(2 * PERIOD_S)
        assert paths.rounds == before + 2
        running.cancel()
        await asyncio.wait([running])

    try:
        loop.run_until_complete(body())
    finally:
        loop.close()

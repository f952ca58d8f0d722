"""What encrypting an overlay costs: the path in user space beside plain VXLAN, between the same two containers.

Two nodes in namespaces of this machine, in turn plain and encrypted: one TCP stream, and round trips of 64 bytes on a
kept connection.  Both ends of everything share this machine's processors, so read the ratios; a veth between the nodes
flatters both sides, since it carries 64 KiB at once.
"""

import asyncio
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.figures import Figure, ratio, run_alone, undisturbed
from bench.machine import processor_s
from bench.overlay_pair import OverlayPair, overlay_pair
from bench.stream import gigabits, round_trip_us

RATIO_MIN = 0.3
"""Smallest ratio encrypted / plain of throughput that the project promises."""
SECONDS = 1.0
TURNS = 3
"""Of each kind, in a pair."""


class Turn(NamedTuple):
    """What one turn gave."""

    gigabits: float
    round_trip_us: float
    forwarders_s: float
    """For a gigabyte."""


def figures(pairs: int) -> list[Figure]:
    """Throughput and round trips."""
    return asyncio.run(_measured(pairs))


async def _measured(pairs: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as directory, overlay_pair(Path(directory)) as pair:
        await pair.encrypt()

        async def one(number: int) -> dict[str, Turn]:
            order = ("plain", "encrypted") if number % 2 else ("encrypted", "plain")
            found: dict[str, list[Turn]] = {kind: [] for kind in order}
            for kind in order * TURNS:
                found[kind].append(await _turn(pair, kind))
            return {kind: Turn(*map(median, zip(*turns, strict=True))) for kind, turns in found.items()}

        values, busy = await undisturbed(pairs, one)
        dropped = [(await side.client.status()).counts.dropped for side in (pair.a, pair.b)]

    def sides(which: int) -> dict[str, list[float]]:
        return {kind: [value[kind][which] for value in values] for kind in ("plain", "encrypted")}

    lost = tuple(float(sum(counts.values())) for counts in dropped)
    return [
        ratio(
            10,
            "encrypted beside plain, one TCP stream, Gbit/s",
            sides(0),
            limit=RATIO_MIN,
            is_least=True,
            busy=busy,
        ),
        ratio(0, "encrypted beside plain, round trip of 64 bytes, µs p50", sides(1)),
        Figure(
            number=0,
            what="processor time of both forwarders for a gigabyte",
            unit="s",
            values=tuple(value["encrypted"].forwarders_s for value in values),
        ),
        Figure(number=0, what="dropped by the forwarders meanwhile", unit="pieces", values=lost, quantile=1),
    ]


async def _turn(pair: OverlayPair, kind: str) -> Turn:
    if kind == "plain":
        pair.detach()
        pair.carry_by_vxlan()
    else:
        pair.attach()
    source, target = pair.a.container_namespace, pair.b.container_namespace
    spent = _forwarders_s(pair)
    rate = await asyncio.to_thread(gigabits, source, target, pair.b.address, SECONDS)
    spent = _forwarders_s(pair) - spent
    trip = await asyncio.to_thread(round_trip_us, source, target, pair.b.address)
    if kind == "plain":
        pair.uncarry()
    return Turn(rate, trip, spent / (rate * SECONDS / 8))


def _forwarders_s(pair: OverlayPair) -> float:
    """Processor time of both until now."""
    return sum(processor_s(side.forwarder.pid) for side in (pair.a, pair.b) if side.forwarder is not None)


if __name__ == "__main__":
    run_alone(__doc__, "encrypted", figures)

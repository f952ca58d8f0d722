"""What encrypting an overlay costs: the path in user space beside plain VXLAN, between the same two containers.

Two nodes in namespaces of this machine, in turn plain and encrypted: one TCP stream, and round trips of 64 bytes on a
kept connection.  Both ends of everything share this machine's processors, so read the ratios; a veth between the nodes
flatters both sides, since it carries 64 KiB at once.
"""

import asyncio
import tempfile
from pathlib import Path

from bench.figures import Figure, ratio, run_alone, undisturbed
from bench.overlay_pair import OverlayPair, overlay_pair
from bench.stream import gigabits, round_trip_us

RATIO_MIN = 0.3
"""Smallest ratio encrypted / plain of throughput that the project promises."""
SECONDS = 1.0
_TURNS = 2
"""Turns of each kind in a pair, in alternation."""


def figures(pairs: int) -> list[Figure]:
    """Throughput and round trips."""
    return asyncio.run(_measured(pairs))


async def _measured(pairs: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as directory, overlay_pair(Path(directory)) as pair:
        await pair.encrypt()

        async def one(number: int) -> dict[str, tuple[float, float]]:
            order = ("plain", "encrypted") if number % 2 else ("encrypted", "plain")
            found: dict[str, list[tuple[float, float]]] = {"plain": [], "encrypted": []}
            for kind in order * _TURNS:
                found[kind].append(await _turn(pair, kind))
            return {
                kind: (sum(rate for rate, _ in turns) / _TURNS, sum(trip for _, trip in turns) / _TURNS)
                for kind, turns in found.items()
            }

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
        Figure(number=0, what="dropped by the forwarders meanwhile", unit="pieces", values=lost, quantile=1),
    ]


async def _turn(pair: OverlayPair, kind: str) -> tuple[float, float]:
    """Gbit/s, µs."""
    if kind == "plain":
        pair.detach()
        pair.carry_by_vxlan()
    else:
        pair.attach()
    source, target = pair.a.container_namespace, pair.b.container_namespace
    rate = await asyncio.to_thread(gigabits, source, target, pair.b.address, SECONDS)
    trip = await asyncio.to_thread(round_trip_us, source, target, pair.b.address)
    if kind == "plain":
        pair.uncarry()
    return rate, trip


if __name__ == "__main__":
    run_alone(__doc__, "encrypted", figures)

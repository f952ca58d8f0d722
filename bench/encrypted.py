"""The cost of encrypting an overlay: VXLAN inside WireGuard compared with plain VXLAN, between the same containers.

Two nodes in namespaces of this machine alternately use a plain and an encrypted overlay.  The benchmark measures a TCP
stream, and round trips of 64 bytes on a kept connection.  Both ends share this machine's processors, so only the ratios
are meaningful.  A veth between the nodes flatters both sides, since it carries 64 KiB at once.
"""

import asyncio
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.figures import Figure, ratio, run_alone, run_undisturbed
from bench.machine import processor_s
from bench.overlay_pair import ENCRYPTED, PLAIN, OverlayPair, overlay_pair
from bench.stream import gigabits, round_trip_us
from skep.dataplane.wireguard.methods import choose
from skep.model.networks.wireguard import EncryptionMethod
from skep.node.host.features import detect

RATIO_MIN = {EncryptionMethod.KERNEL: 0.3, EncryptionMethod.USER_SPACE: 0.02}
"""Smallest ratio of encrypted to plain throughput that the project promises.

wireguard-go of Debian 12 encrypts each packet separately, while plain VXLAN here carries 64 KiB at once.
"""
SECONDS = 1.0
TURNS = 3
"""Number of turns of each kind within one pair."""


class Turn(NamedTuple):
    """Result of one turn."""

    gigabits: float
    round_trip_us: float
    processes_s: float
    """Processor seconds of the processes per gigabyte."""


def figures(pairs: int) -> list[Figure]:
    """Measure throughput and round trips."""
    return asyncio.run(_measure(pairs))


async def _measure(pairs: int) -> list[Figure]:
    method = choose(detect(Path(tempfile.gettempdir()) / "skep-features"))
    if not isinstance(method, EncryptionMethod):
        raise SystemExit(method.reason)
    with tempfile.TemporaryDirectory() as directory, overlay_pair(Path(directory), method) as pair:
        pair.add_plain()
        async with pair.encrypting():
            return await _compare(pair, method, pairs)


async def _compare(pair: OverlayPair, method: EncryptionMethod, pairs: int) -> list[Figure]:
    async def one(number: int) -> dict[str, Turn]:
        order = ("plain", "encrypted") if number % 2 else ("encrypted", "plain")
        found: dict[str, list[Turn]] = {kind: [] for kind in order}
        for kind in order * TURNS:
            found[kind].append(await _turn(pair, kind))
        return {kind: Turn(*map(median, zip(*turns, strict=True))) for kind, turns in found.items()}

    values, busy = await run_undisturbed(pairs, one)

    def sides(which: int) -> dict[str, list[float]]:
        return {kind: [value[kind][which] for value in values] for kind in ("plain", "encrypted")}

    name = "the kernel's WireGuard" if method is EncryptionMethod.KERNEL else "wireguard-go"
    return [
        ratio(
            10,
            f"encrypted by {name} beside plain, one TCP stream, Gbit/s",
            sides(0),
            limit=RATIO_MIN[method],
            is_least=True,
            busy=busy,
        ),
        ratio(0, f"encrypted by {name} beside plain, round trip of 64 bytes, µs p50", sides(1)),
        Figure(
            number=0,
            what="processor time of both wireguard-go for a gigabyte",
            unit="s",
            values=tuple(value["encrypted"].processes_s for value in values),
        ),
    ]


async def _turn(pair: OverlayPair, kind: str) -> Turn:
    pair.carry(PLAIN if kind == "plain" else ENCRYPTED)
    source, target = pair.a.container_namespace, pair.b.container_namespace
    spent = _processes_s(pair)
    rate = await asyncio.to_thread(gigabits, source, target, pair.b.address, SECONDS)
    spent = _processes_s(pair) - spent
    trip = await asyncio.to_thread(round_trip_us, source, target, pair.b.address)
    return Turn(rate, trip, spent / (rate * SECONDS / 8))


def _processes_s(pair: OverlayPair) -> float:
    """Return the processor time of both processes until now.  The kernel's WireGuard has no processes."""
    found = (side.wireguard_go.process for side in (pair.a, pair.b))
    return sum(processor_s(process.pid) for process in found if process is not None)


if __name__ == "__main__":
    run_alone(__doc__, "encrypted", figures)

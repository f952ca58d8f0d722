"""What encrypting an overlay costs: the path in user space beside plain VXLAN, between the same two containers.

Two nodes in namespaces of this machine, in turn plain and encrypted, at least seven pairs: one TCP stream, and round
trips of 64 bytes on a kept connection.  Both ends of everything share this machine's processors, so read the ratios;
a veth between the nodes flatters both sides, since it carries 64 KiB at once.
"""

import argparse
import asyncio
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from bench.machine import noise
from bench.overlay_pair import OverlayPair, overlay_pair
from bench.run import commit, result_name, write_result
from bench.stream import gigabits, round_trip_us

RATIO_MIN = 0.3
"""Smallest ratio encrypted / plain of throughput that the project promises."""

NOISE_MAX = 0.15
"""Share of the machine that may be busy with something else before a measurement."""

Values = dict[str, dict[str, list[float]]]
THROUGHPUT, LATENCY = "one TCP stream, Gbit/s", "round trip of 64 bytes, µs p50"


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each stream")
    parser.add_argument("--keep", action="store_true", help="write bench/results")
    options = parser.parse_args()
    values, noisy = asyncio.run(measured(options.pairs, options.seconds))
    text = report(values, noisy)
    print(text)
    if options.keep:
        name = result_name(datetime.now(UTC), commit(), "encrypted")
        write_result(name, text + "\n", {"values": values, "noisy pairs": noisy})


async def measured(pairs: int, seconds: float) -> tuple[Values, int]:
    """All single values, and how many pairs began while something else kept the machine busy."""
    values: Values = {what: {"plain": [], "encrypted": []} for what in (THROUGHPUT, LATENCY)}
    noisy = 0
    with tempfile.TemporaryDirectory() as directory, overlay_pair(Path(directory)) as pair:
        await pair.encrypt()
        for number in range(pairs):
            noisy += noise() > NOISE_MAX
            kinds = ("plain", "encrypted") if number % 2 else ("encrypted", "plain")
            for kind in kinds:
                _use(pair, kind)
                throughput = await asyncio.to_thread(gigabits, pair.a, pair.b, seconds)
                values[THROUGHPUT][kind].append(round(throughput, 3))
                latency = await asyncio.to_thread(round_trip_us, pair.a, pair.b)
                values[LATENCY][kind].append(round(latency, 1))
                _unuse(pair, kind)
            print(
                f"pair {number + 1}: {values[THROUGHPUT]['plain'][-1]} {values[THROUGHPUT]['encrypted'][-1]} Gbit/s"
            )
        for side in (pair.a, pair.b):
            dropped = (await side.client.status()).counts.dropped
            print(f"dropped by {side.id}: {dropped}")
    return values, noisy


def _use(pair: OverlayPair, kind: str) -> None:
    if kind == "plain":
        pair.detach()
        pair.carry_by_vxlan()
    else:
        pair.attach()


def _unuse(pair: OverlayPair, kind: str) -> None:
    if kind == "plain":
        pair.uncarry()


def report(values: Values, noisy: int) -> str:
    """Markdown: medians with smallest and largest, ratios of medians."""
    rows = ["| what | plain VXLAN | encrypted | ratio | limit |", "|---|---|---|---|---|"]
    for what, kinds in values.items():
        ratio = median(kinds["encrypted"]) / median(kinds["plain"])
        limit = f">= {RATIO_MIN}" if what == THROUGHPUT else "–"
        rows.append(
            f"| {what} | {_spread(kinds['plain'])} | {_spread(kinds['encrypted'])} | {ratio:.2f} | {limit} |"
        )
    count = len(values[THROUGHPUT]["plain"])
    return "\n".join([*rows, "", f"{count} pairs, {noisy} of them begun on a busy machine."])


def _spread(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} .. {max(values):.3g})"


if __name__ == "__main__":
    main()

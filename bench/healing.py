"""Time until each kernel object of Skep is restored after it was removed by hand.

::

    .venv/bin/python -m bench.healing            # kept in results/
    .venv/bin/python -m bench.healing --dry      # only printed

Two nodes have plain, encrypted and ingress networks.  Every object in the namespaces of an overlay, an encrypted
overlay, the node and a container is removed, one after the other.  A time includes one reading of all objects.
"""

import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench.run import commit, measure_alone
from tests.support.networks.healing_lab import PLACES, healing_lab, taken_away

LIMIT_S = 5.0
SHOWN = 5


class Object(msgspec.Struct):
    """A kind of object.  ``seconds`` is None if it was not restored within a minute."""

    place: str
    name: str
    command: str
    seconds: float | None

    @property
    def sort_s(self) -> float:
        return float("inf") if self.seconds is None else self.seconds


class Result(msgspec.Struct):
    objects: list[Object]


def main() -> None:
    """Measure, and keep the result."""
    measure_alone(__doc__ or "", "healing", _measure, _text)


async def _measure() -> Result:
    objects = []
    for where in PLACES:
        with tempfile.TemporaryDirectory(prefix="skep-bench-") as directory:
            async with healing_lab(Path(directory)) as spaces:
                async for one in taken_away(spaces, where):
                    objects.append(Object(where, one.name, one.command, one.seconds))
                    print(f"{where}: {one.command}: {one.seconds}", flush=True)
    return Result(objects)


def _text(result: Result, busy: float) -> str:
    late = [one for one in result.objects if one.sort_s > LIMIT_S]
    verdict = "each within 5 s" if not late else f"{len(late)} later than 5 s"
    rows = []
    for where in PLACES:
        times = sorted(one.sort_s for one in result.objects if one.place == where)
        rows.append(f"| {where} | {len(times)} | {statistics.median(times):.2f} | {times[-1]:.2f} |")
    slowest = sorted(result.objects, key=lambda one: -one.sort_s)[:SHOWN]
    return "\n".join(
        (
            f"# Objects of the kernel that were taken away, {datetime.now(UTC):%F %H:%M} UTC, {commit()}",
            "",
            f"{len(result.objects)} objects: {verdict}.  Other work took {busy:.0%} of the machine just before.",
            "",
            "| namespace | objects | back after, s: median | longest |",
            "|---|---|---|---|",
            *rows,
            "",
            "The slowest:",
            "",
            *(f"* {one.sort_s:.2f} s, {one.place}: `{one.command}`" for one in slowest),
            "",
        )
    )


if __name__ == "__main__":
    main()

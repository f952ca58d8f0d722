"""How long each object that Skep has put into the kernel takes to be back when it was taken away by hand.

::

    .venv/bin/python -m bench.healing            # kept in results/
    .venv/bin/python -m bench.healing --dry      # printed alone

Two nodes with plain, encrypted and ingress networks; every object of an overlay's, an encrypted overlay's, the node's
own and a container's namespace is taken away, one after the other.  A time includes one reading of everything there.
"""

import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench.run import commit, measure_alone
from tests.support.healing_lab import PLACES, healing_lab, taken_away

LIMIT_S = 5.0
SHOWN = 5


class Object(msgspec.Struct):
    """``seconds``: None: it was not back within a minute."""

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
    measure_alone(__doc__ or "", "healing", _measured, _text)


async def _measured() -> Result:
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

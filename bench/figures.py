"""Results of the network benchmarks with limits, compared and printed in one format.

Each of these modules has a function that returns its results.  ``run_alone`` runs one, and ``bench.networks`` runs
all.
"""

import argparse
import asyncio
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Protocol, TypeAlias, TypeVar

import msgspec

from bench.docker_lab import found_dockerd
from bench.machine import is_kept, noise
from bench.run import BEFORE, commit, result_name, write_result
from skep import __version__

T = TypeVar("T")
K = TypeVar("K")

PAIRS = 7
_WINDOW_S = 0.3


class System(Protocol):
    """One of the two measured systems."""

    system: str


L = TypeVar("L", bound=System)


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One result, with all values that it is computed from."""

    number: int
    """Number in the list of promised results (``bench/README.md``), or 0 for information only."""
    what: str
    unit: str
    values: tuple[float, ...]
    """One ratio per pair."""
    quantile: float = 0.5
    """Quantile of the values that is compared with the limit (0.5 is the median)."""
    limit: float | None = None
    is_least: bool = False
    """Whether the limit is a minimum instead of a maximum."""
    sides: Mapping[str, tuple[float, ...]] = {}
    """Measurements of each side, pair by pair, in the measurement's own unit."""
    busy: tuple[float, ...] = ()
    """Share of the machine that was busy with other work before each value."""

    @property
    def value(self) -> float:
        """Return the value that is compared with the limit."""
        return median(self.values) if self.quantile == 0.5 else at_quantile(self.values, self.quantile)

    @property
    def holds(self) -> bool | None:
        """Return whether the value keeps its limit, or None without a limit."""
        if self.limit is None:
            return None
        return self.value >= self.limit if self.is_least else self.value <= self.limit


Sides: TypeAlias = Mapping[str, Sequence[float]]
"""Measurements of both sides, pair by pair."""
Measure: TypeAlias = Callable[[int], list[Figure]]
"""Measures a number of pairs."""


def ratio(
    number: int,
    what: str,
    sides: Sides,
    *,
    limit: float | None = None,
    is_least: bool = False,
    busy: Sequence[float] = (),
) -> Figure:
    """Return the second side divided by the first, pair by pair."""
    first, second = sides.values()
    return Figure(
        number=number,
        what=what,
        unit="ratio",
        values=tuple(mine / other for other, mine in zip(first, second, strict=True)),
        limit=limit,
        is_least=is_least,
        sides={name: tuple(values) for name, values in sides.items()},
        busy=tuple(busy),
    )


def at_quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of all values do not exceed (the nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


async def run_undisturbed(wanted: int, one: Callable[[int], Awaitable[T]]) -> tuple[list[T], list[float]]:
    """Call ``one`` with the pair's number until ``wanted`` pairs were undisturbed.  Return results and prior load.

    A pair that began while other work kept the machine busy is repeated under the next number, which reverses the order
    of its sides.  There are at most twice as many pairs as ``wanted``.
    """
    kept: list[T] = []
    busy: list[float] = []
    tried = 0
    while len(kept) < wanted:
        tried += 1
        before = await asyncio.to_thread(noise, _WINDOW_S)
        result = await one(tried)
        if is_kept(before, tried, len(kept), wanted):
            kept.append(result)
            busy.append(round(before, 3))
    return kept, busy


async def alternate(
    ways: Sequence[K], number: int, turns: int, measure: Callable[[K], Awaitable[float]]
) -> dict[K, float]:
    """Measure each way in the pair ``number``.

    The result is the median of short alternating turns, so that noise affects all ways equally.

    With few processors it also matters on which of them the two ends of a turn happen to be.  A median of five ignores
    one outlier.
    """
    taken: dict[K, list[float]] = {way: [] for way in ways}
    for turn in range(turns):
        for way in ways if (number + turn) % 2 else reversed(ways):
            taken[way].append(await measure(way))
    return {way: median(values) for way, values in taken.items()}


def table(figures: Sequence[Figure]) -> str:
    """Return the results as a Markdown table."""
    rows = ["| | what | values | limit | |", "|---|---|---|---|---|"]
    for one in figures:
        spread = f"{one.value:.3g} {one.unit} ({min(one.values):.3g} .. {max(one.values):.3g}, n={len(one.values)})"
        sides = "".join(f"; {name} {median(values):.3g}" for name, values in one.sides.items())
        limit = "" if one.limit is None else f"{'at least' if one.is_least else 'at most'} {one.limit:g}"
        verdict = {True: "kept", False: "**missed**", None: ""}[one.holds]
        rows.append(f"| {one.number or ''} | {one.what} | {spread}{sides} | {limit} | {verdict} |")
    return "\n".join(rows)


def document(title: str, now: datetime, at: str, figures: Sequence[Figure], notes: Sequence[str] = ()) -> str:
    """Return the whole result for people."""
    busy = [share for one in figures for share in one.busy]
    lines = [
        f"# {title}, {now:%Y-%m-%d %H:%M} UTC, commit {at}",
        "",
        f"{os.cpu_count()} processors, {platform.system()} {platform.release()}.",
        "What is judged (the median where nothing else is said), smallest and largest, the medians of both sides.",
        "Share of the machine that others kept busy before a value:",
        f"median {median(busy or [0]):.0%}, largest {max(busy or [0]):.0%}.",
        "",
        table(figures),
        "",
        *(f"* {note}" for note in notes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def keep(
    title: str, subject: str, now: datetime, figures: Sequence[Figure], notes: Sequence[str] = ()
) -> None:
    """Write the result, for people and for programs.  ``subject`` is the suffix of the files' names."""
    at = commit()
    plain = [msgspec.to_builtins(one) | {"value": one.value, "holds": one.holds} for one in figures]
    result = {
        "date": f"{now:%Y-%m-%d %H:%M UTC}",
        "commit": at,
        "versions": versions(),
        "figures": plain,
        "notes": list(notes),
    }
    write_result(result_name(now, at, subject), document(title, now, at, figures, notes), result)


def versions() -> dict[str, str]:
    """Return the versions of Skep, and of Docker Engine and Podman if this machine has them."""
    found = {"skep": __version__}
    for system, path in (("docker", found_dockerd()), ("podman", shutil.which("podman"))):
        if path is not None:
            response = subprocess.run([path, "--version"], check=True, capture_output=True, text=True)
            found[system] = response.stdout.partition(",")[0].strip()
    return found


def run_alone(about: str, subject: str, measure: Measure) -> None:
    """Run one module as a command: measure, print, keep.  ``measure`` takes the number of pairs."""
    parser = _parser(about)
    options = parser.parse_args()
    now = _begin()
    _finish(about, subject, now, measure(options.pairs), dry=options.dry)


def run_against(about: str, subject: str, measure: Callable[[int, Path], list[Figure]]) -> None:
    """Run one module as a command that compares this clone with an earlier commit.

    ``measure`` takes the number of pairs and the path of the other clone.  The exit status is 1 if a limit was missed.
    """
    parser = _parser(about)
    parser.add_argument(
        "--before", type=Path, required=True, help="a clone of an earlier commit, with its .venv"
    )
    options = parser.parse_args()
    now = _begin()
    figures = measure(options.pairs, options.before)
    notes = [f"{BEFORE}: commit {commit(options.before)}"]
    _finish(about, subject, now, figures, notes, dry=options.dry)
    if any(one.holds is False for one in figures):
        raise SystemExit(1)


def run_parts(about: str, subject: str, parts: Mapping[str, Measure]) -> None:
    """Run a module of several parts as a command.  ``--parts`` selects some.

    A part that fails is named in the result, and the others continue.  The exit status is 1 if a limit was missed or a
    part failed.
    """
    parser = _parser(about)
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=list(parts), help=",".join(parts)
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(parts)):
        parser.error(f"unknown part {', '.join(unknown)}; known: {', '.join(parts)}")
    now = _begin()
    figures, notes = measured_parts({name: parts[name] for name in options.parts}, options.pairs)
    _finish(about, subject, now, figures, notes, dry=options.dry)
    if notes or any(one.holds is False for one in figures):
        raise SystemExit(1)


def measured_parts(parts: Mapping[str, Measure], pairs: int) -> tuple[list[Figure], list[str]]:
    """Return the results of all parts by their numbers, and the errors of failed parts."""
    figures: list[Figure] = []
    notes: list[str] = []
    for name, measure in parts.items():
        began = time.monotonic()
        try:
            figures += measure(pairs)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            notes.append(f"{name} failed: {error}")
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return sorted(figures, key=lambda one: one.number or math.inf), notes


def side_by_side(
    labs: Sequence[L], pairs: int, measure: Callable[[L], Mapping[str, float]]
) -> tuple[Mapping[str, Sides], list[float]]:
    """Measure each metric of ``measure`` alternately on both systems.  Return also the load before each pair."""

    async def one(number: int) -> dict[str, Mapping[str, float]]:
        return {
            lab.system: await asyncio.to_thread(measure, lab)
            for lab in (labs if number % 2 else reversed(labs))
        }

    found, busy = asyncio.run(run_undisturbed(pairs, one))
    sides: dict[str, dict[str, list[float]]] = {}
    for pair in found:
        for lab in labs:
            for metric, value in pair[lab.system].items():
                sides.setdefault(metric, {}).setdefault(lab.system, []).append(value)
    return sides, busy


def _parser(about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--dry", action="store_true", help="keep no result")
    return parser


def _begin() -> datetime:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up after SIGTERM as well
    return datetime.now(UTC)


def _finish(
    about: str,
    subject: str,
    now: datetime,
    figures: Sequence[Figure],
    notes: Sequence[str] = (),
    *,
    dry: bool,
) -> None:
    title = about.partition("\n")[0].partition(":")[0]
    print(document(title, now, commit(), figures, notes))
    if not dry:
        keep(title, subject, now, figures, notes)

"""Runs the scenarios on Docker Swarm and on Skep in alternating pairs and keeps the results.

With ``--beside``, a clone of an earlier commit is measured in turn with them, which shows regressions since then.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from bench.docker_lab import DockerLab, put_engine_first
from bench.facts import facts
from bench.machine import is_kept, noise
from bench.report import document
from bench.scenarios import FRESH, SCENARIOS, clear
from bench.skep_lab import SkepLab
from skep.playground.images.busybox import busybox_archive

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"
BEFORE = "before"
"""Name of the earlier commit's system in results."""


def main() -> None:
    options = _options()
    archive = asyncio.run(busybox_archive())
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir=options.dir) as directory:
        if options.engine:
            put_engine_first(options.engine, Path(directory) / "engine")
        labs: list[DockerLab | SkepLab] = [
            DockerLab(Path(directory) / "docker"),
            SkepLab(Path(directory) / "skep"),
        ]
        if options.beside is not None:
            before = SkepLab(Path(directory) / BEFORE, BEFORE, options.beside / ".venv/bin/skep")
            before.system = BEFORE
            labs.append(before)
        try:

            def begin(lab: DockerLab | SkepLab) -> None:
                _say(f"starting {lab.system} ...")
                lab.up(archive.data, archive.image_id)

            for lab in labs:
                begin(lab)
            result = _measure(labs, options, begin)
        finally:
            for lab in labs:
                lab.down()
    keep(result, "-commits" if options.beside else f"-{options.engine}" if options.engine else "")


def _measure(labs: list[Any], options: argparse.Namespace, begin: Callable[[Any], None]) -> dict[str, Any]:
    """Run every scenario on both systems.  ``begin`` restarts a system."""
    started = time.monotonic()
    known = {lab.system: facts(lab) for lab in labs}
    for system, about in known.items():
        _say(f"{system}: " + ", ".join(f"{fact} {value}" for fact, value in about.items()))
    for lab in labs:
        clear(lab)
    values: dict[str, dict[str, list[float]]] = {}
    busy_before: list[float] = []
    for name in options.scenarios:
        wanted = options.pairs
        kept = tried = 0
        while kept < wanted:
            tried += 1
            if name in FRESH:
                for lab in labs:
                    begin(lab)
            before = noise()
            pair = {}
            for lab in labs if tried % 2 else reversed(labs):
                pair[lab.system] = SCENARIOS[name](lab)
            pair = {lab.system: pair[lab.system] for lab in labs}
            if not is_kept(before, tried, kept, wanted):
                _say(f"{name}: the machine was {before:.0%} busy, once more")
                continue
            kept += 1
            busy_before.append(before)
            for system, metrics in pair.items():
                for metric, value in metrics.items():
                    values.setdefault(metric, {}).setdefault(system, []).append(value)
            _say(f"{name} {kept}/{wanted}: {_pair_text(pair)}")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "beside": commit(options.beside) if options.beside else "",
        "machine": f"{os.cpu_count()} processors, {platform.system()} {platform.release()}",
        "pairs": options.pairs,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "noise": busy_before,
        "facts": known,
        "values": values,
    }


def _pair_text(pair: dict[str, dict[str, float]]) -> str:
    """Return ``create 1 to running, s: 1.2 / 0.2``: the values of Docker, Skep, and the earlier commit if there is
    one.
    """
    first, *others = pair.values()
    return "; ".join(
        f"{metric}: " + " / ".join(f"{values[metric]:.3g}" for values in (first, *others))
        for metric in first
        if all(metric in values for values in others)
    )


def keep(result: dict[str, Any], subject: str = "") -> None:
    """Write the result files, for programs and for people.  ``subject`` is the suffix of their names."""
    RESULTS.mkdir(exist_ok=True)
    minute = result["date"].removesuffix(" UTC").replace(" ", "-").replace(":", "")
    text = document(result)
    write_result(f"{minute}-{result['commit']}{subject}", text, result)
    print(text)


def measure_alone(
    doc: str, subject: str, measured: Callable[[], Coroutine[Any, Any, T]], text: Callable[[T, float], str]
) -> None:
    """Run a benchmark of only Skep as a command.  ``--dry`` keeps nothing.

    Args:
        measured: returns the result, which is kept for programs.
        text: renders the result for people, with the share of the machine that was busy before.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="keep nothing")
    is_dry = parser.parse_args().dry
    busy = noise()
    result = asyncio.run(measured())
    document_text = text(result, busy)
    print(document_text)
    if not is_dry:
        name = result_name(datetime.now(UTC), commit(), subject)
        write_result(name, document_text, msgspec.to_builtins(result))


def result_name(now: datetime, at: str, subject: str) -> str:
    """Return the name of the files of a result measured ``now`` at the commit ``at``."""
    return f"{now:%Y-%m-%d-%H%M}-{at}-{subject}"


def write_result(name: str, text: str, result: Any) -> None:
    """Write one result twice: ``text`` for people, ``result`` (plain values) for programs."""
    (RESULTS / f"{name}.md").write_text(text)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def figures_page(title: str, busy: float, rows: Iterable[tuple[str, str]]) -> str:
    """Return the text of a result of one system.

    Args:
        busy: Share of the machine that other work took just before.
        rows: Names and figures.
    """
    head = (
        f"# {title}, {datetime.now(UTC):%F %H:%M} UTC, {commit()}",
        "",
        f"Other work took {busy:.0%} of the machine just before, which can double times.",
        "",
        "| what | figure |",
        "|---|---|",
    )
    return "\n".join((*head, *(f"| {what} | {figure} |" for what, figure in rows), ""))


def commit(top: Path = Path(__file__).parent) -> str:
    """Return the short name of the commit that is checked out in the clone at ``top``."""
    response = subprocess.run(
        ["git", "-C", str(top), "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True
    )
    return response.stdout.strip() or "unknown"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__)
    parser.add_argument("--pairs", type=int, default=7, help="pairs per scenario (default 7)")
    parser.add_argument(
        "--dir", default="/var/tmp", help="where both nodes keep their state; not on overlayfs"
    )
    parser.add_argument(
        "--scenarios",
        type=lambda text: text.split(","),
        default=list(SCENARIOS),
        help=f"comma-separated: {', '.join(SCENARIOS)}",
    )
    parser.add_argument(
        "--engine", default="", help="Debian suite of the Docker Engine, default this machine's"
    )
    parser.add_argument("--beside", type=Path, help="a clone of an earlier commit, with its .venv")
    options = parser.parse_args()
    unknown = sorted(set(options.scenarios) - set(SCENARIOS))
    if unknown:
        parser.error(f"unknown scenario {', '.join(unknown)}; known: {', '.join(SCENARIOS)}")
    return options


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

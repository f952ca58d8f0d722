"""Small requests to a manager, alternately: this clone, a clone of another commit, and a Docker Engine.

    python -m bench.requests --rounds 60 --beside ../other-clone

Each round sends every system the same requests, over a kept connection and over new ones, in alternating order.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.docker_lab import DockerLab
from bench.engine import Engine
from bench.run import commit, result_name, write_result
from bench.scenarios import clear, service
from bench.skep_lab import SkepLab
from skep.playground.images.busybox import busybox_archive

_PER_ROUND = 10
Values = dict[str, dict[str, list[float]]]
"""Milliseconds by request and system."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--beside", type=Path, help="a clone of another commit, with its .venv")
    parser.add_argument("--no-docker", action="store_true")
    options = parser.parse_args()
    archive = asyncio.run(busybox_archive())
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory, ExitStack() as stack:
        labs: dict[str, Any] = {"skep": SkepLab(Path(directory) / "skep", "requests")}
        if options.beside is not None:
            skep = options.beside / ".venv/bin/skep"
            labs["skep before"] = SkepLab(Path(directory) / "before", "before", skep)
        if not options.no_docker:
            labs["docker"] = DockerLab(Path(directory) / "docker")
        for lab in labs.values():
            stack.callback(lab.down)
            lab.up(archive.data, archive.image_id)
        values = _measure(labs, options.rounds)
    now = datetime.now(UTC)
    text = _table(values, f"{now:%Y-%m-%d %H:%M} UTC, commit {commit()}, {options.rounds} rounds")
    write_result(result_name(now, commit(), "requests"), text, values)
    print(text)


def _measure(labs: dict[str, Any], rounds: int) -> Values:
    values: Values = {}
    for number in range(rounds):
        for system in sorted(labs, reverse=number % 2 == 1):
            for request, took_ms in _round(labs[system]):
                values.setdefault(request, {}).setdefault(system, []).append(took_ms)
    return values


def _round(lab: Any) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []

    def timed(request: str, send: Callable[[], object]) -> None:
        began = time.perf_counter()
        send()
        found.append((request, (time.perf_counter() - began) * 1e3))

    def on_a_new_connection() -> None:
        engine = Engine(lab.engine.path)
        engine.raw("GET", "/nodes")
        engine.close()

    lab.engine.raw("GET", "/services")
    for path in ("/_ping", "/services", "/nodes"):
        for _ in range(_PER_ROUND):
            timed(f"GET {path}", lambda path=path: lab.engine.raw("GET", path))  # type: ignore[misc]
    for number in range(_PER_ROUND // 2):
        timed("POST /services/create", lambda number=number: service(lab, f"r{number}", 0))  # type: ignore[misc]
    clear(lab)
    for _ in range(_PER_ROUND):
        timed("GET /nodes, new connection", on_a_new_connection)
    return found


def _table(values: Values, title: str) -> str:
    lines = [
        f"# Small requests, ms ({title})",
        "",
        "| request | system | p10 | p50 | p90 | p50, of Docker's |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for request, by_system in values.items():
        docker = quantile(by_system["docker"], 0.5) if "docker" in by_system else float("nan")
        for system, found in by_system.items():
            p10, p50, p90 = (quantile(found, share) for share in (0.1, 0.5, 0.9))
            lines.append(f"| {request} | {system} | {p10:.2f} | {p50:.2f} | {p90:.2f} | {p50 / docker:.2f} |")
    return "\n".join(lines) + "\n"


def quantile(values: list[float], share: float) -> float:
    """Return the value below which ``share`` (0 to 1) of the values are."""
    return sorted(values)[int(len(values) * share)]


if __name__ == "__main__":
    main()

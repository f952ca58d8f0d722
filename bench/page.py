"""Writes the performance page and every figure that other pages repeat from the kept results: ``make bench-page``.

Each figure comes from the newest result of a quiet machine that has both systems, however few values it has.  No other
rule selects a result, so a newer and worse figure replaces an older and better one.  Results with a newer Docker
Engine (``--engine``) and with Podman (``bench.single``) have tables of their own.

Pages mark a figure with its key and side, ``<!--task-memory.skep-->0.37 MiB<!---->``, or a whole table with a pair of
comments. The text between the marks is written here.
"""

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec

from bench.machine import BUSY

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "bench/results"
PAGE: Final = ROOT / "docs/guide/performance.md"
WANTED: Final = 7
"""Pairs that ``make bench`` measures by default.  The page counts the figures that have fewer."""
WIDTH: Final = 120
"""Columns of a page's prose."""
UNKNOWN: Final = "not recorded"
NEWER_ENGINE: Final = 23
"""First major version of Docker Engine after 20.10.  Its results do not replace older results of 20.10."""
ALONE: Final = ("start", "exec", "removal")
"""Measurements of ``bench.single``, in the order of the page."""
_MACHINE = re.compile(r"^(\d+ processors), Linux (\S+?)\.(?:\s|$)", re.MULTILINE)
_INLINE = re.compile(r"<!--([a-z0-9-]+)\.(docker|skep|ratio)-->.*?<!---->")
_BLOCK = re.compile(r"(<!-- ([a-z-]+): written by make bench-page -->\n).*?(<!-- end -->)", re.DOTALL)


class Wanted(msgspec.Struct, frozen=True):
    """A figure of the page: its name, and where results have it."""

    key: str
    what: str
    metric: str
    unit: str
    in_readme: bool = False
    sides: tuple[str, str] = ("docker", "skep")
    """Names of both systems in the result."""
    is_more_better: bool = False


FIGURES: Final = (
    Wanted(
        "manager-processor", "idle manager of three: processor", "idle manager, % of a processor", "%", True
    ),
    Wanted("manager-memory", "idle manager of three: memory", "idle manager, memory (PSS), MiB", "MiB", True),
    Wanted("worker-processor", "idle worker: processor", "idle worker, % of a processor", "%"),
    Wanted("worker-memory", "idle worker: memory", "idle worker, memory (PSS), MiB", "MiB"),
    Wanted("create-request", "request to create a service", "POST /services/create, ms p50", "ms", True),
    Wanted("single-memory", "single manager without tasks: memory", "memory idle, MiB", "MiB"),
    Wanted("build", "build of ten steps with BuildKit", "BuildKit, ten steps, docker command, s", "s"),
    Wanted(
        "stream",
        "one TCP stream on an overlay",
        "between whole nodes, one TCP stream, Gbit/s: overlay beside Docker's",
        "Gbit/s",
        False,
        ("Docker's overlay", "overlay"),
        True,
    ),
    Wanted(
        "worker-alone",
        "only idle worker of its machine: memory",
        "idle worker alone, memory (PSS), MiB",
        "MiB",
    ),
    Wanted("pull", "pull and unpack of 300 MB", "pull and unpack of 300 MB, s", "s"),
    Wanted("exec", "exec in a task", "exec, ms p50", "ms"),
    Wanted("start", "20 tasks: created until they run", "create 20 to running, s", "s", True),
    Wanted(
        "start-processor", "start of one of 20 tasks: processor time", "create 20, processor s per task", "s"
    ),
    Wanted("removal", "20 tasks: removed", "remove 20 to containers gone, s", "s"),
    Wanted("task-memory", "memory for each task", "memory per task, MiB", "MiB", True),
    Wanted(
        "update",
        "rolling update of 10 tasks, 2 at a time",
        "rolling update, stop-first: all new tasks run, s",
        "s",
    ),
    Wanted("crash", "task crashed: its replacement runs", "crash to replacement, s", "s"),
    Wanted(
        "worker-lost",
        "worker lost: its tasks run elsewhere",
        "worker killed: its tasks running elsewhere, s",
        "s",
        True,
    ),
    Wanted(
        "leader-write", "leader lost: first write accepted", "leader lost: first write accepted, s", "s", True
    ),
    Wanted("leader-tasks", "leader lost: its tasks replaced", "leader lost: its tasks replaced, s", "s"),
)


class Result(msgspec.Struct, frozen=True):
    """A kept result: when and where it was measured, and its values."""

    name: str
    date: str
    commit: str
    processors: str
    kernel: str
    versions: Mapping[str, str]
    values: Mapping[str, Mapping[str, Sequence[float]]]
    """Values by metric and system."""
    busy: Mapping[str, float]
    """Share of the machine that was busy with other work, by metric."""
    pairs: int | None = None
    """Pairs of runs, or None if every pair has one value, so that the values are the pairs."""

    def version(self, system: str) -> str:
        """Return a system's version without its name, or an empty text."""
        return re.sub(r"^\D+", "", self.versions.get(system, ""))

    @property
    def is_of_newer_engine(self) -> bool:
        """Return whether Docker's side is a newer engine than 20.10.  Results without a version are of 20.10."""
        major = self.version("docker").partition(".")[0]
        return major.isdecimal() and int(major) >= NEWER_ENGINE


class Figure(msgspec.Struct, frozen=True):
    """A figure, measured."""

    wanted: Wanted
    docker: Sequence[float]
    skep: Sequence[float]
    result: Result

    @property
    def n(self) -> int:
        """Return how many pairs have values of both systems.

        A pair may have several values, one for each node. They share the pair's machines, and repeat no run.
        """
        values = min(len(self.docker), len(self.skep))
        return values if self.result.pairs is None else min(values, self.result.pairs)

    @property
    def ratio(self) -> float:
        """Return Skep's cost divided by Docker's.  Above 1, Skep loses."""
        docker, skep = median(self.docker), median(self.skep)
        return docker / skep if self.wanted.is_more_better else skep / docker

    def text(self, side: str) -> str:
        """Return a median with its unit, or how many times as much the worse system needs."""
        if side == "ratio":
            return f"{max(self.ratio, 1 / self.ratio):.2g} times"
        return f"{median(self.docker if side == 'docker' else self.skep):.3g} {self.wanted.unit}"


def parsed(name: str, text: str, data: Any) -> Result | None:
    """Return a result, or None if it does not compare two systems.

    Args:
        text: the file for people, which names the machine.
        data: the file for programs.
    """
    machine = _MACHINE.search(text)
    if machine is None or not isinstance(data, dict) or "commit" not in data:
        return None
    if "figures" in data:
        values = {one["what"]: one["sides"] for one in data["figures"] if one["sides"]}
        busy = {one["what"]: median(one["busy"] or [0.0]) for one in data["figures"]}
    else:
        values = data["values"]
        busy = dict.fromkeys(values, median(data["noise"] or [0.0]))
    facts = {system: facts["version"] for system, facts in data.get("facts", {}).items()}
    versions = data.get("versions", facts)
    return Result(
        name,
        data["date"],
        data["commit"],
        machine[1],
        machine[2],
        versions,
        values,
        busy,
        data.get("pairs"),
    )


def selected(wanted: Wanted, results: Sequence[Result]) -> Figure | None:
    """Return a figure from the newest result that has it, or None.  Results are in the order of their dates."""
    first, second = wanted.sides
    for one in reversed(results):
        sides = one.values.get(wanted.metric, {})
        if sides.get(first) and sides.get(second) and one.busy[wanted.metric] <= BUSY:
            return Figure(wanted, sides[first], sides[second], one)
    return None


def figures(results: Sequence[Result]) -> list[Figure]:
    """Return all figures that results have.  Those in which Skep loses most come first."""
    found = [one for wanted in FIGURES if (one := selected(wanted, results)) is not None]
    return sorted(found, key=lambda one: -one.ratio)


def page(found: Sequence[Figure], fault_run: str, newer: Sequence[Figure] = (), alone: str = "") -> str:
    """Return the performance page.

    Args:
        newer: figures with a newer Docker Engine.
        alone: the section on one container, with Podman.
    """
    few = sum(one.n < WANTED for one in found)
    lost = sum(one.ratio > 1 for one in found)
    used = _used([*found, *newer])
    return "\n".join(
        [
            "# Performance",
            "",
            "<!-- Written by `make bench-page`; edit bench/page.py. -->",
            "",
            _paragraph(
                "You find here how fast Skep is, and how much memory and processor time it uses, measured against",
                f"Docker Swarm. Skep loses in {lost} of {len(found)} figures, and these rows come first.",
            ),
            "## Figures",
            "",
            _paragraph(
                "Each cell has the median, with the smallest and the largest value. Both systems ran in turn on one",
                "machine, with the same program through the same API. `n` is the number of such pairs, of which each",
                "has one or more values of each system. The ratio is Skep's value divided by Docker's.",
                "For a throughput it is the inverse, so above 1 Skep always loses. Memory is the proportional set",
                "size of all daemons, etcd included.",
            ),
            *table(found, used),
            "",
            _paragraph(
                f"{few} of {len(found)} figures have fewer than {WANTED} pairs. Read those as an",
                "order of magnitude.",
            ),
            *_newer_section(newer, used),
            *((alone, "") if alone else ()),
            "## Fault run",
            "",
            _paragraph(fault_run.rstrip(), "Eight nodes ran ten stacks under load, with an upgrade."),
            "## Results",
            "",
            _paragraph(
                "Each figure comes from the newest result that has it and began on a quiet machine: other programs",
                f"used at most {BUSY:.0%} of the processors. The files in `bench/results/` have every single value.",
            ),
            "| | result | date | commit | machine | kernel | Docker Engine | Skep |",
            "|---|---|---|---|---|---|---|---|",
            *(f"| {number} | {_result_cells(one)} |" for number, one in enumerate(used, 1)),
            "",
            _paragraph(
                "A small difference on one machine says little about your machines. Measure your own: `make bench`",
                "takes about half an hour. See [how the programs measure](../../bench/README.md), and [how much",
                "memory your cluster needs](sizing.md).",
            ),
        ]
    )


def _paragraph(*parts: str) -> str:
    text = textwrap.fill(" ".join(parts), WIDTH, break_long_words=False, break_on_hyphens=False)
    return text + "\n"


def _newer_section(newer: Sequence[Figure], used: Sequence[Result]) -> Iterator[str]:
    if newer:
        versions = " and ".join(sorted({one.result.version("docker") for one in newer}))
        yield "## With a newer Docker Engine"
        yield ""
        yield _paragraph(
            f"The same measurements with Docker Engine {versions}, in a root file system of its own:"
        )
        yield from table(newer, used)
        yield ""


def alone_section(results: Sequence[Result]) -> str:
    """Return the section on one container, or nothing without a result of a quiet machine that has Podman."""
    for one in reversed(results):
        rows = {what: one.values.get(f"{what} of one container, s", {}) for what in ALONE}
        if all(
            "podman" in sides and one.busy[f"{what} of one container, s"] <= BUSY
            for what, sides in rows.items()
        ):
            break
    else:
        return ""
    lines = [
        "## One container",
        "",
        _paragraph(
            "A container is started, gets a command, and is removed, each with the system's own command, runc and the",
            f"same image. Podman is {one.version('podman')}, the Docker Engine {one.version('docker')}, with",
            f"{min(len(values) for sides in rows.values() for values in sides.values())} values of each system",
            f"([`{one.name}`](../../bench/results/{one.name}.md)).",
        ),
        "| one container | Docker Engine | Podman | Skep |",
        "|---|---|---|---|",
    ]
    for what, sides in rows.items():
        best = min(median(values) for values in sides.values())
        cells = (
            _bold(median(sides[side]) == best, sides[side], "s") for side in ("docker", "podman", "skep")
        )
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join((*lines, ""))


def table(found: Sequence[Figure], used: Sequence[Result] = ()) -> Iterator[str]:
    """Yield the lines of a table.  Results are numbered as in ``used``, or among themselves."""
    number = {one.name: number for number, one in enumerate(used or _used(found), 1)}
    yield "| figure | Docker Swarm | Skep | ratio | n | result |"
    yield "|---|---|---|---|---|---|"
    for one in found:
        unit = one.wanted.unit
        cells = (_bold(one.ratio > 1, one.docker, unit), _bold(one.ratio <= 1, one.skep, unit))
        link = f"[{number[one.result.name]}](#results)"
        yield f"| {one.wanted.what} | {cells[0]} | {cells[1]} | {one.ratio:.2f} | {one.n} | {link} |"


def _used(found: Iterable[Figure]) -> list[Result]:
    return sorted({one.result.name: one.result for one in found}.values(), key=lambda one: one.name)


def _bold(is_better: bool, values: Sequence[float], unit: str) -> str:
    middle = f"{median(values):.3g} {unit}"
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    return (f"**{middle}**" if is_better else middle) + spread


def _result_cells(one: Result) -> str:
    docker, skep = (one.version(system) or UNKNOWN for system in ("docker", "skep"))
    link = f"[`{one.name}`](../../bench/results/{one.name}.md)"
    cells = (link, one.date, f"`{one.commit}`", one.processors, one.kernel, docker, skep)
    return " | ".join(cells)


def readme_table(found: Iterable[Figure]) -> str:
    """Return the table of the README: medians alone."""
    rows = ["| | Docker Swarm | Skep | n |", "|---|---|---|---|"]
    for one in found:
        if one.wanted.in_readme:
            docker, skep = one.text("docker"), one.text("skep")
            docker, skep = (f"**{docker}**", skep) if one.ratio > 1 else (docker, f"**{skep}**")
            rows.append(f"| {one.wanted.what} | {docker} | {skep} | {one.n} |")
    return "\n".join(rows) + "\n"


def fault_run_text(name: str, text: str, top: str) -> str:
    """Return one paragraph on a fault run, from its result.  ``top`` leads from the page to the repository's root."""
    minutes = _only(r"^# .*: (\d+) minutes", text)
    promised, failed = (
        int(_only(pattern, text)) for pattern in (r"(\d+) promised req", r"requests, (\d+) failed")
    )
    killed, lost = (_only(rf"^\| {what} \| (\d+) ", text) for what in ("daemon killed", "machine lost"))
    return _paragraph(
        f"In a [fault run of {minutes} minutes]({top}bench/results/{name}.md) with {killed} killed daemons",
        f"and {lost} lost machines, {failed or 'none'} of {promised:,} promised requests failed.",
    )


def _only(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ValueError(f"the result has no line like {pattern}")
    return found[1]


def filled(text: str, found: Sequence[Figure], blocks: Mapping[str, str]) -> str:
    """Return a page with its marked figures and blocks as they are now.  Raises KeyError for an unknown mark."""
    figure = {one.wanted.key: one for one in found}
    text = _BLOCK.sub(lambda mark: f"{mark[1]}\n{blocks[mark[2]]}\n{mark[3]}", text)
    return _INLINE.sub(lambda mark: f"<!--{mark[1]}.{mark[2]}-->{figure[mark[1]].text(mark[2])}<!---->", text)


def kept_results() -> list[Result]:
    """Return all results of two systems in the order of their dates."""
    read = (
        parsed(path.stem, path.with_suffix(".md").read_text(), json.loads(path.read_text()))
        for path in sorted(RESULTS.glob("*.json"))
    )
    return [one for one in read if one is not None]


def marked_pages() -> list[Path]:
    """Return all pages that have marked figures."""
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    return [one for one in pages if _INLINE.search(text := one.read_text()) or _BLOCK.search(text)]


def written() -> dict[Path, str]:
    """Return the performance page and all marked pages as they should be."""
    results = kept_results()
    found = figures([one for one in results if not one.is_of_newer_engine])
    newer = figures([one for one in results if one.is_of_newer_engine])
    newest = sorted(RESULTS.glob("day-*.md"))[-1]
    blocks = {"figures": f"{readme_table(found)}\n{fault_run_text(newest.stem, newest.read_text(), '')}"}
    texts = {one: filled(one.read_text(), found, blocks) for one in marked_pages()}
    told = fault_run_text(newest.stem, newest.read_text(), "../../")
    return texts | {PAGE: page(found, told, newer, alone_section(results))}


def main() -> None:
    for path, text in written().items():
        path.write_text(text)


if __name__ == "__main__":
    main()

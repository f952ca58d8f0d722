"""Results as a Markdown table: medians with smallest and largest, ratios, and the limit of each ratio."""

from statistics import median
from typing import Any

LIMITS = {
    "create 1 to running, s": 0.5,
    "create 20 to running, s": 0.4,
    "create 50 to running, s": 0.4,
    "remove 1 to containers gone, s": 0.4,
    "remove 20 to containers gone, s": 0.4,
    "remove 50 to containers gone, s": 0.4,
    "create 20 on an overlay to running, s": 0.4,
    "remove 20 on an overlay to containers gone, s": 0.4,
    "crash to replacement, s": 0.5,
    "memory idle, MiB": 1.5,
    "memory per task, MiB": 0.4,
    "list 1000 tasks, ms p50": 1.0,
    "list 3000 tasks, ms p50": 1.0,
    "leader lost: first write accepted, s": 0.1,
    "leader lost: its tasks replaced, s": 0.2,
    "worker killed: its tasks running elsewhere, s": 0.35,
    "worker's cable out: its tasks running elsewhere, s": 0.35,
    "rolling update, stop-first: old tasks stopped, s": 0.5,
    "rolling update, stop-first: completed, s": 0.5,
    "rolling update, start-first: old tasks stopped, s": 0.5,
    "rolling update, start-first: completed, s": 0.5,
    "swarm init, s": 1.0,
    "swarm join of a manager, s": 1.0,
    "swarm join of a worker, s": 1.0,
}
"""Largest ratio of Skep's value to Docker's that the project promises."""

ABSOLUTE = {
    "GET /_ping, ms p50": 2.0,
    "GET /services, ms p50": 2.0,
    "GET /nodes, ms p50": 2.0,
    "POST /services/create, ms p50": 2.0,
    "growth by churn": 1.2,
}
"""Largest value of Skep's own result that the project promises."""


def table(pairs: dict[str, dict[str, list[float]]]) -> str:
    """Render ``{metric: {"docker": [...], "skep": [...]}}`` as Markdown.  ``"before"`` adds its values and a ratio to
    them.
    """
    beside = any("before" in values for values in pairs.values())
    rows = ["| what | Docker Swarm | Skep | ratio | limit | |", "|---|---|---|---|---|---|"]
    if beside:
        rows = [rows[0] + " before | ratio to before |", rows[1] + "---|---|"]
    for metric, values in pairs.items():
        docker, skep = values.get("docker", []), values.get("skep", [])
        ratio = median(skep) / median(docker) if docker and skep and median(docker) else None
        rows.append(
            f"| {metric} | {_spread(docker)} | {_spread(skep)} | {'–' if ratio is None else f'{ratio:.2f}'} "
            f"| {_limit(metric)} | {_verdict(metric, ratio, skep)} |" + (_beside(values) if beside else "")
        )
    return "\n".join(rows)


def _beside(values: dict[str, list[float]]) -> str:
    """Return two more cells: the values of the earlier commit, and the median of each turn's ratio to them."""
    before, skep = values.get("before", []), values.get("skep", [])
    ratios = [now / then for now, then in zip(skep, before, strict=False) if then]
    return f" {_spread(before)} | {f'{median(ratios):.2f}' if ratios else '–'} |"


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{median(values):.3g} ({min(values):.3g} .. {max(values):.3g}, n={len(values)})"


def _limit(metric: str) -> str:
    if metric in LIMITS:
        return f"ratio {LIMITS[metric]}"
    return f"{ABSOLUTE[metric]}" if metric in ABSOLUTE else ""


def _verdict(metric: str, ratio: float | None, skep: list[float]) -> str:
    if metric in LIMITS and ratio is not None:
        return "kept" if ratio <= LIMITS[metric] else "**missed**"
    if metric in ABSOLUTE and skep:
        return "kept" if median(skep) <= ABSOLUTE[metric] else "**missed**"
    return ""


def document(result: dict[str, Any]) -> str:
    """Return the whole result file for people."""
    lines = [f"# Skep beside Docker Swarm, {result['date']}, commit {result['commit']}", ""]
    lines += [
        f"{result['machine']}. {result['pairs']} pairs, alternating; medians (smallest .. largest, number).",
        f"They took {result['minutes']:g} minutes." if "minutes" in result else "",
        f"Share of the machine busy before a timed part: median {median(result['noise'] or [0.0]):.0%}.",
        f"Before is commit {result['beside']}." if result.get("beside") else "",
        "",
        "| | Docker Swarm | Skep |",
        "|---|---|---|",
    ]
    docker, skep = result["facts"]["docker"], result["facts"]["skep"]
    lines += [f"| {fact} | {docker[fact]} | {skep[fact]} |" for fact in docker]
    lines += ["", table(result["values"]), ""]
    if failures := result.get("failures"):
        lines += ["What could not be measured:", "", *(f"* {failure}" for failure in failures), ""]
    return "\n".join(lines)

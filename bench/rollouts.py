"""A rolling update of ten replicas, two at a time, until the new tasks run, the old ones have stopped, and it has
ended.
"""

import time
from typing import Any

from bench.cluster_lab import until
from bench.engine import Engine

REPLICAS, PARALLELISM = 10, 2
MONITOR_S = 1.0
"""Seconds for which each new task is monitored.  Short, because both systems only wait."""
ORDERS = ("stop-first", "start-first")
TIMES = 2
"""Consecutive updates of each order.  The second one finds tasks of a previous update."""
POLL_S = 0.05
"""Seconds between two polls.

Not less, because a list of tasks costs both systems processor time, which is measured.
"""
_SECOND_NS = 10**9
Metrics = dict[str, float]


def policy(order: str) -> dict[str, Any]:
    """Return an ``UpdateConfig``."""
    return {
        "Parallelism": PARALLELISM,
        "Delay": 0,
        "FailureAction": "pause",
        "Monitor": int(MONITOR_S * _SECOND_NS),
        "MaxFailureRatio": 0,
        "Order": order,
    }


def rolling_update(via: Engine, service: str, order: str, round: int) -> Metrics:
    """Update all tasks of ``service`` in this order.  Return the seconds from the request until each condition.

    Args:
        round: differs from every earlier update's number, so that tasks have to be replaced.
    """
    before = via.get(f"/services/{service}")
    spec = before["Spec"]
    word = f"ROUND={round}"
    spec["TaskTemplate"]["ContainerSpec"]["Env"] = [word]
    spec["UpdateConfig"] = policy(order)
    began = time.monotonic()
    via.post(f"/services/{service}/update", spec, version=before["Version"]["Index"])
    metrics: Metrics = {}

    def replaced() -> bool:
        tasks = via.get("/tasks", filters={"service": [service]})
        runs = [task for task in tasks if task["Status"]["State"] == "running"]
        new = [task for task in runs if word in task["Spec"]["ContainerSpec"].get("Env", ())]
        if len(new) < REPLICAS:
            return False
        metrics.setdefault(f"rolling update, {order}: all new tasks run, s", time.monotonic() - began)
        return len(runs) == REPLICAS

    def completed() -> bool:
        state: str = via.get(f"/services/{service}")["UpdateStatus"]["State"]
        return state == "completed"

    until(replaced, f"rolling update, {order}: the old tasks have stopped", poll_s=POLL_S)
    metrics[f"rolling update, {order}: old tasks stopped, s"] = time.monotonic() - began
    until(completed, f"rolling update, {order}: it is completed", poll_s=POLL_S)
    metrics[f"rolling update, {order}: completed, s"] = time.monotonic() - began
    return metrics

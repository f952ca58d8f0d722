"""``metrics.md``: names, kinds and help texts of all metrics, from the code that makes them."""

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from skep.aio.clock import SystemClock
from skep.api.telemetry import process_metrics
from skep.dataplane.door import traffic as door_metrics
from skep.engine.metrics import usage
from skep.manager.acme import showing
from skep.manager.telemetry import metrics as manager_metrics
from skep.manager.telemetry.metrics import ETCD
from skep.node.telemetry import metrics as node_metrics
from tests.support.harness.sources import parsed

_NOTICE = "<!-- Written by `make reference`; edit the code, or docs/reference/metric_page.py. -->"
_HEAD = """
You read the metrics of a node, its containers and its manager process with `GET /metrics`: on the API's hosts, and by
plain HTTP on `metrics-addr` ([configuration](configuration.md)), as with a Docker Engine. Everyone who reaches
`metrics-addr` can read them, and change nothing. [Monitor](../guide/monitoring.md) has the steps, with alert rules and
a dashboard.

`GET /sd` on `metrics-addr` lists all nodes for `http_sd_configs`, with the same port for each. The labels are
`__meta_skep_node_id`, `_name`, `_role`, `_leader`, `_availability`, `_state`, and `_label_KEY` for each node label. On
a worker you need `skep cluster worker-reads on`. You can also use Prometheus' discovery of Docker Swarm.
"""
_MANAGERS = """
Every manager counts the whole cluster, so use `max by`, not `sum`. Names that begin with `swarm_` come from SwarmKit.
Names that begin with `etcd_` come from etcd, and have the values of the manager's member.
"""
_CONTAINERS = """
The names come from cAdvisor. The labels are `name` (the container's), `image`, `service`, `task` and `stack`. The last
three are empty for plain containers. Network metrics also have `interface`. While there are requests, the values are
sampled every ten seconds.
"""
_NOT_THERE = {
    "builder_builds_*": "not counted: an engine counts builds by its old builder only, and no builds by BuildKit",
    "engine_daemon_host_info_functions_seconds": "not measured: `/info` is made from what the node has in memory, "
    "and a question to its manager",
    "engine_daemon_network_actions_seconds": "not measured: a container gets its networks as it starts, which "
    "`engine_daemon_container_actions_seconds` has",
    "logger_*": "not counted: conmon writes the logs of containers and counts nothing. A full disk is a condition of "
    "the node (`skep_node_condition`)",
    "swarm_raft_*": "consensus is etcd's: `etcd_disk_wal_fsync_duration_seconds`, "
    "`etcd_disk_backend_commit_duration_seconds`",
    "swarm_store_*": "Skep has no store in memory with a lock: reads take none, and etcd does the writes. "
    "`skep_event_loop_lag_seconds` shows a manager that is late",
}
"""Metrics that a Docker Engine exports and Skep does not, with the reason."""
_LABELS = {
    **dict.fromkeys(
        (
            "skep_certificate_expires_timestamp_seconds",
            "skep_certificate_valid_from_timestamp_seconds",
            "skep_certificate_failures",
        ),
        ("name",),
    ),
    "skep_door_requests_total": ("route",),
    "skep_door_errors_total": ("route",),
    "skep_door_response_seconds": ("route",),
    "engine_daemon_engine_info": ("version", "architecture", "kernel", "os"),
    "engine_daemon_container_actions_seconds": ("action",),
    "swarm_node_info": ("node_id", "swarm_id"),
    "skep_dns_responses_total": ("source", "code"),
    "skep_service_state": ("service", "state"),
    "skep_service_running_tasks": ("service",),
    "skep_service_desired_tasks": ("service",),
    "skep_job_last_run_failed": ("service",),
    "process_cpu_seconds_total": ("process",),
    "process_resident_memory_bytes": ("process",),
    "process_open_fds": ("process",),
    "skep_event_loop_lag_seconds": ("process",),
    "etcd_network_peer_round_trip_time_seconds": ("To",),
}
"""Labels of the families that do not declare them as an argument of their own."""


class Metric(NamedTuple):
    """One row."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()


def metrics() -> str:
    """The page."""
    sections = {
        "## Of a node": (
            *made_in(node_metrics),
            *made_in(door_metrics),
            _actions(),
            *made_in(process_metrics),
        ),
        "## Of a manager": (*made_in(manager_metrics), *made_in(showing), *_of_etcd()),
        "## Of containers": tuple(Metric(*family[:3]) for family in usage.families([])),
    }
    below = {"## Of a manager": _MANAGERS, "## Of containers": _CONTAINERS}
    lines = ["# Metrics", "", _NOTICE, _HEAD]
    for title, found in sections.items():
        lines += [title, "", *_table(found)]
        lines.append(below.get(title, ""))
    lines += ["## Metrics that only an engine has", "", "| name | instead |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, why in _NOT_THERE.items()]
    return "\n".join(lines).rstrip() + "\n"


def _actions() -> Metric:
    name, kind, help, _ = usage.ActionTimes(SystemClock()).family()
    return Metric(name, kind, help, _LABELS[name])


def made_in(module: ModuleType) -> list[Metric]:
    """Return the families that a module makes: calls of ``gauge``, ``by_label``, ``MetricFamily`` and a histogram's
    ``family``.
    """
    found: dict[str, Metric] = {}
    calls = [each for each in ast.walk(parsed(Path(str(module.__file__)))) if isinstance(each, ast.Call)]
    for call in sorted(calls, key=lambda call: call.lineno):
        texts = [
            each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)
        ]
        match ast.unparse(call.func).rpartition(".")[2], texts:
            case "gauge", [name, help, *_]:
                metric = Metric(name, "gauge", help)
            case "family", [name, help]:
                metric = Metric(name, "histogram", help)
            case "by_label", [name, kind, help, label]:
                metric = Metric(name, kind, help, (label,))
            case "MetricFamily", [name, kind, help]:
                metric = Metric(name, kind, help)
            case _:
                continue
        found.setdefault(metric.name, metric._replace(labels=_LABELS.get(metric.name, metric.labels)))
    return list(found.values())


def _of_etcd() -> Iterator[Metric]:
    for name, help in ETCD.items():
        kind = "histogram" if name.endswith("_seconds") else "counter" if name.endswith("_total") else "gauge"
        yield Metric(name, kind, help, _LABELS.get(name, ()))


def _table(found: tuple[Metric, ...]) -> Iterator[str]:
    yield "| name | kind | labels | meaning |"
    yield "|---|---|---|---|"
    for one in found:
        labels = ", ".join(f"`{label}`" for label in one.labels)
        yield f"| `{one.name}` | {one.kind} | {labels} | {textwrap.shorten(one.help, 200)} |"

"""Prometheus metrics of a manager: cluster objects, task start times, sessions, store and event loop.

A metric that SwarmKit has keeps SwarmKit's name.  Source: swarmkit, manager/metrics/collector.go,
manager/dispatcher/dispatcher.go.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from skep.aio.clock import Clock
from skep.aio.event_loop.loop_lag import LoopLag
from skep.api.client.client import ApiClient
from skep.api.telemetry.exposition import Histogram, Kind, MetricFamily, Sample, by_label, gauge, label_text
from skep.api.telemetry.process_metrics import process_families
from skep.errors import SkepError
from skep.manager.acme.showing import certificate_families
from skep.manager.autoscaling.state import AutoscalingCounts
from skep.manager.cluster import known_cluster
from skep.manager.control_loops.informer import batches_of
from skep.manager.diagnosis.service_health import status_with_health
from skep.manager.notify.showing import delivery_families
from skep.manager.services.job_runs import has_last_failed
from skep.manager.telemetry.starting_tasks import StartingTasks
from skep.manager.verify.records import recorded
from skep.manager.verify.rules import RULES
from skep.model.network import Network
from skep.model.node import Node, NodeState
from skep.model.options.freezes import CLUSTER
from skep.model.secret import Config, Secret
from skep.model.service import HealthState, Service, ServiceStatus
from skep.model.task import Task, TaskState
from skep.store.interface import Store, View

_START_BOUNDS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Upper bounds of the histogram's buckets: starts take from a tenth of a second to minutes of pulling."""
_STORE_S = 2.0
"""Timeout in seconds for the store's figures.  Without them, the page is served nevertheless."""
_STARTING_MAX = 100_000
"""Number of starting tasks that are timed."""

ETCD = {
    "etcd_server_has_leader": "Whether a leader exists.",
    "etcd_server_is_leader": "Whether this member leads etcd.",
    "etcd_server_leader_changes_seen_total": "Changes of etcd's leader.",
    "etcd_server_proposals_pending": "Proposals that wait to be committed.",
    "etcd_server_proposals_failed_total": "Proposals that failed.",
    "etcd_server_slow_apply_total": "Slow applications of an entry.",
    "etcd_disk_wal_fsync_duration_seconds": "Duration of fsync of the log.",
    "etcd_disk_backend_commit_duration_seconds": "Duration of commits of the database.",
    "etcd_mvcc_db_total_size_in_bytes": "Size of the database.",
    "etcd_mvcc_db_total_size_in_use_in_bytes": "Size of the database that is in use.",
    "etcd_network_peer_round_trip_time_seconds": "Round trips to other members.",
}
"""Names and help texts of the exported metrics of etcd, which has some hundred.

The names are etcd's, which existing dashboards use.  Source: https://etcd.io/docs/v3.5/metrics/
"""
_TYPE = re.compile(r"# TYPE (\S+) (\S+)")
_SAMPLE = re.compile(r"([a-z_]+)(\{.*\})? (\S+)")
_SUFFIXES = ("", "_bucket", "_sum", "_count")


class StartTimes(StartingTasks[float]):
    """Measures the time from a task's creation to the commit that shows it running, by this manager's clock."""

    def __init__(self, store: Store, clock: Clock) -> None:
        super().__init__(store, _STARTING_MAX)
        self.clock = clock
        self.histogram = Histogram(_START_BOUNDS_S)

    def created(self) -> float:
        """See ``StartingTasks``."""
        return self.clock.monotonic()

    def changed(self, task: Task, value: float) -> float | None:
        """See ``StartingTasks``.  Observes the duration once the task runs."""
        if task.status.state is TaskState.RUNNING:
            self.histogram.observe(self.clock.monotonic() - value)
        return value if task.status.state < TaskState.RUNNING else None


class ClusterMetrics:
    """Metric families of one manager.

    Args:
        leads: Returns whether the manager leads and has a quorum.
        sessions: Returns the number of nodes that have their session with the manager.
        of_store: Returns the metrics of the store's process.
        of_others: Returns the metrics of other parts of the manager.
    """

    def __init__(
        self,
        store: Store,
        leads: Callable[[], bool],
        starts: StartTimes,
        sessions: Callable[[], int],
        lag: LoopLag,
        of_store: Callable[[], Awaitable[list[MetricFamily]]],
        of_others: Callable[[], list[MetricFamily]] = list,
    ) -> None:
        self._store = store
        self._leads = leads
        self._starts = starts
        self._sessions = sessions
        self._lag = lag
        self._of_store = of_store
        self._of_others = of_others

    async def families(self) -> list[MetricFamily]:
        """Return the families from this replica.  Yields to other work between batches of tasks."""
        states: Counter[str] = Counter({state.value: 0 for state in TaskState})
        for piece in batches_of(self._store.view, Task):
            for task in piece:
                states[task.status.state.value] += 1
            await asyncio.sleep(0)
        view = self._store.view()
        nodes, services = view.find(Node), view.find(Service)
        return [
            gauge("swarm_manager_leader", "Whether this manager leads.", int(self._leads())),
            by_label("swarm_manager_nodes", "gauge", "The number of nodes.", "state", _node_states(nodes)),
            by_label("swarm_manager_tasks_total", "gauge", "The number of tasks.", "state", states),
            gauge("swarm_manager_services_total", "The number of services.", len(services)),
            gauge("swarm_manager_networks_total", "The number of networks.", len(view.ids(Network))),
            gauge("swarm_manager_secrets_total", "The number of secrets.", len(view.ids(Secret))),
            gauge("swarm_manager_configs_total", "The number of configs.", len(view.ids(Config))),
            *service_families(await self._statuses(services)),
            job_family(services),
            *delivery_families(view),
            *certificate_families(view),
            self._starts.histogram.family(
                "skep_task_start_seconds", "From the creation of a task until it runs, as this manager sees it."
            ),
            self._starts.histogram.family(
                "swarm_dispatcher_scheduling_delay_seconds", "The same under SwarmKit's name."
            ),
            *freeze_families(view),
            violation_family(view),
            gauge("skep_manager_sessions", "Nodes that have their session with this manager.", self._sessions()),
            gauge("skep_store_revision", "The revision of this manager's replica.", view.revision),
            *await self._space(),
            *process_families("manager", self._lag),
            *self._of_others(),
        ]  # fmt: skip

    async def _statuses(self, services: Iterable[Service]) -> list[tuple[Service, ServiceStatus]]:
        clock = self._starts.clock
        return [
            (one, await status_with_health(self._store.view(), one, clock.now_ns(), clock))
            for one in services
            if one.removed_at is None
        ]

    async def _space(self) -> list[MetricFamily]:
        try:
            async with asyncio.timeout(_STORE_S):
                space, counted = await self._store.space(), await self._of_store()
        except (SkepError, TimeoutError):
            return []
        if space is None:
            return counted
        return [
            *counted,
            gauge("skep_store_size_bytes", "The file of this manager's store.", space.size),
            gauge("skep_store_in_use_bytes", "What is in use of that file.", space.in_use),
            gauge("skep_store_quota_bytes", "The largest size of that file.", space.quota),
        ]


def autoscaling_families(counts: AutoscalingCounts) -> list[MetricFamily]:
    """Return the metrics of autoscaling.  A manager that does not lead shows the changes of its own earlier terms."""
    return [
        by_label(
            "skep_autoscale_changes_total",
            "counter",
            "Times that autoscaling on this manager changed a service's number of tasks.",
            "direction",
            counts.changes,
        ),
        gauge("skep_autoscale_services", "Autoscaled services, on the leader.", counts.services),
        gauge(
            "skep_autoscale_unmeasured_tasks",
            "Their tasks that were not measured at the last decision, on the leader.",
            counts.unknown,
        ),
    ]


def freeze_families(view: View) -> list[MetricFamily]:
    """Return the numbers of freezes in force, and whether the maintenance window is closed."""
    swarm = known_cluster(view)
    freezes = swarm.change_freezes.keys() if swarm is not None else ()
    window = swarm.window if swarm is not None else None
    return [
        gauge("skep_cluster_frozen", "Whether the cluster is frozen.", int(CLUSTER in freezes)),
        gauge("skep_frozen_stacks", "The number of frozen stacks.", len({*freezes} - {CLUSTER})),
        gauge(
            "skep_maintenance_window_closed",
            "Whether the maintenance window is closed.",
            int(window is not None and bool(window.closed_until)),
        ),
    ]


def violation_family(view: View) -> MetricFamily:
    """Return the number of violated invariants, which the leader has found at its last check."""
    counts = Counter(dict.fromkeys(RULES, 0))
    counts.update(one.rule for one in recorded(view).violations)
    return by_label(
        "skep_invariant_violations",
        "gauge",
        "Violations of the invariants that the leader has found at its last check.",
        "rule",
        counts,
    )


def _node_states(nodes: Iterable[Node]) -> Mapping[str, float]:
    found = Counter({state.value: 0 for state in NodeState})
    found.update(node.status.state.value for node in nodes)
    return found


def service_families(services: Sequence[tuple[Service, ServiceStatus]]) -> list[MetricFamily]:
    """Return the health of each service, and its running and desired tasks.

    Jobs, whose tasks end, have no numbers of tasks.  Done slots of a one-shot service should not run.
    """
    counted = [
        (label_text({"service": one.spec.name}), status) for one, status in services if one.job_status is None
    ]
    states = [
        Sample(label_text({"service": one.spec.name, "state": state.value}), int(health.state is state))
        for one, status in services
        if (health := status.health) is not None
        for state in HealthState
    ]
    return [
        MetricFamily("skep_service_state", "gauge", "Whether the service is in this state.", states),
        MetricFamily(
            "skep_service_running_tasks",
            "gauge",
            "Tasks of the service that run.",
            [Sample(labels, status.running_tasks) for labels, status in counted],
        ),
        MetricFamily(
            "skep_service_desired_tasks",
            "gauge",
            "Tasks of the service that should run.",
            [
                Sample(labels, max(status.desired_tasks - status.completed_tasks, 0))
                for labels, status in counted
            ],
        ),
    ]


def job_family(services: Iterable[Service]) -> MetricFamily:
    """Return for each job whether its last ended run failed."""
    return MetricFamily(
        "skep_job_last_run_failed",
        "gauge",
        "Whether the last run of the job that has ended failed.",
        [
            Sample(label_text({"service": one.spec.name}), int(has_last_failed(one)))
            for one in services
            if one.job_status is not None
        ],
    )


async def etcd_families(socket: Path) -> list[MetricFamily]:
    """Return the metric families of the etcd member at ``socket``.  Raises: Unavailable: no response."""
    async with ApiClient.local(socket, "etcd") as client:
        response = await client.send("GET", "/metrics", headers={"Accept-Encoding": "identity"})
    return chosen(response.body.decode(errors="replace")) if response.status == 200 else []


def chosen(page: str) -> list[MetricFamily]:
    """Return the metric families of ``ETCD`` found in a metrics page.  Malformed lines are skipped."""
    kinds: dict[str, str] = {}
    samples: dict[str, list[Sample]] = {name: [] for name in ETCD}
    suffixes = {f"{name}{suffix}": (name, suffix) for name in ETCD for suffix in _SUFFIXES}
    for line in page.splitlines():
        if found := _TYPE.fullmatch(line):
            kinds[found[1]] = found[2]
        elif (found := _SAMPLE.fullmatch(line)) and found[1] in suffixes:
            name, suffix = suffixes[found[1]]
            with suppress(ValueError):
                samples[name].append(Sample(found[2] or "", float(found[3]), suffix))
    return [
        MetricFamily(name, cast("Kind", kinds[name]), ETCD[name], found)
        for name, found in samples.items()
        if found and kinds.get(name) in ("counter", "gauge", "histogram")
    ]

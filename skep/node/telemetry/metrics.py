"""Prometheus metrics of a node, its engine, networks and containers, and its manager process.

Metrics that Docker Engine also has are named as in Docker.  Source: moby, daemon/metrics.go, daemon/events/metrics.go;
swarmkit, node/node.go.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import structlog

from skep import __version__
from skep.agent.session.session_state import SessionState
from skep.aio.clock import Clock
from skep.aio.event_loop.loop_lag import LoopLag
from skep.api.telemetry.exposition import MetricFamily, Sample, by_label, gauge, label_text, merged, render
from skep.api.telemetry.otlp import TraceExporter
from skep.api.telemetry.process_metrics import process_families
from skep.dataplane.dataplane import DataPlane
from skep.dataplane.net_process.protocol import ServedListing
from skep.dataplane.netns.repair_counts import KINDS
from skep.engine.containers.container import EngineCounts
from skep.engine.engine import Engine
from skep.engine.metrics.usage import UsagePage
from skep.errors import SkepError
from skep.model.networks.paths import PathReport
from skep.model.values.ids import NodeId
from skep.node import info
from skep.node.cluster.cluster_reads import ClusterReads
from skep.node.cluster.local import LocalNode
from skep.node.cluster.membership import Membership
from skep.node.events import NodeEvents
from skep.node.host.conditions import Conditions
from skep.node.host.disk_space import FileSystemUse

log = structlog.get_logger()

KEPT_S = 1.0
"""Seconds for which one page answers all requests."""
_MANAGER_S = 4.0
"""Time limit in seconds for the manager's metrics.  Shorter than Prometheus' own limit of ten seconds."""
_NET_S = 2.0
"""Time limit in seconds for the metrics of the network process.  If they are late, the page is served without them."""
_LAG_PERIOD_S = 1.0
"""Seconds between measurements of the loop's delay."""


class Sources(NamedTuple):
    """Sources of a node's values.  ``engine`` and ``usage`` are None on a node without containers."""

    node: info.NodeProperties
    engine: Engine | None
    events: NodeEvents
    conditions: Conditions
    session: SessionState
    load: Callable[[], float | None]
    data_plane: DataPlane | None
    usage: UsagePage | None
    reads: ClusterReads
    membership: Membership
    exporter: TraceExporter | None
    disks: Callable[[], Sequence[FileSystemUse]]
    reports: Callable[[], int]
    """Returns the number of task statuses that wait for a session."""
    door: Callable[[], Sequence[MetricFamily]] = tuple


class KeptPage:
    """A page that is made by ``make`` at most once in ``KEPT_S``, because any client can send many requests."""

    def __init__(self, make: Callable[[], Awaitable[bytes]], clock: Clock) -> None:
        self._make = make
        self._clock = clock
        self._page = b""
        self._made_at = float("-inf")
        self._making = asyncio.Lock()

    async def text(self) -> bytes:
        """Return the page."""
        async with self._making:
            if self._clock.monotonic() - self._made_at >= KEPT_S:
                self._page = await self._make()
                self._made_at = self._clock.monotonic()
            return self._page


class NodeMetrics:
    """The metrics page of one node."""

    def __init__(self, sources: Sources, clock: Clock) -> None:
        self._sources = sources
        self._clock = clock
        self._lag = LoopLag()
        self._page = KeptPage(self._make_page, clock)

    async def run(self) -> None:
        """Sample the event loop, and the use of containers while it is requested, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._lag.sample(self._clock, _LAG_PERIOD_S))
            if self._sources.usage is not None:
                group.create_task(self._sources.usage.run())

    async def text(self) -> bytes:
        """Return the page.

        Sources that do not answer in time are left out.  For the manager, ``skep_manager_up`` shows that.
        """
        return await self._page.text()

    async def _make_page(self) -> bytes:
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(self._of_manager())
            names = group.create_task(self._of_net_process())
            used = await self._sources.usage.text() if self._sources.usage is not None else b""
        families = [*self._own(), *names.result(), *asked.result()]
        # in a thread, because a manager has two lines for each service
        return await asyncio.to_thread(_joined, families, used)

    async def nodes(self) -> Any:
        """Return the response to ``GET /nodes``.  Raises: SkepError: no manager answers, or workers may not read."""
        if self._sources.membership.is_manager:
            return await self._sources.reads.own.get("/nodes", timeout_s=_MANAGER_S)
        return msgspec.json.decode(await self._sources.reads.body("/nodes"))

    def _own(self) -> list[MetricFamily]:
        one = self._sources
        plane, load = one.data_plane, one.load()
        return [
            *engine_families(one.node, one.engine.counts() if one.engine is not None else EngineCounts(), one.events),
            *([one.engine.action_times.family()] if one.engine is not None else ()),
            *member_families(one.membership.node),
            gauge("swarm_node_manager", "Whether this node is a manager.", int(one.membership.is_manager)),
            gauge("skep_node_session", "Whether the node has a session with a manager.", int(one.session.has_session)),
            *([gauge("skep_node_load", "The load that the scheduler sees, 0 to 1.", load)] if load is not None else ()),
            by_label(
                "skep_node_condition", "gauge", "What is wrong with the node.", "condition",
                dict.fromkeys(one.conditions.present(), 1),
            ),
            *disk_families(one.disks()),
            *(network_families(plane.repairs.counts, plane.prober.reports) if plane is not None else ()),
            gauge("skep_node_pending_reports", "Statuses of tasks that are not sent to a manager yet.", one.reports()),
            *one.door(),
            *process_families("node", self._lag),
            *(one.exporter.families() if one.exporter is not None else ()),
        ]  # fmt: skip

    async def _of_net_process(self) -> list[MetricFamily]:
        """Return the counters of the containers' name servers, or nothing if the network process does not answer."""
        plane = self._sources.data_plane
        if plane is None or plane.naming is None:
            return []
        try:
            async with asyncio.timeout(_NET_S):
                return dns_families(await plane.naming.listing())
        except (SkepError, TimeoutError) as error:
            log.debug("no metrics from the net process", reason=str(error))
            return []

    async def _of_manager(self) -> list[MetricFamily]:
        if not self._sources.membership.is_manager:
            return []
        up, families = 1, []
        try:
            response = await self._sources.reads.own.get("/_skep/metrics", timeout_s=_MANAGER_S)
            families = msgspec.convert(response, list[MetricFamily])
        except (SkepError, msgspec.ValidationError) as error:
            log.debug("no metrics from the manager", reason=str(error))
            up = 0
        return [gauge("skep_manager_up", "Whether this node's manager process answers.", up), *families]


def _joined(families: Sequence[MetricFamily], used: bytes) -> bytes:
    return render(merged(families)) + used


def engine_families(
    node: info.NodeProperties, counts: EngineCounts, events: NodeEvents
) -> list[MetricFamily]:
    """Return Docker Engine's metrics, under its names."""
    machine = node.machine
    about = {
        "version": __version__,
        "architecture": machine.architecture,
        "graphdriver": "overlay2",
        "kernel": machine.kernel,
        "os": machine.os_name,
        "os_type": "linux",
        "os_version": machine.os_version,
        "daemon_id": node.id,
    }
    states = {"running": counts.running, "paused": counts.paused, "stopped": counts.stopped}
    return [
        MetricFamily(
            "engine_daemon_engine_info",
            "gauge",
            "The engine and its machine.",
            [Sample(label_text(about), 1)],
        ),
        gauge("engine_daemon_engine_cpus_cpus", "Processors of the machine.", machine.cpus),
        gauge("engine_daemon_engine_memory_bytes", "Memory of the machine.", machine.memory_bytes),
        by_label(
            "engine_daemon_container_states_containers", "gauge", "Containers by state.", "state", states
        ),
        MetricFamily(
            "engine_daemon_events_total", "counter", "Events of this node.", [Sample("", events.published)]
        ),
        gauge("engine_daemon_events_subscribers_total", "Clients that read events.", events.readers),
        MetricFamily(
            "engine_daemon_health_checks_total",
            "counter",
            "Probes of health checks.",
            [Sample("", counts.health_checks)],
        ),
        MetricFamily(
            "engine_daemon_health_checks_failed_total",
            "counter",
            "Probes that failed.",
            [Sample("", counts.failed_health_checks)],
        ),
    ]


def member_families(member: LocalNode | None) -> list[MetricFamily]:
    """Return the metric that names the node's cluster, or nothing outside of a cluster."""
    if member is None:
        return []
    ids = label_text({"node_id": member.node_id, "swarm_id": member.cluster_id})
    return [MetricFamily("swarm_node_info", "gauge", "The node and its cluster.", [Sample(ids, 1)])]


def disk_families(disks: Sequence[FileSystemUse]) -> list[MetricFamily]:
    """Return the use of the disks that the node and its containers write to.

    No metric has a path of the machine, because viewers of the cluster read the page.
    """
    used = {one.name: round(one.used_percent / 100, 4) for one in disks}
    inodes = {one.name: round(one.inodes_percent / 100, 4) for one in disks}
    free = {one.name: one.free_bytes for one in disks}
    return [
        by_label(
            "skep_disk_used_ratio",
            "gauge",
            "Used share of a disk of the node or its containers, without what only root may use.",
            "disk",
            used,
        ),
        by_label("skep_disk_inodes_used_ratio", "gauge", "Used share of its inodes.", "disk", inodes),
        by_label("skep_disk_free_bytes", "gauge", "Free for processes without privileges.", "disk", free),
    ]


def dns_families(listing: ServedListing) -> list[MetricFamily]:
    """Return the counters of the name servers of this node's containers."""
    names = listing.names
    responses = [
        Sample(label_text({"source": source, "code": code}), number)
        for source, code, number in sorted(names.responses)
    ]
    return [
        gauge("skep_dns_containers", "Containers with a name server of their networks.", len(listing.served)),
        by_label(
            "skep_dns_requests_total",
            "counter",
            "Questions of containers for names, by record type.",
            "type",
            dict(names.questions),
        ),
        MetricFamily(
            "skep_dns_responses_total",
            "counter",
            "Responses to containers: of their networks, forwarded, or none (malformed), by DNS code.",
            responses,
        ),
        by_label(
            "skep_dns_upstream_errors_total",
            "counter",
            "Attempts at other name servers without a response: timeout, or failure.",
            "reason",
            {"timeout": names.upstream_timeouts, "failure": names.upstream_failures},
        ),
        gauge("skep_dns_forwards_in_flight", "Questions at other name servers now.", names.in_flight),
        by_label(
            "skep_network_repairs_total",
            "counter",
            "Repairs of what other programs had changed.",
            "kind",
            {"container rules": listing.repairs},
        ),
    ]


def network_families(repairs: Mapping[str, int], reports: Mapping[NodeId, PathReport]) -> list[MetricFamily]:
    """Return how often changes by other programs were repaired, and which nodes the probes reach."""
    reachable = {id: int(not (report.failing and report.is_settled)) for id, report in reports.items()}
    mtus = {id: report.mtu for id, report in reports.items() if report.mtu}
    return [
        by_label(
            "skep_network_repairs_total",
            "counter",
            "Repairs of what other programs had changed.",
            "kind",
            # Prometheus takes the first value that it sees of a counter for an old one, and does not count it.
            dict.fromkeys(KINDS, 0) | {**repairs},
        ),
        by_label(
            "skep_peer_reachable", "gauge", "Whether probes of another node succeed.", "peer", reachable
        ),
        by_label(
            "skep_peer_mtu_bytes", "gauge", "The largest packet that reaches another node.", "peer", mtus
        ),
    ]

"""Events, metrics, traces and measured usage: how the cluster and this manager are observed."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

from aiohttp import web

from skep.aio.event_loop.loop_lag import LoopLag
from skep.api.telemetry.exposition import MetricFamily
from skep.api.telemetry.otlp import exporter_to
from skep.manager.autoscaling.state import AutoscalingCounts
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.environment import ManagerEnvironment
from skep.manager.quorum import Quorum
from skep.manager.telemetry.events import ClusterEvents
from skep.manager.telemetry.metrics import ClusterMetrics, StartTimes, autoscaling_families, etcd_families
from skep.manager.telemetry.task_usages import TaskUsages
from skep.manager.telemetry.traces import TaskSpans, request_spans
from skep.manager.view.cluster import ClusterRows
from skep.manager.view.loop import ClusterView
from skep.model.values.ids import NodeId
from skep.wire.client import ManagerChannel


class ManagerObservation:
    """Sources of events, metrics and traces."""

    def __init__(
        self,
        environment: ManagerEnvironment,
        dispatcher: Dispatcher,
        channel_to: Callable[[NodeId], ManagerChannel],
        read_quorum: Callable[[], Quorum],
    ) -> None:
        config, store, clock, _, random = environment
        self._environment = environment
        self._dispatcher = dispatcher
        self.events = ClusterEvents(store, clock)
        self.cluster_view = ClusterView(store, clock, ClusterRows(store, clock, read_quorum).row)
        self.lag = LoopLag()
        self.usages = TaskUsages(
            *(store, config.node_id, dispatcher.usages, dispatcher.requests, channel_to, dispatcher.idle)
        )
        self.autoscaling = AutoscalingCounts()
        self._starts = StartTimes(store, clock)
        self._exporter = exporter_to(config.trace_endpoint, "manager", config.hostname, clock, random.random)

    def metrics(self) -> ClusterMetrics:
        """Return the metrics of this manager and, while it leads, of the cluster."""
        config, store, _, _, _ = self._environment
        dispatcher = self._dispatcher
        return ClusterMetrics(
            store,
            lambda: store.leader == config.node_id and dispatcher.is_current(),
            self._starts,
            dispatcher.session_count,
            self.lag,
            partial(etcd_families, config.paths.etcd_socket),
            self._counted,
        )

    def tasks(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """Yield the work that runs on every manager, with its names."""
        yield "events", self.events.run()
        yield "times of starts", self._starts.run()
        yield "loop lag", self.lag.run(self._environment.clock)
        yield "cluster view", self.cluster_view.run()

    def trace(self, app: web.Application, group: asyncio.TaskGroup) -> None:
        """Add spans of requests and tasks if traces are exported."""
        if self._exporter is not None:
            app.middlewares.append(request_spans(self._exporter))
            group.create_task(self._exporter.run(), name="export of traces")
            spans = TaskSpans(self._environment.store, self._environment.own, self._exporter)
            group.create_task(spans.run(), name="spans of tasks")

    def _counted(self) -> list[MetricFamily]:
        """Return the metric families of autoscaling and, if traces are exported, of the export."""
        traces = self._exporter.families() if self._exporter is not None else []
        return [*autoscaling_families(self.autoscaling), *traces]

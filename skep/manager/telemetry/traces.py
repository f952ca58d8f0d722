"""Spans of a manager: requests that change services, with their writes, and starting tasks until they run.

Each manager exports the requests that it answers.  The leader exports the tasks, whose commits every manager sees.
"""

import re
from collections.abc import Iterator

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from skep.api.telemetry.otlp import TraceExporter
from skep.manager.telemetry.starting_tasks import StartingTasks
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.store.interface import Store
from skep.tracing import Part, Span, recording, span_id, trace_id

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
"""Source: https://www.w3.org/TR/trace-context/#traceparent-header"""
_FOLLOWED_MAX = 10_000
"""Number of starting tasks that are followed.  Other tasks have no spans of a manager."""
_TRACED = re.compile(r"(/v[0-9.]+)?(/skep)?/services(/.*)?")


def request_spans(exporter: TraceExporter) -> Middleware:
    """Return a middleware that records requests which write services as the first spans of their traces."""

    @web.middleware
    async def trace_request(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method != "POST" or not _TRACED.fullmatch(request.path):
            return await handler(request)
        with recording(exporter.now_ns) as recorded, recorded.part(f"POST {request.path}") as whole:
            response = await handler(request)
        exporter.add(spans_of_request(whole, recorded.parts, request.headers.get("traceparent", "")))
        return response

    return trace_request


def spans_of_request(whole: Part, parts: list[Part], traceparent: str) -> Iterator[Span]:
    """Yield the span of a request, and of the write of each service in it.  ``traceparent`` is the client's header."""
    found = _TRACEPARENT.fullmatch(traceparent)
    for part in parts:
        services = part.result if isinstance(part.result, list | tuple) else (part.result,)
        for service in services:
            if not isinstance(service, Service) or service.spec_version is None:
                continue
            trace = _trace(service)
            about = {"swarm.service.name": service.spec.name, "swarm.service.id": service.id}
            yield Span(
                trace=trace,
                id=_root(trace),
                name="request",
                begin_ns=whole.begin_ns,
                end_ns=whole.end_ns,
                attributes={**about, "http.route": whole.name},
                link=(found[1], found[2]) if found else None,
            )
            yield Span(
                trace=trace,
                id=span_id(trace, "store"),
                parent=_root(trace),
                name="store",
                begin_ns=part.begin_ns,
                end_ns=part.end_ns,
                attributes=about,
            )


def _trace(one: Service | Task) -> str:
    """Return the trace id of an object whose ``spec_version`` is set."""
    assert one.spec_version is not None
    return trace_id(one.service_id if isinstance(one, Task) else one.id, one.spec_version.index)


def _root(trace: str) -> str:
    return span_id(trace, "request")


class _Begun(msgspec.Struct, frozen=True):
    at_ns: int
    is_scheduled: bool = False


class TaskSpans(StartingTasks[_Begun]):
    """Exports spans of tasks.  ``own`` is this manager's node."""

    def __init__(self, store: Store, own: NodeId, exporter: TraceExporter) -> None:
        super().__init__(store, _FOLLOWED_MAX)
        self._own = own
        self._exporter = exporter

    def created(self) -> _Begun:
        """See ``StartingTasks``."""
        return _Begun(self._exporter.now_ns())

    def changed(self, task: Task, value: _Begun) -> _Begun | None:
        """See ``StartingTasks``.  Adds the spans that end."""
        now, state = self._exporter.now_ns(), task.status.state
        if not value.is_scheduled and state >= TaskState.ASSIGNED:
            value = msgspec.structs.replace(value, is_scheduled=True)
            self._add(task, "schedule", span_id(task.id, "task"), value.at_ns, now)
        if state < TaskState.RUNNING:
            return value
        self._add(task, "task", "", value.at_ns, now)
        return None

    def _add(self, task: Task, name: str, parent: str, begin_ns: int, end_ns: int) -> None:
        own = self._store.view().lookup(Node, self._own)
        leads = own is not None and own.manager_status is not None and own.manager_status.leader
        if not leads or task.spec_version is None:
            return
        trace = _trace(task)
        about = {"swarm.service.id": task.service_id, "swarm.task.id": task.id, "swarm.node.id": task.node_id}
        failed = task.status.state > TaskState.RUNNING
        span = Span(
            trace=trace,
            id=span_id(task.id, name),
            parent=parent or _root(trace),
            name=name,
            begin_ns=begin_ns,
            end_ns=end_ns,
            attributes=about,
            error=(task.status.err or task.status.state.value) if failed else "",
        )
        self._exporter.add((span,))

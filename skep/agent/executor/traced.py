"""An executor that records trace spans for the steps until a task runs, including the calls of runc."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager

from skep.agent.executor.interface import Controller, Executor, OnUnhealthy, Running, TaskExit, ignored
from skep.model.task import AssignedTask, Task
from skep.model.task_end import TaskEnd
from skep.model.values.ids import TaskId
from skep.tracing import NowNs, Part, Recording, Span, recording, span_id, trace_id

Export = Callable[[Iterable[Span]], None]


class TracedExecutor:
    """Wraps another executor and exports spans.  Used only with tracing, so that it costs nothing otherwise."""

    def __init__(self, inner: Executor, export: Export, now_ns: NowNs) -> None:
        self._inner = inner
        self._export = export
        self._now_ns = now_ns

    @property
    def name(self) -> str:
        return self._inner.name

    def running(self) -> AbstractAsyncContextManager[None]:
        return self._inner.running()

    def controller(self, task: AssignedTask, registry_auth: str = "") -> Controller:
        return _TracedController(
            self._inner.controller(task, registry_auth), task.task, self._export, self._now_ns
        )

    async def leftovers(self) -> Sequence[TaskId]:
        return await self._inner.leftovers()

    async def discard(self, task_id: TaskId) -> None:
        await self._inner.discard(task_id)


class _TracedController:
    def __init__(self, inner: Controller, task: Task, export: Export, now_ns: NowNs) -> None:
        self._inner = inner
        self._task = task
        self._export = export
        self._now_ns = now_ns
        self._begin_ns = 0

    async def prepare(self) -> None:
        with recording(self._now_ns) as recorded:
            self._begin_ns = self._now_ns()
            try:
                with recorded.part("prepare"):
                    await self._inner.prepare()
            finally:
                self._export(spans_of_node(self._task, self._begin_ns, recorded, has_ended=False))

    async def start(self) -> Running:
        with recording(self._now_ns) as recorded:
            try:
                with recorded.part("start"):
                    return await self._inner.start()
            finally:
                begin_ns = self._begin_ns or recorded.parts[0].begin_ns
                self._export(spans_of_node(self._task, begin_ns, recorded, has_ended=True))

    def observed(self) -> Running | None:
        return self._inner.observed()

    async def wait(self, on_unhealthy: OnUnhealthy = ignored) -> TaskExit:
        return await self._inner.wait(on_unhealthy)

    async def fetch_end(self) -> TaskEnd | None:
        return await self._inner.fetch_end()

    async def shutdown(self, drain_s: float = 0.0) -> None:
        await self._inner.shutdown(drain_s)

    async def terminate(self) -> None:
        await self._inner.terminate()

    async def update(self, task: AssignedTask) -> None:
        await self._inner.update(task)

    async def remove(self) -> None:
        await self._inner.remove()


def spans_of_node(task: Task, begin_ns: int, recorded: Recording, *, has_ended: bool) -> list[Span]:
    """Return the spans of a verb and its parts.  Once the work has ended or failed, a span over all verbs is added.

    ``recorded`` has the verb, then its parts.
    """
    if task.spec_version is None:
        return []
    trace, node = trace_id(task.service_id, task.spec_version.index), span_id(task.id, "node")
    about = {"swarm.service.id": task.service_id, "swarm.task.id": task.id, "swarm.node.id": task.node_id}
    verb, *parts = recorded.parts

    def span(name: str, part: Part, id: str, parent: str, begin_ns: int) -> Span:
        return Span(
            trace=trace,
            id=id,
            parent=parent,
            name=name,
            begin_ns=begin_ns,
            end_ns=part.end_ns,
            attributes=about,
            error=part.error,
        )

    verb_id = span_id(task.id, verb.name)
    spans = [span(verb.name, verb, verb_id, node, verb.begin_ns)]
    spans += [span(one.name, one, span_id(verb_id, one.name), verb_id, one.begin_ns) for one in parts]
    if has_ended or verb.error:
        spans.append(span("node", verb, node, span_id(task.id, "task"), begin_ns))
    return spans

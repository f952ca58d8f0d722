"""The spans of a node: its work on a task, with what was done in it, and where it failed."""

from typing import Any, cast

import pytest
from msgspec.structs import replace

from skep.agent.executor.interface import Rejected
from skep.agent.executor.traced import TracedExecutor
from skep.model.task import AssignedTask
from skep.model.values.meta import Version
from skep.tracing import Span, span_id, trace_id, within
from tests.support.builders import a_task


class Worker:
    """Controller and executor; ``refusal``: why nothing can be prepared."""

    refusal = ""

    def controller(self, task: AssignedTask, registry_auth: str = "") -> Any:
        return self

    async def prepare(self) -> None:
        if self.refusal:
            raise Rejected(self.refusal)

    async def start(self) -> str:
        with within("runc create"):
            pass
        return "running"


class Times:
    at = 0

    def __call__(self) -> int:
        self.at += 1
        return self.at


def traced(worker: Worker, *, of_service: bool = True) -> tuple[Any, list[Span]]:
    spans: list[Span] = []
    task = replace(a_task("t1", node="n1"), spec_version=Version(index=3) if of_service else None)
    executor = TracedExecutor(cast("Any", worker), spans.extend, Times())
    return executor.controller(AssignedTask(task=task)), spans


async def test_the_node_is_a_span_over_its_verbs() -> None:
    controller, spans = traced(Worker())
    await controller.prepare()
    assert [span.name for span in spans] == ["prepare"]
    assert await controller.start() == "running"
    by_name = {span.name: span for span in spans}
    assert set(by_name) == {"prepare", "start", "runc create", "node"}
    node = by_name["node"]
    assert node.parent == span_id("t1", "task")
    assert (node.begin_ns, node.end_ns) == (1, by_name["start"].end_ns)
    assert by_name["runc create"].parent == by_name["start"].id
    assert {span.trace for span in spans} == {trace_id(a_task("t1").service_id, 3)}


async def test_a_task_that_cannot_be_prepared_has_the_reason() -> None:
    worker = Worker()
    worker.refusal = "no such image"
    controller, spans = traced(worker)
    with pytest.raises(Rejected):
        await controller.prepare()
    assert [(span.name, span.error) for span in spans] == [
        ("prepare", "no such image"),
        ("node", "no such image"),
    ]


async def test_a_task_of_no_service_has_no_trace() -> None:
    controller, spans = traced(Worker(), of_service=False)
    await controller.prepare()
    assert spans == []

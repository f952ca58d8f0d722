"""The spans of a manager: a request with its writes, a task from its creation until it runs."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec.structs import replace

from skep.manager.telemetry.traces import TaskSpans, spans_of_request
from skep.model.node import ManagerStatus
from skep.model.task import TaskState
from skep.model.values.ids import NodeId
from skep.model.values.meta import Version
from skep.store.interface import Commit, Created, Deleted, Updated
from skep.tracing import Part, Span, recording, trace_id, within
from tests.support.builders import a_node, a_service, a_task

VERSION = Version(index=7)


def test_a_request_is_the_root_of_a_trace_for_each_service_that_it_wrote() -> None:
    services = [replace(a_service(id=id), spec_version=VERSION) for id in ("s1", "s2")]
    whole, store = Part("POST /services/create", 10, 90), Part("store", 20, 60, result=services)
    spans = list(spans_of_request(whole, [whole, store, Part("store", 70, 80, result=None)], ""))
    assert [(span.trace, span.name, span.begin_ns, span.end_ns) for span in spans] == [
        (trace_id(id, 7), *rest) for id in ("s1", "s2") for rest in (("request", 10, 90), ("store", 20, 60))
    ]
    request, written, *_ = spans
    assert (request.parent, written.parent) == ("", request.id)


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'A' * 32}-{'b' * 16}-01"])
def test_what_is_no_context_of_a_client_is_ignored(header: str) -> None:
    service = replace(a_service(), spec_version=VERSION)
    assert next(spans_of_request(Part("", 1), [Part("store", 1, result=service)], header)).link is None


def test_a_clients_context_is_linked() -> None:
    service = replace(a_service(), spec_version=VERSION)
    header = f"00-{'a' * 32}-{'b' * 16}-01"
    assert next(spans_of_request(Part("", 1), [Part("store", 1, result=service)], header)).link == (
        "a" * 32,
        "b" * 16,
    )


class Exported:
    """An exporter whose time a test sets."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.at = 0

    def now_ns(self) -> int:
        return self.at

    def add(self, spans: Any) -> None:
        self.spans += spans


@pytest.mark.parametrize("leads", [True, False])
def test_a_task_is_followed_by_the_leader_until_it_runs(leads: bool) -> None:
    own = replace(a_node("m1"), manager_status=ManagerStatus(leader=leads))
    store = SimpleNamespace(view=lambda: SimpleNamespace(lookup=lambda *_: own))
    exported = Exported()
    spans = TaskSpans(cast("Any", store), NodeId("m1"), cast("Any", exported))

    def at(time: int, *events: Any) -> None:
        exported.at = time
        spans.note(Commit(1, events))

    def a(state: TaskState) -> Any:
        return replace(a_task("t1", state=state), spec_version=VERSION)

    new, assigned, running = a(TaskState.NEW), a(TaskState.ASSIGNED), a(TaskState.RUNNING)
    at(10, Created(new), Created(replace(new, id="t2")))
    at(20, Updated(new, a(TaskState.PENDING)), Deleted(replace(new, id="t2")))
    at(30, Updated(a(TaskState.PENDING), assigned))
    at(40, Updated(assigned, a(TaskState.STARTING)))
    at(50, Updated(assigned, running), Updated(running, running))
    found = [(span.name, span.begin_ns, span.end_ns, span.error) for span in exported.spans]
    assert found == ([("schedule", 10, 30, ""), ("task", 10, 50, "")] if leads else [])
    if leads:
        schedule, task = exported.spans
        assert schedule.parent == task.id
        assert schedule.trace == task.trace == trace_id(new.service_id, 7)


def test_nothing_is_recorded_outside_of_a_recording() -> None:
    with within("alone") as part:
        assert part is None
    times = iter((1, 2))
    with recording(lambda: next(times)) as recorded, pytest.raises(ValueError, match="why"), within("part"):
        raise ValueError("why")
    assert recorded.parts == [Part("part", 1, 2, "why")]

"""Measures of a whole service: what the front doors count, and what queries answer."""

import pytest
from msgspec.structs import replace

from skep.manager.autoscaling.decision import Recommendations, decide, readings_of
from skep.manager.autoscaling.totals import totals_of
from skep.manager.diagnosis.scaling_explanations import explain_autoscaling
from skep.model.measures.readings import VALID_S, QueryAnswer, ScalingMeasurements, ServiceRequests
from skep.model.options.autoscaling import Autoscaling, TaskUsage, parsed_autoscaling
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from tests.support.builders import a_service, a_task

N1, N2 = NodeId("n1"), NodeId("n2")
RANGE = {"skep.autoscale": "2..10"}
REQUESTS = parsed_autoscaling({**RANGE, "skep.autoscale.requests": "50"})
RPS = parsed_autoscaling({**RANGE, "skep.autoscale.rps": "100"})
QUERY = parsed_autoscaling(
    {
        **RANGE,
        "skep.autoscale.prometheus": "http://prometheus:9090",
        "skep.autoscale.query": "sum(x)",
        "skep.autoscale.query-target": "10",
    }
)
QUEUE = parsed_autoscaling(
    {**RANGE, "skep.autoscale.queue": "http://queue", "skep.autoscale.queue-target": "10"}
)


def a_scaled(replicas: int) -> tuple[Service, list[Task]]:
    service = a_service("web", replicas=replicas)
    slots = range(1, replicas + 1)
    return service, [
        a_task(f"t{slot}", slot=slot, service=service, state=TaskState.RUNNING) for slot in slots
    ]


def decided(
    replicas: int,
    scaling: Autoscaling,
    found: ScalingMeasurements,
    proxies: tuple[NodeId, ...] = (),
    *,
    waited_s: float = 1000.0,
) -> tuple[int | None, str]:
    """Return the decision after the present number has stood for a while."""
    service, tasks = a_scaled(replicas)
    totals = totals_of(service.id, scaling, found, proxies)
    readings = readings_of(service, scaling, tasks, found.usages, totals=totals)
    decision = decide(service, scaling, readings, Recommendations(replicas, 0.0), waited_s)
    return decision.replicas, decision.reason


def reported(**by_node: ServiceRequests) -> ScalingMeasurements:
    return ScalingMeasurements(
        requests={a_service("web").id: {NodeId(node): one for node, one in by_node.items()}}
    )


def answered(measure: str, answer: QueryAnswer) -> ScalingMeasurements:
    return ScalingMeasurements(answers={a_service("web").id: {measure: answer}})


def test_requests_of_all_doors_are_divided_among_the_tasks() -> None:
    found = reported(n1=ServiceRequests(in_flight=120), n2=ServiceRequests(in_flight=80, per_second=9))
    assert decided(3, REQUESTS, found, (N1, N2)) == (4, "requests 200, target 50 for each task")
    found = reported(n1=ServiceRequests(per_second=550))
    assert decided(4, RPS, found, (N1,)) == (6, "rps 550, target 100 for each task")


@pytest.mark.parametrize("in_flight", [138.0, 150.0, 164.0])
def test_a_small_difference_changes_nothing(in_flight: float) -> None:
    assert decided(3, REQUESTS, reported(n1=ServiceRequests(in_flight=in_flight)), (N1,))[0] is None


def test_a_service_without_requests_shrinks_to_the_least_number() -> None:
    assert decided(9, REQUESTS, reported(n1=ServiceRequests()), (N1,))[0] == 2


def test_a_door_that_reports_nothing_keeps_tasks_and_the_others_still_add_some() -> None:
    quiet = reported(n1=ServiceRequests(in_flight=1))
    missing = "requests not known: no report of the front door on 1 of 2 nodes"
    assert decided(9, REQUESTS, quiet, (N1, N2)) == (
        None,
        f"requests 1, target 50 for each task; {missing}",
    )
    busy = reported(n1=ServiceRequests(in_flight=400))
    assert decided(3, REQUESTS, busy, (N1, N2))[0] == 6
    assert decided(9, REQUESTS, ScalingMeasurements(), ()) == (
        None,
        "requests not known: no task of the front door runs",
    )


def test_reports_of_nodes_without_a_proxy_are_not_believed() -> None:
    found = reported(n1=ServiceRequests(in_flight=100), n2=ServiceRequests(in_flight=5000))
    assert decided(2, REQUESTS, found, (N1,))[0] is None


@pytest.mark.parametrize(("measure", "scaling"), [("query", QUERY), ("queue", QUEUE)])
def test_an_answer_counts_until_it_is_stale(measure: str, scaling: Autoscaling) -> None:
    recent = QueryAnswer(figure=62.0, age_s=VALID_S, problem="connection refused")
    assert decided(4, scaling, answered(measure, recent)) == (7, f"{measure} 62, target 10 for each task")
    stale = replace(recent, figure=0.0, age_s=VALID_S + 1)
    assert decided(4, scaling, answered(measure, stale)) == (None, f"{measure} not known: connection refused")
    assert decided(4, scaling, ScalingMeasurements()) == (None, f"{measure} not known: not answered yet")
    assert decided(4, scaling, answered(measure, QueryAnswer(figure=0.0)))[0] == 2


def test_a_negative_value_of_a_query_leaves_the_least_number() -> None:
    assert decided(4, QUERY, answered("query", QueryAnswer(figure=-50.0)))[0] == 2


def test_the_measure_that_needs_the_most_tasks_decides_and_an_unknown_one_keeps_the_number() -> None:
    both = replace(QUERY, cpu=50)
    _, tasks = a_scaled(4)
    busy = {task.id: TaskUsage(nano_cpus=900_000_000, memory_bytes=0) for task in tasks}
    idle = {task.id: TaskUsage(nano_cpus=0, memory_bytes=0) for task in tasks}
    unknown = answered("query", QueryAnswer(problem="timeout"))
    grown = decided(4, both, replace(unknown, usages=busy))
    assert grown == (8, "cpu 90%, target 50%, over 4 of 4 tasks; query not known: timeout")
    assert decided(4, both, replace(unknown, usages=idle)) == (None, "query not known: timeout")
    assert decided(4, both, replace(answered("query", QueryAnswer(figure=1.0)), usages=busy))[0] == 8
    assert decided(4, both, replace(answered("query", QueryAnswer(figure=70.0)), usages=idle))[0] == 7
    assert decided(4, both, replace(answered("query", QueryAnswer(figure=1.0)), usages=idle))[0] == 2


def test_a_figure_beyond_any_number_of_tasks_asks_for_the_most() -> None:
    small = parsed_autoscaling(
        {**RANGE, "skep.autoscale.queue": "http://queue", "skep.autoscale.queue-target": "0.01"}
    )
    found = ScalingMeasurements(answers={a_service("web").id: {"queue": QueryAnswer(figure=1.7e308)}})
    assert decided(6, small, found)[0] == 10
    assert decided(10, small, found)[0] is None
    service, tasks = a_scaled(6)
    spec = replace(
        service.spec,
        labels={**RANGE, "skep.autoscale.queue": "http://q", "skep.autoscale.queue-target": "0.01"},
    )
    explained = explain_autoscaling(replace(service, spec=spec), tasks, found, lambda number: (number, ""))
    assert "it needs 10" in str(explained)

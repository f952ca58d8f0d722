"""What tasks use, as messages."""

from hypothesis import given
from hypothesis import strategies as st

from skep.model.door.traffic import BUCKETS, COUNT_MAX, added
from skep.model.measures.readings import QueryAnswer, ServiceRequests
from skep.model.options.autoscaling import TaskUsage
from skep.model.values.ids import ServiceId, TaskId
from skep.wire import skep_pb2 as pb
from skep.wire.convert.usages import (
    answer_from_pb,
    answers_to_pb,
    idle_from_pb,
    idle_to_pb,
    reported_requests_from_pb,
    requests_from_pb,
    requests_to_pb,
    routes_from_pb,
    routes_to_pb,
    service_requests_to_pb,
    usages_from_pb,
    usages_to_pb,
)

USAGES = st.builds(TaskUsage, nano_cpus=st.integers(0, 4096 * 10**9), memory_bytes=st.integers(0, 1 << 50))


@given(st.dictionaries(st.text(max_size=25).map(TaskId), USAGES, max_size=20))
def test_usages_survive_the_wire(usages: dict[TaskId, TaskUsage]) -> None:
    message = pb.Heartbeat(usages=usages_to_pb(usages))
    assert usages_from_pb(pb.Heartbeat.FromString(message.SerializeToString()).usages) == usages


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_whatever_a_node_reports_only_what_can_be_a_measurement_counts(cpus: int, memory: int) -> None:
    found = usages_from_pb([pb.TaskUsage(task_id="t", nano_cpus=cpus, memory_bytes=memory)])
    assert all(usage.is_plausible for usage in found.values())
    assert (TaskId("t") in found) == (cpus <= 4096 * 10**9 and memory <= 1 << 50)


def test_a_node_speaks_for_the_tasks_that_it_was_asked_about() -> None:
    reported = [pb.TaskUsage(task_id=id, nano_cpus=1) for id in ("own", "foreign")]
    assert list(usages_from_pb(reported, {"own"})) == ["own"]


THOUSANDTHS = st.integers(0, 10**9).map(lambda number: number / 1000)
SERVICE_IDS = st.text(max_size=25).map(ServiceId)


@given(
    st.dictionaries(
        SERVICE_IDS, st.builds(ServiceRequests, in_flight=THOUSANDTHS, per_second=THOUSANDTHS), max_size=9
    )
)
def test_requests_of_services_survive_the_wire_also_if_there_are_none(
    requests: dict[ServiceId, ServiceRequests],
) -> None:
    message = pb.Heartbeat(service_requests=service_requests_to_pb(requests))
    sent = pb.Heartbeat.FromString(message.SerializeToString())
    assert reported_requests_from_pb(sent.service_requests) == requests


def test_absurd_requests_are_ignored() -> None:
    absurd = pb.ServiceRequests(service_id="web", in_flight_thousandths=2**63)
    assert reported_requests_from_pb([absurd]) == {}


COUNTS = st.integers(0, 2**64 - 1) | st.integers(0, COUNT_MAX)


@given(st.lists(st.tuples(COUNTS, COUNTS, COUNTS), max_size=5))
def test_sums_of_whatever_nodes_report_fit_into_the_next_message(counts: list[tuple[int, int, int]]) -> None:
    tasks = [pb.TaskRequests(task_id="t", requests=a, errors=b, milliseconds=c) for a, b, c in counts]
    routes = [
        pb.RouteTraffic(
            service_id="web", route="a", milliseconds=a, requests=b, errors=c, buckets=[c] * BUCKETS
        )
        for a, b, c in counts
    ]
    idle = [pb.IdleService(service_id="web", milliseconds=a) for a, _, _ in counts]
    requests, traffic = requests_from_pb(tasks), [*added(routes_from_pb(routes))]
    assert requests_from_pb(requests_to_pb(requests)) == requests
    assert routes_from_pb(routes_to_pb(traffic)) == tuple(traffic)
    for times in idle_from_pb(idle).values():
        idle_to_pb(times)


@given(
    st.builds(
        QueryAnswer, figure=st.none() | st.floats(allow_nan=False), age_s=THOUSANDTHS, problem=st.text()
    )
)
def test_answers_survive_the_wire(answer: QueryAnswer) -> None:
    (message,) = answers_to_pb({ServiceId("web"): {"query": answer}})
    assert (message.service_id, message.measure) == ("web", "query")
    assert answer_from_pb(pb.QueryAnswer.FromString(message.SerializeToString())) == answer

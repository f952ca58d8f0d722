"""What tasks use, as messages."""

from hypothesis import given
from hypothesis import strategies as st

from skep.model.measures.readings import QueryAnswer, ServiceRequests
from skep.model.options.autoscaling import TaskUsage
from skep.model.values.ids import ServiceId, TaskId
from skep.wire import skep_pb2 as pb
from skep.wire.convert.usages import (
    answer_from_pb,
    answers_to_pb,
    reported_requests_from_pb,
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


@given(
    st.builds(
        QueryAnswer, figure=st.none() | st.floats(allow_nan=False), age_s=THOUSANDTHS, problem=st.text()
    )
)
def test_answers_survive_the_wire(answer: QueryAnswer) -> None:
    (message,) = answers_to_pb({ServiceId("web"): {"query": answer}})
    assert (message.service_id, message.measure) == ("web", "query")
    assert answer_from_pb(pb.QueryAnswer.FromString(message.SerializeToString())) == answer

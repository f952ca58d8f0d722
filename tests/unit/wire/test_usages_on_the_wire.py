"""What tasks use, as messages."""

from hypothesis import given
from hypothesis import strategies as st

from skep.model.options.autoscaling import TaskUsage
from skep.model.values.ids import TaskId
from skep.wire import skep_pb2 as pb
from skep.wire.convert.usages import usages_from_pb, usages_to_pb

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

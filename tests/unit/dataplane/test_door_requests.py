"""Requests of new tasks, from HAProxy's counters of server lines."""

from skep.dataplane.door.statistics import WINDOW_S, LineCounters, RequestWindow, counters_of
from skep.model.staging.updates import TaskRequests
from skep.model.values.ids import TaskId

LINE = ("web-1", "s1")
T1, T2 = TaskId("t1"), TaskId("t2")
TEXT = """# pxname,svname,econ,eresp,hrsp_1xx,hrsp_2xx,hrsp_3xx,hrsp_4xx,hrsp_5xx,hrsp_other,rtime,
web-1,s1,1,2,0,10,0,3,4,0,25,
web-1,s2,0,0,0,7,0,0,0,0,25,
"""


def counters(task: str, requests: int, errors: int = 0, latency_ms: float = 10.0) -> LineCounters:
    return LineCounters(task=task, requests=requests, errors=errors, latency_ms=latency_ms)


def test_failed_connections_and_server_errors_are_errors() -> None:
    assert dict(counters_of(TEXT, {LINE: "t1"})) == {LINE: counters("t1", 20, 7, 25.0)}
    assert dict(counters_of("", {LINE: "t1"})) == {}


def test_the_first_reading_and_requests_of_the_lines_former_task_do_not_count() -> None:
    window = RequestWindow()
    window.add(0.0, {LINE: counters("t1", 100, 50)})
    window.add(5.0, {LINE: counters("t1", 110, 51)})
    window.add(10.0, {LINE: counters("t2", 130, 60)})
    window.add(15.0, {LINE: counters("t2", 131, 60)})
    seen = window.present(15.0)
    assert seen[T1] == TaskRequests(requests=10, errors=1, milliseconds=100)
    assert seen[T2] == TaskRequests(requests=1, milliseconds=10)


def test_a_reload_counts_from_zero_and_old_requests_are_forgotten() -> None:
    window = RequestWindow()
    window.add(0.0, {LINE: counters("t1", 100)})
    window.add(5.0, {LINE: counters("t1", 4)})
    assert window.present(5.0)[T1].requests == 4
    window.add(5.0 + WINDOW_S, {LINE: counters("t1", 4)})
    assert window.present(5.0 + WINDOW_S)[T1].requests == 4
    assert window.present(6.0 + WINDOW_S)[T1].requests == 0

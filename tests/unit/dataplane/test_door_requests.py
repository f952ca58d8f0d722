"""Requests of new tasks and of autoscaled services, from HAProxy's counters."""

from skep.dataplane.door.reading import rows_in
from skep.dataplane.door.statistics import (
    RATE_WINDOW_S,
    WINDOW_S,
    LineCounters,
    RequestWindow,
    ServiceCounters,
    ServiceWindow,
    counters_of,
    service_counters_of,
)
from skep.model.measures.readings import ServiceRequests
from skep.model.staging.updates import TaskRequests
from skep.model.values.ids import ServiceId, TaskId

LINE = ("web-1", "s1")
T1, T2 = TaskId("t1"), TaskId("t2")
TEXT = """# pxname,svname,econ,eresp,hrsp_1xx,hrsp_2xx,hrsp_3xx,hrsp_4xx,hrsp_5xx,hrsp_other,rtime,
web-1,s1,1,2,0,10,0,3,4,0,25,
web-1,s2,0,0,0,7,0,0,0,0,25,
"""


def counters(task: str, requests: int, errors: int = 0, latency_ms: float = 10.0) -> LineCounters:
    return LineCounters(task=task, requests=requests, errors=errors, latency_ms=latency_ms)


def test_failed_connections_and_server_errors_are_errors() -> None:
    assert dict(counters_of(rows_in(TEXT), {LINE: "t1"})) == {LINE: counters("t1", 20, 7, 25.0)}
    assert dict(counters_of(rows_in(""), {LINE: "t1"})) == {}


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


BACKENDS = """# pxname,svname,scur,req_tot,
web-1,BACKEND,3,100,

# pxname,svname,scur,req_tot,
web-2,BACKEND,4,10,
other,BACKEND,9,9,
"""
WEB = ServiceId("web")
OF_WEB = {"web-1": "web", "web-2": "web"}


def readings(first: tuple[int, int], second: tuple[int, int]) -> dict[str, ServiceCounters]:
    return {"web-1": ServiceCounters(*first), "web-2": ServiceCounters(*second)}


def test_counters_of_backends_are_read_from_several_responses() -> None:
    assert dict(service_counters_of(rows_in(BACKENDS), OF_WEB)) == readings((3, 100), (4, 10))
    assert dict(service_counters_of((), OF_WEB)) == {}


def test_all_backends_of_a_service_are_added_and_averaged_over_the_last_readings() -> None:
    window = ServiceWindow()
    window.add(0.0, OF_WEB, readings((3, 100), (4, 10)))
    assert window.present(0.0) == {}
    window.add(5.0, OF_WEB, readings((2, 150), (0, 20)))
    window.add(10.0, OF_WEB, readings((0, 180), (0, 30)))
    assert window.present(10.0) == {WEB: ServiceRequests(in_flight=1.0, per_second=10.0)}
    window.add(15.0, OF_WEB, readings((0, 10), (0, 30)))
    assert window.present(15.0)[WEB].per_second == 110 / 15, "a reload counts from 0"
    for at in (20.0, 25.0, 30.0):
        window.add(at, OF_WEB, readings((0, 10), (0, 30)))
    assert window.present(30.0) == {WEB: ServiceRequests()}, "an idle service is known to be idle"


def test_a_service_is_not_known_without_a_recent_reading_of_each_backend() -> None:
    window = ServiceWindow()
    window.add(0.0, OF_WEB, readings((3, 100), (4, 10)))
    window.add(5.0, OF_WEB, readings((3, 100), (4, 10)))
    assert WEB in window.present(5.0)
    assert window.present(5.0 + RATE_WINDOW_S) == {}, "HAProxy does not respond"
    window.add(25.0, OF_WEB, {"web-1": ServiceCounters(3, 100)})
    assert window.present(25.0) == {}

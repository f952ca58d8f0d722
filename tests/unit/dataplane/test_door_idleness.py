"""Which services a node reports as idle, and since when."""

from skep.dataplane.door.configuration import DoorState
from skep.dataplane.door.derivation import state_of
from skep.dataplane.door.idleness import (
    READING_S_MAX,
    SERVICES_MAX,
    BackendCounters,
    IdleWatch,
    idle_candidates,
)
from skep.model.networks.tables import NetworkHead, NetworkTable, TableEndpoint, TableService
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId

WEB = ServiceId("web")


def a_state(*names: str, running: tuple[str, ...] = ()) -> DoorState:
    services = {
        ServiceId(name): TableService(
            id=ServiceId(name), name=name, labels={"skep.http": f"{name}.example", "skep.autoscale": "0..3"}
        )
        for name in names
    }
    endpoints = {
        TaskId(name): TableEndpoint(
            task_id=TaskId(name),
            node_id=NodeId("n1"),
            service_id=ServiceId(name),
            addresses=("10.0.0.1",),
            is_running=name in running,
        )
        for name in names
    }
    head = NetworkHead(id=NetworkId("door"), name="skep-door", is_door=True)
    return state_of(NetworkTable(head=head, services=services, endpoints=endpoints), DoorState())


def test_a_service_whose_task_does_not_run_counts() -> None:
    assert [*idle_candidates(a_state("web")).values()] == ["web"]


def test_services_with_tasks_are_first_in_a_report_that_is_full() -> None:
    names = [f"s{number:03}" for number in range(SERVICES_MAX + 3)]
    running = tuple(names[-2:])
    found = [*idle_candidates(a_state(*names, running=running)).values()]
    assert len(found) == SERVICES_MAX
    assert {*found} >= {*running}
    watch = IdleWatch()
    watch.add(0.0, {ServiceId(name): BackendCounters() for name in names})
    watch.add(1.0, {ServiceId(name): BackendCounters(servers=int(name in running), open=1) for name in names})
    assert [*watch.present(1.0)][:2] == [*running]
    assert len(watch.present(1.0)) == SERVICES_MAX


def test_the_time_since_the_last_reading_does_not_count_because_a_request_may_have_come() -> None:
    watch = IdleWatch()
    watch.add(0.0, {WEB: BackendCounters(reached={"7": 3})})
    watch.add(60.0, {WEB: BackendCounters(reached={"7": 3})})
    assert watch.present(60.0 + READING_S_MAX) == {WEB: 60.0}
    assert watch.present(60.5 + READING_S_MAX) == {}
    watch.add(70.0, {WEB: BackendCounters(reached={"7": 4})})
    assert watch.present(70.0) == {WEB: 0.0}


def test_a_process_that_nobody_has_expected_may_have_had_requests() -> None:
    watch = IdleWatch()
    watch.add(0.0, {WEB: BackendCounters(reached={"7": 3})})
    watch.expect_reload()
    watch.add(10.0, {WEB: BackendCounters(reached={"8": 0})})
    assert watch.present(10.0) == {WEB: 10.0}
    watch.add(20.0, {WEB: BackendCounters(reached={"9": 0})})
    assert watch.present(20.0) == {WEB: 0.0}

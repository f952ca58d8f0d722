"""What a manager counts for Prometheus."""

from msgspec.structs import replace

from skep.api.telemetry.exposition import render
from skep.manager.telemetry.metrics import StartTimes, chosen, service_families
from skep.model.service import GlobalService, HealthState, ServiceHealth, ServiceMode, ServiceStatus
from skep.model.task import TaskState
from skep.store.interface import Commit, Created, Deleted, Updated
from tests.support.builders import a_service, a_service_spec, a_task


class Steps:
    """A clock that a test sets."""

    at = 0.0

    def monotonic(self) -> float:
        return self.at


def test_a_start_is_the_time_between_two_commits_that_were_seen() -> None:
    clock = Steps()
    starts = StartTimes(None, clock)  # type: ignore[arg-type]  # no commits are followed here
    pending = a_task("t1", state=TaskState.PENDING)
    running = a_task("t1", state=TaskState.RUNNING)
    failed = a_task("t2", state=TaskState.FAILED)

    def commit(*events: object) -> None:
        starts.note(Commit(1, events))  # type: ignore[arg-type]

    commit(
        Created(pending),
        Created(a_task("t2", state=TaskState.NEW)),
        Created(a_task("t3", state=TaskState.NEW)),
    )
    clock.at = 0.3
    commit(Updated(pending, running), Updated(pending, failed), Deleted(a_task("t3")))
    clock.at = 9.0
    commit(Updated(running, running), Updated(failed, failed))
    commit(Updated(pending, a_task("t9", state=TaskState.RUNNING)))  # begun before this manager
    text = render([starts.histogram.family("x", "X.")]).decode()
    assert 'x_bucket{le="0.25"} 0' in text
    assert 'x_bucket{le="0.5"} 1' in text
    assert "x_count 1" in text


def test_of_etcds_metrics_a_few_are_kept_under_their_names() -> None:
    page = """
# HELP etcd_server_has_leader Whether or not a leader exists. 1 is existence, 0 is not.
# TYPE etcd_server_has_leader gauge
etcd_server_has_leader 1
# TYPE etcd_network_peer_round_trip_time_seconds histogram
etcd_network_peer_round_trip_time_seconds_bucket{To="a b",le="0.0001"} 0
etcd_network_peer_round_trip_time_seconds_bucket{To="a b",le="+Inf"} 2
etcd_network_peer_round_trip_time_seconds_sum{To="a b"} 1.5e-03
etcd_network_peer_round_trip_time_seconds_count{To="a b"} 2
# TYPE etcd_server_slow_apply_total counter
etcd_server_slow_apply_total nonsense
# TYPE go_goroutines gauge
go_goroutines 90
"""
    assert (
        render(chosen(page)).decode()
        == """\
# HELP etcd_server_has_leader Whether a leader exists.
# TYPE etcd_server_has_leader gauge
etcd_server_has_leader 1.0
# HELP etcd_network_peer_round_trip_time_seconds Round trips to other members.
# TYPE etcd_network_peer_round_trip_time_seconds histogram
etcd_network_peer_round_trip_time_seconds_bucket{To="a b",le="0.0001"} 0.0
etcd_network_peer_round_trip_time_seconds_bucket{To="a b",le="+Inf"} 2.0
etcd_network_peer_round_trip_time_seconds_sum{To="a b"} 0.0015
etcd_network_peer_round_trip_time_seconds_count{To="a b"} 2.0
"""
    )


def test_services_count_what_runs_and_what_should() -> None:
    services = [
        a_service("web", id="s1", spec=a_service_spec("web", replicas=3)),
        a_service(
            "agent", id="s2", spec=replace(a_service_spec("agent"), mode=ServiceMode(global_=GlobalService()))
        ),
    ]
    degraded = ServiceHealth(state=HealthState.DEGRADED)
    counts = [
        ServiceStatus(running_tasks=2, desired_tasks=3, health=degraded),
        ServiceStatus(running_tasks=4, desired_tasks=5, health=ServiceHealth()),
    ]
    found = service_families(list(zip(services, counts, strict=True)))
    text = render(found).decode()
    assert 'skep_service_running_tasks{service="web"} 2' in text
    assert 'skep_service_desired_tasks{service="web"} 3' in text
    assert 'skep_service_desired_tasks{service="agent"} 5' in text
    assert 'skep_service_state{service="web",state="degraded"} 1' in text
    assert 'skep_service_state{service="web",state="healthy"} 0' in text
    assert 'skep_service_state{service="agent",state="healthy"} 1' in text


def test_a_slot_of_a_one_shot_service_that_is_done_is_not_expected_to_run() -> None:
    services = [a_service("migrate", id="s1", spec=a_service_spec("migrate", replicas=2))]
    status = ServiceStatus(desired_tasks=2, completed_tasks=1, health=ServiceHealth())
    text = render(service_families([(services[0], status)])).decode()
    assert 'skep_service_desired_tasks{service="migrate"} 1' in text

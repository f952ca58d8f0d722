"""Scheduled jobs in a simulated cluster: every due time is decided once, over changes of leader and skewed clocks."""

from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.invariants.services.schedules import DECIDED_S, due_times, undecided
from sim.users.random_specs import ENDING_IMAGES
from skep.manager.control.jobs import retry_job, run_job
from skep.manager.control.services import create_service
from skep.model.options.schedules import CRON
from skep.model.service import (
    JobStatus,
    ReplicatedJob,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceSpec,
)
from skep.model.values.ids import ServiceId
from skep.model.values.times import SECOND_NS, Timestamp, timestamp
from tests.support.builders import a_service_spec

MINUTES = 8


def now(cluster: SimulatedCluster) -> Timestamp:
    """By the clock of some manager, as of a client's request."""
    return timestamp(cluster.clocks[cluster.random.choice(cluster.managers)].now_ns())


def a_job(name: str, every: int = 1, *, image: str = "job:1", total: int = 1, **labels: str) -> ServiceSpec:
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=2, total_completions=total))
    restart = RestartPolicy(max_attempts=1, delay=SECOND_NS)
    spec = a_service_spec(name, image=image, restart=restart)
    return replace(spec, mode=mode, labels={CRON: f"*/{every} * * * *", **labels})


def a_cluster(workers: int, seed: int) -> SimulatedCluster:
    """Its images end, or fail, after a while."""
    cluster = SimulatedCluster(managers=3, workers=workers, seed=seed, skew=True)
    for node in cluster.nodes.values():
        node.ending_images.update(ENDING_IMAGES)
    return cluster


def create(cluster: SimulatedCluster, spec: ServiceSpec) -> ServiceId:
    """With its name as id."""
    at = now(cluster)
    cluster.write(lambda tx: create_service(tx, spec, new_id=lambda: spec.name, new_name=lambda: "", now=at))
    return ServiceId(spec.name)


def status(cluster: SimulatedCluster, id: str) -> JobStatus:
    job = cluster.view.get(Service, id).job_status
    assert job is not None
    return job


def runs(cluster: SimulatedCluster, id: str) -> list[str]:
    """The due times that had runs."""
    schedule = status(cluster, id).schedule
    assert schedule is not None
    return [one.scheduled_at for one in schedule.starts if one.scheduled_at and not one.skipped]


def decided(cluster: SimulatedCluster) -> list[str]:
    """Due times that should be decided and are not: the slowest clock counts, as any manager may lead."""
    slowest = min(cluster.clocks[id].now_ns() for id in cluster.managers)
    return list(undecided(cluster.view, timestamp(slowest - round(DECIDED_S * SECOND_NS))))


def test_two_schedules_over_the_loss_of_leaders_have_no_doubled_and_no_missed_run() -> None:
    with a_cluster(workers=2, seed=7) as cluster:
        began = now(cluster)
        ids = [create(cluster, a_job("every-minute", 1)), create(cluster, a_job("every-second", 2))]
        assert [status(cluster, id).awaits_first_run for id in ids] == [True, True]
        assert cluster.created("every-minute") == 0
        for number in range(MINUTES):
            cluster.run_for(51)
            if number % 2:
                cluster.depose()
            else:
                leader = cluster.leader
                cluster.crash(leader)
                cluster.run_for(3)
                cluster.start_manager(leader)
        cluster.run_for(DECIDED_S + 5)
        for id in ids:
            schedule = status(cluster, id).schedule
            assert schedule is not None
            service = cluster.view.get(Service, id)
            due = [timestamp(at * SECOND_NS) for at in due_times(service, began, schedule.settled)]
            assert runs(cluster, id) == due
        assert decided(cluster) == []
        assert cluster.created("every-minute") == len(runs(cluster, "every-minute")) >= MINUTES - 2
        cluster.check_invariants()


def test_after_an_outage_of_all_managers_there_is_one_run_for_all_that_were_missed() -> None:
    with a_cluster(workers=2, seed=3) as cluster:
        id = create(cluster, a_job("nightly"))
        cluster.run_for(130)
        before = runs(cluster, id)
        for manager in cluster.managers:
            cluster.crash(manager)
        cluster.run_for(400)
        for manager in cluster.managers:
            cluster.start_manager(manager)
        cluster.run_for(30)
        schedule = status(cluster, id).schedule
        assert schedule is not None
        late = next(one for one in schedule.starts if one.missed_since is not None)
        assert late.skipped == ""
        assert runs(cluster, id)[len(before)] == late.scheduled_at
        assert decided(cluster) == []
        cluster.check_invariants()


def test_a_failed_run_is_retried_with_the_spec_that_it_had_and_completes_what_is_missing() -> None:
    with a_cluster(workers=2, seed=5) as cluster:
        spec = a_job("nightly", 60, image="crashing:1", total=2)
        id = create(cluster, spec)
        at = now(cluster)
        cluster.write(lambda tx: run_job(tx, id, now=at, replaces=False))
        cluster.run_until(lambda: cluster.created("nightly") == 4, within_s=60)  # two attempts each
        cluster.run_for(20)
        assert cluster.created("nightly") == 4
        cluster.write(lambda tx: retry_job(tx, id))
        cluster.run_until(lambda: cluster.created("nightly") == 8, within_s=60)
        cluster.depose()
        cluster.run_for(30)
        assert cluster.created("nightly") == 8
        assert status(cluster, id).job_iteration.index == 0
        cluster.check_invariants()

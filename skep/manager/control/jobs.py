"""Operations on jobs: start a run now, and retry the failed slots of the current run."""

from msgspec.structs import replace

from skep.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from skep.manager.control.services import check_files
from skep.manager.services.job_runs import (
    away_from_retry,
    has_failed,
    is_going,
    of_present_run,
    retried,
    started,
    started_plainly,
)
from skep.model.needs import references_of
from skep.model.network import Network
from skep.model.service import JobStart, Service
from skep.model.task import Task
from skep.model.values.ids import ServiceId
from skep.model.values.times import Timestamp
from skep.store.interface import Transaction
from skep.store.kinds import as_run, has_unreadable_run
from skep.store.level import SCHEDULES


def run_job(tx: Transaction, id: ServiceId, *, now: Timestamp, replaces: bool) -> Service:
    """Start the next run of a job now, whether it has a schedule or not.

    ``replaces`` stops the current run if it is active.

    Raises:
        FailedPrecondition: The service is not a job, or its current run is active.
        NotFound: The service does not exist.
        Unavailable: The current run cannot be read.
    """
    service = _job(tx, id)
    job = service.job_status
    assert job is not None, "it is a job"
    if not replaces and is_going(tx, service):
        raise FailedPrecondition(
            f"run {job.job_iteration.index} of job {service.spec.name} is active: wait until it ends, or replace it "
            f"(skep job run --replace {service.spec.name})"
        )
    if job.schedule is not None:
        return tx.put(replace(service, job_status=started(tx, service, job.schedule, JobStart(at=now))))
    return tx.put(replace(service, job_status=started_plainly(tx, job, service.spec, now)))


def retry_job(tx: Transaction, id: ServiceId) -> Service:
    """Retry the slots of a job's current run that were given up.  Completed slots stay completed.

    Raises:
        FailedPrecondition: The service is not a job, or nothing has failed.
        InvalidArgument: A secret, config or network of the run was removed.
        NotFound: The service does not exist.
        Unavailable: The current run cannot be read.
    """
    service = _job(tx, id)
    if not has_failed(tx, service):
        tasks = of_present_run(service, tx.find(Task, service_id=id))
        is_restarting = any(task.has_failed for task in tasks) and any(task.is_active for task in tasks)
        why = (
            f"the current run of job {service.spec.name} restarts its failed tasks by itself"
            if is_restarting
            else f"no slot of the current run of job {service.spec.name} has failed"
        )
        raise FailedPrecondition(f"{why}: there is nothing to retry")
    if service.job_status is not None and (away := away_from_retry(tx, service)):
        others = f" and {len(away) - 1} more" if len(away) > 1 else ""
        raise FailedPrecondition(
            f"run {service.job_status.job_iteration.index} of job {service.spec.name} failed on {away[0]}{others}: "
            "retry it when its nodes take tasks again"
        )
    spec = as_run(
        tx, service
    ).spec  # The run was over, so the objects to which it refers may have been removed.
    check_files(tx, spec)
    for kind, network in references_of(spec):
        if kind == "network" and tx.rely_on(Network, network) is None:
            raise InvalidArgument(f"network {network} not found")
    return tx.put(replace(service, job_status=retried(tx, service)))


def _job(tx: Transaction, id: ServiceId) -> Service:
    service = tx.get(Service, id)
    if service.removed_at is not None:
        raise NotFound(f"service {id} not found")
    if has_unreadable_run(tx, id):
        raise Unavailable(f"this manager cannot read the current run of job {id}: try another manager")
    if service.job_status is None:
        raise FailedPrecondition(
            f"service {service.spec.name} is not a job: it has mode {service.spec.mode.name}"
        )
    if tx.level < SCHEDULES:  # an older leader would not retry, and would not show why a run started
        raise FailedPrecondition("this needs managers of this version: upgrade the others first")
    return service

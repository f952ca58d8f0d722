"""Operations that stop a service and start it again.  Docker can only scale a service to 0, which forgets its number.

A stop changes the labels of the current spec and of the previous one, and nothing else, so that a rollback does not
start the service, and still leads to the spec before the last update.  Each operation is idempotent.
"""

from collections.abc import Mapping

from msgspec.structs import replace

from skep.errors import FailedPrecondition
from skep.manager.control.quotas import check_quota
from skep.manager.control.services import check_level, present_service
from skep.manager.services.job_runs import next_job
from skep.model.options.labels import STOPPED, is_stopped
from skep.model.options.schedules import CRON, CRON_SUSPEND
from skep.model.service import Service, ServiceSpec
from skep.model.values.ids import ServiceId
from skep.model.values.times import Timestamp
from skep.store.interface import Transaction


def stop_service(tx: Transaction, id: ServiceId, *, now: Timestamp) -> Service:
    """Stop all tasks of a service, or the schedule of a job, whose current run continues.

    Raises:
        FailedPrecondition: It is a job without a schedule, which ends by itself, or a manager has an older version.
        NotFound: The service was removed.
        Unavailable: This manager cannot read the current run of the job.
    """
    service = present_service(tx, id)
    if service.job_status is None:
        if is_stopped(service.spec.labels):
            return service
        return _put(tx, service, frozenset(), {STOPPED: "true"}, now)
    if CRON not in service.spec.labels:
        raise FailedPrecondition(
            f"service {service.spec.name} is a job without a schedule: it ends by itself, or remove it with "
            f"docker service rm {service.spec.name}"
        )
    if service.spec.labels.get(CRON_SUSPEND, "").lower() == "true":
        return service  # A start shall not resume a schedule that a user has suspended.
    return _put(tx, service, frozenset(), {STOPPED: "true", CRON_SUSPEND: "true"}, now)


def start_service(tx: Transaction, id: ServiceId, *, now: Timestamp) -> Service:
    """Start a stopped service with the number of tasks of its spec, or the schedule of a stopped job.

    Raises:
        NotFound: The service was removed.
        PermissionDenied: The stack's quota is exceeded.
        Unavailable: This manager cannot read the current run of the job.
    """
    service = present_service(tx, id)
    if not is_stopped(service.spec.labels):
        return service
    removed = {STOPPED, CRON_SUSPEND} if service.job_status is not None else {STOPPED}
    return _put(tx, service, frozenset(removed), {}, now)


def _put(
    tx: Transaction, service: Service, removed: frozenset[str], added: Mapping[str, str], now: Timestamp
) -> Service:
    def changed(spec: ServiceSpec) -> ServiceSpec:
        kept = {name: text for name, text in spec.labels.items() if name not in removed}
        return replace(spec, labels={**kept, **added})

    spec, previous, job = changed(service.spec), service.previous_spec, service.job_status
    check_level(tx, spec)
    check_quota(tx, spec, service)
    if job is not None:
        job = next_job(tx, service, spec, now)
    return tx.put(
        replace(
            service,
            spec=spec,
            previous_spec=changed(previous) if previous is not None else None,
            job_status=job,
        )
    )

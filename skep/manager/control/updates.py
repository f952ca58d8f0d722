"""Operations on a service: pause, resume and abort its update, stop it and start it again.

Docker can end an update only by another update, and can only scale a service to 0, which forgets its number.  A stop
changes the labels of the current spec and of the previous one, and nothing else.  So a rollback does not start the
service, and still leads to the spec before the last update.  Each operation is idempotent.
"""

from collections.abc import Mapping

from msgspec.structs import replace

from skep.errors import FailedPrecondition
from skep.manager.control.quotas import check_quota
from skep.manager.control.services import check_level, present_service, rollback_service
from skep.manager.control.tasks import is_up_to_date
from skep.manager.services.job_runs import next_job
from skep.model.options.labels import STOPPED, is_stopped
from skep.model.options.schedules import CRON, CRON_SUSPEND
from skep.model.service import Service, ServiceSpec, UpdateSplit, UpdateState, UpdateStatus
from skep.model.staging.shares import ALL_PERCENT
from skep.model.staging.updates import (
    UPDATE,
    UpdateStage,
    message_of,
    percent_in_force,
    stages_of,
    status_after,
    tasks_of_step,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import ServiceId
from skep.model.values.times import Timestamp, unix_ns
from skep.store.interface import Transaction, View

PAUSED_BY_USER = "manually paused"
"""Message of an update that a user paused.  The leader's own messages start differently."""

SWITCHED_BACK = "switched back to the old tasks"
"""Message of a blue-green update that a user switched back, which is paused."""

_PAUSES = {
    UpdateState.UPDATING: UpdateState.PAUSED,
    UpdateState.ROLLBACK_STARTED: UpdateState.ROLLBACK_PAUSED,
}
_RESUMES = {paused: going for going, paused in _PAUSES.items()}


def pause_update(tx: Transaction, id: ServiceId, *, now: Timestamp) -> Service:
    """Pause an update or rollback, so that it starts no further task.

    Slots that are being replaced are completed, but their result does not count.

    Raises:
        FailedPrecondition: No update is in progress.
        NotFound: The service was removed.
    """
    service = present_service(tx, id)
    state = _state(tx, service)
    if state in _RESUMES:
        return service
    if state not in _PAUSES:
        raise _nothing_to(service, "pause")
    status = service.update_status or UpdateStatus(started_at=now)
    return _put(tx, service, replace(status, state=_PAUSES[state], message=PAUSED_BY_USER))


def resume_update(tx: Transaction, id: ServiceId) -> Service:
    """Resume a paused update or rollback.

    Earlier failures no longer count, or the update would be paused again at once.  Later failures count, and so does a
    task that has not started by the progress deadline.

    Raises:
        FailedPrecondition: No update is in progress.
        NotFound: The service was removed.
    """
    service = present_service(tx, id)
    state = _state(tx, service)
    if state in _PAUSES:
        return service
    if state not in _RESUMES:
        raise _nothing_to(service, "resume")
    assert service.update_status is not None
    # Use the tasks' own times: this manager's clock may differ from the leader's.
    made = [task.created_at for task in tx.find(Task, service_id=id)]
    status = replace(
        service.update_status,
        state=_RESUMES[state],
        message="update in progress" if state is UpdateState.PAUSED else "rollback in progress",
        tolerated_until=max(made, key=unix_ns, default=None),
    )
    return _put(tx, service, status)


def abort_update(tx: Transaction, id: ServiceId, version: int, *, now: Timestamp, by: str = "") -> Service:
    """Abort the update at ``version``, paused or not, and return to the previous spec, as a rollback does.

    Raises:
        FailedPrecondition: No update is in progress, it is already a rollback, or there is no previous spec.
        NotFound: The service was removed.
        OutOfSequence: The service is at another version.
    """
    service = present_service(tx, id)
    state = _state(tx, service)
    if state in (UpdateState.ROLLBACK_STARTED, UpdateState.ROLLBACK_PAUSED):
        more = f": skep update resume {service.spec.name}" if state is UpdateState.ROLLBACK_PAUSED else ""
        raise FailedPrecondition(f"service {service.spec.name} is already being rolled back{more}")
    if state not in (UpdateState.UPDATING, UpdateState.PAUSED):
        raise _nothing_to(service, "abort")
    return rollback_service(tx, id, service.spec, version, now=now, by=by)


def promote_update(tx: Transaction, id: ServiceId) -> Service:
    """Begin the next step of a staged update, without waiting for the time of the present one.

    Its share follows once its tasks run.

    Raises:
        FailedPrecondition: The update has no next step, is paused, its step has just begun, or not all new tasks of the
            step run.
        NotFound: The service was removed.
    """
    service = present_service(tx, id)
    status, split, stages = _step_of(service)
    name = service.spec.name
    if status.state is not UpdateState.UPDATING:
        raise FailedPrecondition(f"the update of service {name} is paused: skep update resume {name}")
    if not stages[split.step].keeps_old:
        raise FailedPrecondition(
            f"the update of service {name} is in its last step: skep service wait {name}"
        )
    tasks = [task for task in tx.find(Task, service_id=id) if task.is_wanted]
    running = {
        task.slot
        for task in tasks
        if task.spec_version is not None
        and task.spec_version.index in split.versions
        and task.status.state is TaskState.RUNNING
    }
    wanted = tasks_of_step(stages[split.step], service.spec.replicas)
    if len(running) < wanted:
        raise FailedPrecondition(
            f"{len(running)} of {wanted} new tasks of service {name} run: see skep explain {name}"
        )
    slots = max(len({task.slot for task in tasks}), service.spec.replicas)
    stage = stages[split.step]
    if split.percent != stage.percent == percent_in_force(stage, len(running), slots):
        # The user has not seen this step: the leader, another user or a repeated request has just begun it.
        raise FailedPrecondition(
            f"step {split.step + 1} of the update of service {name} has just begun: repeat the command in a few "
            "seconds if it shall end"
        )
    return _put_step(tx, service, stages, split.step + 1, split.percent)


def switch_back(tx: Transaction, id: ServiceId) -> Service:
    """Return all new connections to the old tasks after the switch of a blue-green update, and pause the update.

    Raises:
        FailedPrecondition: The update has not switched, or the old tasks have ended.
        NotFound: The service was removed.
    """
    service = present_service(tx, id)
    status, split, stages = _step_of(service)
    name = service.spec.name
    if split.percent == 0 and status.state is UpdateState.PAUSED:
        return service
    stage = stages[split.step]
    if stage.percent != ALL_PERCENT or not stage.keeps_old:
        why = "has not switched to the new tasks" if stage.keeps_old else "already replaces the old tasks"
        raise FailedPrecondition(
            f"the update of service {name} {why}: skep update abort {name} returns to the previous spec"
        )
    return _put_step(tx, service, stages, split.step - 1, 0, is_paused=True)


def _step_of(service: Service) -> tuple[UpdateStatus, UpdateSplit, tuple[UpdateStage, ...]]:
    """Return status, step and all steps of a staged update.  Raises: FailedPrecondition: None is in progress."""
    status, stages = service.update_status, stages_of(service.spec.labels)
    is_staged = status is not None and status.state in (UpdateState.UPDATING, UpdateState.PAUSED)
    if status is None or status.split is None or not is_staged or status.split.step >= len(stages):
        name = service.spec.name
        raise FailedPrecondition(
            f"service {name} has no update with {UPDATE} in progress: see docker service inspect {name}"
        )
    return status, status.split, stages


def _put_step(
    tx: Transaction,
    service: Service,
    stages: tuple[UpdateStage, ...],
    step: int,
    percent: int | None,
    *,
    is_paused: bool = False,
) -> Service:
    """Write the step.  Its share, if it is larger, follows from the tasks that run."""
    status = service.update_status
    assert status is not None
    assert status.split is not None
    return _put(
        tx,
        service,
        replace(
            status,
            state=UpdateState.PAUSED if is_paused else UpdateState.UPDATING,
            message=SWITCHED_BACK if is_paused else message_of(stages, step),
            split=replace(status.split, step=step, percent=percent),
        ),
    )


def _state(view: View, service: Service) -> UpdateState | None:
    """Return the state of the update, or the state that the leader will write if it has not started the update yet."""
    status = service.update_status
    if status is not None and status.state is not None:
        return status.state
    if service.job_status is not None:
        return None
    tasks = view.find(Task, service_id=service.id)
    is_new = any(task.is_wanted and not is_up_to_date(view, task) for task in tasks)
    return UpdateState.UPDATING if is_new else None


def _nothing_to(service: Service, verb: str) -> FailedPrecondition:
    name = service.spec.name
    return FailedPrecondition(f"service {name} has no update in progress: there is nothing to {verb}")


def _put(tx: Transaction, service: Service, status: UpdateStatus) -> Service:
    return tx.put(replace(service, update_status=status))


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
        return _write_labels(tx, service, frozenset(), {STOPPED: "true"}, now)
    if CRON not in service.spec.labels:
        raise FailedPrecondition(
            f"service {service.spec.name} is a job without a schedule: it ends by itself, or remove it with "
            f"docker service rm {service.spec.name}"
        )
    if service.spec.labels.get(CRON_SUSPEND, "").lower() == "true":
        return service  # A start shall not resume a schedule that a user has suspended.
    return _write_labels(tx, service, frozenset(), {STOPPED: "true", CRON_SUSPEND: "true"}, now)


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
    return _write_labels(tx, service, frozenset(removed), {}, now)


def _write_labels(
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
            update_status=status_after(service, spec, now),
            job_status=job,
        )
    )

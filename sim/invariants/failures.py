"""Services that have had a failure.  Slots of other services are never given up."""

from collections.abc import Iterable

from sim.world.committed import Change
from skep.model.service import RestartCondition, Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import ServiceId
from skep.store.interface import Created, Deleted, Updated, View

_BY_ITSELF = (TaskState.COMPLETE, TaskState.FAILED, TaskState.REJECTED)


class FailedServices:
    """The services with a task that ended while it should run.  Moves, drains and preemptions are not failures."""

    def __init__(self) -> None:
        self._failed: set[ServiceId] = set()

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Updated(Task() as old, Task() as task):
                    has_ended = old.status.state not in _BY_ITSELF and task.status.state in _BY_ITSELF
                    # A stopped task is shut down.  It is complete if it had ended by itself before.
                    if has_ended and (old.is_wanted or task.status.state is TaskState.COMPLETE):
                        self._failed.add(task.service_id)
                case Created(Task() as task) if task.status.state in _BY_ITSELF:
                    # Only a restored snapshot creates a task that has ended, and it does not contain the reason.
                    self._failed.add(task.service_id)
                case Deleted(Service() as service):
                    self._failed.discard(service.id)
        return ()

    def may_be_given_up(self, service: Service) -> bool:
        """Return whether slots of the service may stay without a task.

        A task that is never restarted is not replaced either when it loses its node, as in SwarmKit.
        """
        policy = service.spec.task_template.restart_policy
        is_never_restarted = policy is not None and policy.condition is RestartCondition.NONE
        return is_never_restarted or service.id in self._failed

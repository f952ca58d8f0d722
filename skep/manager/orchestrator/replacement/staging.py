"""Steps of a staged update, which raises the share of new connections for the new tasks (``model.staging.updates``).

Each step starts new tasks in some of the slots, whose old tasks stay.  Once all of them run, and the time of the step
has passed, the next step follows.  The last step is an ordinary start-first update, which retires the old tasks.

The step is stored with the update's status, so a new leader continues with it, and measures the time of the step again.
Network tables bring the share to the nodes.  A failure of any new task ends the update with a rollback.  The new tasks
no longer get connections from that moment, and end.  In the last step, they get connections until they end, because few
old tasks are left.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from math import inf

import msgspec
from msgspec.structs import replace

from skep.manager.orchestrator.changes import SetUpdateStatus
from skep.manager.orchestrator.decision_inputs import Situation
from skep.manager.orchestrator.replacement.slot_views import SlotView
from skep.manager.orchestrator.slots import age
from skep.model.measures.readings import VALID_S
from skep.model.service import Service, UpdateSplit, UpdateState, UpdateStatus
from skep.model.staging.updates import (
    IN_PROGRESS,
    QueryVerdict,
    TaskRequests,
    UpdateStage,
    bounds_of,
    is_undecided,
    message_of,
    percent_in_force,
    query_bounds_of,
    stages_of,
    tasks_of_step,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import ServiceId, TaskId
from skep.store.interface import Commit, Created, Deleted, Updated

_STAGED = (UpdateState.UPDATING, UpdateState.PAUSED)
"""States of an update in which steps apply.  A rollback has none."""

_SEPARATOR = "; "
"""Separates the step from the reason for which it waits, in an update's message."""
COLLECT_S = 5.0
"""Seconds between two collections of the requests to new tasks, which nodes count as often."""
JUDGED_S = 3 * COLLECT_S
"""Least seconds of a step with bounds.  The leader knows a request after two collections at most.  So it judges the
requests of the first seconds before the next step sends more of them to new tasks.
"""
CollectRequests = Callable[[], Awaitable[Mapping[TaskId, TaskRequests]]]
"""Returns the recent HTTP requests of new tasks in staged updates, from all managers, within seconds."""


async def no_requests() -> Mapping[TaskId, TaskRequests]:
    """Return no requests, where no front door is."""
    return {}


class Staging(msgspec.Struct, frozen=True):
    """The steps of a service's update, and the present one."""

    service: Service
    stages: tuple[UpdateStage, ...]
    step: int

    @property
    def stage(self) -> UpdateStage:
        """The present step."""
        return self.stages[self.step]

    @property
    def keeps_old(self) -> bool:
        """Whether old tasks stay although their successors run."""
        return self.stage.keeps_old

    @property
    def least_s(self) -> float:
        """Seconds from the start of the last new task to the end of the present step, at least."""
        has_bounds = bounds_of(self.service.spec.labels) is not None
        return max(self.stage.least_s, JUDGED_S if has_bounds and self.keeps_old else 0.0)

    def missing(self, slots: int, begun: int) -> int:
        """Return how many of the ``slots`` get a new task in this step, in addition to ``begun`` slots."""
        return max(0, tasks_of_step(self.stage, slots) - begun)

    def is_withdrawn(self, task: Task) -> bool:
        """Return whether the task is of a staged update that this one has replaced."""
        return _is_of(task, self.service.split.withdrawn if self.service.split is not None else ())

    def present(self, new: Iterable[Task], slots: int, verdict: QueryVerdict) -> SetUpdateStatus | None:
        """Return the status of the present step, or None if it is written already.

        Args:
            new: Tasks of the current spec, whatever the version that they were created from.
            slots: Number of slots that have tasks.
            verdict: What the update's query says.
        """
        status = self.service.update_status or UpdateStatus()
        before = status.split or UpdateSplit()
        new = tuple(new)
        found = {task.spec_version.index for task in new if task.spec_version is not None} | {
            *before.versions
        }
        if self.service.spec_version is not None:
            found.add(self.service.spec_version.index)
        running = len(
            {task.slot for task in new if task.is_wanted and task.status.state is TaskState.RUNNING}
        )
        split = replace(
            before,
            step=self.step,
            percent=percent_in_force(self.stage, running, max(slots, self.service.spec.replicas)),
            versions=tuple(sorted(found)),
            withdrawn=tuple(one for one in before.withdrawn if one not in found),
        )
        if status.state is UpdateState.PAUSED:
            message = status.message
        else:
            own = message_of(self.stages, self.step)
            message = f"{own}{_SEPARATOR}{verdict.why_not}" if self.keeps_old and verdict.why_not else own
            # The message of an update that a user has resumed does not name the step.  Errors are kept.
            is_own = status.message == IN_PROGRESS or status.message.partition(_SEPARATOR)[0] == own
            if status.split == split and not is_own:
                return None
        if (status.message, status.split) == (message, split):
            return None
        return SetUpdateStatus(self.service, status.state or UpdateState.UPDATING, message, split)

    def following(self) -> SetUpdateStatus:
        """Return the status of the next step.  Its share follows once its tasks run (``present``)."""
        step = self.step + 1
        before = self.service.split or UpdateSplit()
        split = replace(before, step=step)
        return SetUpdateStatus(self.service, UpdateState.UPDATING, message_of(self.stages, step), split)

    def exceeded(self, situation: Situation) -> str:
        """Return which bound the requests to new tasks exceed, or an empty text."""
        bounds = bounds_of(self.service.spec.labels) if self.keeps_old else None
        return bounds.exceeded(situation.requests) if bounds is not None else ""

    def waits_for_query(self, situation: Situation, since: float) -> bool:
        """Return whether the step, whose tasks run ``since`` some time, may not end because of the update's query."""
        if not self.keeps_old or query_bounds_of(self.service.spec.labels) is None:
            return False
        verdict = situation.query
        is_recent = verdict.asked_at >= since and situation.now - verdict.asked_at <= VALID_S
        return bool(verdict.why_not) or not is_recent

    def query_fails_at(self, situation: Situation, since: float) -> float:
        """Return when the update rolls back because of its query, or infinity."""
        bounds = query_bounds_of(self.service.spec.labels) if self.keeps_old else None
        return max(since, situation.query.failing_since) + bounds.wait_s if bounds is not None else inf

    def query_failure(self, situation: Situation, since: float) -> str:
        """Return why the update fails because of its query, or an empty text."""
        bounds, verdict = query_bounds_of(self.service.spec.labels), situation.query
        if bounds is None or self.query_fails_at(situation, since) > situation.now:
            return ""
        figure = f", {verdict.figure:.4g} at last" if verdict.figure is not None else ""
        return f"because for {bounds.wait_s:g} s {verdict.why_not}{figure}"

    def failed(self, view: SlotView, situation: Situation) -> Task | None:
        """Return the last new task of the slot that failed, however long it ran."""
        failed = [
            task
            for task in view.slot
            if self._is_new(task)
            and task.ended_by_itself
            and not task.is_done
            and situation.seen.saw_end(task)
            and not situation.is_tolerated(task)
        ]
        return max(failed, key=age, default=None)

    def _is_new(self, task: Task) -> bool:
        """Return whether the task is of this update, also if the service was scaled since."""
        versions = self.service.split.versions if self.service.split is not None else ()
        return task.spec_version == self.service.spec_version or _is_of(task, versions)


def staging_of(service: Service) -> Staging | None:
    """Return the steps of the service's update, or None if it has no steps."""
    status, stages = service.update_status or UpdateStatus(), stages_of(service.spec.labels)
    if status.state not in _STAGED or not stages or status.split is None or service.old_version is None:
        return None
    return Staging(service, stages, min(status.split.step, len(stages) - 1))


class RequestCounts:
    """The services whose staged updates have bounds for HTTP requests, and the requests that front doors counted."""

    def __init__(self) -> None:
        self.services: set[ServiceId] = set()
        self.requests: Mapping[TaskId, TaskRequests] = {}
        self._has_any = asyncio.Event()

    async def wait(self) -> None:
        """Wait until there is such a service."""
        await self._has_any.wait()

    def start(self, services: Iterable[Service]) -> None:
        """Start with all services of a snapshot."""
        self.requests = {}
        self._set(set())
        self.add(services)

    def add(self, services: Iterable[Service]) -> None:
        """Load more services of a snapshot."""
        self._set(self.services | {service.id for service in services if _has_bounds(service)})

    def note(self, commit: Commit) -> None:
        """Follow changes of services."""
        for event in commit.events:
            match event:
                case Created(Service() as service) | Updated(_, Service() as service) if _has_bounds(service):
                    self._set(self.services | {service.id})
                case Updated(_, Service() as service) | Deleted(Service() as service):
                    if service.id in self.services:
                        self._set(self.services - {service.id})

    def _set(self, services: set[ServiceId]) -> None:
        self.services = services
        if services:
            self._has_any.set()
        else:
            self._has_any.clear()

    def requests_of(self, service: Service, tasks: Iterable[Task]) -> TaskRequests:
        """Return the requests to the new ``tasks`` of a service, all together."""
        if service.id not in self.services or service.split is None:
            return TaskRequests()
        versions = service.split.versions
        new = (task for task in tasks if _is_of(task, versions))
        return sum((self.requests.get(task.id, TaskRequests()) for task in new), TaskRequests())


def _is_of(task: Task, versions: Collection[int]) -> bool:
    """Return whether the task was created from one of these spec versions."""
    return task.spec_version is not None and task.spec_version.index in versions


def _has_bounds(service: Service) -> bool:
    return is_undecided(service) and bounds_of(service.spec.labels) is not None

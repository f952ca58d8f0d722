"""Rolling updates, which replace tasks of an old spec by tasks of the current one, a few slots at a time.

An update has no stored progress.  Its progress is derived from the slots.

* A slot is *outdated* if one of its desired tasks, or its last task if that ended for good, has a spec that requires
  another task (``outdated_tasks``).
* An updated slot has a *lead*: the first task of the current version, unless it was stopped before it ran because its
  node was lost or drained.  The lead is *settled* once it was observed running or ended.  Until then, and for the
  update delay after it, the slot counts against ``parallelism``.  So does a slot without a running task that this
  update has not started with: an earlier update, which this one replaced, may have left it so.
* A lead fails if it ends within the monitor time, or does not settle within the progress deadline (a label of the
  service), or if no node of the cluster can take it (``unplaceable``).  A lead that ended with exit code 0 does not
  fail if its restart policy does not start it again (decision 155).  The deadline does not run while the lead waits for
  earlier tasks to stop, which takes a bounded time, and restarts when the lead is started.  If more leads fail than the
  ratio allows, the update is paused or rolled back, or the failures are ignored.  The update's message names the last
  failure and its cause.
* A user may pause and resume an update (``manager/control/updates.py``).  Tasks that had ended before a resume do not
  fail the update.  A lead without progress no longer delays other slots.  Its deadline starts once more, and the update
  is not complete until then.
* The update is complete when it has started with every slot and the monitor time has passed since the last lead
  settled.  Leads that are all done (``Task.is_done``) need no such time.  An old task may then still run next to the
  attempts at a new one.

A running task is only retired once its successor is ready.  With stop-first, the new task is assigned and prepared
first (desired READY).  Then the old one is retired, and the new one starts when the old one has stopped.  With
start-first, the old task is retired when the new one runs, or earlier if no node can run both (a host port, a replica
per node).  In both cases, if the new task fails before that point, the restart policy retries it while the old one
keeps running.  If the new task cannot be assigned, the old one is retired only if it holds something that the new one
needs (``model.needs``): an address, reservations, host ports, a replica per node, a cluster volume.  The old task also
stays if its node does not meet the new task's constraints, so that a wrong constraint stops nothing.  An old task that
does not run is retired at once.

Differences from swarmkit:

* swarmkit retires the old task of a stop-first update at once, so that an image that cannot be pulled leaves nothing
  running.
* In swarmkit a one-shot task that ends with exit code 0 pauses its service's updates.
* Skep does not wait for the update delay after the last slot.
* A lead that Skep itself stops (a drained node, a scale down) does not count as a failure.
* Failures of tasks that a scale up adds to the update count.
* A task without progress ends an update after the progress deadline, or after ``UNPLACEABLE_S`` if no node can take
  it.  swarmkit waits forever.

Source: swarmkit, manager/orchestrator/update/updater.go.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from math import inf

from msgspec.structs import replace

from skep.aio.time_slices import STEP, SlicedWork, collect_in_slices
from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.diagnosis.reasons import failure_of
from skep.manager.diagnosis.unmet_needs import with_needs
from skep.manager.orchestrator.changes import (
    ROLLED_BACK,
    Cause,
    FillSlot,
    ReplaceTask,
    RetireTask,
    RollBack,
    SetUpdateStatus,
    Step,
)
from skep.manager.orchestrator.decision_inputs import Situation
from skep.manager.orchestrator.replacement.early_failures import EarlyFailures
from skep.manager.orchestrator.replacement.held_places import blocks, excludes, holds
from skep.manager.orchestrator.replacement.slot_views import SlotView, monitor_s, retired, serves, view_of
from skep.manager.orchestrator.replacement.staging import staging_of
from skep.manager.orchestrator.slots import (
    Slot,
    age,
)
from skep.manager.services.disruption_budget import ROLLBACKS
from skep.model.service import (
    PAUSED,
    UNDER_WAY,
    Service,
    UpdateFailureAction,
    UpdateOrder,
    UpdateState,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.times import SECOND_NS


def update_steps(slots: Iterable[Slot], situation: Situation) -> SlicedWork[list[Step]]:
    """Return the next steps of the service's update, given the ``slots`` that stay.

    After the steps are applied, the next call returns ``[]`` or a ``Recheck`` until something else happens.
    """
    service = situation.service
    views: list[SlotView] = []
    yield from collect_in_slices((view_of(slot, situation) for slot in slots), views)
    rollout = _Rollout(service, views, situation)
    yield
    steps: list[Step] = []
    if any(view.current and view.outdated for view in views):
        yield from rollout.count_stopped()
    for number, view in enumerate(views):
        steps += rollout.finish(view)
        if number % STEP == 0:
            yield
    state = rollout.state
    yield
    outdated = [view for view in views if view.outdated]
    if state in PAUSED:
        leaving: list[SlotView] = []
        for number, view in enumerate(outdated):
            steps += rollout.retire_surplus(view) if not view.current else ()
            leaving += [view] if rollout.leaves(view) else []
            if number % STEP == 0:
                yield
        outdated = leaving  # the drains continue
    if not outdated and state not in UNDER_WAY:
        return [*steps, *rollout.present_share()]
    steps += rollout.present_step()
    yield from rollout.observe()
    if state not in PAUSED and (failure_step := rollout.failure_step()) is not None:
        return [*steps, failure_step]
    waiting = [view for view in outdated if not view.current and view.lead is None]
    more, later = rollout.to_start(waiting)
    for number, view in enumerate(later):
        steps += rollout.retire_surplus(view)
        if number % STEP == 0:
            yield
    if more:
        return [*steps, *(yield from rollout.start_slots(more))]
    return [*steps, *rollout.complete()]


class _Rollout:
    """Progress and settings of the update to one version."""

    def __init__(self, service: Service, views: list[SlotView], situation: Situation) -> None:
        self._service = service
        self._views = views
        self._started = [view.started for view in views if view.started is not None]
        self._settled: dict[TaskId, float | None] = {}
        """Time at which each started task's slot settled.  ``observe`` fills it."""
        self._failed: list[Task] = []
        """Failed leads."""
        self._due: list[float] = []
        """Future deadlines of tasks that have neither run nor ended."""
        self._stopped = 0
        """Number of slots that have no running task and whose new task is not settled."""
        self._early = EarlyFailures(situation)
        self._held = {task.id for view in views for task in view.held}
        self._seen = situation.seen
        self._now = situation.now
        self._situation = situation
        self._is_tolerated = situation.is_tolerated
        self._has_unknown_status = situation.has_unknown_status
        self.state = service.update_status.state if service.update_status else None
        self._is_rollback = self.state in ROLLBACKS
        self._staging = staging_of(service)
        self._keeps_old = self._staging is not None and self._staging.keeps_old
        self._config = config = situation.rollout_config
        self._starts_first = config.order is UpdateOrder.START_FIRST
        self._delay_s = config.delay / SECOND_NS
        self._monitor_s = monitor_s(config)

    def finish(self, view: SlotView) -> Iterator[Step]:
        """Retire the outdated tasks that a current task of the same slot replaces."""
        if not view.current:
            if view.lead is not None and view.lead.is_done:
                yield from retired(view.outdated)
            return
        if self._staging is not None and self._keeps_old:
            # An old task that does not run yet will.
            is_served = any(map(serves, view.current))
            yield from retired(
                task
                for task in view.outdated
                if not task.is_active or (is_served and self._staging.is_withdrawn(task))
            )
        elif not view.serving:
            yield from retired(view.outdated)
        elif (heirs := self._heirs(view)) and self._may_take_over(view):
            successor = max(heirs, key=lambda task: task.status.state.number)
            is_refused = not any(map(self._is_ready, view.current))
            yield from (
                replace(step, successor=successor.id, is_refused=is_refused)
                for step in retired(view.outdated)
            )
        if len(view.current) > 1:
            # A task on a drained node runs until its replacement does.
            staying = [task for task in view.current if not self._situation.moves_start_first(task)]
            best = max(
                staying, key=lambda task: (task.desired_state.number, *self._progress(task)), default=None
            )
            yield from (RetireTask(task) for task in staying if task is not best)

    def _heirs(self, view: SlotView) -> list[Task]:
        """Return the slot's current tasks that may take over (``RetireTask.successor``)."""
        return [
            task
            for task in view.current
            if task.is_active and task.preemption is None and not self._situation.is_on_lost_node(task)
        ]

    def _progress(self, task: Task) -> tuple[bool, bool, int]:
        """Return a sort key for how far a task has come.

        A task with an unreadable status may run.  Only a task that is known to run ranks above it.
        """
        is_begun = task.status.state >= TaskState.ASSIGNED and self._has_unknown_status(task)
        return task.status.state is TaskState.RUNNING, is_begun, task.status.state.number

    def leaves(self, view: SlotView) -> bool:
        """Return whether a drained node keeps a task of the slot until its replacement runs."""
        return any(map(self._situation.moves_start_first, view.serving))

    def retire_surplus(self, view: SlotView) -> Iterable[RetireTask]:
        """Retire the outdated tasks of a slot that waits for its turn, except for a running task.

        A slot has two running tasks after a drain that was undone.
        """
        if len(view.outdated) == 1:
            return ()
        running = [task for task in self._by_rank(view.serving) if serves(task)]
        best = max(reversed(running), key=self._stays, default=None)
        kept = view.serving if best is None else (best,)
        steps = retired(task for task in view.outdated if view.serving and task not in kept)
        if best is None or best.preemption is not None or not self._situation.is_known_to_run(best):
            return steps
        return [replace(step, successor=best.id) for step in steps]

    def _stays(self, task: Task) -> tuple[bool, bool, bool]:
        """Return a sort key for how surely a running task stays where it is."""
        is_moved = self._situation.moves_start_first(task)
        return self._situation.is_known_to_run(task), task.preemption is None, not is_moved

    def count_stopped(self) -> SlicedWork[None]:
        """Count the slots that the update took out of service, so that ``finish`` can limit them."""
        for number, view in enumerate(self._views):
            if view.started is not None and not view.serves and self._settled_at(view) is None:
                self._stopped += 1
            if number % STEP == 0:
                yield

    def present_step(self) -> Iterator[Step]:
        """Write that the update, or the present step of a staged one, has begun."""
        if self._staging is not None:
            yield from self.present_share()
        elif self.state is None:
            yield SetUpdateStatus(self._service, UpdateState.UPDATING, "update in progress")

    def present_share(self) -> Iterator[Step]:
        """Write the present step of a staged update, with its share and versions, also while it is paused."""
        if self._staging is not None:
            new = (task for view in self._views for task in view.current)
            step = self._staging.present(new, len(self._views), self._situation.query)
            yield from [step] if step is not None else []

    def to_start(self, waiting: list[SlotView]) -> tuple[list[SlotView], list[SlotView]]:
        """Return the slots that the update may start with, and the ones for later steps of a staged update."""
        if self._staging is None or not self._keeps_old or self.state in PAUSED:
            return waiting, []
        staying = [view for view in waiting if not self._goes(view)]
        leaving = [view for view in waiting if self._goes(view)]
        count = self._staging.missing(len(self._views), len(self._views) - len(staying))
        # Slots without a running task come first.  A slot on a drained node gets a new task in any step.
        staying.sort(key=lambda view: view.serves)
        return leaving + staying[:count], staying[count:]

    def _goes(self, view: SlotView) -> bool:
        """Return whether the slot gets a new task in any step: its node is drained, or its tasks are withdrawn."""
        staging = self._staging
        return self.leaves(view) or (staging is not None and all(map(staging.is_withdrawn, view.outdated)))

    def start_slots(self, waiting: list[SlotView]) -> SlicedWork[list[Step]]:
        """Start with as many more slots as ``parallelism`` allows, and recheck when a delay ends.

        Idle slots, which have no running task, come first, and then slots of drained nodes.  The update starts
        with a slot that has a running task only if ``parallelism`` has capacity for all idle slots as well.  Otherwise
        the service might have no running task left, because an earlier update may have stopped the idle slots.  The
        update starts with an idle slot even beyond ``parallelism`` if its task holds something that a new task was
        refused, because the new task would otherwise wait forever.  For the same reason, a waiting slot keeps its
        running task but retires attempts at versions that this update has replaced.
        """
        busy, allowed_at = 0, []
        for task in self._started:
            settled_at = self._settled[task.id]
            if settled_at is None:
                busy += 1
            elif settled_at + self._delay_s > self._now:
                busy += 1
                allowed_at.append(settled_at + self._delay_s)
        allowed = (self._config.parallelism or len(waiting)) - busy
        yield
        idle: list[SlotView] = []
        leaving: list[SlotView] = []
        staying: list[SlotView] = []
        for number, view in enumerate(waiting):
            (idle if not view.serves else leaving if self.leaves(view) else staying).append(view)
            if number % STEP == 0:
                yield
        serving = leaving + staying
        steps: list[Step] = []
        allowed = max(allowed, 0)
        for number, view in enumerate([*idle, *serving][:allowed] + self._holders(idle[allowed:])):
            steps += self._replace(view)
            if number % STEP == 0:
                yield
        for number, view in enumerate(serving[max(allowed - len(idle), 0) :]):
            steps += self.retire_surplus(view)
            if number % STEP == 0:
                yield
        if len(waiting) > allowed and allowed_at:
            steps.append(Recheck(min(allowed_at)))
        return [*steps, *self._recheck_progress()]

    def _holders(self, idle: list[SlotView]) -> list[SlotView]:
        """Return idle slots that hold something that new tasks were refused, at most one for each such task."""
        refused = [task for task in self._started if self._settled[task.id] is None and task.status.err]
        kinds = {task.status.state: task for task in refused}.values()
        holders = (
            view
            for view in idle
            if any(holds(old, task, self._situation) for old in view.outdated for task in kinds)
        )
        return list(islice(holders, len(refused)))

    def observe(self) -> SlicedWork[None]:
        """Find out which leads have settled and which have failed.  The other methods rely on it."""
        for number, view in enumerate(self._views):
            if view.started is not None:
                self._settled[view.started.id] = self._settled_at(view)
                if self._is_open(view.started) and (due_at := self._due_at(view.started)) > self._now:
                    self._due.append(due_at)
            if view.lead is not None and self._has_failed(view.lead):
                self._failed.append(view.lead)
            elif self._keeps_old and self._staging is not None:
                failed = self._staging.failed(view, self._situation)
                # A scale makes a new version, so the task that the update started the slot with is not its lead.
                if failed is None and view.started is not None and self._has_failed(view.started):
                    failed = view.started
                self._failed += [failed] if failed is not None else []
            if number % STEP == 0:
                yield

    def failure_step(self) -> Step | None:
        """Return the step that follows from too many failures, or None if the update may continue."""
        action = self._config.failure_action or UpdateFailureAction.PAUSE
        if action is UpdateFailureAction.CONTINUE or not (reason := self._failure()):
            return None
        if self._is_rollback:
            # A rollback is never rolled back.
            return SetUpdateStatus(self._service, UpdateState.ROLLBACK_PAUSED, f"rollback paused {reason}")
        if action is UpdateFailureAction.PAUSE:
            return SetUpdateStatus(self._service, UpdateState.PAUSED, f"update paused {reason}")
        if self._service.previous_spec is None:
            message = f"update paused {reason}: there is no previous spec to roll back to"
            return SetUpdateStatus(self._service, UpdateState.PAUSED, message)
        return RollBack(self._service, f"{ROLLED_BACK} {reason}")

    def _failure(self) -> str:
        """Return the reason why the update fails, with Docker's words for failed tasks, or an empty text."""
        if self._staging is not None and (reason := self._staging.exceeded(self._situation)):
            return reason
        return self._failed_reason() or self._query_failure()

    def _query_failure(self) -> str:
        """Return why the update fails because of its query, which says nothing if no new task runs.

        A new task that is down after a tolerated failure does not delay it.
        """
        runs = any(serves(task) for view in self._views for task in view.current)
        settled = self._all_settled() if runs else None
        if self._staging is None or not self._keeps_old or settled is None:
            return ""
        return self._staging.query_failure(self._situation, self._begun_at(settled))

    def _failed_reason(self) -> str:
        """Return the reason why more leads failed than the ratio allows, or an empty text."""
        if not self._failed:
            return ""
        begun = [view for view in self._views if view.started is not None]
        total = len([view for view in self._views if view.lead is not None or view.outdated])
        if self._keeps_old:
            total = len(begun) or 1
        if len(self._failed) / total <= self._config.max_failure_ratio:
            return ""
        return self._reason(max(self._failed, key=lambda task: (self._seen.ended(task) or 0.0, task.id)))

    def complete(self) -> Iterator[Step]:
        """End the update, or the step of a staged one, once it has started with every slot and has monitored every lead
        for the monitor time.
        """
        if self.state not in UNDER_WAY or (self._keeps_old and not self._service.spec.replicas):
            return
        settled = self._settled_leads()
        if settled is None:
            yield from self._recheck_progress()
            return
        over_at = max(settled, default=self._now) + (0.0 if self._is_done() else self._monitor_s)
        since = self._step_since()
        if since is not None and self._staging is not None:
            over_at = since + max(self._monitor_s, self._staging.least_s)
        if renewed := [*self._recheck_progress()]:
            yield from renewed
        elif (settled or self._keeps_old) and over_at > self._now:
            yield from [Recheck(over_at)] if over_at < inf else []
        elif since is not None and self._staging is not None:
            if self._staging.waits_for_query(self._situation, since):
                fails_at = self._staging.query_fails_at(self._situation, since)
                yield from [Recheck(fails_at)] if self._now < fails_at < inf else []
            else:
                yield self._staging.following()
        elif self._is_rollback:
            yield SetUpdateStatus(self._service, UpdateState.ROLLBACK_COMPLETED, self._rolled_back())
        else:
            yield SetUpdateStatus(self._service, UpdateState.COMPLETED, "update completed")

    def _is_done(self) -> bool:
        """Return whether every lead has done its work, so that none can still fail."""
        return all(view.lead is not None and view.lead.is_done for view in self._views)

    def _settled_leads(self) -> list[float] | None:
        """Return when each lead has settled, or None while some have not, or do not run as a step demands."""
        if self._keeps_old and not all(map(self._is_ready_for_step, self._views)):
            return None
        return self._all_settled()

    def _is_ready_for_step(self, view: SlotView) -> bool:
        """Return whether the new task of the slot runs on a node that is not lost, if the slot has one."""
        return not view.current or any(map(self._situation.is_known_to_run, view.current))

    def _all_settled(self) -> list[float] | None:
        leads = [view.lead if self._staging is None else view.started for view in self._views]
        found = [self._settled[lead.id] for lead in leads if lead is not None]
        settled = [at for at in found if at is not None]
        return settled if len(settled) == len(found) else None

    def _step_since(self) -> float | None:
        """Return since when all tasks of the present step run, or None if they do not, or there are no steps."""
        settled = self._settled_leads()
        return None if not self._keeps_old or settled is None else self._begun_at(settled)

    def _begun_at(self, settled: list[float]) -> float:
        """Return when the present step began, of which the leads have ``settled``."""
        id = self._service.id
        return max([self._seen.stepped(id), self._seen.resumed(id), *settled])

    def _rolled_back(self) -> str:
        """Return Docker's message, with the cause of the rollback, which Docker omits."""
        status = self._service.update_status
        cause = status.message if status is not None and status.message.startswith(ROLLED_BACK) else ""
        return "rollback completed" + (f": {cause}" if cause else "")

    def _replace(self, view: SlotView) -> Iterator[Step]:
        """Start with one slot.  If it has several outdated tasks, after overlapping updates, the best one counts."""
        *others, best = sorted(
            self._by_rank(view.outdated),
            key=lambda task: (task.status.state is TaskState.RUNNING, task in view.serving),
        )
        others = [task for task in others if task.desired_state <= TaskState.RUNNING]
        fill = FillSlot(self._service, best.slot, NodeId("") if best.slot else best.node_id)
        prepared = replace(fill, desired=TaskState.READY)
        if best.desired_state > TaskState.RUNNING:
            yield prepared if view.stops else fill
        elif self._keeps_old and best.is_active and not self._withdrawn(best):
            # Tasks of a replaced staged update are retired first, so that the slot never has three.
            if not others:
                yield fill
        elif best not in view.serving:
            # Any of several outdated tasks may be assigned to a node before it is retired, so the successor must wait.
            successor = prepared if view.stops or others else fill
            # Once the task runs, its slot serves, and only a limited number of serving slots may be stopped at a time.
            is_idle = not view.serves and best.is_active
            yield ReplaceTask(best, successor, Cause.DOES_NOT_RUN if is_idle else None)
        else:
            successor = fill if self._starts_first or self.leaves(view) else prepared
            yield ReplaceTask(others.pop(), successor) if others else successor
        yield from map(RetireTask, others)

    def _by_rank(self, tasks: Slot) -> list[Task]:
        """Return outdated tasks, the best one last: the newest that is not of a replaced staged update."""
        return sorted(tasks, key=lambda task: (not self._withdrawn(task), age(task)))

    def _withdrawn(self, task: Task) -> bool:
        return self._staging is not None and self._staging.is_withdrawn(task)

    def _may_take_over(self, view: SlotView) -> bool:
        """Return whether the slot's serving tasks may be retired for a current one.

        The current task runs, or (stop-first) could start at once, and ``parallelism`` allows one more stopped slot.
        More slots than that have a current task if restarts created them, because the predecessors were of a version
        that this update replaced.
        """
        if any(map(self._situation.is_known_to_run, view.current)):
            return True
        if self.leaves(view):
            return False
        if not any(self._can_take_over(task, view.serving) for task in view.current):
            return False
        if (
            view.started is not None
            and not self._is_open(view.started)
            and self._settled_at(view) is not None
        ):
            return True  # its first task failed, which is tolerated, so the update no longer waits for it
        parallelism = self._config.parallelism
        if parallelism and self._stopped >= parallelism:
            return False
        self._stopped += 1
        return True

    def _can_take_over(self, task: Task, serving: Slot) -> bool:
        """Return whether ``task``, which does not run, could start at once if the ``serving`` tasks were retired.

        Start-first waits for reservations that other services may soon release.  It stops an old task first only if
        the service's own tasks exclude the new one, which would never change.
        """
        if self._starts_first:
            return any(excludes(old, task, self._situation) for old in serving)
        return self._is_ready(task) or any(blocks(old, task, self._situation) for old in serving)

    def _is_ready(self, task: Task) -> bool:
        """Return whether ``task`` runs, or (stop-first) is prepared to run."""
        least = TaskState.RUNNING if self._starts_first else TaskState.READY
        return least <= task.status.state <= TaskState.RUNNING and not self._situation.is_on_lost_node(task)

    def _settled_at(self, view: SlotView) -> float | None:
        """Return the time at which the slot's lead began to run, ended or became overdue.

        Parallelism, delay and monitor time count from here.  If the lead failed and the failure is tolerated, they
        count from the first attempt: an earlier leader has counted it, and a new leader may find another lead after
        each restart because the history is bounded.
        """
        if view.lead is not None and view.first is not None and self._has_failed(view.lead):
            return self._ended_waiting_at(view.first)
        return self._ended_waiting_at(view.started) if view.started is not None else None

    def _ended_waiting_at(self, lead: Task) -> float | None:
        moments = (self._seen.running(lead), self._seen.ended(lead))
        settled_at = min((at for at in moments if at is not None), default=None)
        since = self._could_start(lead)
        if settled_at is None and since is not None:
            due_at = self._early.due_at(lead, since)
            return due_at if due_at <= self._now else None
        return settled_at

    def _recheck_progress(self) -> Iterator[Step]:
        """Recheck when the first deadline of the leads that have neither run nor ended passes."""
        if self._due and (first := min(self._due)) < inf:
            yield Recheck(first)

    def _due_at(self, lead: Task) -> float:
        """Return the lead's deadline, or infinity while it waits for something with its own deadline.

        The time starts when that wait ends, and once more when a user resumes the update.
        """
        since = self._could_start(lead)
        resumed_at = self._seen.resumed(self._service.id)
        return inf if since is None else self._early.due_at(lead, max(since, resumed_at))

    def _could_start(self, lead: Task) -> float | None:
        """Return when the lead could start, or None while it waits for another service or for earlier tasks to stop."""
        return None if lead.id in self._held else self._seen.could_start(lead)

    def _is_open(self, lead: Task) -> bool:
        return self._seen.running(lead) is None and self._seen.ended(lead) is None

    def _is_overdue(self, lead: Task) -> bool:
        return self._is_open(lead) and self._due_at(lead) <= self._now

    def _reason(self, lead: Task) -> str:
        """Return Docker's message, with the cause, which Docker omits."""
        status = lead.status
        if self._is_overdue(lead) and self._early.includes(lead):
            return f"because no node can take task {lead.id}: {with_needs(lead)}"
        if self._is_overdue(lead):
            words = f"because task {lead.id} made no progress within {self._early.deadline_s:g} s"
            return f"{words}: it is {status.state.value}" + (f", {status.err}" if status.err else "")
        words = f"due to failure or early termination of task {lead.id}"
        cause = failure_of(lead)[1] if status.err else ""
        if not cause and status.state is TaskState.COMPLETE:
            cause = "its process ended with exit code 0"
        return words + (f": {cause}" if cause else "")

    def _has_failed(self, lead: Task) -> bool:
        """Return whether the task ended by itself within the monitor time, or made no progress within the deadline."""
        if self._is_tolerated(lead):
            return False
        if self._is_overdue(lead):
            return True
        if not lead.ended_by_itself or lead.is_done or self._seen.is_unseen(lead, self._monitor_s):
            return False
        ended_at, ran_at = self._seen.ended(lead), self._seen.running(lead)
        return ran_at is None or ended_at is None or ended_at - ran_at <= self._monitor_s

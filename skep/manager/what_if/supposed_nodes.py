"""The nodes of a rehearsal: they start and stop tasks as they are told, and each task that starts keeps running.

Whether an image can be pulled, or a process fails, only time shows.  But a task in a crash loop does not run, because
those before it did not either.  A node that is down reports nothing.
"""

import heapq
from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from skep.manager.control_loops.informer import batches_of
from skep.manager.control_loops.work_queue import LEAST_WAIT_S
from skep.manager.diagnosis.reasons import LOOP_FROM
from skep.manager.what_if.supposed_time import SupposedClock
from skep.model.node import Node, NodeState
from skep.model.task import ContainerStatus, Task, TaskState, TaskStatus
from skep.model.values.ids import ContainerId, ServiceId, TaskId
from skep.model.values.times import SECOND_NS, timestamp, unix_ns
from skep.model.volume import Volume
from skep.store.copied import CopiedStore
from skep.store.interface import Commit, Created, Transaction, Updated

START_S = 1.0
"""Seconds from the assignment of a task until it runs, if no task of its service has shown how long that takes.  A
container of a local image starts in about half a second on a machine with two processors.
"""
START_S_MIN, START_S_MAX = 0.1, 300.0
"""Limits of measured times.  Smaller values come from clocks that disagree, larger ones from tasks that had to wait."""
SAMPLES = 20
"""Running tasks of a service whose start is looked at."""
STOP_S = 1.0
"""Seconds in which a task stops.  A process that handles its stop signal takes less, others their grace period."""

_A_CONTAINER = ContainerStatus(container_id=ContainerId("supposed"))


class SupposedNodes:
    """Reports the next states of tasks when they are due."""

    def __init__(self, copy: CopiedStore, clock: SupposedClock) -> None:
        self._copy = copy
        self._clock = clock
        self._due: list[tuple[float, TaskId]] = []
        self._due_at: dict[TaskId, float] = {}
        self._start_s: dict[ServiceId, float] = {}

    def start(self) -> Iterator[None]:
        """Queue the tasks that are starting or stopping now."""
        running = TaskState.RUNNING
        for tasks in batches_of(self._copy.view, Task):
            for task in tasks:
                if task.status.state is not running or task.desired_state is not running:
                    self._queue(task)
            yield

    def on_commit(self, commit: Commit) -> None:
        """Queue the tasks that now have something to do."""
        for event in commit.events:
            match event:
                case Created(Task() as task) | Updated(_, Task() as task):
                    self._queue(task)

    def _queue(self, task: Task) -> None:
        step = self._next(task)
        if step is None:
            self._due_at.pop(task.id, None)
            return
        at = self._clock.monotonic() + step[0]
        if task.id not in self._due_at or at < self._due_at[task.id]:
            self._due_at[task.id] = at
            heapq.heappush(self._due, (at, task.id))

    def _next(self, task: Task) -> tuple[float, TaskState] | None:
        """Return the state that the task's node reports next and in how many seconds, or None if it is at its goal."""
        state = task.status.state
        if state < TaskState.ASSIGNED or state.is_terminal:
            return None
        node = self._copy.view().lookup(Node, task.node_id)
        if node is None or node.status.state is not NodeState.READY:
            return None
        if task.desired_state > TaskState.COMPLETE:
            return STOP_S, TaskState.SHUTDOWN
        if task.is_failing:
            return STOP_S, TaskState.FAILED
        is_held = task.desired_state <= TaskState.READY or is_in_loop(task)
        goal = TaskState.READY if is_held else TaskState.RUNNING
        return (self.start_s(task.service_id), goal) if state < goal else None

    def wait_s(self) -> float | None:
        """Return the seconds until the next report, or None without one."""
        return max(self._due[0][0] - self._clock.monotonic(), LEAST_WAIT_S) if self._due else None

    def report(self) -> Iterator[None]:
        """Write the reports that are due."""
        now = self._clock.monotonic()
        while self._due and self._due[0][0] <= now:
            at, id = heapq.heappop(self._due)
            task = self._copy.view().lookup(Task, id)
            if self._due_at.get(id) != at or task is None:
                continue
            del self._due_at[id]
            step = self._next(task)
            if step is not None:
                self._copy.apply(self._write, id, step[1])
                yield

    def _write(self, tx: Transaction, id: TaskId, state: TaskState) -> None:
        task = tx.get(Task, id)
        status = TaskStatus(
            timestamp=timestamp(self._clock.now_ns()),
            state=state,
            message=state.value,
            # It shows that the task has used its local volumes, and so where the next task of its slot has to run.
            container_status=task.status.container_status or _A_CONTAINER,
        )
        tx.put(replace(task, status=status))
        if state.is_terminal:
            for attachment in task.volumes:
                _unpublish(tx, task, tx.lookup(Volume, attachment.id))

    def start_s(self, service_id: ServiceId) -> float:
        """Return how long tasks of a service take to start, measured by its running tasks."""
        found = self._start_s.get(service_id)
        if found is None:
            view = self._copy.view()
            found = self._start_s[service_id] = measured_start_s(view.find(Task, service_id=service_id))
        return found


def is_in_loop(task: Task) -> bool:
    """Return whether the tasks before it failed in a row, so that it is not supposed to run."""
    return task.restart is not None and task.restart.failures >= LOOP_FROM


def _unpublish(tx: Transaction, ended: Task, volume: Volume | None) -> None:
    """Remove the volume from the node of its last task there."""
    others = (
        task
        for task in tx.find(Task, node_id=ended.node_id)
        if task.id != ended.id and not task.status.state.is_terminal
    )
    if volume is None or any(one.id == volume.id for task in others for one in task.volumes):
        return
    left = tuple(entry for entry in volume.publish_status if entry.node_id != ended.node_id)
    if left != tuple(volume.publish_status):
        tx.put(replace(volume, publish_status=left))


def measured_start_s(tasks: Sequence[Task]) -> float:
    """Return the median time from creation to running of a service's tasks, or ``START_S`` without running tasks.

    The timestamps come from the clocks of a manager and of nodes, so single values may be wrong.
    """
    took = sorted(
        (unix_ns(task.status.timestamp) - unix_ns(task.created_at)) / SECOND_NS
        for task in [task for task in tasks if task.status.state is TaskState.RUNNING][:SAMPLES]
    )
    return min(max(took[len(took) // 2], START_S_MIN), START_S_MAX) if took else START_S

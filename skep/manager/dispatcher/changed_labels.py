"""Wakes assignment streams when service labels change that affect running tasks.

Such a change replaces no task.  If it reached a task's node only with the next task, the leader would decide by other
labels than the node: a disconnected node would keep running tasks that the leader considers stopped.
"""

from collections.abc import Callable, Iterable, Iterator

from skep.aio.clock import Clock
from skep.aio.event import Event
from skep.aio.time_slices import STEP, run_in_slices
from skep.model.door.settings import is_door
from skep.model.options.labels import sent_labels
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.store.interface import Store


class ChangedLabels:
    """Services whose labels have changed, until the nodes of their tasks are woken."""

    def __init__(self, store: Store, clock: Clock, wake: Callable[[NodeId, Iterable[TaskId]], None]) -> None:
        self._store = store
        self._clock = clock
        self._wake = wake
        self._changed: dict[ServiceId, None] = {}
        self._has_changed = Event()

    def on_update(self, old: Service, new: Service) -> None:
        """Record a changed service, or a removed one, which is no longer drained."""
        before, now = old.spec.labels, new.spec.labels
        has_changed = before != now and (
            sent_labels(before) != sent_labels(now) or is_door(before) is not is_door(now)
        )
        if has_changed or (new.removed_at is not None and old.removed_at is None):
            self._changed[new.id] = None
            self._has_changed.set()

    async def run(self) -> None:
        """Wake nodes until cancelled, in slices, since a service may have very many tasks."""
        while True:
            await self._has_changed.wait()
            self._has_changed.clear()
            changed, self._changed = self._changed, {}
            for id in changed:
                await run_in_slices(self.wake_nodes(id), self._clock)

    def wake_nodes(self, id: ServiceId) -> Iterator[None]:
        # Later assignments are sent with the new labels.
        view = self._store.view()
        service = view.lookup(Service, id)
        is_removed = service is not None and service.removed_at is not None
        for number, task in enumerate(view.find(Task, service_id=id), 1):
            is_next = is_removed and task.is_wanted  # its stop is sent with the labels
            if task.node_id and not task.status.state.is_terminal and not is_next:
                self._wake(task.node_id, (task.id,))
            if number % STEP == 0:
                yield

"""Follows tasks from their creation to the commit that shows them running or ended."""

from typing import Generic, TypeVar

from skep.manager.control_loops.informer import observe_commits
from skep.model.task import Task
from skep.model.values.ids import TaskId
from skep.store.interface import Commit, Created, Deleted, Store, Updated

T = TypeVar("T")


class StartingTasks(Generic[T]):
    """Keeps a value for each starting task.  A subclass creates and uses the values.

    Args:
        tasks_max: Maximum number of followed tasks.  Further tasks are not followed.
    """

    def __init__(self, store: Store, tasks_max: int) -> None:
        self._store = store
        self._tasks_max = tasks_max
        self._begun: dict[TaskId, T] = {}

    async def run(self) -> None:
        """Follow the commits until cancelled."""
        await observe_commits(
            self._store, (Task,), on_snapshot=lambda _: self._begun.clear(), on_commit=self.note
        )

    def note(self, commit: Commit) -> None:
        """Handle the tasks of one commit."""
        for event in commit.events:
            match event:
                case Created(object=Task() as task) if len(self._begun) < self._tasks_max:
                    self._begun[task.id] = self.created()
                case Updated(new=Task() as task) if (value := self._begun.pop(task.id, None)) is not None:
                    if (kept := self.changed(task, value)) is not None:
                        self._begun[task.id] = kept
                case Deleted(object=Task() as task):
                    self._begun.pop(task.id, None)

    def created(self) -> T:
        """Return the value of a task that was just created."""
        raise NotImplementedError

    def changed(self, task: Task, value: T) -> T | None:
        """Return the value of ``task`` after a change, or None if it is no longer starting."""
        raise NotImplementedError

"""Pending tasks that are decided together."""

from collections.abc import Collection
from typing import TypeAlias

from skep.model.ids import TaskId
from skep.model.task import Task

Group: TypeAlias = str
"""``<service>/<version>``, or a single task's id."""


class Groups:
    """The groups of all pending tasks."""

    def __init__(self) -> None:
        self.of: dict[TaskId, Group] = {}
        """Of every pending task."""
        self._tasks: dict[Group, dict[TaskId, None]] = {}
        """The tasks of a group, those that wait longest first; not of a single task, whose group is its id."""

    def enter(self, id: TaskId, group: Group) -> None:
        """A task is in the group from now on."""
        self.of[id] = group
        if group != id:
            self._tasks.setdefault(group, {})[id] = None

    def leave(self, id: TaskId) -> Group | None:
        """A task is in no group any more; gives the one that it was in, if that is empty now."""
        group = self.of.pop(id, None)
        if group is None or group == id:
            return group
        others = self._tasks[group]
        del others[id]
        if others:
            return None
        del self._tasks[group]
        return group

    def ids(self, group: Group) -> Collection[TaskId]:
        """The tasks of a group, those that wait longest first."""
        return self._tasks.get(group) or (TaskId(group),)

    def count(self, group: Group) -> int:
        """How many tasks wait in a group."""
        return len(self._tasks[group]) if group in self._tasks else int(group in self.of)


def group_of(task: Task) -> Group:
    """The group of a task that goes to any node."""
    if task.node_id or task.spec_version is None:
        return task.id
    return f"{task.service_id}/{task.spec_version.index}"


def returns(task: Task, group: Group) -> bool:
    """Whether the task is a group of its own for the volumes of its slot."""
    return group == task.id and task.spec_version is not None and not task.node_id

"""Groups of pending tasks that are decided together."""

from collections.abc import Collection, Iterable, Sequence
from typing import TypeAlias

from skep.model.options.slot_volumes import SlotName
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import ServiceId, TaskId
from skep.store.interface import View

Group: TypeAlias = str
"""``<service>/<version>``, or a single task's id."""


class Groups:
    """The groups of all pending tasks."""

    def __init__(self) -> None:
        self.of: dict[TaskId, Group] = {}
        """The group of each pending task."""
        self._tasks: dict[Group, dict[TaskId, None]] = {}
        """The tasks of a group, longest waiting first.  A single task is not listed here, because its group is its
        id.
        """
        self._sources: dict[Group, Sequence[str]] = {}
        """Sources of each group's cluster volume mounts."""
        self._by_source: dict[str, set[Group]] = {}

    def enter(self, id: TaskId, group: Group, sources: Sequence[str] = ()) -> None:
        """Add a task to a group.  ``sources`` are the sources of its cluster volume mounts."""
        if sources and group not in self._sources:
            self._sources[group] = sources
            for source in sources:
                self._by_source.setdefault(source, set()).add(group)
        self.of[id] = group
        if group != id:
            self._tasks.setdefault(group, {})[id] = None

    def leave(self, id: TaskId) -> Group | None:
        """Remove a task from its group.  Returns that group if it is empty now, or None."""
        group = self.of.pop(id, None)
        if group is None:
            return None
        if group != id:
            others = self._tasks[group]
            del others[id]
            if others:
                return None
            del self._tasks[group]
        for source in self._sources.pop(group, ()):
            self._by_source[source].discard(group)
            if not self._by_source[source]:
                del self._by_source[source]
        return group

    def mounting(self, sources: Iterable[str]) -> set[Group]:
        """Return the groups with mounts of these sources."""
        return set().union(*(self._by_source.get(source, ()) for source in sources))

    def of_slots(self, slots: Iterable[SlotName], view: View) -> set[Group]:
        """Return the groups of the slots' pending tasks."""
        return {
            group
            for name, slot in slots
            for service in view.find(Service, name=name)
            for number in (slot, slot + 1)  # a job's slots begin at 1 in the store
            for task in view.find(Task, slot=f"{service.id}/{number}")
            if task.shown_slot == slot and (group := self.of.get(task.id)) is not None
        }

    def of_service(self, id: ServiceId, view: View) -> set[Group]:
        """Return the groups of the service's pending tasks."""
        tasks = view.find(Task, service_id=id)
        return {group for task in tasks if (group := self.of.get(task.id)) is not None}

    @property
    def with_volumes(self) -> Collection[Group]:
        """The groups with cluster volume mounts."""
        return self._sources.keys()

    def ids(self, group: Group) -> Collection[TaskId]:
        """Return the tasks of a group, longest waiting first."""
        return self._tasks.get(group) or (TaskId(group),)

    def count(self, group: Group) -> int:
        """Return how many tasks wait in a group."""
        return len(self._tasks[group]) if group in self._tasks else int(group in self.of)


def group_of(task: Task) -> Group:
    """Return the group of a task that may run on any node."""
    if task.node_id or task.spec_version is None:
        return task.id
    return f"{task.service_id}/{task.spec_version.index}"


def is_of_many(group: Group) -> bool:
    """Return whether a group has all tasks of a version.  Otherwise it is a single task that is bound to a node, by its
    mode or by data.
    """
    return "/" in group


def returns(task: Task, group: Group) -> bool:
    """Return whether the task is a group of its own because of the volumes of its slot."""
    return group == task.id and task.spec_version is not None and not task.node_id

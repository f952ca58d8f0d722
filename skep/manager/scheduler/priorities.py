"""Priorities of services (label ``skep.priority``): whose tasks are decided first."""

from collections.abc import Sequence
from typing import Final

from skep.manager.scheduler.groups import Group
from skep.model.ids import ServiceId, TaskId
from skep.model.labels import priority_of
from skep.model.service import Service
from skep.model.task import Task
from skep.store.interface import Commit, Updated, View

HELD_S: Final = 0.5
"""How long tasks of lower priority wait before they take the room of one that ended: its successor comes until then."""


class Priorities:
    """The priorities of all services."""

    def __init__(self) -> None:
        self._by_service: dict[ServiceId, int] = {}
        """Those that are not 0."""

    def __bool__(self) -> bool:
        """Whether any service has one."""
        return bool(self._by_service)

    @property
    def lowest(self) -> int:
        """Of all services; those without a label have 0."""
        return min((0, *self._by_service.values()))

    def of(self, id: ServiceId) -> int:
        """The priority of a service's tasks."""
        return self._by_service.get(id, 0)

    def of_group(self, group: Group, view: View) -> int:
        """The priority of a group's tasks."""
        if not self._by_service:
            return 0
        service_id, _, version = group.partition("/")
        if not version:
            task = view.lookup(Task, TaskId(group))
            service_id = task.service_id if task is not None else ""
        return self.of(ServiceId(service_id))

    def levels(self, groups: Sequence[Group], view: View) -> Sequence[Sequence[Group]]:
        """The groups by priority, the highest first."""
        if not self._by_service:
            return (groups,)
        levels: dict[int, list[Group]] = {}
        for group in groups:
            levels.setdefault(self.of_group(group, view), []).append(group)
        return [levels[priority] for priority in sorted(levels, reverse=True)]

    def of_successors(self, commit: Commit) -> int | None:
        """The highest priority of tasks that ended by themselves: successors follow, and are to have the room.

        None: there are no such tasks, or no priorities.
        """
        if not self._by_service:
            return None
        tasks = (event.new for event in commit.events if isinstance(event, Updated))
        ended = (
            one for one in tasks if isinstance(one, Task) and one.is_wanted and one.status.state.is_terminal
        )
        return max((self.of(task.service_id) for task in ended), default=None)

    def set(self, service: Service) -> bool:
        """A service was created or changed; gives whether its priority is another one now."""
        before, priority = self.of(service.id), priority_of(service.spec.labels)
        if priority:
            self._by_service[service.id] = priority
        else:
            self.forget(service.id)
        return before != priority

    def forget(self, id: ServiceId) -> None:
        """The service was deleted."""
        self._by_service.pop(id, None)

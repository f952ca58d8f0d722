"""Priorities of services (label ``skep.priority``), which decide whose tasks are decided first."""

from collections.abc import Sequence
from typing import Final

from skep.manager.scheduler.groups import Group
from skep.model.options.labels import priority_of
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import ServiceId, TaskId
from skep.store.interface import Commit, Created, Updated, View

HELD_S: Final = 0.5
"""Seconds before tasks of lower priority may take the place of a task that ended or is replaced, so that its successor
can arrive first.
"""


class Priorities:
    """The priorities of all services."""

    def __init__(self) -> None:
        self._by_service: dict[ServiceId, int] = {}
        """Priorities other than 0."""

    def __bool__(self) -> bool:
        """Return whether any service has a priority other than 0."""
        return bool(self._by_service)

    @property
    def lowest(self) -> int:
        """The lowest priority of all services.  Services without the label have 0."""
        return min((0, *self._by_service.values()))

    def of(self, id: ServiceId) -> int:
        """Return the priority of a service's tasks."""
        return self._by_service.get(id, 0)

    def of_group(self, group: Group, view: View) -> int:
        """Return the priority of a group's tasks."""
        if not self._by_service:
            return 0
        service_id, _, version = group.partition("/")
        if not version:
            task = view.lookup(Task, TaskId(group))
            service_id = task.service_id if task is not None else ""
        return self.of(ServiceId(service_id))

    def levels(self, groups: Sequence[Group], view: View) -> Sequence[Sequence[Group]]:
        """Return the groups by priority, the highest first."""
        if not self._by_service:
            return (groups,)
        levels: dict[int, list[Group]] = {}
        for group in groups:
            levels.setdefault(self.of_group(group, view), []).append(group)
        return [levels[priority] for priority in sorted(levels, reverse=True)]

    def of_successors(self, commit: Commit) -> int | None:
        """Return the highest priority of tasks whose successors need their places and are not pending yet.

        They ended by themselves, or the commit replaces them.  None without such tasks or priorities.
        """
        if not self._by_service:
            return None
        replaced_in = {
            event.object.service_id
            for event in commit.events
            if isinstance(event, Created) and isinstance(event.object, Task)
        }
        tasks = (event.new for event in commit.events if isinstance(event, Updated))
        ended = (
            one
            for one in tasks
            if isinstance(one, Task)
            and (one.status.state.is_terminal if one.is_wanted else one.service_id in replaced_in)
        )
        return max((self.of(task.service_id) for task in ended), default=None)

    def set(self, service: Service) -> bool:
        """Record a service that was created or changed.  Returns whether its priority changed."""
        before, priority = self.of(service.id), priority_of(service.spec.labels)
        if priority:
            self._by_service[service.id] = priority
        else:
            self.forget(service.id)
        return before != priority

    def forget(self, id: ServiceId) -> None:
        """Forget a deleted service."""
        self._by_service.pop(id, None)

"""Tracks tasks that are not yet released to the scheduler, and keys that wait for networks.

A released address is offered only to keys that wait for its network, and only while the network has a free address.  So
each release costs the work of one task, however many tasks wait.  Services with many new tasks take turns, so that a
service of 100,000 tasks does not delay the others.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from skep.model.values.ids import NetworkId, ServiceId, TaskId


class WaitingTasks:
    """New tasks by service, and keys of the work queue by the network that they wait for."""

    def __init__(self) -> None:
        self._new: dict[ServiceId, dict[TaskId, None]] = {}
        """Tasks to check.  The work is proportional to them, not to all tasks of the service."""
        self._parked: dict[NetworkId, dict[ServiceId, dict[TaskId, None]]] = {}
        """Tasks to check when a network has a free address again, longest waiting first."""
        self._keys: dict[NetworkId, dict[str, None]] = {}
        self._unchecked: dict[ServiceId, int] = {}
        """Services that are being checked, in the order of their turns, and how many of their new tasks are left."""

    def add(self, service_id: ServiceId, task_id: TaskId) -> None:
        """Add a new task."""
        self._new.setdefault(service_id, {})[task_id] = None

    def remove(self, service_id: ServiceId, task_id: TaskId) -> None:
        """Remove a task that does not wait any longer."""
        if (tasks := self._new.get(service_id)) is not None:
            tasks.pop(task_id, None)
            if not tasks:
                del self._new[service_id]
        for network_id in self._full_networks_of(service_id):
            self._unpark(network_id, service_id, task_id)

    def forget_service(self, service_id: ServiceId) -> None:
        """Forget a deleted service."""
        self._new.pop(service_id, None)
        self.end(service_id)
        for waiting in (*self._parked.values(), *self._keys.values()):
            waiting.pop(service_id, None)  # type: ignore[attr-defined]

    def park(self, service_id: ServiceId, task_id: TaskId, network_id: NetworkId) -> None:
        """Set a task aside until the full network has a free address."""
        self.remove(service_id, task_id)
        self._parked.setdefault(network_id, {}).setdefault(service_id, {})[task_id] = None

    @property
    def is_checking(self) -> bool:
        """Whether tasks of any service are left to check."""
        return bool(self._unchecked)

    def begin(self, service_id: ServiceId) -> None:
        """Check all tasks of a service: tasks that a network may help, and all new ones."""
        self._unchecked[service_id] = len(self._new.get(service_id, ()))

    def end(self, service_id: ServiceId) -> None:
        """Check no more tasks of a service until it begins again."""
        self._unchecked.pop(service_id, None)

    def turns(self, limit: int) -> Sequence[ServiceId]:
        """Return up to ``limit`` services that are being checked.  The first ones now are the last ones next time."""
        ids = list(islice(self._unchecked, limit))
        for id in ids:
            self._unchecked[id] = self._unchecked.pop(id)
        return ids

    def due(
        self, service_id: ServiceId, is_full: Callable[[NetworkId], bool], limit: int
    ) -> Iterator[TaskId]:
        """Iterate over the next tasks to check of a service, at most ``limit``, first the parked ones.

        Tasks may be added, removed and parked during the iteration.  Each task stays new until it is removed or parked
        again, because its decision may not be written.
        """
        left = self._unchecked.get(service_id, 0)
        # Chosen before the parked tasks become new, so that no task is checked twice.
        new = list(islice(self._new.get(service_id, ()), min(limit, left)))
        for network_id in self._full_networks_of(service_id):
            while (parked := self._parked_on(network_id, service_id)) and not is_full(network_id):
                if limit <= 0:
                    return
                limit -= 1
                task_id = next(iter(parked))
                self._unpark(network_id, service_id, task_id)
                self.add(service_id, task_id)
                yield task_id
        for task_id in new[:limit]:
            tasks = self._new.get(service_id, {})
            if task_id in tasks:
                del tasks[task_id]
                tasks[task_id] = None  # the next turn begins with the others
                yield task_id
        if limit < left:
            self._unchecked[service_id] = left - limit
        else:
            self.end(service_id)

    def wait(self, network_id: NetworkId, key: str) -> None:
        """Let ``key`` wait for the network, or for an address of it."""
        self._keys.setdefault(network_id, {})[key] = None

    def woken(self, network_id: NetworkId) -> Sequence[str]:
        """Return the keys that wait for the network, which has changed or has a free address again."""
        return *self._keys.pop(network_id, ()), *self._parked.get(network_id, ())

    def _full_networks_of(self, service_id: ServiceId) -> Sequence[NetworkId]:
        """Return the networks for which tasks of the service are parked.  Few networks are full."""
        return [id for id, services in self._parked.items() if service_id in services]

    def _parked_on(self, network_id: NetworkId, service_id: ServiceId) -> dict[TaskId, None]:
        return self._parked.get(network_id, {}).get(service_id, {})

    def _unpark(self, network_id: NetworkId, service_id: ServiceId, task_id: TaskId) -> None:
        services = self._parked[network_id]
        services[service_id].pop(task_id, None)
        if not services[service_id]:
            del services[service_id]
        if not services:
            del self._parked[network_id]

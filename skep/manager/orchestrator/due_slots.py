"""Tracks the due slots of services, which are the slots that the next decision concerns.

An event of a task or node concerns one slot of each affected service.  The first decision about a service, and each
decision after a change of the service itself, concerns all slots.  If such a decision finds nothing to do, the service
is *settled*, and unchanged slots need no decision until something else changes.  So the next decisions concern only
slots with later events, and slots for which the last decision had steps.
"""

from collections.abc import Collection, Set
from typing import TypeAlias

import msgspec

from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import NodeId, ServiceId

SlotKey: TypeAlias = int | NodeId
"""Number of a slot, or the node of a global service's slot."""


class Settled(msgspec.Struct, frozen=True):
    """Result of a decision about all slots of a service that found nothing to do."""

    tasks: int
    """Number of tasks that the decision was about."""
    filled: Collection[int] = ()
    """Numbers of a replicated service's filled slots, which are all its slots."""
    running: SlotKey | None = None
    """Slot of a global job that has an active task.  The run cannot end before that slot becomes due."""


class DueSlots:
    """The due slots of every service."""

    def __init__(self) -> None:
        self._settled: dict[ServiceId, tuple[Service, Settled]] = {}
        self._due: dict[ServiceId, set[SlotKey]] = {}
        """Slots with events, for services that are settled or being decided."""

    def clear(self) -> None:
        """Make all slots of all services due."""
        self._settled.clear()
        self._due.clear()

    def add(self, id: ServiceId, slot: SlotKey) -> None:
        """Make one slot due."""
        if id in self._due:
            self._due[id].add(slot)

    def add_all(self, id: ServiceId) -> None:
        """Make all slots of the service due."""
        self._settled.pop(id, None)
        self._due.pop(id, None)

    def is_partial(self, id: ServiceId) -> bool:
        """Return whether the next decision is about the due slots only, because there are some and they cost less than
        all slots.
        """
        if id not in self._settled:
            return False
        return 0 < 2 * len(self._due[id]) <= self._settled[id][1].tasks + 1

    def begin(self, service: Service) -> tuple[Settled, Set[SlotKey]] | None:
        """Begin a decision.  Returns the due slots, or None if all are due.

        Events from now on make slots due again.
        """
        id = service.id
        if not self.is_partial(id) or self._settled[id][0] is not service:
            self._settled.pop(id, None)
            self._due[id] = set()
            return None
        slots, self._due[id] = self._due[id], set()
        return self._settled[id][1], slots

    def put_back(self, id: ServiceId, slots: Set[SlotKey]) -> None:
        """Make slots due again after a decision about them had steps."""
        if id in self._due:
            self._due[id] |= slots

    def end(self, service: Service, settled: Settled | None) -> None:
        """End a decision about all slots.  ``settled`` is its result, or None if something is left to do."""
        if settled is None:
            self.add_all(service.id)
        elif service.id in self._due:
            self._settled[service.id] = service, settled


def slot_key(task: Task) -> SlotKey:
    """Return the slot of a task."""
    return task.slot or task.node_id

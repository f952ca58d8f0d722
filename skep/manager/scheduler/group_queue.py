"""The scheduler's queue of due groups, and of refused groups, which become due again when resources may be free."""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from typing import Final

from skep.aio.clock import Clock
from skep.manager.control_loops.work_queue import LEAST_WAIT_S, WorkQueue
from skep.manager.scheduler.groups import Group, is_of_many
from skep.manager.scheduler.preemption.priorities import HELD_S

RETRIES_S: Final = 0.1
"""Seconds for which refused groups are decided again before other groups get their turn."""


class GroupQueue(WorkQueue[Group]):
    """Groups in the order in which they became due, higher priorities first.

    Refused groups are set aside and become due again together.  Thousands of them, of any priority, may still not fit,
    and each decision may check every node.  So while other groups are due, refused groups get at most half of each
    take, and groups that are not decided within ``RETRIES_S`` wait for the next take.
    """

    def __init__(self, clock: Clock, priority: Callable[[Group], int]) -> None:
        super().__init__(clock, priority)
        self._priority_of = priority
        self._aside: dict[int, dict[Group, None]] = {}
        """Refused groups by priority, so that all of them can become due without a loop over them."""
        self._aside_at: dict[Group, int] = {}
        self._held: deque[tuple[float, int, dict[Group, None]]] = deque()
        """Refused groups that become due later.  All have the same delay, so their times are in order."""
        self._retries: dict[int, deque[Group]] = {}
        """Refused groups that are due again, by priority.  No entry is empty."""
        self._retried: frozenset[Group] = frozenset()
        """The refused groups in the last take."""
        self._retries_until = math.inf

    def add_times(self, times: Mapping[Group, float]) -> None:
        """Queue groups for the given times."""
        now = self._clock.monotonic()
        self.add(group for group, at in times.items() if at <= now)
        for group, at in times.items():
            if at > now:
                self.add_at(group, at)

    @property
    def has_refused(self) -> bool:
        """Whether there are refused groups that are not due again."""
        return bool(self._aside)

    @property
    def refused(self) -> Collection[Group]:
        """The refused groups that are not due again."""
        return self._aside_at.keys()

    def set_aside(self, group: Group) -> None:
        """Set a refused group aside."""
        self.discard_refused(group)
        priority = self._aside_at[group] = self._priority_of(group)
        self._aside.setdefault(priority, {})[group] = None

    def discard_refused(self, group: Group) -> None:
        """Remove the group from the refused groups, if it is one."""
        priority = self._aside_at.pop(group, None)
        if priority is not None:
            groups = self._aside[priority]
            del groups[group]
            if not groups:
                del self._aside[priority]

    def retry(self, held_for: int | None = None, only: Set[Group] | None = None) -> None:
        """Make refused groups due again, because resources may be free.

        Args:
            held_for: Groups with a lower priority than this become due a moment later.
            only: Limits the call to these groups.
        """
        for priority, groups in self._take_aside(only).items():
            if held_for is not None and priority < held_for:
                self._held.append((self._clock.monotonic() + HELD_S, priority, groups))
                self._changed.set()
            else:
                self._add_retries(priority, groups)

    def _take_aside(self, only: Set[Group] | None) -> Mapping[int, dict[Group, None]]:
        """Remove the refused groups (only these, if ``only`` is set) and return them by priority."""
        if only is None:
            aside, self._aside, self._aside_at = self._aside, {}, {}
            return aside
        chosen: dict[int, dict[Group, None]] = {}
        for group in sorted(self._aside_at.keys() & only):
            chosen.setdefault(self._aside_at[group], {})[group] = None
            self.discard_refused(group)
        return chosen

    def put_back(self, groups: Iterable[Group]) -> None:
        """Return groups of the last take to the queue."""
        for group in groups:
            if group in self._retried:
                self._add_retries(self._priority_of(group), (group,))
            else:
                self.add((group,))

    def in_time(self, groups: Collection[Group]) -> Collection[Group]:
        """Return the taken ``groups`` to decide now, and put the others back."""
        again = [group for group in groups if group in self._retried]
        if not again:
            return groups
        now = self._clock.monotonic()
        if now > self._retries_until:
            self.put_back(again)
            return [group for group in groups if group not in self._retried]
        if self._retries_until == math.inf:  # the first retried group is always in time
            self._retries_until = now + RETRIES_S
        return groups

    def _add_retries(self, priority: int, groups: Iterable[Group]) -> None:
        # Tasks that are bound to a node come first, as in the decision (``SchedulerState.decide``).
        new = sorted((group for group in groups if group not in self._is_due), key=is_of_many)
        if new:
            self._is_due.update(new)
            self._retries.setdefault(priority, deque()).extend(new)
            self._changed.set()

    def take_due(self, limit: int) -> list[Group]:
        now = self._clock.monotonic()
        while self._held and self._held[0][0] <= now:
            _, priority, groups = self._held.popleft()
            self._add_retries(priority, groups)
        due_again = sum(map(len, self._retries.values()))
        keys = super().take_due(limit - min(due_again, limit // 2))
        retried: list[Group] = []
        for priority in sorted(self._retries, reverse=True):
            due = self._retries[priority]
            retried += [due.popleft() for _ in range(min(limit - len(keys) - len(retried), len(due)))]
            if not due:
                del self._retries[priority]
        self._is_due.difference_update(retried)
        self._retried, self._retries_until = frozenset(retried), math.inf
        return [*retried, *keys]

    def has_due(self) -> bool:
        return super().has_due() or bool(self._held and self._held[0][0] <= self._clock.monotonic())

    def wait_s(self) -> float | None:
        waits = [super().wait_s(), self._held[0][0] - self._clock.monotonic() if self._held else None]
        return min((max(one, LEAST_WAIT_S) for one in waits if one is not None), default=None)

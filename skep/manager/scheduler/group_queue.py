"""The scheduler's work queue: groups that are due, and refused ones, which are due again when there may be room."""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from typing import Final

from skep.aio.clock import Clock
from skep.manager.scheduler.groups import Group
from skep.manager.scheduler.priorities import HELD_S
from skep.manager.work_queue import LEAST_WAIT_S, WorkQueue

RETRIES_S: Final = 0.1
"""How long refused groups are decided again before other groups get their turn."""


class GroupQueue(WorkQueue[Group]):
    """Groups in the order in which they became due, those of a higher priority first.

    Refused groups are set aside, and due again together.  There may be thousands for which there is still no room, and
    of any priority, and each decision may take a look at every node.  So while others are due they get at most half of
    what is taken, and those whose turn has not come after ``RETRIES_S`` wait for the next take.
    """

    def __init__(self, clock: Clock, priority: Callable[[Group], int]) -> None:
        super().__init__(clock, priority)
        self._priority_of = priority
        self._aside: dict[int, dict[Group, None]] = {}
        """Refused groups by their priority then: making all of them due takes no look at each."""
        self._aside_at: dict[Group, int] = {}
        self._held: deque[tuple[float, int, dict[Group, None]]] = deque()
        """Refused groups that are due again at a time, which is the same span after each event."""
        self._retries: dict[int, deque[Group]] = {}
        """Those that are due again, by priority; none is empty."""
        self._retried: frozenset[Group] = frozenset()
        """The refused ones among the groups that were taken last."""
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
        """Whether there are any that are not due again."""
        return bool(self._aside)

    def set_aside(self, group: Group) -> None:
        """The group is refused."""
        self.discard_refused(group)
        priority = self._aside_at[group] = self._priority_of(group)
        self._aside.setdefault(priority, {})[group] = None

    def discard_refused(self, group: Group) -> None:
        """The group is refused no more, if it was."""
        priority = self._aside_at.pop(group, None)
        if priority is not None:
            groups = self._aside[priority]
            del groups[group]
            if not groups:
                del self._aside[priority]

    def retry(self, held_for: int | None = None, only: Set[Group] | None = None) -> None:
        """There may be room for refused groups (``only`` for these): for those below the priority ``held_for`` a moment
        later."""
        for priority, groups in self._take_aside(only).items():
            if held_for is not None and priority < held_for:
                self._held.append((self._clock.monotonic() + HELD_S, priority, groups))
                self._changed.set()
            else:
                self._add_retries(priority, groups)

    def _take_aside(self, only: Set[Group] | None) -> Mapping[int, dict[Group, None]]:
        """The refused groups (of ``only`` these) by their priority; they are no longer aside."""
        if only is None:
            aside, self._aside, self._aside_at = self._aside, {}, {}
            return aside
        chosen: dict[int, dict[Group, None]] = {}
        for group in sorted(self._aside_at.keys() & only):
            chosen.setdefault(self._aside_at[group], {})[group] = None
            self.discard_refused(group)
        return chosen

    def put_back(self, groups: Iterable[Group]) -> None:
        """Some of the groups that were taken last come with the next ones."""
        for group in groups:
            if group in self._retried:
                self._add_retries(self._priority_of(group), (group,))
            else:
                self.add((group,))

    def in_time(self, groups: Collection[Group]) -> Collection[Group]:
        """Those that are to be decided now, of ``groups`` that were taken last; the others are put back."""
        again = [group for group in groups if group in self._retried]
        if not again:
            return groups
        now = self._clock.monotonic()
        if now > self._retries_until:
            self.put_back(again)
            return [group for group in groups if group not in self._retried]
        if self._retries_until == math.inf:  # the first of them is always in time
            self._retries_until = now + RETRIES_S
        return groups

    def _add_retries(self, priority: int, groups: Iterable[Group]) -> None:
        new = [group for group in groups if group not in self._is_due]
        if new:
            self._is_due.update(new)
            self._retries.setdefault(priority, deque()).extend(new)
            self._changed.set()

    def _take_due(self, limit: int) -> list[Group]:
        now = self._clock.monotonic()
        while self._held and self._held[0][0] <= now:
            _, priority, groups = self._held.popleft()
            self._add_retries(priority, groups)
        due_again = sum(map(len, self._retries.values()))
        keys = super()._take_due(limit - min(due_again, limit // 2))
        retried: list[Group] = []
        for priority in sorted(self._retries, reverse=True):
            due = self._retries[priority]
            retried += [due.popleft() for _ in range(min(limit - len(keys) - len(retried), len(due)))]
            if not due:
                del self._retries[priority]
        self._is_due.difference_update(retried)
        self._retried, self._retries_until = frozenset(retried), math.inf
        return [*retried, *keys]

    def _wait_s(self) -> float | None:
        waits = [super()._wait_s(), self._held[0][0] - self._clock.monotonic() if self._held else None]
        return min((max(one, LEAST_WAIT_S) for one in waits if one is not None), default=None)

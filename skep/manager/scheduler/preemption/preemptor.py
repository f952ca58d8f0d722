"""The preemption state of the scheduler's loop: priorities, claims, and victims that have not ended."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Final

from skep.aio.time_slices import SlicedWork
from skep.manager.scheduler.groups import Group
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.requirements import Requirements
from skep.manager.scheduler.preemption.preemption import (
    AT_ONCE,
    Nomination,
    Occupants,
    Preempt,
    frees_own_resources,
    making_nominations,
    reserve_candidate,
)
from skep.manager.scheduler.preemption.priorities import Priorities
from skep.manager.services.freezes import held_stacks, why_held
from skep.model.node import NodeState
from skep.model.options.labels import allows_preemption
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Preemption, Task
from skep.model.values.ids import NodeId, TaskId
from skep.store.interface import View

STOPPING_S: Final = 60.0
"""Seconds for which a victim counts against ``AT_ONCE``, six times Docker's default stop grace period.

So a victim with a stop grace period of hours does not delay preemption on other nodes.
"""


BUDGET_S: Final = 5.0
"""Seconds until a refused task is tried again if disruption budgets excluded victims, because a start of their tasks
makes no other decision due."""


class Preemptor:
    """Preempts tasks for refused tasks, if the cluster allows it."""

    def __init__(self, accounting: Accounting, view: Callable[[], View], now: Callable[[], float]) -> None:
        """``view`` returns the current view, and ``now`` the seconds on a monotonic clock."""
        self._now = now
        self.priorities = Priorities()
        self._accounting = accounting
        self._view = view
        self._is_allowed = False
        self._frozen: Collection[str] = ()
        """Stacks with a change freeze or a closed window, whose tasks are not preempted."""
        self._claims: dict[Group, list[Nomination]] = {}
        """Claims of pending tasks whose victims have not ended, as reservations in the accounting."""
        self._victims: dict[TaskId, float] = {}
        """Preempted tasks that have not ended, and when this leader first saw each of them."""
        self._holds_back = False
        """Whether disruption budgets excluded victims in the last decision."""

    # -- keeping up with the store ---------------------------------------------------------------------------------

    def set_cluster(self, swarm: Swarm) -> bool:
        """Apply the cluster's settings and freezes.  Returns whether other tasks may be preempted than before."""
        before = self._is_allowed, self._frozen
        self._is_allowed = allows_preemption(swarm.spec.labels) and not why_held(swarm)
        self._frozen = held_stacks(swarm)
        if not self._is_allowed:
            for group in list(self._claims):
                self.release(group)
        return before != (self._is_allowed, self._frozen)

    def add_victim(self, id: TaskId) -> None:
        """Add a preempted task that has not ended."""
        self._victims.setdefault(id, self._now())

    def remove_victim(self, id: TaskId) -> None:
        """Remove a task that has ended, whether it was preempted or not."""
        self._victims.pop(id, None)

    # -- claims ------------------------------------------------------------------------------------------------------

    def claims(self, group: Group) -> Counter[NodeId]:
        """Return the number of the group's claims per node."""
        return Counter(one.candidate.node_id for one in self._claims.get(group, ()))

    def release(self, group: Group) -> bool:
        """Release the claims of a group.  Returns whether it had any."""
        released = self._claims.pop(group, ())
        for one in released:
            self._accounting.remove(claim_id(one.task))
        return bool(released)

    def release_below(self, group: Group) -> list[Group]:
        """Release the claims of groups with a lower priority.  Returns these groups."""
        if not self._claims:
            return []
        priority = self.priorities.of_group(group, self._view())
        lower = [one for one in self._claims if self.priorities.of_group(one, self._view()) < priority]
        return [one for one in lower if self.release(one)]

    # -- deciding ----------------------------------------------------------------------------------------------------

    def may_preempt(self, task: Task) -> bool:
        """Return whether other tasks may be preempted for a task that is refused."""
        return self._is_allowed and self.priorities.of(task.service_id) > self.priorities.lowest

    def nominating(
        self, group: Group, refused: Sequence[Task], requirements: Requirements, nodes: Sequence[NodeId]
    ) -> SlicedWork[list[Nomination]]:
        """Choose nodes among ``nodes`` for the group's refused tasks, and claim them."""
        view = self._view()
        tasks = [task for task in refused if not frees_own_resources(task, self._accounting, view)]

        def claim(nomination: Nomination) -> None:
            self._claims.setdefault(group, []).append(nomination)
            reserve_candidate(self._accounting, claim_id(nomination.task), nomination.candidate, requirements)

        occupants = Occupants(self._view, self.priorities, self.priorities.of(requirements.service_id))
        nominations = yield from making_nominations(
            tasks,
            requirements,
            nodes if tasks else (),
            self._accounting,
            occupants,
            claim=claim,
            victims_max=AT_ONCE - len(self._victims_under_way()),
        )
        self._holds_back = occupants.holds_back
        return nominations

    def preemption(self, nomination: Nomination) -> Preempt | None:
        """Return the preemption to write for a nomination, or None if all its victims leave anyway."""
        task, victims = nomination.task, nomination.candidate.victims
        if not victims:
            return None
        service = self._view().lookup(Service, task.service_id)
        reason = Preemption(
            task_id=task.id,
            service=service.spec.name if service is not None else task.service_id,
            priority=self.priorities.of(task.service_id),
        )
        return Preempt(task, victims, reason)

    def words(self, nomination: Nomination) -> str:
        """Return the text that says why a nominated task waits."""
        account = self._accounting.accounts.get(nomination.candidate.node_id)
        name = account.node.description.hostname if account is not None else ""
        return f"; preempting tasks of lower priority on {name or nomination.candidate.node_id}"

    def more_at(self) -> float | None:
        """Return the time at which more victims may be chosen even if none ends before, or None if none is stopping."""
        until = self._victims_under_way() + ([self._now() + BUDGET_S] if self._holds_back else [])
        return min(until, default=None)

    def _victims_under_way(self) -> list[float]:
        """Return the times until which stopping victims count.  They are limited because a victim on a node that is not
        ready may never end.
        """
        accounts, node_of = self._accounting.accounts, self._accounting.node_of
        found = (
            (accounts.get(node_of(id) or NodeId("")), at + STOPPING_S) for id, at in self._victims.items()
        )
        return [
            until
            for account, until in found
            if until > self._now() and account is not None and account.node.status.state is NodeState.READY
        ]


def claim_id(task: Task) -> TaskId:
    """Return the key of a task's claim in the accounting, which is not a task's id."""
    return TaskId(f"claim of {task.id}")

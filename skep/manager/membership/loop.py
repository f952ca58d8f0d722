"""The leader's membership loop: writes the managers' reachability and applies the roles in the specs."""

import asyncio
from collections.abc import Collection, Mapping, Sequence, Set
from contextlib import suppress
from functools import partial
from random import Random
from typing import Protocol

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.control_loops.informer import run_informer
from skep.manager.manager_list import on_manager_change
from skep.manager.membership.consensus import Consensus
from skep.manager.membership.manager_changes import (
    LevelRise,
    LostContact,
    RoleChanges,
    write_level,
    write_reachability,
)
from skep.manager.membership.roles import Keep, Learners, Step, Withdraw, next_steps
from skep.model.node import Node
from skep.model.values.ids import NodeId
from skep.store.etcd.membership import RaftMember
from skep.store.interface import NotLeader, Term

log = structlog.get_logger(__name__)

CHECK_S = 0.5
"""Seconds between checks: lost managers and learners cause no commits, so they are polled."""
CHECK_ALONE_S = 5.0
"""The same for a single manager, which can lose no other.  A node that shall become one causes a commit."""
LONGEST_RETRY_S = 5.0
"""Maximum seconds between attempts after an error."""


class LinkState(Protocol):
    """The state of the links to the other managers (``ManagerLink``).  ``now`` is in monotonic seconds."""

    def silent(self, now: float) -> Mapping[NodeId, float]:
        """Return the managers that do not respond, with the seconds since their last ping."""

    def reachable(self, now: float) -> Set[NodeId]:
        """Return the managers that answered a recent ping and have contact with a quorum."""

    async def ask(self) -> Set[NodeId]:
        """Ping the managers now.  Returns the managers that answer."""


class ManagerReconciler:
    """Reconciles members, certificates and statuses of the managers with the specs.  Leader only."""

    def __init__(
        self,
        term: Term,
        own: NodeId,
        consensus: Consensus,
        link: LinkState,
        clock: Clock,
        random: Random,
    ) -> None:
        self._random = random
        self._term = term
        self._own = own
        self._consensus = consensus
        self._link = link
        self._clock = clock
        self._learners = Learners()
        self._kept = ""
        self._is_alone = False
        self._level_rise = LevelRise()
        self._lost_contact = LostContact()
        self._changes = RoleChanges(term, consensus, clock)

    async def run(self) -> None:
        """Reconcile at every change of a manager, and periodically, until cancelled."""
        changed = asyncio.Event()

        await run_informer(
            self._term,
            (Node,),
            on_snapshot=lambda _: changed.set(),
            on_commit=on_manager_change(changed.set),
            work=partial(self._work, changed),
        )

    async def _work(self, changed: asyncio.Event) -> None:
        backoff = Backoff(CHECK_S, LONGEST_RETRY_S, rng=self._random.random)
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_ALONE_S if self._is_alone else CHECK_S):
                    await changed.wait()
            changed.clear()
            try:
                await self.check()
                backoff.reset()
            except NotLeader:
                raise
            except SkepError as error:
                log.warning("managers not reconciled, will retry", reason=str(error))
                await backoff.sleep(self._clock)

    async def check(self) -> None:
        now = self._clock.monotonic()
        silent, reachable = self._link.silent(now), self._link.reachable(now)
        view = self._term.view()
        for change in self._lost_contact.changes(view.find(Node), silent, reachable, self._own, now):
            log.info(
                "manager reachability changed", node=change.node_id, reachability=change.reachability.value
            )
            await self._term.update(write_reachability, change)
        if (level := self._level_rise.due(view, now)) is not None:
            await self._term.update(write_level)
            log.info("data level raised", data_level=level)
        members = await self._consensus.all()
        overdue, steps = self._decide(members, reachable)
        self._is_alone = len(members) == 1 and not steps
        if overdue or any(isinstance(step, Withdraw) for step in steps):
            # Removing a member is not fenced, and this manager's state may be old: decide again with a quorum's
            # members, after the store has confirmed this term.  The order matters: a node is recorded before it
            # becomes a member, so the state shown then has the nodes of all these members.  Reachability is checked
            # again too: a manager that has just failed no longer counts for the quorum of the others.
            members = await self._consensus.all(is_current=True)
            await self._term.confirm()
            overdue, steps = self._decide(members, await self._link.ask())
        for learner in overdue:
            log.warning("learner did not catch up and is removed", node=learner.name)
            await self._changes.withdraw(learner)
        self._log_kept(steps)
        for step in steps:
            await self._changes.apply(step)

    def _decide(
        self, members: Sequence[RaftMember], reachable: Set[NodeId]
    ) -> tuple[list[RaftMember], list[Step]]:
        """Return overdue learners, and the steps that bring members and certificates closer to the specs."""
        view, now = self._term.view(), self._clock.monotonic()
        names = {member.name for member in members if member.name == self._own or member.name in reachable}
        steps = next_steps(view.find(Node), members, names, self._own, view.unreadable(Node))
        return self._learners.overdue(members, now), steps

    def _log_kept(self, steps: Collection[Step]) -> None:
        held = ", ".join(step.member.name for step in steps if isinstance(step, Keep))
        if held and held != self._kept:
            log.warning("manager not removed: the others would have no quorum", node=held)
        self._kept = held

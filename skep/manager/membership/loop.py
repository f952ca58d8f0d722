"""The leader's loop over the managers: who answers, and roles as they are wished."""

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from functools import partial
from random import Random
from typing import Protocol, assert_never

import structlog
from msgspec.structs import replace

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.informer import run_informer
from skep.manager.manager_list import on_manager_change
from skep.manager.membership.consensus import Consensus
from skep.manager.membership.roles import (
    Demote,
    HandOver,
    Hold,
    Learners,
    Promote,
    Step,
    Withdraw,
    next_steps,
)
from skep.manager.membership.roll_call import roll_call, write_mark
from skep.manager.revocation import revoke
from skep.model.ids import NodeId
from skep.model.node import Node, NodeRole
from skep.store.etcd.membership import RaftMember
from skep.store.interface import NotLeader, Term, Transaction
from skep.store.level import LOWEST

log = structlog.get_logger(__name__)

CHECK_S = 0.5
LONGEST_RETRY_S = 5.0
"""Silence and learners announce nothing."""


class Hearing(Protocol):
    """What this manager hears of the others (``ManagerLink``); ``now``: the clock's monotonic time."""

    def silent(self, now: float) -> Mapping[NodeId, float]: ...

    def heard(self, now: float) -> Set[NodeId]: ...


class Managers:
    """Keeps members, certificates and statuses of the managers as wished and as they are.  Leader only."""

    def __init__(
        self,
        term: Term,
        own: NodeId,
        consensus: Consensus,
        hearing: Hearing,
        clock: Clock,
        random: Random,
    ) -> None:
        self._random = random
        self._term = term
        self._own = own
        self._consensus = consensus
        self._hearing = hearing
        self._clock = clock
        self._learners = Learners()
        self._held = ""

    async def run(self) -> None:
        """Look at every change of a manager, and twice a second, until cancelled."""
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
                async with asyncio.timeout(CHECK_S):
                    await changed.wait()
            changed.clear()
            try:
                await self._look()
                backoff.reset()
            except NotLeader:
                raise
            except SkepError as error:
                log.warning("managers not looked after", reason=str(error))
                await backoff.sleep(self._clock)

    async def _look(self) -> None:
        now = self._clock.monotonic()
        silent, heard = self._hearing.silent(now), self._hearing.heard(now)
        view = self._term.view()
        nodes = view.find(Node)
        for mark in roll_call(nodes, silent, heard, self._own):
            log.info("manager", node=mark.node_id, reachability=mark.reachability.value)
            await self._term.update(write_mark, mark)
        level = lowest_level(nodes)
        if level > view.level and not view.unreadable(Node):
            await self._term.update(write_level)
            log.info("level of the data raised", data_level=level)
        overdue, steps = self._judged(await self._consensus.all(), heard, now)
        if overdue or any(isinstance(step, Withdraw) for step in steps):
            # No fence covers a removal, and what this manager knows by itself may be old: it is judged again by what
            # a quorum says now, and by what the store shows that still knows this term.
            await self._term.confirm()
            overdue, steps = self._judged(await self._consensus.all(is_current=True), heard, now)
        for learner in overdue:
            log.warning("a manager that never caught up is removed", node=learner.name)
            await self._withdraw(learner)
        self._tell_held(steps)
        for step in steps:
            await self._take(step)

    def _judged(
        self, members: Sequence[RaftMember], heard: Set[NodeId], now: float
    ) -> tuple[list[RaftMember], list[Step]]:
        """Members that learn for too long, and what brings members and certificates nearer to the wished roles."""
        view = self._term.view()
        reachable = {member.name for member in members if member.name == self._own or member.name in heard}
        steps = next_steps(view.find(Node), members, reachable, self._own, view.unreadable(Node))
        return self._learners.overdue(members, now), steps

    async def _take(self, step: Step) -> None:
        match step:
            case Promote(node_id):
                await self._term.update(give_role, node_id, NodeRole.MANAGER, self._clock.now_ns())
                log.info("node promoted", node=node_id)
            case Demote(node_id):
                await self._term.update(give_role, node_id, NodeRole.WORKER, self._clock.now_ns())
                log.info("node demoted", node=node_id)
            case HandOver(to):
                log.info("leadership is handed over", to=to.name)
                await self._consensus.move_leader(to)
            case Withdraw(member):
                await self._withdraw(member)
            case Hold():
                pass
            case _:
                assert_never(step)

    async def _withdraw(self, member: RaftMember) -> None:
        await self._term.update(forget_presence, NodeId(member.name))
        await self._consensus.remove(member)

    def _tell_held(self, steps: Collection[Step]) -> None:
        held = ", ".join(step.member.name for step in steps if isinstance(step, Hold))
        if held and held != self._held:
            log.warning("a manager stays: without it there would be no quorum", node=held)
        self._held = held


def give_role(tx: Transaction, node_id: NodeId, role: NodeRole, now_ns: int) -> None:
    """Have the node renew its certificate in ``role``, unless the wish has changed meanwhile.

    What a former manager's certificates were good for is taken back at once.
    """
    node = tx.lookup(Node, node_id)
    if node is None or node.certificate is None or node.spec.role is not role:
        return
    if role is NodeRole.WORKER:
        revoke(tx, node, now_ns, is_removed=False)
        node = replace(node, manager_status=None)
    certificate = node.certificate
    if certificate is not None and certificate.role is not role:
        node = replace(node, certificate=replace(certificate, role=role, state="rotate"))
    tx.put(node)


def lowest_level(nodes: Iterable[Node]) -> int:
    """The newest level that every manager knows."""
    levels = (max(node.manager_status.level, LOWEST) for node in nodes if node.manager_status is not None)
    return min(levels, default=LOWEST)


def write_level(tx: Transaction) -> None:
    """Raise the level of the stored data as far as every manager knows it."""
    tx.raise_level(lowest_level(tx.find(Node)))


def forget_presence(tx: Transaction, node_id: NodeId) -> None:
    """Show the node as no manager."""
    node = tx.lookup(Node, node_id)
    if node is not None and node.manager_status is not None:
        tx.put(replace(node, manager_status=None))

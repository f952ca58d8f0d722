"""The leader's membership loop: writes the managers' reachability and applies the roles in the specs."""

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
from skep.manager.control_loops.informer import run_informer
from skep.manager.manager_list import on_manager_change
from skep.manager.membership.consensus import Consensus
from skep.manager.membership.member_sync import reachability_changes, write_reachability
from skep.manager.membership.roles import (
    Demote,
    Keep,
    Learners,
    Promote,
    Step,
    TransferLeadership,
    Withdraw,
    next_steps,
)
from skep.manager.nodes.revocation import revoke
from skep.model.node import Node, NodeRole, NodeState
from skep.model.values.ids import NodeId
from skep.store.etcd.membership import RaftMember
from skep.store.interface import NotLeader, Term, Transaction, View
from skep.store.level import LOWEST

log = structlog.get_logger(__name__)

CHECK_S = 0.5
"""Seconds between checks: lost managers and learners cause no commits, so they are polled."""
CHECK_ALONE_S = 5.0
"""The same for a single manager, which can lose no other.  A node that shall become one causes a commit."""
LONGEST_RETRY_S = 5.0
"""Maximum seconds between attempts after an error."""
SOUND_S = 30.0
"""Seconds for which every manager's node must be ready before the level is raised, which cannot be undone.

They are two heartbeat grace periods (15 s), so a node that starts and fails at once still returns to its former
version."""


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
        self._sound_since: float | None = None
        """When all managers' nodes were first seen ready, in monotonic seconds, or None while one is not."""

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
                await self._check()
                backoff.reset()
            except NotLeader:
                raise
            except SkepError as error:
                log.warning("managers not reconciled, will retry", reason=str(error))
                await backoff.sleep(self._clock)

    async def _check(self) -> None:
        now = self._clock.monotonic()
        silent, reachable = self._link.silent(now), self._link.reachable(now)
        view = self._term.view()
        nodes = view.find(Node)
        for change in reachability_changes(nodes, silent, reachable, self._own):
            log.info(
                "manager reachability changed", node=change.node_id, reachability=change.reachability.value
            )
            await self._term.update(write_reachability, change)
        await self._raise_level(view, now)
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
            await self._withdraw(learner)
        self._log_kept(steps)
        for step in steps:
            await self._apply(step)

    async def _raise_level(self, view: View, now: float) -> None:
        """Raise the level once every manager supports a higher one and has been ready with it for a while."""
        level = usable_level(view.find(Node))
        if level is None:
            self._sound_since = None
            return
        self._sound_since = now if self._sound_since is None else self._sound_since
        is_known = not view.unreadable(Node) and not any(
            "manager" in one for one in view.damaged(Node).values()
        )
        if level > view.level and is_known and now - self._sound_since >= SOUND_S:
            await self._term.update(write_level)
            log.info("data level raised", data_level=level)

    def _decide(
        self, members: Sequence[RaftMember], reachable: Set[NodeId]
    ) -> tuple[list[RaftMember], list[Step]]:
        """Return overdue learners, and the steps that bring members and certificates closer to the specs."""
        view, now = self._term.view(), self._clock.monotonic()
        names = {member.name for member in members if member.name == self._own or member.name in reachable}
        steps = next_steps(view.find(Node), members, names, self._own, view.unreadable(Node))
        return self._learners.overdue(members, now), steps

    async def _apply(self, step: Step) -> None:
        match step:
            case Promote(node_id):
                await self._term.update(set_certificate_role, node_id, NodeRole.MANAGER, self._clock.now_ns())
                log.info("node promoted", node=node_id)
            case Demote(node_id):
                await self._term.update(set_certificate_role, node_id, NodeRole.WORKER, self._clock.now_ns())
                log.info("node demoted", node=node_id)
            case TransferLeadership(to):
                log.info("leadership transferred: this node is being demoted", to=to.name)
                await self._consensus.move_leader(to)
            case Withdraw(member):
                await self._withdraw(member)
            case Keep():
                pass
            case _:
                assert_never(step)

    async def _withdraw(self, member: RaftMember) -> None:
        await self._term.update(clear_manager_status, NodeId(member.name))
        await self._consensus.remove(member)

    def _log_kept(self, steps: Collection[Step]) -> None:
        held = ", ".join(step.member.name for step in steps if isinstance(step, Keep))
        if held and held != self._kept:
            log.warning("manager not removed: the others would have no quorum", node=held)
        self._kept = held


def set_certificate_role(tx: Transaction, node_id: NodeId, role: NodeRole, now_ns: int) -> None:
    """Have the node renew its certificate in ``role``, unless its spec has changed meanwhile.

    A demoted manager's certificates are revoked at once.
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
    """Return the newest level that every manager supports."""
    levels = (max(node.manager_status.level, LOWEST) for node in nodes if node.manager_status is not None)
    return min(levels, default=LOWEST)


def usable_level(nodes: Iterable[Node]) -> int | None:
    """Return the newest level that every manager supports, or None while a manager's node is not ready.

    A manager process reports its level before its node is known to be ready.  A node that does not start gets its
    former version again (``skep upgrade``), which does not start on a higher level.
    """
    managers = [node for node in nodes if node.manager_status is not None]
    if any(node.status.state is not NodeState.READY for node in managers):
        return None
    return lowest_level(managers)


def write_level(tx: Transaction) -> None:
    """Raise the level of the stored data to the newest that every manager supports, if all their nodes are ready."""
    if (level := usable_level(tx.find(Node))) is not None:
        tx.raise_level(level)


def clear_manager_status(tx: Transaction, node_id: NodeId) -> None:
    """Remove the node's manager status."""
    node = tx.lookup(Node, node_id)
    if node is not None and node.manager_status is not None:
        tx.put(replace(node, manager_status=None))

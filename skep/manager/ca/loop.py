"""The leader's loop over certificates: takes a rotation of the root to its end, and forgets what has expired."""

import asyncio
from random import Random

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.race import wait_first
from skep.errors import SkepError
from skep.manager.ca.rotation import Ask, Finish, Renewal, ask_to_renew, finish, next_step
from skep.manager.informer import LoopStore, run_informer
from skep.manager.revocation import expired, forget
from skep.model.ids import IdSource, NodeId
from skep.model.node import Node
from skep.model.swarm import Swarm
from skep.store.interface import Commit, NotLeader, View
from skep.store.kinds import Revocation

log = structlog.get_logger()

RECHECK_S = 5.0
"""While a rotation waits for nodes: until asking those again that did not renew."""

FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 10.0
SWEEP_S = 3600.0


class CertificateAuthority:
    """Keeps certificates as the cluster wants them.  Runs on the leader only."""

    def __init__(self, term: LoopStore, clock: Clock, new_id: IdSource, random: Random) -> None:
        self._term = term
        self._clock = clock
        self._new_id = new_id
        self._random = random
        self._asked_at: dict[NodeId, float] = {}
        self._rotated_to = ""
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweep(), name="forget expired certificates")
            await run_informer(
                self._term,
                (Swarm, Node),
                on_snapshot=self._on_snapshot,
                on_commit=self._on_commit,
                work=self._work,
            )

    def _on_snapshot(self, _snapshot: View) -> None:
        self._changed.set()

    def _on_commit(self, _commit: Commit) -> None:
        self._changed.set()

    async def _work(self) -> None:
        backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=self._random.random)
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._step()
                backoff.reset()
            except NotLeader:
                raise
            except SkepError as error:
                log.warning("root rotation: the store took no write", reason=str(error))
                await backoff.sleep(self._clock)
                self._changed.set()

    async def _step(self) -> None:
        view = self._term.view()
        swarms = view.find(Swarm)
        if not swarms or swarms[0].rotation is None:
            self._asked_at.clear()
            self._rotated_to = ""
            return
        if swarms[0].rotation.root != self._rotated_to:
            self._asked_at.clear()
            self._rotated_to = swarms[0].rotation.root
            log.info("rotating the root", nodes=len(view.find(Node)))
        match next_step(swarms[0], view.find(Node), self._asked_at, self._clock.monotonic()):
            case Ask(node_ids=node_ids):
                await self._ask(node_ids)
            case Finish(root=root):
                if await self._term.update(finish, root, self._new_id):
                    log.info("the root is rotated")
            case None:
                await self._wait_or_recheck()

    async def _ask(self, node_ids: tuple[NodeId, ...]) -> None:
        for node_id in node_ids:
            self._asked_at[node_id] = self._clock.monotonic()
        renewals = [Renewal(node_id) for node_id in node_ids]
        for result in await self._term.update_each(ask_to_renew, renewals):
            if isinstance(result, SkepError):
                raise result
        log.info("nodes asked to renew their certificates", nodes=len(node_ids))
        self._changed.set()

    async def _wait_or_recheck(self) -> None:
        """A node that says nothing causes no commit: look again after a while."""
        await wait_first(self._changed.wait(), self._clock.sleep(RECHECK_S))
        self._changed.set()

    async def _sweep(self) -> None:
        while True:
            revocations = self._term.view().find(Revocation)
            gone = expired(revocations, self._clock.now_ns())
            try:
                for result in await self._term.update_each(forget, gone):
                    if isinstance(result, SkepError):
                        raise result
            except NotLeader:
                raise
            except SkepError as error:
                log.warning("expired certificates not forgotten yet", reason=str(error))
            await self._clock.sleep(SWEEP_S)

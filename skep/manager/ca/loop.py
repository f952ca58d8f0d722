"""The leader's loop over certificates: completes root rotations, and deletes expired revocations."""

import asyncio
from random import Random

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.race import wait_first
from skep.errors import SkepError
from skep.manager.ca.rotation import Finish, Renewal, RequestRenewals, finish, next_step, request_renewal
from skep.manager.control_loops.informer import run_informer
from skep.manager.nodes.revocation import expired, forget
from skep.model.node import Node
from skep.model.swarm import Swarm
from skep.model.values.ids import IdSource, NodeId
from skep.store.interface import Commit, LoopStore, NotLeader, View
from skep.store.kinds import Revocation

log = structlog.get_logger()

RECHECK_S = 5.0
"""Seconds after which nodes that did not renew are requested again during a rotation."""

FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 10.0
"""Seconds between attempts to write a certificate that could not be written."""
SWEEP_S = 3600.0
"""Seconds between two deletions of expired revocations."""


class CertificateAuthority:
    """Completes root rotations.  Runs on the leader only."""

    def __init__(self, term: LoopStore, clock: Clock, new_id: IdSource, random: Random) -> None:
        self._term = term
        self._clock = clock
        self._new_id = new_id
        self._random = random
        self._requested_at: dict[NodeId, float] = {}
        self._rotated_to = ""
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweep(), name="delete expired revocations")
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
                log.warning("root rotation step not written, will retry", reason=str(error))
                await backoff.sleep(self._clock)
                self._changed.set()

    async def _step(self) -> None:
        view = self._term.view()
        swarms = view.find(Swarm)
        if not swarms or swarms[0].rotation is None:
            self._requested_at.clear()
            self._rotated_to = ""
            return
        if swarms[0].rotation.root != self._rotated_to:
            self._requested_at.clear()
            self._rotated_to = swarms[0].rotation.root
            log.info("root rotation started", nodes=len(view.find(Node)))
        match next_step(swarms[0], view.find(Node), self._requested_at, self._clock.monotonic()):
            case RequestRenewals(node_ids=node_ids):
                await self._request_renewals(node_ids)
            case Finish(root=root):
                if await self._term.update(finish, root, self._new_id):
                    log.info("root rotation completed")
            case None:
                await self._wait_or_recheck()

    async def _request_renewals(self, node_ids: tuple[NodeId, ...]) -> None:
        results = await self._term.update_each(request_renewal, [Renewal(node_id) for node_id in node_ids])
        failure: SkepError | None = None
        for node_id, result in zip(node_ids, results, strict=True):
            if isinstance(result, SkepError):
                failure = failure or result
            else:
                self._requested_at[node_id] = self._clock.monotonic()
        if failure is not None:
            raise failure
        log.info("certificate renewal requested", nodes=len(node_ids))
        self._changed.set()

    async def _wait_or_recheck(self) -> None:
        """Wait for a change, or until the next check: a node that does not respond causes no commit."""
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
                log.warning("expired revocations not deleted, will retry", reason=str(error))
            await self._clock.sleep(SWEEP_S)

"""Keeps free space in every manager's store (``store.space``), as the leader, one step at a time.

The leader reads and defragments another manager's store by a call.  It skips managers whose version lacks the call.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import inf

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock, tick
from skep.errors import SkepError, Unavailable
from skep.manager.membership.consensus import Consensus
from skep.model.values.ids import NodeId
from skep.store.etcd.membership import RaftMember
from skep.store.interface import Store
from skep.store.space import COMPACT_AT, Compact, Defragment, Disarm, HandOver, MemberSpace, Step, next_step
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.client import ManagerChannel
from skep.wire.service import Handler, unary

log = structlog.get_logger(__name__)

CHECK_S, CHECK_S_MAX = 5.0, 60.0
"""Seconds between two checks: normally, and at most while steps fail.  The pause grows, because even a failed
defragmentation stops its store for a while.
"""
RESPONSE_S = 5.0
"""Seconds to wait for another manager's figures."""
DEFRAGMENT_S = 150.0
"""Seconds to wait for another manager's defragmentation."""
SETTLE_S = 1.0
"""Seconds after a compaction until etcd has freed its pages."""
COMPACT_AGAIN_S = 30.0
"""Seconds before an insufficient compaction is repeated.

The pause lets a replica that is being reloaded read one revision of the store, and lets other steps run even if much is
written.
"""


class StoreSpace:
    """Serves the leader's calls.  ``keep`` runs on the leader."""

    def __init__(
        self,
        store: Store,
        own: NodeId,
        consensus: Consensus,
        channel: Callable[[NodeId], ManagerChannel],
        clock: Clock,
    ) -> None:
        """``channel`` returns the link's connection to another manager, or raises Unavailable."""
        self._store = store
        self._own = own
        self._consensus = consensus
        self._channel = channel
        self._clock = clock
        self._cut: tuple[float, int] = (-inf, 0)
        """Time and kept revisions of the last compaction, if it was insufficient."""
        self._defragmenting = asyncio.Lock()

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (unary(methods.STORE_SPACE, self.answer),)

    async def keep(self) -> None:
        """Check every ``CHECK_S`` until cancelled, as the leader."""
        backoff = Backoff(CHECK_S, CHECK_S_MAX)
        while True:
            await tick(self._clock, CHECK_S)
            try:
                await self._check()
                backoff.reset()
            except SkepError as error:
                log.warning("store space not checked, will retry", reason=str(error))
                await backoff.sleep(self._clock)

    async def _check(self) -> None:
        """Take all steps that are due.  Each runs once and after a fresh check.  Raises: SkepError: to retry later."""
        can_compact = True
        taken: list[Step] = []
        while (space := await self._store.space()) is not None:
            if space.share < COMPACT_AT:
                self._cut = (-inf, 0)
            members = {member.name: member for member in await self._consensus.all()}
            spaces = {self._own: space, **await self._others(sorted(members))}
            step = next_step(self._own, spaces, can_compact=can_compact)
            if isinstance(step, Compact):
                can_compact = False
                if not self._may_compact(step.kept_revisions):
                    continue
            if step is None or step in taken:
                return
            taken.append(step)
            await self._take(step, members, spaces)

    def _may_compact(self, kept_revisions: int) -> bool:
        """Return whether history may be compacted again.  It may be at once if fewer revisions are kept than last
        time.
        """
        cut_at, kept = self._cut
        return kept_revisions < kept or self._clock.monotonic() - cut_at >= COMPACT_AGAIN_S

    async def _take(
        self, step: Step, members: Mapping[str, RaftMember], spaces: Mapping[NodeId, MemberSpace]
    ) -> None:
        match step:
            case Compact(kept_revisions):
                if await self._store.compact(kept_revisions):
                    self._cut = self._clock.monotonic(), kept_revisions
                    log.info("store compacted", space=spaces[self._own].summary)
                    await self._clock.sleep(SETTLE_S)
            case Defragment(node_id):
                log.warning(
                    "defragmenting a store, which pauses its service",
                    node=node_id,
                    file_bytes=spaces[node_id].size,
                )
                await self._defragment(node_id)
                log.info("store defragmented", node=node_id)
            case HandOver(to):
                log.info("leadership transferred, to defragment this store", to=to)
                await self._consensus.move_leader(members[to])
                await self._clock.sleep(
                    CHECK_S
                )  # this term is about to end, unless leadership returned at once
            case Disarm():
                await self._store.disarm()
                log.info("store has free space again", space=spaces[self._own].summary)

    async def _others(self, names: Sequence[str]) -> Mapping[NodeId, MemberSpace]:
        """Return the space of the other managers that respond."""
        found: dict[NodeId, MemberSpace] = {}
        for name in names:
            if name != self._own:
                with suppress(SkepError):  # the manager is unreachable or has an older version
                    found[NodeId(name)] = await self._call(NodeId(name), defragment=False)
        return found

    async def _defragment(self, node_id: NodeId) -> None:
        if node_id == self._own:
            await self._store.defragment()
        else:
            await self._call(node_id, defragment=True)

    async def _call(self, node_id: NodeId, *, defragment: bool) -> MemberSpace:
        reply = await self._channel(node_id).call(
            methods.STORE_SPACE,
            skep.StoreSpaceRequest(defragment=defragment),
            timeout_s=DEFRAGMENT_S if defragment else RESPONSE_S,
        )
        return MemberSpace(size=reply.size, in_use=reply.in_use, quota=reply.quota, has_alarm=reply.has_alarm)

    async def answer(self, request: skep.StoreSpaceRequest, caller: Caller) -> skep.StoreSpaceResponse:
        if request.defragment:
            if self._defragmenting.locked():
                raise Unavailable("this manager's store is already being defragmented")
            async with self._defragmenting:
                log.warning(
                    "defragmenting this manager's store, which pauses its service", asked_by=caller.node_id
                )
                await self._store.defragment()
        space = await self._store.space()
        if space is None:
            raise Unavailable("this manager's store has no file")
        return skep.StoreSpaceResponse(
            size=space.size, in_use=space.in_use, quota=space.quota, has_alarm=space.has_alarm
        )

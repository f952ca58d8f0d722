"""The leader's eviction loop: one step after the other, until nothing that the node had is valid."""

import asyncio
from collections.abc import Callable
from random import Random
from typing import assert_never

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import FailedPrecondition, SkepError, Unavailable, Unimplemented
from skep.manager.cluster import cluster_of
from skep.manager.control.swarm import rotate_join_tokens, rotate_root, rotate_unlock_key
from skep.manager.control_loops.informer import run_informer
from skep.manager.eviction.steps import (
    EVICTION_ID,
    TEXTS,
    Eviction,
    Step,
    eviction_of,
    has_new_root,
    is_rotating_root,
    names,
    note_damaged,
    note_done,
    note_waiting,
    remove_evicted,
    replace_gossip_keys,
)
from skep.manager.storage.keys import StoreKeys
from skep.model.node import Node, NodeRole, NodeState
from skep.model.values.ids import IdSource, NodeId
from skep.model.values.times import moment, timestamp
from skep.security.trust import is_issued_by, root_digest
from skep.store.etcd.encryption.cipher import new_wrapping_key
from skep.store.interface import Commit, Created, NotLeader, Store, Term, Updated, View
from skep.store.kinds import ROOT_KEY_ID, Payload
from skep.wire import methods
from skep.wire import skep_pb2 as pb
from skep.wire.client import ManagerChannel
from skep.wire.server import Bound

log = structlog.get_logger(__name__)

CHECK_S = 0.5
"""Seconds between attempts while a step waits for something that causes no commit."""

KEEP_S = 10.0
"""Timeout in seconds for a manager to store a key on its disk."""

DAMAGED_MAX = 100
"""Maximum damaged values that are listed."""


class Evictions:
    """Completes the current eviction.  Runs on the leader only.

    Args:
        channel: Returns the connection to another manager, or raises Unavailable.
    """

    def __init__(
        self,
        term: Term,
        own: NodeId,
        keys: StoreKeys,
        channel: Callable[[NodeId], ManagerChannel],
        clock: Clock,
        new_id: IdSource,
        random: Random,
    ) -> None:
        self._term = term
        self._own = own
        self._keys = keys
        self._channel = channel
        self._clock = clock
        self._new_id = new_id
        self._random = random
        self._changed = asyncio.Event()
        self._offered: tuple[NodeId, bytes] | None = None
        """The node whose eviction is in progress, and its new wrapping key, which stays the same during retries."""
        self._early: NodeId | None = None
        """The node whose eviction replaced the docker nodes' keys before the root."""

    async def run(self) -> None:
        """Process evictions until cancelled."""
        await run_informer(
            self._term,
            (Payload,),
            on_snapshot=lambda _: self._changed.set(),
            on_commit=self._on_commit,
            work=self._work,
        )

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Payload(id=id)) | Updated(_, Payload(id=id)) if id == EVICTION_ID:
                    self._changed.set()

    async def _work(self) -> None:
        backoff = Backoff(CHECK_S, 10.0, rng=self._random.random)
        while True:
            await self._changed.wait()
            self._changed.clear()
            while (eviction := self._present()) and (step := eviction.next_step):
                try:
                    await self._run_step(eviction, step)
                    backoff.reset()
                except NotLeader:
                    raise
                except (SkepError, OSError) as error:
                    log.warning("eviction step waits", node=eviction.node_id, step=step, reason=str(error))
                    await self._write_waiting(eviction, str(error))
                    await backoff.sleep(self._clock)

    def _present(self) -> Eviction | None:
        try:
            return eviction_of(self._term.view())
        except FailedPrecondition as error:
            log.error("eviction cannot be read", reason=str(error))
            return None

    async def _run_step(self, eviction: Eviction, step: Step) -> None:
        """Do as much of a step as is possible now.  Raises SkepError with the reason."""
        if waits_for := await self._try(eviction, step):
            await self._write_waiting(eviction, waits_for)
            await self._clock.sleep(CHECK_S)
            return
        await self._term.update(note_done, eviction.node_id, step)
        log.warning("eviction step done", node=eviction.node_id, name=eviction.hostname, done=TEXTS[step])

    async def _write_waiting(self, eviction: Eviction, reason: str) -> None:
        present = eviction_of(self._term.view())
        if present is not None and present.waits_for != reason:
            try:
                await self._term.update(note_waiting, eviction.node_id, reason)
            except Unavailable as error:
                log.warning("eviction status not written, will retry", reason=str(error))

    async def _try(self, eviction: Eviction, step: Step) -> str:
        """Run a step.  Returns the reason why it waits, or an empty string if it is done."""
        match step:
            case "remove":
                now_ns = self._clock.now_ns()
                return await self._term.update(
                    remove_evicted, eviction.nodes, now_ns, keeping=eviction.keeping
                )
            case "keys":
                return await self._replace_keys(eviction)
            case "data":
                return await self._wait_encrypted(eviction)
            case "root":
                return await self._replace_root(eviction)
            case "restarts":
                return self._not_restarted()
            case "tokens":
                await self._term.update(rotate_join_tokens, self._new_id)
            case "unlock":
                await self._term.update(rotate_unlock_key)
            case "overlays":
                await self._replace_gossip_keys()
            case _:
                assert_never(step)
        return ""

    # -- keys of the store -----------------------------------------------------------------------------------------

    async def _replace_keys(self, eviction: Eviction) -> str:
        """Have every manager store a new wrapping key, then rewrap the store's keys with it in one fenced write.

        A manager that joins meanwhile receives all keys of the manager that it joins through.  If it was admitted
        before the last of the others had the new key, it is among the managers that receive the key here.  A key that
        was offered before the node's eviction began may be known to the node.
        """
        if self._offered is None or self._offered[0] != eviction.node_id:
            self._offered = eviction.node_id, new_wrapping_key()
        key = self._offered[1]
        await self._keys.keep(key)
        stored_on: set[NodeId] = {self._own}
        while others := [node for node in self._managers() if node.id not in stored_on]:
            for node in others:
                try:
                    await self._send_key(node, key)
                except Unavailable:
                    return f"manager {names([node])} must store the new key but cannot be reached: start or remove it"
                stored_on.add(node.id)
            await self._keys.store.barrier()
        await self._keys.store.replace_wrapping_key(self._term, key)
        self._offered = None
        return ""

    async def _wait_encrypted(self, eviction: Eviction) -> str:
        """Wait until all values are encrypted with the new key, and list values that cannot be decrypted.

        These values are left as they are: no key that the node had decrypts them either.
        """
        damaged = self._keys.store.unreadable_values
        if self._keys.store.is_rotating and not damaged:
            return "waiting until all values are re-encrypted"
        await self._term.update(note_damaged, eviction.node_id, damaged[:DAMAGED_MAX])
        return ""

    async def _send_key(self, node: Node, key: bytes) -> None:
        request = pb.KeepWrappingKeyRequest(key=key)
        try:
            await self._channel(node.id).call(methods.KEEP_WRAPPING_KEY, request, timeout_s=KEEP_S)
        except Unimplemented as error:
            raise FailedPrecondition(
                f"manager {names([node])} runs a version of Skep that cannot replace its wrapping key: upgrade it"
            ) from error

    def _managers(self) -> list[Node]:
        return [node for node in self._term.view().find(Node) if node.manager_status is not None]

    # -- the root --------------------------------------------------------------------------------------------------

    async def _replace_root(self, eviction: Eviction) -> str:
        view = self._term.view()
        swarm = cluster_of(view)
        if has_new_root(eviction, swarm):
            return ""
        if not is_rotating_root(eviction, swarm):
            if view.lookup(Payload, ROOT_KEY_ID) is None:
                return (
                    "the external CA of the current root must sign the next one: run docker swarm ca --rotate"
                )
            await self._term.update(rotate_root, moment(self._clock.now_ns()))
            return "waiting for nodes to renew their certificates"
        waiting = _not_renewed(view)
        if not waiting:
            return "the root is being replaced"
        if all(node.status.state is not NodeState.READY for node in waiting):
            if self._early != eviction.node_id:
                # These may be away for days, and the overlay step comes after the root, so replace the keys now.
                await self._replace_gossip_keys()
                self._early = eviction.node_id
            return f"waiting for nodes that are down to return and renew their certificates: {names(waiting)}"
        return f"waiting for nodes to renew their certificates: {names(waiting)}"

    def _not_restarted(self) -> str:
        wanted = root_digest(cluster_of(self._term.view()).tls_info.trust_root.encode())
        waiting = [node for node in self._managers() if node.peer_roots != wanted]
        return f"waiting for managers to restart etcd one after another: {names(waiting)}" if waiting else ""

    async def _replace_gossip_keys(self) -> None:
        await self._term.update(replace_gossip_keys, timestamp(self._clock.now_ns()), self._random.randbytes)


def _not_renewed(view: View) -> list[Node]:
    wanted = cluster_of(view).tls_info
    return [node for node in view.find(Node) if not is_issued_by(node.description.tls_info, wanted)]


def end_connections(store: Store, bound: Bound) -> None:
    """End every connection if the root has changed because of an eviction.

    Connections survive a rotation, as they do in Docker.  But with the old root's key some of them may have been made
    in the names of other nodes.
    """
    eviction = eviction_of(store.view())
    if eviction is not None and eviction.next_step is not None:
        log.warning("root replaced by an eviction: all connections are closed", node=eviction.node_id)
        # Connections of managers have more rights, and there are few of them, so they are closed at once.
        bound.disconnect_all(
            lambda caller: caller.role is NodeRole.MANAGER or caller.node_id in eviction.nodes
        )

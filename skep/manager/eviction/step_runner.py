"""Runs one step of an eviction.  Each step may be interrupted and repeated."""

from collections.abc import Callable
from random import Random
from typing import assert_never

from skep.aio.clock import Clock
from skep.manager.cluster import cluster_of
from skep.manager.control.swarm import rotate_join_tokens, rotate_root, rotate_unlock_key
from skep.manager.eviction.key_replacement import KeyReplacement, managers_in
from skep.manager.eviction.steps import (
    Eviction,
    Step,
    remove_evicted,
    replace_gossip_keys,
    root_progress,
    waits_for_restarts,
)
from skep.manager.storage.keys import StoreKeys
from skep.model.node import Node
from skep.model.values.ids import IdSource, NodeId
from skep.model.values.times import moment, timestamp
from skep.store.interface import Term
from skep.store.kinds import ROOT_KEY_ID, Payload
from skep.wire.client import ManagerChannel


class StepRunner:
    """Runs steps on the leader.

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
        self._keys = KeyReplacement(term, own, keys, channel)
        self._clock = clock
        self._new_id = new_id
        self._random = random
        self._early: NodeId | None = None
        """The node whose eviction replaced the docker nodes' keys before the root."""

    async def attempt(self, eviction: Eviction, step: Step) -> str:
        """Do as much of a step as is possible now.

        Returns the reason why the step waits, or an empty string if it is done.  Raises: SkepError, OSError.
        """
        match step:
            case "remove":
                now_ns = self._clock.now_ns()
                return await self._term.update(
                    remove_evicted, eviction.nodes, now_ns, keeping=eviction.keeping
                )
            case "keys":
                return await self._keys.replace(eviction)
            case "data":
                return await self._keys.wait_encrypted(eviction)
            case "root":
                return await self._replace_root(eviction)
            case "restarts":
                view = self._term.view()
                return waits_for_restarts(cluster_of(view), managers_in(view))
            case "tokens":
                await self._term.update(rotate_join_tokens, self._new_id)
            case "unlock":
                await self._term.update(rotate_unlock_key)
            case "overlays":
                await self._replace_gossip_keys()
            case _:
                assert_never(step)
        return ""

    async def _replace_root(self, eviction: Eviction) -> str:
        view = self._term.view()
        has_root_key = view.lookup(Payload, ROOT_KEY_ID) is not None
        progress = root_progress(eviction, cluster_of(view), view.find(Node), has_root_key=has_root_key)
        match progress.action:
            case "rotate":
                await self._term.update(rotate_root, moment(self._clock.now_ns()))
            case "replace gossip keys" if self._early != eviction.node_id:
                await self._replace_gossip_keys()
                self._early = eviction.node_id
        return progress.waits_for

    async def _replace_gossip_keys(self) -> None:
        await self._term.update(replace_gossip_keys, timestamp(self._clock.now_ns()), self._random.randbytes)

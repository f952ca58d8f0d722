"""Tells each skep node the keys it encrypts overlays with: its own pairs' and no others.

Runs on every manager.  Who asks is known by the certificate of the connection, so no node can ask for another's keys.
A node hears of a peer while the two share an encrypted network.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from skep.aio.clock import Clock
from skep.aio.slices import Slices
from skep.manager.discovery.encrypted_members import KINDS, EncryptedMembers
from skep.manager.discovery.overlay_keys import (
    KeyRing,
    decoded_ring,
    pair_keys,
    wireguard_private,
    wireguard_public,
)
from skep.manager.informer import LoopStore, run_informer
from skep.model.ids import NodeId
from skep.model.pair_keys import KeysTold, PeerKeys
from skep.store.interface import Commit, Created, Updated, View
from skep.store.kinds import OVERLAY_KEYS_ID, Payload
from skep.wire import methods
from skep.wire import skep_pb2 as pb
from skep.wire.access import Caller
from skep.wire.convert.overlay_keys import keys_to_pb
from skep.wire.service import Handler, server_stream


class _Known(NamedTuple):
    """What a node has been told of a peer: up to which epoch, and how the two encrypt."""

    epoch: int
    has_wireguard: bool


class KeyService:
    """Follows the store, and keeps one stream per node up to date."""

    def __init__(self, store: LoopStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._members = EncryptedMembers()
        self._ring: KeyRing | None = None
        self._is_ready = asyncio.Event()
        self._listeners: dict[asyncio.Event, NodeId] = {}

    def services(self) -> Sequence[Handler]:
        """What to hand to ``wire.server.serve``."""
        return (server_stream(methods.OVERLAY_KEYS, self._keys),)

    async def run(self) -> None:
        """Follow the store until cancelled."""
        await run_informer(
            self._store,
            (*KINDS, Payload),
            on_snapshot=self._on_snapshot,
            on_commit=self._on_commit,
            work=_nothing,
        )

    async def _keys(self, _request: pb.KeysRequest, caller: Caller) -> AsyncIterator[pb.NodeKeys]:
        news = asyncio.Event()
        self._listeners[news] = caller.node_id
        try:
            await self._is_ready.wait()
            known: dict[NodeId, _Known] = {}
            is_first = True
            while True:
                news.clear()
                told = await self._told(caller.node_id, known, is_first=is_first)
                if told is not None:
                    yield keys_to_pb(told)
                    is_first = False
                await news.wait()
        finally:
            del self._listeners[news]

    async def _told(self, node: NodeId, known: dict[NodeId, _Known], *, is_first: bool) -> KeysTold | None:
        """What ``node`` has to hear beyond ``known``, which is brought up to date; None: nothing."""
        ring = self._ring
        peers = self._members.peers(node) if ring is not None else frozenset()
        removed = tuple(sorted(known.keys() - peers))
        for id in removed:
            del known[id]
        changed: list[PeerKeys] = []
        if ring is not None:
            slices = Slices(self._clock)
            for peer in sorted(peers):
                now = _Known(ring.secrets[-1].epoch, self._members.have_wireguard(node, peer))
                if known.get(peer) != now:
                    known[peer] = now
                    changed.append(_peer_keys(ring, node, peer, has_wireguard=now.has_wireguard))
                await slices.give_way()
        if not (is_first or removed or changed):
            return None
        uses_wireguard = any(one.has_wireguard for one in known.values())
        return KeysTold(
            is_complete=is_first,
            peers=tuple(changed),
            removed=removed,
            wireguard_private=wireguard_private(ring, node) if ring is not None and uses_wireguard else b"",
        )

    def _on_snapshot(self, view: View) -> None:
        self._members = EncryptedMembers()
        self._members.start(view)
        stored = view.lookup(Payload, OVERLAY_KEYS_ID)
        self._ring = decoded_ring(stored.data) if stored is not None else None
        self._is_ready.set()
        self._wake(None)

    def _on_commit(self, commit: Commit) -> None:
        affected = self._members.note(commit)
        if affected:
            self._wake(affected)
        for event in commit.events:
            match event:
                case Created(Payload(id=id) as ring) | Updated(_, Payload(id=id) as ring) if (
                    id == OVERLAY_KEYS_ID
                ):
                    self._ring = decoded_ring(ring.data)
                    self._wake(None)

    def _wake(self, nodes: frozenset[NodeId] | None) -> None:
        """Have the streams of these nodes looked at; None: of all."""
        for news, node in self._listeners.items():
            if nodes is None or node in nodes:
                news.set()


def _peer_keys(ring: KeyRing, node: NodeId, peer: NodeId, *, has_wireguard: bool) -> PeerKeys:
    return PeerKeys(
        node_id=peer,
        keys=pair_keys(ring, node, peer),
        wireguard_public=wireguard_public(ring, peer) if has_wireguard else b"",
    )


async def _nothing() -> None:
    """What is noted wakes the streams; there is no work beside."""
    await asyncio.Event().wait()

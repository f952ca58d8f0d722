"""Reads the cluster's objects as they were at an earlier revision, as far back as etcd keeps its history.

Pages are read concurrently with other requests.  Secrets and configs are left out, because their data would be read
with them.
"""

import asyncio
from collections.abc import Awaitable, Callable

from skep.errors import FailedPrecondition, ResourceExhausted
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import LOAD_S, EtcdClient, prefix_end
from skep.store.etcd.encryption.cipher import Cipher, decoded_ring
from skep.store.etcd.errors import Compacted
from skep.store.etcd.reflector import PAGE_KEYS_FIRST, next_limit
from skep.store.etcd.requests import change_of, etcd_key
from skep.store.state import State

KINDS = ("spec", "service", "task", "node", "network", "swarm")
"""The kinds that are read.  Specs come before tasks, because a task is filled from its spec."""
KEYS_MAX = 200_000
"""Maximum keys of one state, enough for about 60,000 tasks.  It occupies memory in addition to the current state."""


async def state_at(client: EtcdClient, wrapping_key: bytes, revision: int) -> State:
    """Return all objects of ``KINDS`` at ``revision``.

    Raises:
        Compacted: The revision was deleted.
        FailedPrecondition: Its data key is unknown here.
        ResourceExhausted: There are too many keys.
        Unavailable: The store did not respond.
    """
    cipher = await _cipher_of(client, wrapping_key, revision)
    await _check_size(client, revision)
    state = State()
    for kind in KINDS:
        prefix = etcd_key(keys.kind_prefix(kind))
        first, limit = prefix, PAGE_KEYS_FIRST
        while True:
            page = await client.range(
                pb.RangeRequest(key=first, range_end=prefix_end(prefix), limit=limit, revision=revision),
                timeout_s=LOAD_S,
            )
            changes = [change_of(kv, cipher) for kv in page.kvs]
            state.apply(revision, [change for change in changes if change is not None])
            await asyncio.sleep(0)
            if not page.more:
                break
            first = page.kvs[-1].key + b"\0"
            limit = next_limit(limit, page.ByteSize())
    state.revision = revision
    return state


async def _cipher_of(client: EtcdClient, wrapping_key: bytes, revision: int) -> Cipher:
    """Return the cipher with the data keys of that time, because the current ring lacks keys that have been replaced
    since.
    """
    found = await client.range(pb.RangeRequest(key=etcd_key(keys.KEY_RING), revision=revision))
    if not found.kvs:
        raise FailedPrecondition("there was no cluster yet")
    try:
        return Cipher(decoded_ring(found.kvs[0].value), wrapping_key)
    except FailedPrecondition as error:
        raise FailedPrecondition(f"the store's keys have been replaced since then: {error}") from error


async def _check_size(client: EtcdClient, revision: int) -> None:
    count = 0
    for kind in KINDS:
        prefix = etcd_key(keys.kind_prefix(kind))
        request = pb.RangeRequest(
            key=prefix, range_end=prefix_end(prefix), count_only=True, revision=revision
        )
        count += (await client.range(request)).count
    if count > KEYS_MAX:
        raise ResourceExhausted(f"the cluster had {count} values then: at most {KEYS_MAX} are read at once")


async def oldest_revision(client: EtcdClient, present: int) -> int:
    """Return the first readable revision. etcd has no request for it, so about 15 small reads find it by bisection."""

    async def is_kept(revision: int) -> bool:
        request = pb.RangeRequest(key=etcd_key(keys.KEY_RING), count_only=True, revision=revision)
        try:
            await client.range(request)
        except Compacted:
            return False
        return True

    return await first_kept(is_kept, present)


async def first_kept(is_kept: Callable[[int], Awaitable[bool]], present: int) -> int:
    """Return the smallest revision from 1 to ``present`` that is kept.  All later ones are kept as well."""
    low, high = 1, present
    while low < high:
        middle = (low + high) // 2
        if await is_kept(middle):
            high = middle
        else:
            low = middle + 1
    return low

"""The first transaction of a cluster, and the checks of its header at every start.

``meta/format`` is the layout of the data.  ``meta/level`` is the lowest feature level among the managers.  Nothing of a
higher level is written.  A store without ``meta/format`` was left by an init that did not finish.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import msgspec

from skep.aio.clock import Clock
from skep.errors import AlreadyExists, FailedPrecondition
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import LOAD_S, EtcdClient
from skep.store.etcd.encryption.cipher import Cipher, KeyRing, decoded_ring, new_key_ring
from skep.store.etcd.errors import Uncertain
from skep.store.etcd.requests import etcd_key, fill_txn
from skep.store.interface import Transaction
from skep.store.level import LEVEL, decoded_level
from skep.store.state import State
from skep.store.transactions.proposal import Proposal, Unchanged
from skep.store.transactions.transaction import LocalTransaction

R = TypeVar("R")
P = ParamSpec("P")

FORMAT = 1
"""The layout of keys and values that this version reads and writes."""

FIRST_INCARNATION = 1
"""Incarnation of a cluster that was never restored or forced new.  Stores of early versions have no number."""


class ClusterHeader(msgspec.Struct, frozen=True):
    """The metadata of a cluster's store, which are readable before any object.

    ``ring_revision`` is the revision at which the key ring was last written.
    """

    ring: KeyRing
    ring_revision: int
    incarnation: int


class InitUnfinished(FailedPrecondition):
    """The store holds no cluster, because init was interrupted or has not run."""


async def initialize(
    socket: Path,
    wrapping_key: bytes,
    clock: Clock,
    body: Callable[Concatenate[Transaction, P], R],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """Write format, level, keys and the objects of ``body(tx, ...)`` in one transaction: a new cluster.

    Raises:
        AlreadyExists: The store holds a cluster already.
        Unavailable: The store did not respond.

    Errors of ``body`` are raised too.
    """
    async with EtcdClient(socket) as client:
        return await initialize_on(client, wrapping_key, clock, body, *args, **kwargs)


async def initialize_on(
    client: EtcdClient,
    wrapping_key: bytes,
    clock: Clock,
    body: Callable[Concatenate[Transaction, P], R],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """Run ``initialize`` through an open ``client``."""
    ring = new_key_ring(wrapping_key)
    tx = LocalTransaction(State(), clock.now_ns())
    result = body(tx, *args, **kwargs)
    first = tx.proposal()
    whole = Proposal(
        compares=(Unchanged(keys.FORMAT, 0), *first.compares),
        puts=(
            (keys.FORMAT, str(FORMAT).encode()),
            (keys.LEVEL, str(LEVEL).encode()),
            (keys.KEY_RING, msgspec.json.encode(ring)),
            (keys.INCARNATION, str(FIRST_INCARNATION).encode()),
            *first.puts,
        ),
    )
    request = pb.TxnRequest()
    fill_txn(request, whole, None, Cipher(ring, wrapping_key))
    try:
        reply = await client.txn(request, timeout_s=LOAD_S)
        is_committed = reply.succeeded
    except Uncertain:
        # The data keys are random, so the transaction was committed if the stored ring has them.
        is_committed = await _stored_ring(client) == ring
        if not is_committed:
            raise
    if not is_committed:
        raise AlreadyExists("this store holds a cluster already")
    return result


async def cluster_in(client: EtcdClient) -> ClusterHeader:
    """Return the header of the cluster in this store, if this version can serve it.

    Raises:
        InitUnfinished: The store holds no cluster.
        FailedPrecondition: Its format or level is unknown to this version.
        Unavailable: The store did not respond.
    """
    format = await _read(client, keys.FORMAT)
    if format is None:
        raise InitUnfinished("the store holds no cluster: its init was not finished")
    if format.value != str(FORMAT).encode():
        raise FailedPrecondition(
            f"the cluster's data have format {format.value.decode(errors='replace')}; this version of Skep supports "
            f"format {FORMAT} only: install the version that wrote them"
        )
    level = await _read(client, keys.LEVEL)
    decoded_level(level.value if level is not None else b"")
    ring = await _read(client, keys.KEY_RING)
    if ring is None:
        raise FailedPrecondition("the cluster's key ring is missing: restore the store from a backup")
    incarnation = await _read(client, keys.INCARNATION)
    return ClusterHeader(
        decoded_ring(ring.value),
        ring.mod_revision,
        decoded_incarnation(incarnation.value) if incarnation is not None else FIRST_INCARNATION,
    )


async def raise_incarnation(socket: Path, at_least: int) -> int:
    """Begin a new incarnation of the cluster in this store, and return its number.  No other manager may serve the
    store yet.

    The leader key is deleted, because raft's terms begin at 1 in a restored store.  A leader record of a higher term
    would keep every manager from leading.

    Raises Unfinished or Unavailable.
    """
    async with EtcdClient(socket) as client:
        return await raise_incarnation_on(client, at_least)


async def raise_incarnation_on(client: EtcdClient, at_least: int) -> int:
    """Run ``raise_incarnation`` through an open ``client``.  A simulation passes its own client."""
    incarnation = max((await cluster_in(client)).incarnation + 1, at_least)
    begin = pb.PutRequest(key=etcd_key(keys.INCARNATION), value=str(incarnation).encode())
    depose = pb.DeleteRangeRequest(key=etcd_key(keys.LEADER))
    operations = [
        pb.RequestOp(request_put=begin),
        pb.RequestOp(request_delete_range=depose),
    ]
    await client.txn(pb.TxnRequest(success=operations), timeout_s=LOAD_S)
    return incarnation


def decoded_incarnation(stored: bytes) -> int:
    """Decode an incarnation.  Raises FailedPrecondition if it is damaged."""
    try:
        return int(stored)
    except ValueError as error:
        raise FailedPrecondition(f"the cluster's incarnation is damaged: {stored!r}") from error


async def _stored_ring(client: EtcdClient) -> KeyRing | None:
    stored = await _read(client, keys.KEY_RING)
    return decoded_ring(stored.value) if stored is not None else None


async def _read(client: EtcdClient, key: str) -> pb.KeyValue | None:
    reply = await client.range(pb.RangeRequest(key=etcd_key(key)))
    return reply.kvs[0] if reply.kvs else None

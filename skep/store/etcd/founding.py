"""The first transaction of a cluster, and what every start checks before it trusts what it finds.

``meta/format`` says how the data are laid out, ``meta/level`` the lowest version among the managers: nothing that
this level does not know is written.  A store without ``meta/format`` is an unfinished init.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import msgspec

from skep.aio.clock import Clock
from skep.errors import AlreadyExists, FailedPrecondition
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.cipher import Cipher, KeyRing, decoded_ring, new_key_ring
from skep.store.etcd.client import LOAD_S, Client
from skep.store.etcd.errors import Uncertain
from skep.store.etcd.requests import etcd_key, fill_txn
from skep.store.interface import Transaction
from skep.store.level import LEVEL, decoded_level
from skep.store.proposal import Proposal, Unchanged
from skep.store.state import State
from skep.store.transaction import Writing

R = TypeVar("R")
P = ParamSpec("P")

FORMAT = 1
"""The layout of keys and values that this version reads and writes."""

FIRST_INCARNATION = 1
"""Of a cluster that was never restored nor forced; stores from before there was a number have none."""


class Founded(msgspec.Struct, frozen=True):
    """What a store says of the cluster in it, before any object can be read.

    ``ring_revision``: when the key ring was last written.
    """

    ring: KeyRing
    ring_revision: int
    incarnation: int


class Unfinished(FailedPrecondition):
    """The store holds no cluster: init was interrupted, or has not run."""


async def initialize(
    socket: Path,
    wrapping_key: bytes,
    clock: Clock,
    body: Callable[Concatenate[Transaction, P], R],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """Write format, level, keys and what ``body(tx, ...)`` puts, in one transaction: a new cluster.

    Raises: AlreadyExists: the store holds a cluster already; Unavailable; what ``body`` raises.
    """
    async with Client(socket) as client:
        return await initialize_on(client, wrapping_key, clock, body, *args, **kwargs)


async def initialize_on(
    client: Client,
    wrapping_key: bytes,
    clock: Clock,
    body: Callable[Concatenate[Transaction, P], R],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """``initialize`` through an open ``client``."""
    ring = new_key_ring(wrapping_key)
    tx = Writing(State(), clock.now_ns())
    result = body(tx, *args, **kwargs)
    first = tx.proposal()
    founding = Proposal(
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
    fill_txn(request, founding, None, Cipher(ring, wrapping_key))
    try:
        reply = await client.txn(request, timeout_s=LOAD_S)
        is_in = reply.succeeded
    except Uncertain:
        # The keys in the ring are chance: if they are there, so is everything else.
        is_in = await _stored_ring(client) == ring
        if not is_in:
            raise
    if not is_in:
        raise AlreadyExists("this store holds a cluster already")
    return result


async def founded(client: Client) -> Founded:
    """The cluster in this store, if this version can serve it.

    Raises: Unfinished: there is none; FailedPrecondition: of a format or level unknown here; Unavailable.
    """
    format = await _read(client, keys.FORMAT)
    if format is None:
        raise Unfinished("the store holds no cluster: its init was not finished")
    if format.value != str(FORMAT).encode():
        raise FailedPrecondition(
            f"the cluster's data have format {format.value.decode(errors='replace')}; this version of Skep knows "
            f"format {FORMAT} only: install the version that wrote them"
        )
    level = await _read(client, keys.LEVEL)
    decoded_level(level.value if level is not None else b"")
    ring = await _read(client, keys.KEY_RING)
    if ring is None:
        raise FailedPrecondition("the cluster's key ring is missing: restore the store from a backup")
    incarnation = await _read(client, keys.INCARNATION)
    return Founded(
        decoded_ring(ring.value),
        ring.mod_revision,
        decoded_incarnation(incarnation.value) if incarnation is not None else FIRST_INCARNATION,
    )


async def raise_incarnation(socket: Path, at_least: int) -> int:
    """Begin another life of the cluster in this store, which nobody else serves yet; which one it is.

    Nobody leads it: raft's terms begin anew in a restored store, and a record of a higher one would bar every manager.
    Raises: Unfinished; Unavailable.
    """
    async with Client(socket) as client:
        return await raise_incarnation_on(client, at_least)


async def raise_incarnation_on(client: Client, at_least: int) -> int:
    """The same through an open ``client``; a simulation brings a client of its own."""
    incarnation = max((await founded(client)).incarnation + 1, at_least)
    begin = pb.PutRequest(key=etcd_key(keys.INCARNATION), value=str(incarnation).encode())
    depose = pb.DeleteRangeRequest(key=etcd_key(keys.LEADER))
    operations = [
        pb.RequestOp(request_put=begin),
        pb.RequestOp(request_delete_range=depose),
    ]
    await client.txn(pb.TxnRequest(success=operations), timeout_s=LOAD_S)
    return incarnation


def decoded_incarnation(stored: bytes) -> int:
    """Raises: FailedPrecondition: it is damaged."""
    try:
        return int(stored)
    except ValueError as error:
        raise FailedPrecondition(f"the cluster's incarnation is damaged: {stored!r}") from error


async def _stored_ring(client: Client) -> KeyRing | None:
    stored = await _read(client, keys.KEY_RING)
    return decoded_ring(stored.value) if stored is not None else None


async def _read(client: Client, key: str) -> pb.KeyValue | None:
    reply = await client.range(pb.RangeRequest(key=etcd_key(key)))
    return reply.kvs[0] if reply.kvs else None

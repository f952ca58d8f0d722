"""Proposals as etcd's requests, etcd's keys as ours.  Pure but for the nonces of encryption."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from secrets import token_bytes

import msgspec
import structlog

from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.cipher import Cipher, Unreadable
from skep.store.etcd.client import prefix_end
from skep.store.proposal import Compare, Exists, NothingSince, Proposal, Unchanged
from skep.store.tables import KeyChange

log = structlog.get_logger()

PREFIX = b"/skep/v1/"

_CLEAR = ("meta/", "w/", "probe/")
"""Keys whose values are not encrypted: read before any data key is known, or empty."""


def etcd_key(key: str) -> bytes:
    """One of our keys as etcd stores it."""
    return PREFIX + key.encode()


WITNESS_BYTES = 16


class Witness(msgspec.Struct, frozen=True):
    """By this write a lost proposal is recognized: an encrypted value is never the same twice, nor a random one."""

    key: bytes
    value: bytes


NO_WITNESS = Witness(b"", b"")
"""Of a proposal that only compares: whether it took effect makes no difference."""


def fill_txn(
    txn: pb.TxnRequest,
    proposal: Proposal,
    fence: int | None,
    cipher: Cipher,
    sign: Callable[[], bytes] | None = None,
) -> Witness:
    """Write a proposal into an empty transaction.  With a ``fence``, the failure branch reads the leader key.

    ``sign``: a key of this manager's alone, for a proposal that only deletes: that something is gone proves nothing,
    as another manager may have deleted it, before or after.

    Messages are filled where they lie: one that is handed to another's constructor is copied with all that is in it.
    """
    for compare in proposal.compares:
        _add_compare(txn, compare)
    if fence is not None:
        _add_compare(txn, Unchanged(keys.LEADER, fence))
        txn.failure.append(_READ_LEADER)
    witness: Witness | None = None
    for key, value in proposal.puts:
        name = etcd_key(key)
        stored = value if key.startswith(_CLEAR) else cipher.encrypt(name, value)
        put = txn.success.add().request_put
        put.key = name
        put.value = stored
        witness = witness or Witness(name, stored)
    for key in proposal.deletes:
        name = etcd_key(key)
        txn.success.add().request_delete_range.key = name
    if witness is None and proposal.deletes:
        assert sign is not None, "nobody could tell what became of it"
        witness = Witness(sign(), token_bytes(WITNESS_BYTES))
        put = txn.success.add().request_put
        put.key, put.value = witness.key, witness.value
    return witness or NO_WITNESS


@lru_cache(maxsize=4)
def guard(ticket: str, ticket_revision: int, ring_revision: int) -> pb.TxnRequest:
    """What makes an entry void as soon as this manager has moved its ticket or there is another key ring.

    Its failure branch reads both.  To be merged into the entry, not to be changed.
    """
    return pb.TxnRequest(
        compare=[compared_key(etcd_key(ticket), ticket_revision), compared_ring(ring_revision)],
        failure=[
            _read(ticket),
            pb.RequestOp(request_range=pb.RangeRequest(key=etcd_key(keys.KEY_RING))),
        ],
    )


def compared_ring(revision: int) -> pb.Compare:
    """That the key ring is still the one of ``revision``."""
    return compared_key(etcd_key(keys.KEY_RING), revision)


def compared_leader(revision: int) -> pb.Compare:
    """That the leader key is still the one of ``revision``, a term's fence; 0: that nobody has led yet."""
    return compared_key(etcd_key(keys.LEADER), revision)


def compared_key(key: bytes, revision: int) -> pb.Compare:
    """That ``key`` (etcd's) was last written at ``revision``; 0: that it does not exist."""
    return pb.Compare(key=key, target=pb.Compare.MOD, result=pb.Compare.EQUAL, mod_revision=revision)


def is_fence_fallen(reply: pb.TxnResponse, fence: int) -> bool:
    """Whether a failed fenced transaction failed because another term has begun."""
    (read,) = reply.responses
    found = read.response_range.kvs
    return not found or found[0].mod_revision != fence


def change_of(kv: pb.KeyValue, cipher: Cipher, *, is_delete: bool = False) -> KeyChange | None:
    """One of etcd's keys as ours, decrypted; one that cannot be is given with its damage, as it is no removal.

    None: it cannot be, and is of no object (the leader's record).
    """
    key = kv.key[len(PREFIX) :].decode(errors="replace")
    if is_delete:
        return KeyChange(key, None, kv.mod_revision)
    value = kv.value
    if not key.startswith(_CLEAR):
        try:
            value = cipher.decrypt(kv.key, value)
        except Unreadable as error:
            if key[1:2] == "/":
                return KeyChange(key, b"", kv.mod_revision, kv.create_revision, str(error))
            log.error("stored value cannot be read", key=key, error=str(error))
            return None
    return KeyChange(key, value, kv.mod_revision, kv.create_revision)


def is_clear(key: bytes) -> bool:
    """Whether the value of this key (etcd's) is not encrypted."""
    return key.startswith(_CLEAR_IN_ETCD)


def by_revision(events: Sequence[pb.Event]) -> Iterable[tuple[int, list[pb.Event]]]:
    """Watch events in groups of one revision each, in order."""
    group: list[pb.Event] = []
    for event in events:
        if group and event.kv.mod_revision != group[0].kv.mod_revision:
            yield group[0].kv.mod_revision, group
            group = []
        group.append(event)
    if group:
        yield group[0].kv.mod_revision, group


def _read(key: str) -> pb.RequestOp:
    return pb.RequestOp(request_range=pb.RangeRequest(key=etcd_key(key), keys_only=True))


_READ_LEADER = _read(keys.LEADER)
_CLEAR_IN_ETCD = tuple(etcd_key(prefix) for prefix in _CLEAR)


def _add_compare(txn: pb.TxnRequest, compare: Compare) -> None:
    match compare:
        case Unchanged(key, revision):
            txn.compare.add(
                key=etcd_key(key), target=pb.Compare.MOD, result=pb.Compare.EQUAL, mod_revision=revision
            )
        case Exists(key, create_revision):
            txn.compare.add(
                key=etcd_key(key),
                target=pb.Compare.CREATE,
                result=pb.Compare.EQUAL,
                create_revision=create_revision,
            )
        case NothingSince(prefix, revision):
            first = etcd_key(prefix)
            # Of an empty range etcd compares a key of revision 0, which is older than any.
            txn.compare.add(
                key=first,
                range_end=prefix_end(first),
                target=pb.Compare.MOD,
                result=pb.Compare.LESS,
                mod_revision=revision + 1,
            )

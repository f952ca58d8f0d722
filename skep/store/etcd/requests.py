"""Converts proposals into etcd requests, and etcd's keys into store keys.  Pure, except for the nonces of
encryption.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from secrets import token_bytes

import msgspec
import structlog

from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import prefix_end
from skep.store.etcd.encryption.cipher import Cipher, Undecryptable
from skep.store.tables import KeyChange
from skep.store.transactions.proposal import Compare, Exists, NothingSince, Proposal, Unchanged

log = structlog.get_logger()

PREFIX = b"/skep/v1/"

_CLEAR = ("meta/", "w/", "probe/")
"""Prefixes of keys whose values are not encrypted.  They are read before any data key is known, or are empty."""


def etcd_key(key: str) -> bytes:
    """Return a store key as etcd has it."""
    return PREFIX + key.encode()


MARKER_BYTES = 16
"""Number of random bytes in a marker."""


class Marker(msgspec.Struct, frozen=True):
    """The write that identifies a proposal in the watch.  Its value is unique, because it is encrypted or random."""

    key: bytes
    value: bytes


NO_MARKER = Marker(b"", b"")
"""Marker of a proposal without writes.  Whether such a proposal took effect does not matter."""


def fill_txn(
    txn: pb.TxnRequest,
    proposal: Proposal,
    fence: int | None,
    cipher: Cipher,
    marker_key: Callable[[], bytes] | None = None,
) -> Marker:
    """Write a proposal into an empty transaction.  With a ``fence``, the failure branch reads the leader key.

    Messages are filled in place, because protobuf would copy a message that is passed to a constructor.

    Args:
        marker_key: Returns a key that only this manager writes, for a proposal that only deletes.  The absence of a
            deleted key would prove nothing, because another manager may have deleted it.
    """
    for compare in proposal.compares:
        _add_compare(txn, compare)
    if fence is not None:
        _add_compare(txn, Unchanged(keys.LEADER, fence))
        txn.failure.append(_READ_LEADER)
    marker: Marker | None = None
    for key, value in proposal.puts:
        name = etcd_key(key)
        stored = value if key.startswith(_CLEAR) else cipher.encrypt(name, value)
        put = txn.success.add().request_put
        put.key = name
        put.value = stored
        marker = marker or Marker(name, stored)
    for key in proposal.deletes:
        name = etcd_key(key)
        txn.success.add().request_delete_range.key = name
    if marker is None and proposal.deletes:
        assert marker_key is not None, "its outcome could not be determined"
        marker = Marker(marker_key(), token_bytes(MARKER_BYTES))
        put = txn.success.add().request_put
        put.key, put.value = marker.key, marker.value
    return marker or NO_MARKER


@lru_cache(maxsize=4)
def guard(epoch_key: str, epoch_revision: int, ring_revision: int) -> pb.TxnRequest:
    """Return compares that void an entry once this manager has advanced its writer epoch or the key ring has changed.

    The failure branch reads both.  Merge the result into the entry's request, and do not change it.
    """
    return pb.TxnRequest(
        compare=[compared_key(etcd_key(epoch_key), epoch_revision), compared_ring(ring_revision)],
        failure=[
            _read(epoch_key),
            pb.RequestOp(request_range=pb.RangeRequest(key=etcd_key(keys.KEY_RING))),
        ],
    )


def compared_ring(revision: int) -> pb.Compare:
    """Compare that the key ring was last written at ``revision``."""
    return compared_key(etcd_key(keys.KEY_RING), revision)


def compared_leader(revision: int) -> pb.Compare:
    """Compare that the leader key is unchanged since ``revision``, or does not exist for revision 0."""
    return compared_key(etcd_key(keys.LEADER), revision)


def compared_key(key: bytes, revision: int) -> pb.Compare:
    """Compare that etcd's ``key`` was last written at ``revision``, or does not exist for revision 0."""
    return pb.Compare(key=key, target=pb.Compare.MOD, result=pb.Compare.EQUAL, mod_revision=revision)


def is_fence_lost(reply: pb.TxnResponse, fence: int) -> bool:
    """Return whether a failed fenced transaction failed because another term has begun."""
    (read,) = reply.responses
    found = read.response_range.kvs
    return not found or found[0].mod_revision != fence


def change_of(kv: pb.KeyValue, cipher: Cipher, *, is_delete: bool = False) -> KeyChange | None:
    """Return one of etcd's keys as a change of a store key, decrypted, or with ``damage`` if that fails.

    None for a value that cannot be decrypted and belongs to no object (the leader's record).
    """
    key = kv.key[len(PREFIX) :].decode(errors="replace")
    if is_delete:
        return KeyChange(key, None, kv.mod_revision)
    value = kv.value
    if not key.startswith(_CLEAR):
        try:
            value = cipher.decrypt(kv.key, value)
        except Undecryptable as error:
            if key[1:2] == "/":
                return KeyChange(key, b"", kv.mod_revision, kv.create_revision, str(error))
            log.error("stored value cannot be read", key=key, error=str(error))
            return None
    return KeyChange(key, value, kv.mod_revision, kv.create_revision)


def is_clear(key: bytes) -> bool:
    """Return whether the value of this key (etcd's) is not encrypted."""
    return key.startswith(_CLEAR_IN_ETCD)


def by_revision(events: Sequence[pb.Event]) -> Iterable[tuple[int, list[pb.Event]]]:
    """Group watch events by revision, in order."""
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
            # For an empty range, etcd compares a key of revision 0, which is less than any revision.
            txn.compare.add(
                key=first,
                range_end=prefix_end(first),
                target=pb.Compare.MOD,
                result=pb.Compare.LESS,
                mod_revision=revision + 1,
            )

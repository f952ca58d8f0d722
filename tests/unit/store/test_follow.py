from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.aio.backoff import Backoff
from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.encryption.cipher import Cipher, new_key_ring, new_wrapping_key
from skep.store.etcd.reflector import PAGE_BYTES, PAGE_KEYS_FIRST, PAGE_KEYS_MAX, Reflector, next_limit
from skep.store.etcd.requests import by_revision, etcd_key
from skep.store.level import LEVEL
from skep.store.replica import Replica


def test_pages_of_small_objects_grow_to_the_most_keys():
    limit = PAGE_KEYS_FIRST
    for _ in range(5):
        limit = next_limit(limit, limit * 1500)
    assert limit == PAGE_KEYS_MAX


@given(st.integers(1, PAGE_KEYS_MAX), st.integers(0, 600 * 1024 * 1024))
def test_the_next_page_is_never_empty_and_grows_at_most_fourfold(limit, page_bytes):
    following = next_limit(limit, page_bytes)
    assert 1 <= following <= min(4 * limit, PAGE_KEYS_MAX)
    if page_bytes > PAGE_BYTES:
        assert following <= limit


def test_events_are_grouped_by_revision_in_order():
    events = [
        pb.Event(kv=pb.KeyValue(key=str(n).encode(), mod_revision=revision))
        for n, revision in enumerate([3, 3, 4, 6, 6, 6])
    ]
    grouped = [(revision, len(group)) for revision, group in by_revision(events)]
    assert grouped == [(3, 2), (4, 1), (6, 3)]
    assert list(by_revision([])) == []


class Pages:
    """A store of one key."""

    def __init__(self, key: bytes, value: bytes) -> None:
        self._kv = pb.KeyValue(key=key, value=value, mod_revision=7)

    async def range(self, request: pb.RangeRequest, **_: object) -> pb.RangeResponse:
        reply = pb.RangeResponse(header=pb.ResponseHeader(revision=7))
        if request.range_end:
            reply.kvs.append(self._kv)
        return reply


async def test_a_replica_that_is_loaded_anew_takes_no_level_that_it_does_not_know():
    client: Any = Pages(etcd_key(keys.LEVEL), str(LEVEL + 1).encode())
    key = new_wrapping_key()
    cipher = Cipher(new_key_ring(key), key)
    follower = Reflector(client, Replica(), cipher, lambda *_: None, SystemClock(), Backoff())
    with pytest.raises(FailedPrecondition, match="upgrade this manager"):
        await follower.run()

from hypothesis import given
from hypothesis import strategies as st

from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.follow import PAGE_BYTES, PAGE_KEYS_FIRST, PAGE_KEYS_MAX, next_limit
from skep.store.etcd.requests import by_revision


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

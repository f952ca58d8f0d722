"""What a proposal is counted with is at least what it takes of etcd's limit for a request."""

from hypothesis import given
from hypothesis import strategies as st

from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.encryption.cipher import Cipher, new_key_ring, new_wrapping_key
from skep.store.etcd.process.flags import MAX_REQUEST_BYTES
from skep.store.etcd.requests import fill_txn, guard
from skep.store.transactions.proposal import (
    MAX_BYTES,
    MAX_OPERATIONS,
    Exists,
    NothingSince,
    Proposal,
    Unchanged,
)

KEY = new_wrapping_key()
CIPHER = Cipher(new_key_ring(KEY), KEY, 1)
LAST = 2**62
"""Revisions are written with as many bytes as they need."""

names = st.text("abc-.%/0", min_size=1, max_size=300)
compares = st.one_of(
    st.builds(Unchanged, names, st.integers(0, LAST)),
    st.builds(Exists, names, st.integers(1, LAST)),
    st.builds(lambda *used: NothingSince(keys.reference_prefix(*used), LAST), names, names),
)
proposals = st.builds(
    lambda compared, puts, deletes: Proposal(tuple(compared), tuple(puts), tuple(deletes)),
    st.lists(compares, max_size=8),
    st.lists(st.tuples(names, st.binary(max_size=300)), max_size=8),
    st.lists(names, max_size=8),
)


def request_bytes(proposal: Proposal) -> int:
    request = pb.TxnRequest()
    txn = request.success.add().request_txn
    fill_txn(txn, proposal, LAST, CIPHER, lambda: b"/skep/v1/w/" + 25 * b"n" + b"/1234567")
    request.MergeFrom(guard("w/" + 25 * "n", LAST, LAST))
    return request.ByteSize()


AROUND = request_bytes(Proposal(deletes=("k",)))
"""Fence, ticket, key ring, the sign of a deletion."""


@given(proposals)
def test_a_request_is_no_larger_than_it_was_counted(proposal: Proposal) -> None:
    assert request_bytes(proposal) <= proposal.size_bytes + AROUND


def test_the_largest_proposal_of_many_long_keys_is_a_request_that_etcd_takes() -> None:
    id, number = 64 * "x", range(MAX_OPERATIONS)
    references = tuple((keys.reference_key(("config", f"{id}{n}"), ("service", id)), b"1") for n in number)
    proposal = Proposal(tuple(NothingSince(f"r/config/{id}{n}/", LAST) for n in number), references)
    room = MAX_BYTES - proposal.size_bytes
    assert room > 0
    large = Proposal(proposal.compares, (*references[1:], ("o/service/web", bytes(room))))
    assert large.size_bytes <= MAX_BYTES
    assert request_bytes(large) < MAX_REQUEST_BYTES

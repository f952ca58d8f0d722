"""Whose change it was, as nftables tells it."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.netns.kernel.nft_changes import ForeignChanges

NEW_TABLE, NEW_RULE, DELETE_ELEMENT, NEW_GENERATION = 0, 6, 14, 15


def reported(type: int, *attributes: tuple[int, bytes]) -> bytes:
    body = b"\2\0\0\0" + b"".join(
        struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)
        for kind, value in attributes
    )
    return struct.pack("=IHHII", 16 + len(body), 10 << 8 | type, 0, 0, 0) + body


def change(table: str, type: int = DELETE_ELEMENT) -> bytes:
    return reported(type, (1, table.encode() + b"\0"))


def end(process: str) -> bytes:
    return reported(NEW_GENERATION, (1, b"\0\0\0\7"), (2, b"\0\0\0\1"), (3, process.encode() + b"\0"))


def changes() -> ForeignChanges:
    return ForeignChanges("skep-1")


def test_our_own_changes_are_not_foreign() -> None:
    assert changes().parse(change("ours") + change("ours", NEW_RULE) + end("skep-1")) == frozenset()


def test_a_table_that_another_writer_changed_is_named_with_its_family() -> None:
    assert changes().parse(change("theirs", NEW_TABLE) + change("ours") + end("nft")) == {
        "ip theirs",
        "ip ours",
    }


def test_a_transaction_may_come_in_pieces() -> None:
    found = changes()
    assert not found.parse(change("ours"))
    assert found.parse(end("nft")) == {"ip ours"}
    assert not found.parse(end("nft")), "that one did nothing"
    assert not found.parse(change("ours"))
    assert found.parse(end("skep-1") + change("theirs") + end("nft")) == {"ip theirs"}


@given(st.binary(max_size=200))
def test_no_bytes_make_it_fail(data: bytes) -> None:
    changes().parse(data)

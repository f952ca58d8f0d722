"""Whose change it was, as nftables tells it."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.vip.healing import Notifications

NEW_TABLE, NEW_RULE, DELETE_ELEMENT, NEW_GENERATION = 0, 6, 14, 15


def told(type: int, *attributes: tuple[int, bytes]) -> bytes:
    body = b"\2\0\0\0" + b"".join(
        struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)
        for kind, value in attributes
    )
    return struct.pack("=IHHII", 16 + len(body), 10 << 8 | type, 0, 0, 0) + body


def change(table: str, type: int = DELETE_ELEMENT) -> bytes:
    return told(type, (1, table.encode() + b"\0"))


def end(process: str) -> bytes:
    return told(NEW_GENERATION, (1, b"\0\0\0\7"), (2, b"\0\0\0\1"), (3, process.encode() + b"\0"))


def notifications() -> Notifications:
    return Notifications(frozenset({"ours"}), "skep-net-1")


def test_our_own_changes_are_nothing_new() -> None:
    assert not notifications().heard(change("ours") + change("ours", NEW_RULE) + end("skep-net-1"))


def test_somebody_elses_change_to_a_table_of_ours_is_noticed() -> None:
    assert notifications().heard(change("theirs", NEW_TABLE) + change("ours") + end("nft"))


def test_somebody_elses_tables_are_none_of_our_business() -> None:
    assert not notifications().heard(change("theirs") + end("nft"))


def test_a_transaction_may_come_in_pieces() -> None:
    hears = notifications()
    assert not hears.heard(change("ours"))
    assert hears.heard(end("nft"))
    assert not hears.heard(end("nft")), "that one did nothing"
    assert not hears.heard(change("ours"))
    assert not hears.heard(end("skep-net-1") + change("theirs") + end("nft"))


@given(st.binary(max_size=200))
def test_no_bytes_make_it_fail(data: bytes) -> None:
    notifications().heard(data)

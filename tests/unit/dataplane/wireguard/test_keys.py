"""A node's own WireGuard keys: made here, rotated with an overlap, kept where root alone reads them."""

from itertools import count
from pathlib import Path

from skep.dataplane.plan.wireguard import KeyPair
from skep.dataplane.wireguard.keys import (
    OVERLAP_S_MIN,
    ROTATION_S,
    load,
    new_private_key,
    rotated,
    save,
    without_replaced,
)
from tests.support.wireguard import numbered_keys


def test_a_private_key_is_clamped_and_its_public_key_has_32_bytes() -> None:
    private = new_private_key()
    assert private[0] & 7 == 0
    assert private[31] & 0xC0 == 0x40
    assert len(KeyPair(private=private, slot=0, made_at=0.0).public) == 32
    assert private != new_private_key()


def test_the_first_key_is_made_at_once_and_kept_until_it_is_due() -> None:
    make = numbered_keys()
    first = rotated((), 100.0, make)
    assert [(pair.slot, pair.made_at) for pair in first] == [(0, 100.0)]
    assert rotated(first, 100.0 + ROTATION_S - 1, make) == first


def test_a_rotation_adds_a_key_in_the_other_slot_and_the_next_one_drops_the_oldest() -> None:
    make = numbered_keys()
    pairs = rotated((), 0.0, make)
    for turn in count(1):
        before, pairs = pairs, rotated(pairs, turn * ROTATION_S, make)
        assert pairs[0] == before[-1]
        assert [pair.slot for pair in pairs] == [(turn - 1) % 2, turn % 2]
        if turn == 4:
            break


def test_keys_from_another_boot_are_replaced() -> None:
    make = numbered_keys()
    old = rotated((), 5000.0, make)
    assert rotated(old, 10.0, make)[-1].made_at == 10.0


def test_the_older_key_goes_when_the_overlap_is_over_and_no_peer_needs_it() -> None:
    make = numbered_keys()
    both = rotated(rotated((), 0.0, make), ROTATION_S, make)
    over = ROTATION_S + OVERLAP_S_MIN
    assert without_replaced(both, over - 1, is_needed=False) == both
    assert without_replaced(both, over, is_needed=True) == both
    assert without_replaced(both, over, is_needed=False) == both[-1:]
    assert without_replaced(both[-1:], over + ROTATION_S, is_needed=False) == both[-1:]


def test_the_file_is_readable_by_root_alone_and_a_damaged_one_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "wireguard.keys"
    assert load(path) == ()
    pairs = rotated((), 0.0, numbered_keys())
    save(path, pairs)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load(path) == pairs
    for damaged in (b"", b"\x00", path.read_bytes()[:-5]):
        path.write_bytes(damaged)
        assert load(path) == ()


def test_no_private_key_is_shown() -> None:
    (pair,) = rotated((), 0.0, numbered_keys())
    assert repr(pair) == "KeyPair(slot=0, made_at=0.0)"

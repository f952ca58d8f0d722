import pytest
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap
from hypothesis import given
from hypothesis import strategies as st

from skep.errors import FailedPrecondition
from skep.store.etcd.encryption.cipher import (
    WRAPPING_KEYS_MAX,
    Cipher,
    Undecryptable,
    decoded_ring,
    new_key_ring,
    new_wrapping_key,
)

KEY = new_wrapping_key()


@given(st.binary(max_size=200), st.binary(min_size=1, max_size=50))
def test_a_value_is_read_back_under_its_own_key_only(value, key):
    cipher = Cipher(new_key_ring(KEY), KEY)
    stored = cipher.encrypt(key, value)
    assert cipher.decrypt(key, stored) == value
    assert cipher.encrypt(key, value) != stored
    with pytest.raises(Undecryptable):
        cipher.decrypt(key + b"x", stored)


@given(st.integers(0, 60), st.integers(1, 255))
def test_any_changed_byte_is_noticed(position, flip):
    cipher = Cipher(new_key_ring(KEY), KEY)
    stored = bytearray(cipher.encrypt(b"key", b"a value of some length here"))
    stored[position % len(stored)] ^= flip
    with pytest.raises(Undecryptable):
        cipher.decrypt(b"key", bytes(stored))


@pytest.mark.parametrize("stored", [b"", b"\x01", b"\x01\x00\x00\x00\x01short", b"{}"])
def test_what_is_no_encrypted_value_is_refused(stored):
    with pytest.raises(Undecryptable):
        Cipher(new_key_ring(KEY), KEY).decrypt(b"key", stored)


def test_values_of_an_older_data_key_stay_readable():
    ring = new_key_ring(KEY)
    old = Cipher(ring, KEY).encrypt(b"key", b"value")
    cipher = Cipher(ring.with_new_key(KEY), KEY)
    assert cipher.decrypt(b"key", old) == b"value"
    assert cipher.encrypt(b"key", b"value")[:5] != old[:5]


def test_rewrapping_changes_the_wrapping_key_and_no_data():
    ring, other = new_key_ring(KEY), new_wrapping_key()
    stored = Cipher(ring, KEY).encrypt(b"key", b"value")
    rewrapped = ring.rewrapped(KEY, other)
    assert Cipher(rewrapped, other).decrypt(b"key", stored) == b"value"
    with pytest.raises(FailedPrecondition, match="another cluster"):
        Cipher(rewrapped, KEY)


def test_a_ring_opens_with_whichever_of_several_wrapping_keys_it_is_under():
    """Before and after the change a manager that has both comes up, in whatever order it keeps them."""
    old, new = KEY, new_wrapping_key()
    cipher = Cipher(new_key_ring(old), old + new, 1)
    stored = cipher.encrypt(b"key", b"value")
    ring = cipher.rewrapped_ring(new)
    for keys in (old + new, new + old, new):
        assert Cipher(ring, keys).decrypt(b"key", stored) == b"value"
        assert Cipher(ring, keys).wrapping_key == new
    cipher.use(ring, 2)
    assert cipher.rewrapped.is_set()
    assert cipher.wrapping_key == new
    assert not cipher.is_current(stored)
    with pytest.raises(FailedPrecondition, match="another cluster"):
        Cipher(ring, old)


def test_no_key_that_was_ever_under_the_old_wrapping_key_encrypts_after_a_change():
    """Rings that the old one opens lie about on disks for long; the new data key is in none of them."""
    old, new = KEY, new_wrapping_key()
    before = new_key_ring(old)
    after = Cipher(before, old).rewrapped_ring(new)
    assert after.current not in {key.id for key in before.keys}
    for key in after.keys:
        with pytest.raises(InvalidUnwrap):
            aes_key_unwrap(old, key.wrapped)


def test_attempts_that_came_to_nothing_fill_no_memory_and_cost_no_key_in_use():
    cipher = Cipher(new_key_ring(KEY), KEY, 1)
    for _ in range(50):
        cipher.learn(new_wrapping_key())
    last = new_wrapping_key()
    cipher.learn(last)
    cipher.use(cipher.rewrapped_ring(last), 2)
    assert cipher.wrapping_key == last
    assert len(cipher.wrapping_keys) <= WRAPPING_KEYS_MAX


def test_a_damaged_ring_is_refused():
    for stored in (b"", b"{}", b'{"current":1,"keys":5}'):
        with pytest.raises(FailedPrecondition, match="damaged"):
            decoded_ring(stored)

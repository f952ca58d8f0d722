"""A node's own WireGuard keys: made here, kept where root alone reads them."""

from pathlib import Path

import msgspec

from skep.dataplane.plan.wireguard import WireGuardKey
from skep.dataplane.wireguard.keys import load, new_private_key, save
from tests.support.encryption.wireguard import a_pair


def test_a_private_key_is_clamped_and_its_public_key_has_32_bytes() -> None:
    private = new_private_key()
    assert private[0] & 7 == 0
    assert private[31] & 0xC0 == 0x40
    assert len(WireGuardKey(private=private, slot=0, made_at=0.0).public) == 32
    assert private != new_private_key()


def test_the_file_is_readable_by_root_alone_and_a_damaged_one_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "wireguard.keys"
    assert load(path) == ()
    pairs = (a_pair(1), a_pair(2, slot=1))
    save(path, pairs)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load(path) == pairs
    whole = path.read_bytes()
    for damaged in (b"", b"\x00", whole[:-5], msgspec.msgpack.encode((pairs[0], pairs[0]))):
        path.write_bytes(damaged)
        assert load(path) == ()
        assert (tmp_path / "wireguard.keys.damaged").read_bytes() == damaged
        assert not path.exists()


def test_no_private_key_is_shown() -> None:
    assert repr(a_pair(1)) == "KeyPair(slot=0, made_at=0.0)"

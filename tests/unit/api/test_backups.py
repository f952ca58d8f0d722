"""The file of a backup: what goes in comes out, and nothing else is taken for one."""

from collections.abc import Callable

import pytest

from skep.api import backups
from skep.api.backups import BackupManifest, Opener, Sealer, key_of, new_header, parsed_opening
from skep.errors import InvalidArgument

KEY_FILE = b"k" * 32
SNAPSHOT = bytes(range(256)) * 3000
MANIFEST = BackupManifest(
    cluster_id="c",
    node_id="m1",
    hostname="host",
    listen_addr="0.0.0.0:2377",
    advertise_addr="10.0.0.1:2377",
    created_at="2026-01-01T00:00:00Z",
    incarnation=3,
    skep_version="1",
    counts={"services": 2},
    root_pem=b"root",
    root_key_pem=b"root key",
    wrapping_key=b"w" * 32,
)


def a_file() -> tuple[bytes, bytes]:
    """A file and its key."""
    header = new_header("hkdf")
    key = key_of(KEY_FILE, header)
    sealer = Sealer(header, key)
    return sealer.manifest(MANIFEST) + sealer.add(SNAPSHOT) + sealer.end(), key


def opened(file: bytes, key: bytes, step: int = 10_000) -> tuple[BackupManifest, bytes]:
    opener = Opener(key)
    content = b"".join(opener.feed(file[at : at + step]) for at in range(0, len(file), step))
    return opener.check_whole(), content


@pytest.mark.parametrize("step", [1_000, 300_000, 10_000_000])
def test_what_goes_in_comes_out_however_it_arrives(step: int) -> None:
    file, key = a_file()
    assert opened(file, key, step) == (MANIFEST, SNAPSHOT)


def test_the_key_is_made_anew_from_passphrase_and_header() -> None:
    header = new_header("scrypt")
    key = key_of(b"correct horse", header)
    file = Sealer(header, key).manifest(MANIFEST)
    parsed = parsed_opening(file)
    assert parsed is not None
    assert key_of(b"correct horse", parsed[0]) == key
    assert key_of(b"wrong horse", parsed[0]) != key


def test_nothing_of_the_cluster_is_in_clear() -> None:
    file, _ = a_file()
    for secret in (MANIFEST.root_key_pem, MANIFEST.wrapping_key, SNAPSHOT[:64], b"10.0.0.1"):
        assert secret not in file


def ends_of_pieces(file: bytes) -> list[int]:
    """Where each piece ends."""
    parsed = parsed_opening(file)
    assert parsed is not None
    ends, at = [], parsed[1]
    while at < len(file):
        at += 4 + int.from_bytes(file[at : at + 4], "big")
        ends.append(at)
    return ends


DAMAGES: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("empty", lambda _: b"", backups.NOT_A_BACKUP),
    ("foreign", lambda _: b"PK\x03\x04" * 100, backups.NOT_A_BACKUP),
    ("a header alone", lambda file: file[:20], backups.TORN),
    ("cut", lambda file: file[:-1], backups.TORN),
    ("cut between pieces", lambda file: file[: ends_of_pieces(file)[1]], backups.TORN),
    ("more behind it", lambda file: file + b"\0\0\0\x20" + b"x" * 32, backups.TORN),
    ("a bit flipped at the end", lambda file: file[:-5] + bytes([file[-5] ^ 1]) + file[-4:], backups.TORN),
    (
        "another header",
        lambda file: file.replace(b'"Salt":"', b'"Salt":"', 1)[:60] + b"x" + file[61:],
        "is not a backup|passphrase",
    ),
]


@pytest.mark.parametrize(("_name", "damage", "sentence"), DAMAGES, ids=[name for name, _, _ in DAMAGES])
def test_torn_and_foreign_files_are_refused_with_a_sentence(
    _name: str, damage: Callable[[bytes], bytes], sentence: str
) -> None:
    file, key = a_file()
    with pytest.raises(InvalidArgument, match=sentence):
        opened(damage(file), key)


def test_pieces_do_not_change_places() -> None:
    file, key = a_file()
    parsed = parsed_opening(file)
    assert parsed is not None
    start = parsed[1]
    size = 4 + int.from_bytes(file[start : start + 4], "big")
    first, second = file[start : start + size], file[start + size : start + 2 * size]
    assert len(second) == size
    with pytest.raises(InvalidArgument):
        opened(file[:start] + second + first + file[start + 2 * size :], key)


def test_a_wrong_key_is_distinguished_from_damage() -> None:
    file, _ = a_file()
    with pytest.raises(InvalidArgument, match="passphrase or key file is wrong"):
        opened(file, b"x" * 32)


def test_a_short_key_file_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least 32 bytes"):
        key_of(b"short", new_header("hkdf"))

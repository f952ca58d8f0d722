"""Autolock on disk: what a stolen disk shows, what a crash leaves, what a rotation changes."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from skep.errors import FailedPrecondition, InvalidArgument
from skep.model.node import NodeRole
from skep.model.values.ids import ClusterId, NodeId
from skep.paths import Paths
from skep.security import keypair
from skep.security.authority import Authority
from skep.security.identity import NodeIdentity
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request
from skep.security.locking import (
    KeyLock,
    Locked,
    WrongUnlockKey,
    new_unlock_key,
    parsed_unlock_key,
    shown_unlock_key,
)
from tests.support.file_faults import file_faults

WRAPPING_KEY, NODE_KEY = b"w" * 32, b"-----BEGIN PRIVATE KEY-----\n"


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """A node with keys in clear."""
    paths = Paths(tmp_path / "data", tmp_path / "run")
    for directory in (paths.manager_keys, paths.certificates, paths.run):
        directory.mkdir(parents=True)
    paths.wrapping_key.write_bytes(WRAPPING_KEY)
    paths.node_key.write_bytes(NODE_KEY)
    return paths


def on_disk(paths: Paths) -> bytes:
    """All that a thief of the disk has."""
    return b"".join(path.read_bytes() for path in sorted(paths.data.rglob("*")) if path.is_file())


def reboot(paths: Paths) -> None:
    for path in paths.run.iterdir():
        path.unlink()


def test_the_unlock_key_has_dockers_form() -> None:
    shown = shown_unlock_key(bytes(range(32)))
    assert shown == "SWMKEY-1-AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
    assert parsed_unlock_key(shown) == bytes(range(32))
    for other in ("", "SWMTKN-1-AAEC", "SWMKEY-1-%%%", "AAECAwQ"):
        with pytest.raises(InvalidArgument, match="invalid key string"):
            parsed_unlock_key(other)


def test_nothing_is_in_clear_on_the_disk_while_the_lock_is_on(paths: Paths) -> None:
    lock, key = KeyLock(paths), new_unlock_key()
    assert lock.turn(key)
    assert not lock.turn(key)
    stolen = on_disk(paths)
    for secret in (WRAPPING_KEY, NODE_KEY, key, paths.open_lock_key.read_bytes()):
        assert secret not in stolen
    assert (lock.read(paths.wrapping_key), lock.read(paths.node_key)) == (WRAPPING_KEY, NODE_KEY)


def test_after_a_reboot_only_the_unlock_key_opens(paths: Paths) -> None:
    lock, key = KeyLock(paths), new_unlock_key()
    lock.turn(key)
    reboot(paths)
    assert lock.is_locked
    with pytest.raises(Locked):
        lock.read(paths.wrapping_key)
    for wrong in (new_unlock_key(), b"", b"short"):
        with pytest.raises(WrongUnlockKey):
            lock.unlock(wrong)
    lock.unlock(key)
    assert not lock.is_locked
    assert lock.read(paths.wrapping_key) == WRAPPING_KEY


def test_a_renewed_key_is_written_locked(paths: Paths) -> None:
    lock = KeyLock(paths)
    lock.turn(new_unlock_key())
    lock.write(paths.node_key, b"renewed")
    assert b"renewed" not in on_disk(paths)
    assert lock.read(paths.node_key) == b"renewed"


def test_a_rotation_replaces_one_file_and_the_old_key_opens_no_more(paths: Paths) -> None:
    lock, old, new = KeyLock(paths), new_unlock_key(), new_unlock_key()
    lock.turn(old)
    before = {path: path.read_bytes() for path in paths.locked_files}
    assert lock.turn(new)
    assert before == {path: path.read_bytes() for path in paths.locked_files}
    reboot(paths)
    with pytest.raises(WrongUnlockKey):
        lock.unlock(old)
    lock.unlock(new)
    assert lock.read(paths.wrapping_key) == WRAPPING_KEY


def test_a_manager_that_was_away_takes_the_rotated_key_when_it_is_back(paths: Paths) -> None:
    lock, old, new = KeyLock(paths), new_unlock_key(), new_unlock_key()
    lock.turn(old)
    reboot(paths)
    lock.unlock(old)
    assert lock.turn(new)
    reboot(paths)
    lock.unlock(new)


def test_turned_off_everything_is_as_before(paths: Paths) -> None:
    lock = KeyLock(paths)
    lock.turn(new_unlock_key())
    assert lock.turn(None)
    assert not lock.turn(None)
    reboot(paths)
    assert not lock.is_on
    assert (paths.wrapping_key.read_bytes(), paths.node_key.read_bytes()) == (WRAPPING_KEY, NODE_KEY)


class Crash(Exception):
    pass


@pytest.mark.parametrize("writes", range(4))
@pytest.mark.parametrize("turns_on", [True, False])
def test_a_crash_while_the_lock_is_turned_is_made_good(
    paths: Paths, writes: int, turns_on: bool, tmp_path: Path
) -> None:
    """After each number of writes: everything can be read, and turning again comes to the end."""
    lock, key = KeyLock(paths), new_unlock_key()
    if not turns_on:
        lock.turn(key)
    left = writes

    def crash(call: str, _path: Path) -> None:
        nonlocal left
        if call == "replace":
            if left == 0:
                raise Crash
            left -= 1

    with file_faults(tmp_path) as files, suppress(Crash):
        files.before_each = crash
        lock.turn(key if turns_on else None)
    assert (lock.read(paths.wrapping_key), lock.read(paths.node_key)) == (WRAPPING_KEY, NODE_KEY)
    lock.turn(key if turns_on else None)
    assert (WRAPPING_KEY in on_disk(paths)) is not turns_on
    assert (NODE_KEY in on_disk(paths)) is not turns_on


def test_another_nodes_open_key_opens_nothing(paths: Paths, tmp_path: Path) -> None:
    lock = KeyLock(paths)
    lock.turn(new_unlock_key())
    paths.open_lock_key.write_bytes(b"x" * 32)
    assert lock.is_locked


def test_damaged_files_are_distinguished_from_wrong_keys(paths: Paths) -> None:
    lock, key = KeyLock(paths), new_unlock_key()
    lock.turn(key)
    content = paths.wrapping_key.read_bytes()
    paths.wrapping_key.write_bytes(content[:-1])
    with pytest.raises(FailedPrecondition, match="is damaged"):
        lock.read(paths.wrapping_key)
    paths.lock_key.write_bytes(b"")
    with pytest.raises(FailedPrecondition, match="is damaged"):
        lock.unlock(key)


SAVE = """
import sys
from pathlib import Path
from skep.paths import Paths
from skep.security import keypair
from skep.security.locking import KeyLock

data, run, renewed = map(Path, sys.argv[1:])
paths = Paths(data, run)
keypair.save(keypair.load(renewed), paths.certificates, KeyLock(paths))
"""


def a_pair() -> KeyPair:
    authority, key = Authority.create(), new_private_key()
    identity = NodeIdentity(node_id=NodeId("n1"), cluster_id=ClusterId("c1"), role=NodeRole.MANAGER)
    chain = authority.sign(signing_request(key), identity)
    return KeyPair(certificate_pem=chain, key_pem=private_pem(key), root_pem=authority.root_pem)


def waits_for(path: Path) -> bool:
    """Whether a process waits for a lock on the file."""
    try:
        inode = path.stat().st_ino
    except FileNotFoundError:
        return False
    return any(f":{inode} " in line and "->" in line for line in Path("/proc/locks").read_text().splitlines())


@pytest.mark.parametrize("was_on", [False, True])
def test_a_certificate_that_another_process_renews_while_the_lock_turns_keeps_its_key(
    paths: Paths, was_on: bool
) -> None:
    """The manager process turns the lock, and the node process renews."""
    lock, unlock_key, renewed = KeyLock(paths), new_unlock_key(), a_pair()
    keypair.save(a_pair(), paths.certificates, lock)
    keypair.save(renewed, paths.data / "renewed")
    if was_on:
        lock.turn(unlock_key)
    started: list[subprocess.Popen[bytes]] = []

    def renew(call: str, path: Path) -> None:
        if started or call not in ("rename", "replace") or not path.name.startswith(keypair.KEY_FILE):
            return
        words = (sys.executable, "-c", SAVE, str(paths.data), str(paths.run), str(paths.data / "renewed"))
        started.append(subprocess.Popen(words))
        while started[0].poll() is None and not waits_for(paths.keys_guard):
            time.sleep(0.01)

    with file_faults(paths.data) as disk:
        disk.before_each = renew
        lock.turn(None if was_on else unlock_key)
    assert started[0].wait(20) == 0
    assert lock.is_on is not was_on
    assert keypair.load(paths.certificates, lock).key_pem == renewed.key_pem
    assert paths.node_key.read_bytes().startswith(NODE_KEY.strip()) is was_on

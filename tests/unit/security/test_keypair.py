"""The node's key pair on disk."""

import errno
import os
import stat

import pytest

from skep.errors import FailedPrecondition, NotFound
from skep.linux.files import NEW_SUFFIX
from skep.model.node import NodeRole
from skep.model.values.ids import ClusterId, NodeId
from skep.security import keypair
from skep.security.authority import Authority
from skep.security.identity import NodeIdentity
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request
from tests.support.file_faults import file_faults

AUTHORITY = Authority.create()
IDENTITY = NodeIdentity(node_id=NodeId("n1"), cluster_id=ClusterId("c1"), role=NodeRole.WORKER)


def a_pair() -> KeyPair:
    key = new_private_key()
    return KeyPair(
        certificate_pem=AUTHORITY.sign(signing_request(key), IDENTITY),
        key_pem=private_pem(key),
        root_pem=AUTHORITY.root_pem,
    )


def test_a_saved_pair_comes_back(tmp_path):
    pair = a_pair()
    keypair.save(pair, tmp_path / "certificates")
    loaded = keypair.load(tmp_path / "certificates")
    assert (loaded.certificate_pem, loaded.key_pem, loaded.root_pem) == (
        pair.certificate_pem,
        pair.key_pem,
        pair.root_pem,
    )
    assert loaded.identity == IDENTITY


def test_the_key_is_for_root_alone_even_where_it_was_not(tmp_path):
    (tmp_path / "swarm-node.key").write_text("old")
    os.chmod(tmp_path / "swarm-node.key", 0o644)
    keypair.save(a_pair(), tmp_path)
    assert stat.S_IMODE((tmp_path / "swarm-node.key").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "swarm-node.crt",
        "swarm-node.key",
        "swarm-root-ca.crt",
    ]


@pytest.mark.parametrize("crash_at", range(1, 4))
def test_a_crash_while_saving_leaves_a_whole_pair(tmp_path, crash_at):
    old, new = a_pair(), a_pair()
    keypair.save(old, tmp_path)
    renames = 0

    def crash(call, _path):
        nonlocal renames
        renames += call == "replace"
        if renames == crash_at:
            raise KeyboardInterrupt

    with file_faults(tmp_path) as files:
        files.before_each = crash
        with pytest.raises(KeyboardInterrupt):
            keypair.save(new, tmp_path)
    assert keypair.load(tmp_path).key_pem == (old.key_pem if crash_at < 3 else new.key_pem)
    assert keypair.load(tmp_path).key_pem == (old.key_pem if crash_at < 3 else new.key_pem)


def test_a_missing_pair_is_not_found(tmp_path):
    with pytest.raises(NotFound, match="no certificate"):
        keypair.load(tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    keypair.save(a_pair(), tmp_path)
    (tmp_path / "swarm-node.key").write_bytes(a_pair().key_pem)
    with pytest.raises(FailedPrecondition, match="does not belong"):
        keypair.load(tmp_path)


def test_a_pair_shows_no_key_when_printed():
    assert "PRIVATE" not in repr(a_pair())


def test_a_pair_can_be_read_at_any_moment_of_a_save(tmp_path):
    """Another process reads; it finds one pair or the other and leaves the writer's files alone."""
    old, new = a_pair(), a_pair()
    keypair.save(old, tmp_path)
    found, is_reading = [], False

    def read(*_call):
        nonlocal is_reading
        if not is_reading:
            is_reading = True
            found.append(keypair.load(tmp_path).certificate_pem)
            is_reading = False

    with file_faults(tmp_path) as files:
        files.before_each = read
        keypair.save(new, tmp_path)
        read()
    assert set(found) == {old.certificate_pem, new.certificate_pem}
    assert found == sorted(found, key=[old.certificate_pem, new.certificate_pem].index)


def test_a_save_after_a_broken_one_can_break_too(tmp_path):
    """The first ends between its renames; the second right after it removed what lay beside."""
    pairs = [a_pair() for _ in range(3)]
    keypair.save(pairs[0], tmp_path)
    beside = keypair.CERTIFICATE_FILE + NEW_SUFFIX
    for call, saved in (("replace", pairs[1]), ("open", pairs[2])):
        with file_faults(tmp_path) as files:
            files.choose(errno.EIO, lambda name, path, call=call: (name, path.name) == (call, beside))
            with pytest.raises(OSError, match="Input/output error"):
                keypair.save(saved, tmp_path)
        assert keypair.load(tmp_path).certificate_pem == pairs[1].certificate_pem

"""A server takes over a renewed certificate without a restart."""

import pytest

from skep.errors import FailedPrecondition
from skep.security import keypair
from skep.security.reloading import KeyPairFiles
from tests.unit.security.test_keypair import a_pair


def test_a_renewed_certificate_is_taken_over_once(tmp_path):
    first, renewed = a_pair(), a_pair()
    keypair.save(first, tmp_path)
    files = KeyPairFiles(tmp_path)
    taken = files.changed()
    assert taken is not None
    assert taken.certificate_pem == first.certificate_pem
    assert files.changed() is None
    keypair.save(renewed, tmp_path)
    taken = files.changed()
    assert taken is not None
    assert taken.certificate_pem == renewed.certificate_pem
    assert files.changed() is None


def test_a_damaged_key_is_not_taken_over_and_read_again_once_it_is_whole(tmp_path):
    pair = a_pair()
    keypair.save(pair, tmp_path)
    files = KeyPairFiles(tmp_path)
    (tmp_path / keypair.KEY_FILE).write_bytes(b"damaged")
    with pytest.raises(FailedPrecondition):
        files.changed()
    keypair.save(pair, tmp_path)
    assert files.changed() is not None

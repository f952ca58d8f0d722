"""A root whose key the test has, so that it can issue certificates in the past."""

from datetime import timedelta
from pathlib import Path

from skep.aio.clock import SystemClock
from skep.model.values.times import SECOND_NS
from skep.security import keypair
from skep.security.authority import Authority
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem


class Earlier(SystemClock):
    """A clock that is behind."""

    def __init__(self, by: timedelta) -> None:
        self._by_ns = int(by.total_seconds()) * SECOND_NS

    def now_ns(self) -> int:
        return super().now_ns() - self._by_ns


def expire(certificates: Path, root: Authority, *, days_ago: float) -> KeyPair:
    """Replace the key pair in a directory by a pair that expired ``days_ago``, and return the pair."""
    pair = keypair.load(certificates)
    then = Authority.load(root.key_pem, root.root_pem, Earlier(timedelta(days=days_ago + 1)))
    key = new_private_key()
    expired = KeyPair(
        certificate_pem=then.issue(key.public_key(), pair.identity, timedelta(days=1)),
        key_pem=private_pem(key),
        root_pem=pair.root_pem,
    )
    keypair.save(expired, certificates)
    return expired

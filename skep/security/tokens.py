"""Join tokens, with which a machine becomes a node.

    SWMTKN-1-<digest of the root, 50 characters>-<secret, 25 characters>

Both parts are lower-case base 36, padded with zeros on the left.  With the digest, a joining node checks that it talks
to the right cluster before it sends the secret.  The secret determines the role.

Source: swarmkit, ca/config.go (GenerateJoinToken, ParseJoinToken).
"""

import hashlib
import hmac
import re

import msgspec

from skep.errors import FailedPrecondition, InvalidArgument
from skep.model.node import NodeRole
from skep.model.swarm import JoinTokens
from skep.model.values.ids import base36, new_id

_PATTERN = re.compile(r"SWMTKN-1-([0-9a-z]{50})-([0-9a-z]{25})")
_FIPS_PATTERN = re.compile(r"SWMTKN-2-[01]-([0-9a-z]{50})-([0-9a-z]{25})")


class JoinToken(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed join token.  ``root_sha256`` is the digest of the root bundle's PEM bytes."""

    root_sha256: bytes
    secret: str


def join_token(root_pem: bytes, secret: str) -> str:
    """Return the token for ``secret`` in the cluster with this root bundle (PEM, exactly as the CA returns it)."""
    digest = int.from_bytes(hashlib.sha256(root_pem).digest(), "big")
    return f"SWMTKN-1-{base36(digest, 50)}-{secret}"


def new_join_tokens(root_pem: bytes) -> JoinTokens:
    """Return new tokens for both roles."""
    return JoinTokens(worker=join_token(root_pem, new_id()), manager=join_token(root_pem, new_id()))


def parse_token(text: str) -> JoinToken:
    """Parse a token.  Raises: InvalidArgument: it is invalid (Docker's text)."""
    match = _PATTERN.fullmatch(text) or _FIPS_PATTERN.fullmatch(text)
    number = int(match[1], 36) if match else 1 << 256
    if match is None or number >> 256:
        raise InvalidArgument("invalid join token")
    return JoinToken(root_sha256=number.to_bytes(32, "big"), secret=match[2])


def check_root(token: JoinToken, root_pem: bytes) -> None:
    """Raise FailedPrecondition unless ``root_pem`` is the root of the token.

    Otherwise the address belongs to another cluster, or an attacker intercepts the connection.
    """
    if not hmac.compare_digest(hashlib.sha256(root_pem).digest(), token.root_sha256):
        raise FailedPrecondition(
            "remote CA does not match fingerprint. Expected: "
            f"{token.root_sha256.hex()}, actual: {hashlib.sha256(root_pem).hexdigest()}.  If the swarm is the right "
            "one, the token is from before the certificate authority was rotated: see `docker swarm join-token`"
        )


def role_of(text: str, tokens: JoinTokens) -> NodeRole | None:
    """Return the role of a token, or None.  Compares whole tokens in constant time."""
    given = text.encode()
    is_manager = hmac.compare_digest(given, tokens.manager.encode())
    is_worker = hmac.compare_digest(given, tokens.worker.encode())
    if not given:
        return None
    return NodeRole.MANAGER if is_manager else NodeRole.WORKER if is_worker else None

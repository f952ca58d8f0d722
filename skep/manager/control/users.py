"""Operations on users and their credentials.

Certificates of users come from a different authority than certificates of nodes.  Nodes and managers do not trust the
users' authority, so a user's certificate never works between them, even if a check were forgotten.
"""

import hashlib
import re
import secrets
from typing import Final, TypeVar

from msgspec.structs import replace

from skep.errors import FailedPrecondition, InvalidArgument, NotFound
from skep.manager.control.validation.names import check_file_name
from skep.model.permissions.access import parse_binding
from skep.model.permissions.user import (
    AccessTable,
    User,
    UserCertificate,
    UserCredentials,
    UserSpec,
    UserToken,
)
from skep.model.values.ids import IdSource, UserId
from skep.model.values.times import SECOND_NS, Timestamp, timestamp, unix_ns
from skep.security.authority import Authority
from skep.store.interface import Transaction, View
from skep.store.kinds import USERS_ROOT_ID, Payload
from skep.store.level import USERS

ROOT_NAME: Final = "skep-users"
TOKEN_PREFIX: Final = "skep_"
BINDINGS_MAX = 64
"""Largest number of roles of one user."""
KEPT_MAX = 32
"""Maximum number of a user's certificates, and of tokens.  A new certificate replaces the oldest."""
LIFETIME_S_MAX = 366 * 86400
"""Longest lifetime of a token or certificate: a leap year."""
T = TypeVar("T", UserToken, UserCertificate)
_PEM = re.compile(rb"-----BEGIN [^-]+-----[^-]+-----END [^-]+-----\s*")


def create_user(tx: Transaction, spec: UserSpec, *, new_id: IdSource, now: Timestamp) -> User:
    """Create a user.  Raises: InvalidArgument; AlreadyExists; FailedPrecondition: a manager is too old for users."""
    if tx.level < USERS:
        raise FailedPrecondition("users need managers of this version: upgrade the others first")
    check_file_name(spec.name)
    return tx.put(User(id=UserId(new_id()), created_at=now, updated_at=now, spec=_checked(spec)))


def set_roles(tx: Transaction, id: UserId, roles: tuple[str, ...], *, now: Timestamp) -> User:
    """Replace a user's roles.  Raises: NotFound; InvalidArgument."""
    user = tx.get(User, id)
    return tx.put(replace(user, updated_at=now, spec=_checked(replace(user.spec, roles=roles))))


def remove_user(tx: Transaction, id: UserId) -> None:
    """Remove a user and its access.  Raises: NotFound."""
    tx.delete(User, id)


def add_token(
    tx: Transaction,
    id: UserId,
    token: str,
    lifetime_s: int,
    *,
    logs_in_only: bool = False,
    new_id: IdSource,
    now: Timestamp,
) -> User:
    """Add a token that authenticates this user.

    Args:
        logs_in_only: Whether the token opens the dashboard only, and the API refuses it.

    Raises:
        NotFound: The user does not exist.
        InvalidArgument: The user has too many tokens, or the lifetime is too long.
    """
    user = tx.get(User, id)
    kept = _living(user.tokens, now)
    if len(kept) >= KEPT_MAX:
        raise InvalidArgument(f"user {user.spec.name} already has {KEPT_MAX} tokens: remove one")
    added = UserToken(
        id=new_id()[:10],
        digest=digest_of(token),
        created_at=now,
        not_after=_end(now, lifetime_s),
        logs_in_only=logs_in_only,
    )
    return tx.put(replace(user, updated_at=now, tokens=(*kept, added)))


def remove_token(tx: Transaction, id: UserId, token_id: str, *, now: Timestamp) -> User:
    """Remove a user's token.  Raises: NotFound."""
    user = tx.get(User, id)
    left = tuple(token for token in user.tokens if token.id != token_id)
    if len(left) == len(user.tokens):
        raise NotFound(f"token {token_id} of user {user.spec.name} not found")
    return tx.put(replace(user, updated_at=now, tokens=left))


def renew_certificate(
    tx: Transaction,
    id: UserId,
    serial: str,
    csr_pem: bytes,
    lifetime_s: int,
    fresh: Authority,
    *,
    now: Timestamp,
) -> tuple[User, bytes, bytes]:
    """Issue a certificate to a user who has the certificate ``serial``.

    Its lifetime is at most as long as that certificate's, so a user cannot extend the lifetime that an administrator
    chose.  If the user already has the maximum number of certificates, it replaces that certificate and no other.

    Args:
        lifetime_s: Lifetime in seconds, or 0 for the lifetime of the certificate ``serial``.
        fresh: Authority that becomes the authority of users if they have none.

    Returns:
        The user, the certificate and its root, as PEM.

    Raises:
        NotFound: The user has no such certificate.
        InvalidArgument: The lifetime is too long, or the request is malformed.
    """
    user = tx.get(User, id)
    asking = next((one for one in _living(user.certificates, now) if one.serial == serial), None)
    if asking is None:
        raise NotFound(f"certificate {serial} of user {user.spec.name} not found")
    lifetime_s_max = (unix_ns(asking.not_after) - unix_ns(asking.created_at)) // SECOND_NS
    if lifetime_s > lifetime_s_max:
        raise InvalidArgument(
            f"your certificate has a lifetime of {lifetime_s_max} s, which the next one cannot exceed: "
            f"an administrator can issue a longer one with `skep user renew {user.spec.name} --days N`"
        )
    if len(_living(user.certificates, now)) >= KEPT_MAX:
        left = tuple(one for one in user.certificates if one is not asking)
        tx.put(replace(user, certificates=left))
    return add_certificate(tx, id, csr_pem, lifetime_s or lifetime_s_max, fresh, now=now)


def add_certificate(
    tx: Transaction, id: UserId, csr_pem: bytes, lifetime_s: int, fresh: Authority, *, now: Timestamp
) -> tuple[User, bytes, bytes]:
    """Issue a certificate for the key of a request.

    Args:
        fresh: Authority that becomes the authority of users if they have none.

    Returns:
        The user, the certificate and its root, as PEM.

    Raises:
        NotFound: The user does not exist.
        InvalidArgument: The lifetime is too long, or the request is malformed.
    """
    user = tx.get(User, id)
    end = _end(now, lifetime_s)
    payload = tx.rely_on(Payload, USERS_ROOT_ID)
    if payload is None:
        payload = tx.put(Payload(id=USERS_ROOT_ID, data=fresh.key_pem + fresh.root_pem))
    key, root = _PEM.findall(payload.data)
    authority = Authority.load(key, root)
    serial, certificate = authority.issue_user(csr_pem, user.spec.name, unix_ns(now), unix_ns(end))
    added = UserCertificate(serial=serial, created_at=now, not_after=end)
    kept = (*_living(user.certificates, now), added)[-KEPT_MAX:]
    return tx.put(replace(user, updated_at=now, certificates=kept)), certificate, authority.root_pem


def new_token() -> str:
    """Return a new token: 256 random bits after a prefix."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def digest_of(token: str) -> str:
    """Return the stored digest of a token.  A token is random, so it needs no salt and no slow hash."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def access_table(view: View, *, is_current: bool) -> AccessTable:
    """Return the data about all users that the node process needs."""
    payload = view.lookup(Payload, USERS_ROOT_ID)
    root = _PEM.findall(payload.data)[1] if payload is not None else b""
    users = tuple(
        UserCredentials(
            name=user.spec.name,
            bindings=tuple(map(parse_binding, user.spec.roles)),
            serials={one.serial: unix_ns(one.not_after) for one in user.certificates},
            tokens={one.digest: unix_ns(one.not_after) for one in user.tokens},
            logins=frozenset(one.digest for one in user.tokens if one.logs_in_only),
        )
        for user in view.find(User)
    )
    return AccessTable(root_pem=root.decode(), users=users, is_current=is_current)


def _checked(spec: UserSpec) -> UserSpec:
    """Check and normalize a user's roles.  Raises: InvalidArgument."""
    if len(spec.roles) > BINDINGS_MAX:
        raise InvalidArgument(f"a user can have at most {BINDINGS_MAX} roles")
    if not spec.roles:
        raise InvalidArgument("a user needs a role: viewer, operator, operator:STACK or admin")
    return replace(spec, roles=tuple(sorted({str(parse_binding(role)) for role in spec.roles})))


def _end(now: Timestamp, lifetime_s: int) -> Timestamp:
    if not 0 < lifetime_s <= LIFETIME_S_MAX:
        raise InvalidArgument(f"a lifetime must be more than 0 and at most {LIFETIME_S_MAX // 86400} days")
    return timestamp(unix_ns(now) + lifetime_s * SECOND_NS)


def _living(items: tuple[T, ...], now: Timestamp) -> tuple[T, ...]:
    return tuple(one for one in items if unix_ns(one.not_after) > unix_ns(now))

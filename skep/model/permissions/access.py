"""The identity behind a request, and its roles in the whole cluster or in single stacks."""

import hashlib
import re
from collections.abc import Iterable
from enum import Enum, IntEnum
from typing import Final, Self

import msgspec

from skep.errors import InvalidArgument

EVERY_STACK: Final = "*"
"""Means the whole cluster, where a binding otherwise names a stack."""
ROLE_HEADER: Final = "X-Skep-Role"
"""Request header that limits a request's rights to this role (``operator:shop``)."""
REVISION_HEADER: Final = "X-Skep-Revision"
"""Request header with the revision of the deploy that makes the request.  The request is refused once a newer deploy of
the stack has begun.
"""
OVERRIDE_HEADER: Final = "X-Skep-Override-Freeze"
"""Request header with the value ``true`` that overrides a strict freeze."""
TOKEN_BYTES_MAX: Final = 512
"""Longer tokens are refused without a comparison."""
_STACK = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")


class Role(IntEnum):
    """A user's role.  Each role includes the rights of the lower ones."""

    VIEWER = 1
    """Reads everything including logs, except secrets and anything that grants rights."""
    OPERATOR = 2
    """Changes services and the objects that they use, except anything that grants rights over a machine or the
    cluster."""
    ADMIN = 3
    """Has the same rights as root on a manager's API socket."""

    @property
    def word(self) -> str:
        """Return the role in the spelling for users."""
        return self.name.lower()


class Binding(msgspec.Struct, frozen=True, order=True):
    """A role in one stack, or in the cluster (``EVERY_STACK``)."""

    role: Role
    stack: str = EVERY_STACK

    def __str__(self) -> str:
        return self.role.word if self.stack == EVERY_STACK else f"{self.role.word}:{self.stack}"


class Origin(Enum):
    """Proof of identity that the client of a request gave."""

    SOCKET = "socket"
    """The client opened a Unix socket of this machine, whose permissions allow that."""
    MACHINE = "machine"
    """The client has a certificate of the authority in the node's setting ``tls-ca``."""
    CERTIFICATE = "certificate"
    """The client has a certificate that the cluster issued to a user."""
    TOKEN = "token"
    """The request contains a user's token."""
    CONTAINER = "container"
    """The client opened the API socket that is mounted into a container."""
    NODE = "node"
    """A worker passes on a request of one of its clients, with its own certificate."""


class Credential(msgspec.Struct, frozen=True):
    """A client's proof of identity.

    ``key`` is the serial number of a user's certificate, the digest of a token, or the name in a certificate of the
    machine's authority."""

    origin: Origin
    key: str
    is_login: bool = False
    """Whether the token was given to the login page of the dashboard."""

    @classmethod
    def of_token(cls, token: bytes, *, is_login: bool = False) -> Self:
        """Return the credential of a token.  Users are found by its digest, so comparison times reveal nothing about
        the token."""
        return cls(Origin.TOKEN, hashlib.sha256(token).hexdigest(), is_login)


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The client of a request.  ``name`` is the user's name, a socket client's uid, or a container's id."""

    name: str
    origin: Origin
    bindings: tuple[Binding, ...]
    serial: str = ""
    """Serial number of the user's certificate, in hexadecimal digits.  Empty if the identity has another origin."""

    @property
    def is_admin(self) -> bool:
        """Return whether the identity has all rights."""
        return self.role_in(EVERY_STACK) is Role.ADMIN

    @property
    def is_user(self) -> bool:
        """Return whether the identity is a user that the cluster knows."""
        return self.origin in (Origin.CERTIFICATE, Origin.TOKEN)

    @property
    def stacks(self) -> frozenset[str]:
        """Return the stacks to which the identity is bound.  Irrelevant for an identity with a role in the cluster."""
        return frozenset(binding.stack for binding in self.bindings) - {EVERY_STACK}

    def role_in(self, stack: str) -> Role | None:
        """Return the highest role in ``stack``, or None without one.  ``EVERY_STACK`` asks for the role in the whole
        cluster.
        """
        reaching = [one.role for one in self.bindings if one.stack in (EVERY_STACK, stack)]
        return max(reaching, default=None)

    def strongest_in(self, stack: str) -> Binding | None:
        """Return the binding with the most rights over ``stack``, or None if none reaches it."""
        reaching = [one for one in self.bindings if one.stack in (EVERY_STACK, stack)]
        return max(reaching, key=_strength, default=None)

    def limited_to(self, limit: Binding) -> "Identity":
        """Return the identity without rights that ``limit`` does not include."""
        shared = (_shared(one, limit) for one in self.bindings)
        return msgspec.structs.replace(self, bindings=tuple(filter(None, shared)))

    def __str__(self) -> str:
        return f"{self.origin.value} {self.name}"


def weaker(one: Binding, other: Binding) -> Binding:
    """Return the binding with fewer rights over a stack that both reach."""
    return min(one, other, key=_strength)


def _strength(binding: Binding) -> tuple[Role, bool]:
    return binding.role, binding.stack == EVERY_STACK


def _shared(one: Binding, limit: Binding) -> Binding | None:
    """Return the rights that both bindings include, or None."""
    if EVERY_STACK not in (one.stack, limit.stack) and one.stack != limit.stack:
        return None
    stack = limit.stack if one.stack == EVERY_STACK else one.stack
    role = min(one.role, limit.role)
    return Binding(Role.OPERATOR if role is Role.ADMIN and stack != EVERY_STACK else role, stack)


ALL: Final = (Binding(Role.ADMIN),)
"""The bindings of an administrator of the cluster."""


def are_of_stacks(roles: Iterable[str]) -> bool:
    """Return whether each of these bindings, as texts, is limited to a stack."""
    return all(":" in role for role in roles)


def parse_binding(text: str) -> Binding:
    """Parse ``operator:shop`` or ``viewer``.  Raises: InvalidArgument."""
    word, colon, stack = text.partition(":")
    try:
        role = Role[word.upper()]
    except KeyError:
        raise InvalidArgument(f"unknown role {word!r}: expected viewer, operator or admin") from None
    if not colon or stack == EVERY_STACK:
        return Binding(role)
    if not _STACK.fullmatch(stack):
        raise InvalidArgument(f"{stack!r} is not the name of a stack")
    if role is Role.ADMIN:
        raise InvalidArgument("the role admin cannot be limited to a stack: use admin, or operator:STACK")
    return Binding(role, stack)

"""The identity of a request, and what its roles reach: the whole cluster, or single stacks."""

import hashlib
import re
from enum import Enum, IntEnum
from typing import Final, Self

import msgspec

from skep.errors import InvalidArgument

EVERY_STACK: Final = "*"
"""In place of a stack's name: the whole cluster."""
ROLE_HEADER: Final = "X-Skep-Role"
"""A request header: the request has the rights of this role at most (``operator:shop``)."""
REVISION_HEADER: Final = "X-Skep-Revision"
"""A request header: the request changes a service only while the deploy with this revision, a config, is current."""
TOKEN_BYTES_MAX: Final = 512
_STACK = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")


class Role(IntEnum):
    """What a user may do; each may what those below may."""

    VIEWER = 1
    """Reads, logs among it; no secrets, nothing that gives rights."""
    OPERATOR = 2
    """Changes services, and what they use; nothing that gives rights over a machine or the cluster."""
    ADMIN = 3
    """Everything that root of a manager may do by the API."""

    @property
    def word(self) -> str:
        """As users write it."""
        return self.name.lower()


class Binding(msgspec.Struct, frozen=True, order=True):
    """A role in one stack, or in the cluster (``EVERY_STACK``)."""

    role: Role
    stack: str = EVERY_STACK

    def __str__(self) -> str:
        return self.role.word if self.stack == EVERY_STACK else f"{self.role.word}:{self.stack}"


class Origin(Enum):
    """How the client of a request proved its identity."""

    SOCKET = "socket"
    """By the permissions of a unix socket of this machine."""
    MACHINE = "machine"
    """By a certificate of the authority in the node's setting ``tls-ca``."""
    CERTIFICATE = "certificate"
    """By a certificate that the cluster issued to a user."""
    TOKEN = "token"
    """By a user's token."""
    CONTAINER = "container"
    """By the socket in a container that may use the API."""
    NODE = "node"
    """By the certificate of a worker, for the clients of its API."""


class Credential(msgspec.Struct, frozen=True):
    """What a client has proved.  ``key``: of a user's certificate its serial number, of a token its digest, of a
    certificate of the machine's authority the name in it."""

    origin: Origin
    key: str
    is_login: bool = False
    """Whether the token was given to the login page of the dashboard."""

    @classmethod
    def of_token(cls, token: bytes, *, is_login: bool = False) -> Self:
        """Users are found by the digest: a comparison tells nothing of the token by the time that it takes."""
        return cls(Origin.TOKEN, hashlib.sha256(token).hexdigest(), is_login)


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The client of a request.  ``name``: of the user; of a socket's client its uid, of a container its id."""

    name: str
    origin: Origin
    bindings: tuple[Binding, ...]
    serial: str = ""
    """Serial number of the user's certificate, in hexadecimal digits.  Empty if the identity has another origin."""

    @property
    def is_admin(self) -> bool:
        """Whether it may do everything."""
        return self.role_in(EVERY_STACK) is Role.ADMIN

    @property
    def is_user(self) -> bool:
        """Whether it is a user that the cluster knows."""
        return self.origin in (Origin.CERTIFICATE, Origin.TOKEN)

    @property
    def stacks(self) -> frozenset[str]:
        """The stacks to which it is bound; without meaning where it has a role in the cluster."""
        return frozenset(binding.stack for binding in self.bindings) - {EVERY_STACK}

    def role_in(self, stack: str) -> Role | None:
        """The highest of its roles that reach ``stack`` (``EVERY_STACK``: the whole cluster)."""
        reaching = [one.role for one in self.bindings if one.stack in (EVERY_STACK, stack)]
        return max(reaching, default=None)

    def strongest_in(self, stack: str) -> Binding | None:
        """Return the binding that gives the most rights over ``stack``, or None if none reaches it."""
        reaching = [one for one in self.bindings if one.stack in (EVERY_STACK, stack)]
        return max(reaching, key=_strength, default=None)

    def limited_to(self, limit: Binding) -> "Identity":
        """Return the identity with only those of its rights that ``limit`` gives, too."""
        shared = (_shared(one, limit) for one in self.bindings)
        return msgspec.structs.replace(self, bindings=tuple(filter(None, shared)))

    def __str__(self) -> str:
        return f"{self.origin.value} {self.name}"


def weaker(one: Binding, other: Binding) -> Binding:
    """Return the binding that gives fewer rights over a stack that both reach."""
    return min(one, other, key=_strength)


def _strength(binding: Binding) -> tuple[Role, bool]:
    return binding.role, binding.stack == EVERY_STACK


def _shared(one: Binding, limit: Binding) -> Binding | None:
    """The rights that both give; None: none."""
    if EVERY_STACK not in (one.stack, limit.stack) and one.stack != limit.stack:
        return None
    stack = limit.stack if one.stack == EVERY_STACK else one.stack
    role = min(one.role, limit.role)
    return Binding(Role.OPERATOR if role is Role.ADMIN and stack != EVERY_STACK else role, stack)


ALL: Final = (Binding(Role.ADMIN),)
"""The bindings of an administrator of the cluster."""


def parse_binding(text: str) -> Binding:
    """``operator:shop``, ``viewer``.  Raises: InvalidArgument."""
    word, colon, stack = text.partition(":")
    try:
        role = Role[word.upper()]
    except KeyError:
        raise InvalidArgument(f"unknown role {word!r}: want viewer, operator or admin") from None
    if not colon or stack == EVERY_STACK:
        return Binding(role)
    if not _STACK.fullmatch(stack):
        raise InvalidArgument(f"{stack!r} is not the name of a stack")
    if role is Role.ADMIN:
        raise InvalidArgument("an admin is one of the whole cluster: want admin, or operator:STACK")
    return Binding(role, stack)

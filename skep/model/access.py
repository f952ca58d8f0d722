"""Who makes a request, and what the identity's roles reach: the whole cluster, or single stacks."""

from enum import Enum, IntEnum
from typing import Final

import msgspec

EVERY_STACK: Final = "*"
"""In place of a stack's name: the whole cluster."""


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
    """How the client of a request proved who it is."""

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


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The client of a request.  ``name``: of the user; of a socket's client its uid, of a container its id."""

    name: str
    origin: Origin
    bindings: tuple[Binding, ...]

    def __str__(self) -> str:
        return f"{self.origin.value} {self.name}"


ALL: Final = (Binding(Role.ADMIN),)
"""The bindings of an administrator of the cluster."""

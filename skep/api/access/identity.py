"""The identity of a request.

An identity belongs to a connection.  It is determined when the connection is accepted, and is passed with it from
process to process.  A connection of a Unix socket has no identity: its client has the rights that the permissions of
the socket grant.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Final
from weakref import WeakKeyDictionary

import msgspec
from aiohttp import web

from skep.errors import Unauthenticated
from skep.linux.unix_sockets import Credentials, credentials_of
from skep.model.permissions.access import ALL, ROLE_HEADER, Identity, Origin, parse_binding

IDENTITY_HEADER: Final = "X-Skep-Identity"
"""Header with the client's identity, in requests that a process of this node makes for a client on the manager's own
socket.
"""

_THIS_NODE: Final = Identity(name="root", origin=Origin.SOCKET, bindings=ALL)
"""Identity of requests that processes of this node make on their own behalf."""

_identities: WeakKeyDictionary[asyncio.BaseTransport, Identity] = WeakKeyDictionary()
_peers: WeakKeyDictionary[asyncio.BaseTransport, Credentials] = WeakKeyDictionary()
IS_PRIVATE: web.AppKey[Callable[[web.Request], bool]] = web.AppKey("is_private")
"""Returns whether a request came on a socket that only processes of this node open, so that its headers are trusted."""


def identify(transport: asyncio.BaseTransport, identity: Identity) -> None:
    """Assign ``identity`` to requests on ``transport``."""
    _identities[transport] = identity


def identity_of(request: web.Request) -> Identity:
    """Return the identity of ``request``, limited to the role in its header ``X-Skep-Role``.

    Raises:
        Unauthenticated: Its connection is unknown, or was closed.
        InvalidArgument: The header does not name a role.
    """
    identity, limit = unlimited_identity_of(request), request.headers.get(ROLE_HEADER)
    return identity if limit is None else identity.limited_to(parse_binding(limit))


def unlimited_identity_of(request: web.Request) -> Identity:
    """Return the identity of the client of ``request``, ignoring a role to which the request is limited.

    Raises:
        Unauthenticated: Its connection is unknown, or was closed.
    """
    transport = request.transport
    known = _identities.get(transport) if transport is not None else None
    if known is not None:
        return known
    header = request.headers.get(IDENTITY_HEADER)
    is_private = request.app.get(IS_PRIVATE)
    if is_private is not None and is_private(request):
        return unpacked(header.encode()) if header is not None else _THIS_NODE
    peer = peer_of(request)
    if transport is None or peer is None:
        raise Unauthenticated("the client of this connection is not known")
    # Only root and a group may use the socket.
    identity = Identity(
        name="root" if peer.uid == 0 else f"uid {peer.uid}", origin=Origin.SOCKET, bindings=ALL
    )
    identify(transport, identity)
    return identity


def is_of_token(request: web.Request) -> bool:
    """Return whether a token authenticates the client.

    A token authenticates a single request, because a proxy sends the requests of all its clients on one connection.
    """
    known = _identities.get(request.transport) if request.transport is not None else None
    return known is not None and known.origin is Origin.TOKEN


def peer_of(request: web.Request) -> Credentials | None:
    """Return the process at the other end of a Unix socket, or None if ``request`` came on another one."""
    transport = request.transport
    if transport is None:
        return None
    known = _peers.get(transport)
    if known is None:
        connected = transport.get_extra_info("socket")
        if connected is None or connected.family != socket.AF_UNIX:
            return None
        known = _peers[transport] = credentials_of(connected)
    return known


def packed(identity: Identity) -> bytes:
    """Return ``identity`` encoded for another process of this node."""
    return msgspec.json.encode(identity)


def unpacked(data: bytes) -> Identity:
    """Decode the result of ``packed``.  Raises: Unauthenticated."""
    try:
        return msgspec.json.decode(data, type=Identity)
    except msgspec.DecodeError as error:
        raise Unauthenticated(f"the identity of a connection cannot be read: {error}") from error

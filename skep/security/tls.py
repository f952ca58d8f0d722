"""TLS contexts of clients and servers.

One port serves nodes with a certificate and machines without one, so the server requests a certificate but does not
require it.  ``wire/access.py`` decides per call what a client without a certificate may do.

An ``SSLContext`` cannot forget a root or a certificate it has loaded.  The server therefore listens with a *front*
context that, at each handshake, hands over to the current one: renewal and root rotation need no restart.
"""

import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from skep.errors import FailedPrecondition
from skep.security.keypair import KeyPair

MANAGER_NAME = "swarm-manager"
"""Clients verify this name instead of an address.  Only managers' certificates have it."""


class ServerTls:
    """A server's contexts: ``front`` is for the listener.  Call ``replace`` when the key pair or the roots change."""

    def __init__(self, pair: KeyPair, present: Callable[[], KeyPair] | None = None) -> None:
        """``present`` returns the pair to use at each handshake.  Without it, call ``replace``."""
        self.pair = pair
        """The pair in use, also for calls to other managers."""
        self._present = present
        self._current = _server_context(pair)
        self.front = _server_context(pair)
        self.front.sni_callback = self._hand_over  # also called without a server name

    def replace(self, pair: KeyPair) -> None:
        """Use ``pair`` and its roots from the next handshake on.  Open connections stay."""
        self.pair = pair
        self._current = _server_context(pair)

    def _hand_over(self, connection: ssl.SSLObject, _name: str | None, _front: ssl.SSLContext) -> None:
        if self._present is not None and (pair := self._present()) is not self.pair:
            self.replace(pair)
        connection.context = self._current


def client_context(pair: KeyPair) -> ssl.SSLContext:
    """Return the context for a node's calls to a manager of its cluster: mutual TLS."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    _load_pair(context, pair)
    return context


def external_context(pair: KeyPair, root_pem: bytes) -> ssl.SSLContext:
    """Return the context for a manager's calls to an external authority: mutual TLS with HTTP/1.1, host name verified.

    Args:
        root_pem: The roots to trust, during a rotation including the next one.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_pair(context, pair.with_root(root_pem))
    return context


def joining_context(root_pem: bytes) -> ssl.SSLContext:
    """Return the context to request a certificate.  Verifies the manager.  The client has no certificate."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    _load_roots(context, root_pem)
    return context


def unverified_context() -> ssl.SSLContext:
    """Return the context for the first call, which fetches the root.  The caller verifies it by the token's digest."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _server_context(pair: KeyPair) -> ssl.SSLContext:
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    _load_pair(context, pair)
    context.verify_mode = ssl.CERT_OPTIONAL
    # A resumed session would skip verification with the present roots.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    return context


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    return context


def _load_pair(context: ssl.SSLContext, pair: KeyPair) -> None:
    _load_roots(context, pair.root_pem)
    with _in_memory(pair.certificate_pem) as certificate, _in_memory(pair.key_pem) as key:
        context.load_cert_chain(certificate, key)


def _load_roots(context: ssl.SSLContext, root_pem: bytes) -> None:
    try:
        context.load_verify_locations(cadata=root_pem.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise FailedPrecondition(f"the root certificate cannot be read: {error}") from error


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """Yield a path from which OpenSSL can read ``content`` without a file on disk."""
    descriptor = os.memfd_create("skep-tls")
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)

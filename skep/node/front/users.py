"""Identifies the clients of TCP hosts by their certificates or tokens.

Users belong to the cluster.  The manager process of this node sends them, and every change.  A node without a manager
has no users, and its TCP clients need a certificate of the configured authority.
"""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.api.client.client import ApiClient
from skep.api.http.tls import server_context
from skep.errors import SkepError, Unauthenticated, Unavailable
from skep.model.permissions.access import ALL, TOKEN_BYTES_MAX, Credential, Identity, Origin
from skep.model.permissions.user import AccessTable, UserCredentials
from skep.security.authority import USER_UNIT

log = structlog.get_logger()

SILENT_S = 10.0
"""Seconds for which the last list of users stays valid.  The manager process sends it every 2 s."""
_CHECK_S = 1.0
"""Seconds between checks for users who have lost their rights."""
_NAME_MAX = 128
"""Number of characters shown of a name in a client's certificate."""
_USERS = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, USER_UNIT)]


class ApiTls:
    """TLS for TCP hosts.  Clients prove their identity by certificate, or later by a token.

    An authority cannot be removed from an ``SSLContext``.  So a fixed context accepts connections and hands each
    handshake over to the present context.
    """

    def __init__(self, certificate: Path, key: Path, authority: Path) -> None:
        """Load the files.  Raises: FailedPrecondition: a file is invalid."""
        self._files = (certificate, key, authority)
        self._current = tls_context(*self._files)
        self.front = tls_context(*self._files)
        self.front.sni_callback = self._hand_over  # also called without a server name

    def trust(self, root_pem: str) -> None:
        """Trust the users' authority in addition to the machine's, from the next handshake on.

        Raises: FailedPrecondition: a file has become invalid, and the authorities stay unchanged.
        """
        context = tls_context(*self._files)
        if root_pem:
            context.load_verify_locations(cadata=root_pem)
        self._current = context

    def _hand_over(self, connection: ssl.SSLObject, _name: str | None, _front: ssl.SSLContext) -> None:
        connection.context = self._current


class KnownUsers:
    """The users in the last list from the manager process, and their open connections.

    ``tls`` is None if no host is served by TCP.
    """

    def __init__(
        self, manager_api: ApiClient, clock: Clock, rng: Callable[[], float], tls: ApiTls | None
    ) -> None:
        self._manager_api = manager_api
        self._clock = clock
        self._rng = rng
        self.tls = tls
        self._root: x509.Certificate | None = None
        self._trusted_pem = ""
        """Root certificate of the users' authority, as TLS handshakes now trust it."""
        self._trust_backoff = Backoff(1.0, 60.0, rng=rng)
        self._trust_again_at = float("-inf")
        self._by_key: dict[str, tuple[UserCredentials, int]] = {}
        """Each user, with the expiry in Unix nanoseconds, by certificate serial number or token digest."""
        self._received_at = float("-inf")
        self._open: dict[asyncio.Transport, tuple[Credential, Identity]] = {}

    async def run(self) -> None:
        """Read the users from the manager process, and close connections of users who have lost their rights."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(), name="users followed")
            while True:
                await self._clock.sleep(_CHECK_S)
                self._end_revoked()

    # --- the identity of a client -----------------------------------------------------------------------------

    def proved_by(self, transport: asyncio.Transport) -> Credential | None:
        """Return the credential in the client's certificate, or None without a certificate.

        Raises: Unauthenticated.
        """
        connection = transport.get_extra_info("ssl_object")
        if connection is None:
            return Credential(Origin.MACHINE, "")  # only tests have a host without TLS
        encoded = connection.getpeercert(binary_form=True)
        if not encoded:
            return None
        certificate = x509.load_der_x509_certificate(encoded)
        if self._root is not None and _is_issued_by(certificate, self._root):
            return Credential(Origin.CERTIFICATE, f"{certificate.serial_number:x}")
        if certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME) == _USERS:
            raise Unauthenticated(
                "the certificate is of an earlier user authority: renew it with `skep user renew`"
            )
        return Credential(Origin.MACHINE, _common_name(connection.getpeercert()))

    def has_certificate(self, transport: asyncio.Transport) -> bool:
        """Return whether the client has proved an identity by its certificate, or needs none (a host without TLS)."""
        try:
            return self.proved_by(transport) is not None
        except Unauthenticated:
            return False

    def identify(self, credential: Credential) -> Identity:
        """Return the identity of a credential.

        Raises: Unauthenticated: it is invalid, expired or revoked; Unavailable: users are not known at present."""
        if credential.origin is Origin.MACHINE:
            return Identity(name=credential.key, origin=Origin.MACHINE, bindings=ALL)
        if self._clock.monotonic() - self._received_at > SILENT_S:
            raise Unavailable(
                "users are unknown at present: this node's manager process has not sent them. Try again later"
            )
        user, end_ns = self._by_key.get(credential.key, (None, 0))
        if user is None or end_ns <= self._clock.now_ns():
            why = "has expired" if user is not None else "is unknown or was revoked"
            raise Unauthenticated(f"the {credential.origin.value} {why}")
        if credential.key in user.logins and not credential.is_login:
            raise Unauthenticated(
                "this token opens the dashboard only: make one for the API with `skep user token`"
            )
        serial = credential.key if credential.origin is Origin.CERTIFICATE else ""
        return Identity(name=user.name, origin=credential.origin, bindings=user.bindings, serial=serial)

    def remember(self, transport: asyncio.Transport, credential: Credential, identity: Identity) -> None:
        """Remember the connection, and close it once ``credential`` no longer proves ``identity``."""
        if credential.origin is not Origin.MACHINE:
            self._open = {one: of for one, of in self._open.items() if not one.is_closing()}
            self._open[transport] = (credential, identity)

    def _end_revoked(self) -> None:
        for transport, (credential, identity) in tuple(self._open.items()):
            try:
                is_same = self.identify(credential) == identity
            except SkepError:
                is_same = False
            if not is_same:
                log.info("api connection ended: its user's rights have changed", user=identity.name)
                transport.abort()
            if not is_same or transport.is_closing():
                del self._open[transport]

    # --- what the manager process sends -----------------------------------------------------------------------

    async def _follow(self) -> None:
        backoff = Backoff(0.1, 2.0, rng=self._rng)
        while True:
            try:
                async with self._manager_api.lines("/_skep/access", {}) as lines:
                    backoff.reset()
                    async for line in lines:
                        self.apply_access(msgspec.json.decode(line, type=AccessTable))
            except (SkepError, OSError, msgspec.DecodeError):
                pass  # the manager process is not running
            await backoff.sleep(self._clock)

    def apply_access(self, table: AccessTable) -> None:
        if not table.is_current:
            return  # the manager no longer sees removals of users
        self._received_at = self._clock.monotonic()
        self._by_key = {
            key: (user, end_ns)
            for user in table.users
            for key, end_ns in (user.serials | user.tokens).items()
        }
        self._root = x509.load_pem_x509_certificate(table.root_pem.encode()) if table.root_pem else None
        self._trust(table.root_pem)
        self._end_revoked()

    def _trust(self, root_pem: str) -> None:
        """Trust the users' authority from the next handshake on, if it has changed.

        Retries later if a TLS file is damaged.
        """
        if (
            self.tls is None
            or root_pem == self._trusted_pem
            or self._clock.monotonic() < self._trust_again_at
        ):
            return
        try:
            self.tls.trust(root_pem)
        except SkepError as error:
            delay_s = self._trust_backoff.next_delay_s()
            self._trust_again_at = self._clock.monotonic() + delay_s
            log.warning("the authority of users is not trusted yet", reason=str(error), again_in_s=delay_s)
        else:
            self._trusted_pem = root_pem
            self._trust_backoff.reset()
            self._trust_again_at = float("-inf")


def bearer(authorization: bytes) -> Credential:
    """Return the token in an ``Authorization`` header.  Raises: Unauthenticated: it has none."""
    scheme, _, token = authorization.strip().partition(b" ")
    token = token.strip()
    if scheme.lower() != b"bearer" or not 0 < len(token) <= TOKEN_BYTES_MAX:
        raise Unauthenticated("a certificate is needed, or a token: Authorization: Bearer TOKEN")
    return Credential.of_token(token)


def tls_context(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """Return the API's TLS context, which accepts client certificates of ``authority``.

    Raises: FailedPrecondition: a file is invalid.
    """
    context = server_context(certificate, key, authority)
    # A client without a certificate may have a token in its first request.  Without either it is refused.
    context.verify_mode = ssl.CERT_OPTIONAL
    # A resumed session would skip verification with the present authorities.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    return context


def _is_issued_by(certificate: x509.Certificate, root: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _common_name(certificate: Mapping[str, Any] | None) -> str:
    subject = {key: value for names in (certificate or {}).get("subject", ()) for key, value in names}
    name: str = subject.get("commonName", "")
    return name.encode("ascii", "replace").decode()[:_NAME_MAX]

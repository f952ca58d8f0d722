"""Who a client by TCP is: what certificates and tokens prove, and for how long that is believed."""

import asyncio
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.client.client import ApiClient
from skep.errors import Unauthenticated, Unavailable
from skep.manager.control.users import ROOT_NAME, digest_of, new_token
from skep.model.node import NodeRole
from skep.model.permissions.access import Credential, Origin, parse_binding
from skep.model.permissions.user import AccessTable, UserCredentials
from skep.model.values.ids import ClusterId, NodeId
from skep.model.values.times import SECOND_NS
from skep.node.front.users import SILENT_S, ApiTls, KnownUsers, bearer
from skep.security.authority import Authority
from skep.security.identity import NodeIdentity, identity_of
from skep.security.keypair import CERTIFICATE_FILE, KEY_FILE, ROOT_FILE, KeyPair, save
from skep.security.keys import new_private_key, private_pem, signing_request
from skep.security.tls import ServerTls


class AClock(SystemClock):
    """That a test moves."""

    ahead_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead_s

    def now_ns(self) -> int:
        return super().now_ns() + int(self.ahead_s * SECOND_NS)


class AConnection:
    """With a certificate, as the transport of a connection by TLS shows it."""

    def __init__(self, certificate_pem: bytes | None) -> None:
        self._pem = certificate_pem
        self.is_aborted = False

    def get_extra_info(self, _name: str) -> Any:
        return self

    def getpeercert(self, binary_form: bool = False) -> Any:
        if self._pem is None:
            return b"" if binary_form else {}
        found = x509.load_pem_x509_certificate(self._pem)
        if binary_form:
            return found.public_bytes(serialization.Encoding.DER)
        return {"subject": tuple(((one.rfc4514_attribute_name, one.value),) for one in found.subject)}

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True


ROOT = Authority.create(name=ROOT_NAME)


def a_certificate(root: Authority = ROOT, *, lifetime_s: int = 3600) -> tuple[str, bytes]:
    now = SystemClock().now_ns()
    return root.issue_user(signing_request(new_private_key()), "ann", now, now + lifetime_s * SECOND_NS)


def a_table(
    *, serials: dict[str, int] | None = None, tokens: dict[str, int] | None = None, **fields: Any
) -> AccessTable:
    bindings = (parse_binding(fields.pop("role", "viewer")),)
    ann = UserCredentials(name="ann", bindings=bindings, serials=serials or {}, tokens=tokens or {})
    return AccessTable(root_pem=ROOT.root_pem.decode(), users=(ann,), **fields)


@pytest.fixture
def clock() -> AClock:
    return AClock()


@pytest.fixture
def users(clock: AClock) -> KnownUsers:
    return KnownUsers(ApiClient.local(Path("/nonexistent"), "no manager"), clock, lambda: 0.5, None)


LATER = SystemClock().now_ns() + 3600 * SECOND_NS


def proved(users: KnownUsers, certificate: bytes | None) -> Credential | None:
    return users.proved_by(AConnection(certificate))  # type: ignore[arg-type]


def test_a_users_certificate_is_known_by_its_serial_number(users: KnownUsers) -> None:
    serial, certificate = a_certificate()
    users.apply_access(a_table(serials={serial: LATER}))
    credential = proved(users, certificate)
    assert credential == Credential(Origin.CERTIFICATE, serial)
    identity = users.identify(credential)
    assert (identity.name, identity.serial) == ("ann", serial)


def test_a_certificate_that_was_not_issued_or_was_revoked_proves_nothing(users: KnownUsers) -> None:
    _, certificate = a_certificate()
    users.apply_access(a_table())
    credential = proved(users, certificate)
    assert credential is not None
    with pytest.raises(Unauthenticated, match="unknown or was revoked"):
        users.identify(credential)


def test_a_users_certificate_of_another_authority_is_never_an_administrators(users: KnownUsers) -> None:
    """As of a cluster that the machine has left: its authority may still have been trusted at the handshake."""
    _, certificate = a_certificate(Authority.create(name=ROOT_NAME))
    users.apply_access(a_table())
    with pytest.raises(Unauthenticated, match="earlier user authority"):
        proved(users, certificate)


def test_a_token_of_the_dashboard_is_no_credential_of_the_api(users: KnownUsers) -> None:
    token = new_token()
    table = a_table(tokens={digest_of(token): LATER})
    (ann,) = table.users
    users.apply_access(replace(table, users=(replace(ann, logins=frozenset({digest_of(token)})),)))
    with pytest.raises(Unauthenticated, match="opens the dashboard only"):
        users.identify(bearer(b"Bearer " + token.encode()))
    assert users.identify(Credential.of_token(token.encode(), is_login=True)).name == "ann"


def test_a_certificate_and_a_token_end(users: KnownUsers, clock: AClock) -> None:
    serial, certificate = a_certificate()
    token = new_token()
    users.apply_access(a_table(serials={serial: LATER}, tokens={digest_of(token): LATER}))
    clock.ahead_s = 3601
    users.apply_access(a_table(serials={serial: LATER}, tokens={digest_of(token): LATER}))
    for credential in (proved(users, certificate), bearer(b"Bearer " + token.encode())):
        assert credential is not None
        with pytest.raises(Unauthenticated, match="has expired"):
            users.identify(credential)


@pytest.mark.parametrize("header", [b"", b"Bearer", b"Bearer ", b"Basic YTpi", b"Bearer " + b"x" * 513])
def test_what_is_no_token_is_refused(header: bytes) -> None:
    with pytest.raises(Unauthenticated):
        bearer(header)


def test_a_token_is_found_by_its_digest_alone(users: KnownUsers) -> None:
    token = new_token()
    digest = digest_of(token)
    users.apply_access(a_table(tokens={digest: LATER}))
    assert users.identify(bearer(b"bearer " + token.encode())).name == "ann"
    for wrong in (token[:-1], token + "x", digest, "\xff"):
        with pytest.raises(Unauthenticated):
            users.identify(bearer(b"Bearer " + wrong.encode("latin-1")))


def test_users_are_not_believed_for_long_without_a_current_manager(users: KnownUsers, clock: AClock) -> None:
    token = new_token()
    users.apply_access(a_table(tokens={digest_of(token): LATER}))
    clock.ahead_s = SILENT_S + 1
    users.apply_access(a_table(tokens={digest_of(token): LATER}, is_current=False))
    with pytest.raises(Unavailable):
        users.identify(bearer(b"Bearer " + token.encode()))
    assert users.identify(Credential(Origin.MACHINE, "root")).is_admin


@pytest.mark.parametrize("change", [{"tokens": {}}, {"role": "operator"}])
def test_open_connections_end_with_the_rights_of_their_user(
    users: KnownUsers, change: dict[str, Any]
) -> None:
    token = new_token()
    tokens = {digest_of(token): LATER}
    users.apply_access(a_table(tokens=tokens))
    credential, connection = bearer(b"Bearer " + token.encode()), AConnection(None)
    users.remember(connection, credential, users.identify(credential))  # type: ignore[arg-type]
    users.apply_access(a_table(tokens=tokens))
    assert not connection.is_aborted
    users.apply_access(a_table(**{"tokens": tokens, **change}))
    assert connection.is_aborted


def test_a_users_certificate_is_no_nodes() -> None:
    """By its authority, its subject and its use, each of which would do."""
    cluster = Authority.create()
    _, certificate = a_certificate()
    found = x509.load_pem_x509_certificate(certificate)
    with pytest.raises((ValueError, InvalidSignature)):
        found.verify_directly_issued_by(cluster.certificate)
    with pytest.raises(Unauthenticated):
        identity_of(found)
    uses = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [use._name for use in uses] == ["clientAuth"]
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_request_for_another_name_or_role_changes_nothing() -> None:
    """Of a request only the key counts."""
    _, certificate = a_certificate()
    subject = x509.load_pem_x509_certificate(certificate).subject.rfc4514_string()
    assert subject == "CN=ann,OU=skep-user"


def test_a_damaged_file_of_tls_delays_the_authority_of_users_and_is_read_again(
    tmp_path: Path, clock: AClock
) -> None:
    """After 1, 2, 4 s and so on; the users are those that were received, meanwhile too."""
    cluster, key = Authority.create(), new_private_key()
    identity = NodeIdentity(node_id=NodeId("n"), cluster_id=ClusterId("c"), role=NodeRole.MANAGER)
    certificate = cluster.sign(signing_request(key), identity)
    save(KeyPair(certificate_pem=certificate, key_pem=private_pem(key), root_pem=cluster.root_pem), tmp_path)
    files = [tmp_path / name for name in (CERTIFICATE_FILE, KEY_FILE, ROOT_FILE)]
    tls = ApiTls(*files)
    users = KnownUsers(ApiClient.local(Path("/nonexistent"), "no manager"), clock, lambda: 1.0, tls)
    serial, _ = a_certificate()
    table = a_table(serials={serial: LATER})

    def authorities() -> int:
        return len(tls._current.get_ca_certs())

    files[0].write_text("damaged")
    for wait_s in (1, 2, 4):
        users.apply_access(table)
        clock.ahead_s += wait_s - 0.5
        users.apply_access(table)
        clock.ahead_s += 0.6
    assert users.identify(Credential(Origin.CERTIFICATE, serial)).name == "ann"
    assert authorities() == 1, "the machine's alone"
    users.apply_access(table)
    files[0].write_bytes(certificate)
    users.apply_access(table)
    assert authorities() == 1, "the next attempt is in 8 s"
    clock.ahead_s += 8
    users.apply_access(table)
    assert authorities() == 2
    users.apply_access(a_table(serials={}))
    users.apply_access(AccessTable())
    assert authorities() == 1, "a node without a cluster trusts its own authority alone"


async def test_a_managers_port_refuses_the_certificate_of_a_user(tmp_path: Path) -> None:
    """In the handshake, with the context that managers' ports have."""
    cluster, key = Authority.create(), new_private_key()
    identity = NodeIdentity(node_id=NodeId("n"), cluster_id=ClusterId("c"), role=NodeRole.MANAGER)
    pair = KeyPair(
        certificate_pem=cluster.sign(signing_request(key), identity),
        key_pem=private_pem(key),
        root_pem=cluster.root_pem,
    )
    own = new_private_key()
    met: list[str] = []
    now = SystemClock().now_ns()
    _, certificate = ROOT.issue_user(signing_request(own), "n", now, LATER)
    save(KeyPair(certificate_pem=certificate, key_pem=private_pem(own), root_pem=cluster.root_pem), tmp_path)
    client = ssl.create_default_context(cadata=cluster.root_pem.decode())
    client.load_cert_chain(*(tmp_path / name for name in (CERTIFICATE_FILE, KEY_FILE)))
    served = await asyncio.start_server(
        lambda *_: met.append("a user"), "127.0.0.1", 0, ssl=ServerTls(pair).front
    )
    async with served:
        port = served.sockets[0].getsockname()[1]

        async def connect() -> None:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=client, server_hostname="swarm-manager"
            )
            try:
                await reader.read()  # in TLS 1.3 the refusal comes after the client's handshake
            finally:
                writer.close()

        with suppress(ssl.SSLError, ConnectionError):
            await connect()
    assert met == [], "the handshake is refused"

"""A real etcd member for tests, its certificates, and a relay that can disturb its connection."""

import asyncio
import datetime
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from skep.aio.backoff import Backoff
from skep.aio.clock import SystemClock
from skep.security.tls import MANAGER_NAME
from skep.store.etcd.process.binary import find_binary
from skep.store.etcd.process.flags import MemberSettings, PeerFiles
from skep.store.etcd.process.member import EtcdMember


def free_port() -> int:
    """Return a free port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def peer_files(directory: Path, name: str = "m1", role: str = MANAGER_NAME) -> PeerFiles:
    """Write a CA and a node certificate with ``role`` among its names below ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test-ca")])
    now = datetime.datetime.now(datetime.UTC)
    base = x509.CertificateBuilder().not_valid_before(now - datetime.timedelta(hours=1))
    base = base.not_valid_after(now + datetime.timedelta(days=1))
    ca = (
        base.subject_name(ca_name)
        .issuer_name(ca_name)
        .public_key(ca_key.public_key())
        .serial_number(1)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    leaf = (
        base.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(ca_name)
        .public_key(key.public_key())
        .serial_number(2)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name), x509.DNSName(role)]), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            critical=False,
        )
        .sign(ca_key, hashes.SHA256())
    )
    files = PeerFiles(
        certificate=directory / "node.crt", key=directory / "node.key", roots=directory / "ca.crt"
    )
    files.certificate.write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    files.roots.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


def member_settings(root: Path, *, name: str = "m1") -> MemberSettings:
    """Return settings of a single-member cluster below ``root``, without fsync."""
    return MemberSettings(
        name=name,
        directory=root / name / "etcd",
        socket=root / name / "etcd.sock",
        peer_listen=f"127.0.0.1:{free_port()}",
        peer_files=peer_files(root / name / "certificates", name),
        cluster_token="cluster",
        is_fsync_off=True,
    )


def a_member(settings: MemberSettings) -> EtcdMember:
    """Return a member that is not running yet: ``async with a_member(settings).running():``."""
    return EtcdMember(settings, find_binary(), SystemClock(), Backoff(0.02, 0.2))


class Relay:
    """Stands between a client and etcd's socket.  It can cut connections, and lose a request or replies."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self._swallows_replies = False
        self._request_to_lose: bytes | None = None

    @asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator["Relay"]:
        """Serve on ``path`` until the block ends."""
        server = await asyncio.start_unix_server(self._serve, path)
        try:
            yield self
        finally:
            server.close()
            self._drop()

    def cut(self) -> None:
        """Break all connections and accept no new one until ``reconnect``."""
        self._is_cut = True
        self._drop()

    def lose_request_with(self, content: bytes) -> None:
        """Break the connection instead of forwarding the next request that has ``content``."""
        self._request_to_lose = content

    def swallow_replies(self) -> None:
        """Forward requests but not their responses, until ``reconnect``."""
        self._swallows_replies = True

    def reconnect(self) -> None:
        """End all disturbances.  A connection with lost data is closed."""
        if self._swallows_replies:
            self._drop()
        self._is_cut = self._swallows_replies = False
        self._request_to_lose = None

    def _drop(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self._is_cut:
                return
            there, here = await asyncio.open_unix_connection(self._target)
            try:
                async with asyncio.TaskGroup() as group:
                    pumps = (
                        group.create_task(self._pass_requests(reader, here)),
                        group.create_task(self._pass_replies(there, writer)),
                    )
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                    for pump in pumps:
                        pump.cancel()
            finally:
                here.transport.abort()
        except (ConnectionError, FileNotFoundError):
            return  # etcd is not running at the moment
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pass_requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 20):
                if self._request_to_lose is not None and self._request_to_lose in data:
                    self._request_to_lose = None
                    return
                writer.write(data)
                await writer.drain()

    async def _pass_replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 20):
                if not self._swallows_replies:
                    writer.write(data)
                    await writer.drain()

"""The log driver syslog: RFC 3164 or RFC 5424 over UDP, TCP, TLS or the machine's own socket.

Source: moby, daemon/logger/syslog/syslog.go; RackSec/srslog.
"""

import errno
import os
from collections.abc import Sequence
from datetime import datetime
from urllib.parse import urlsplit

from skep.engine.containers.container import StandardStream
from skep.engine.log_drivers.facts import LogFacts, tag_of
from skep.engine.log_drivers.message import LogMessage
from skep.engine.log_drivers.options import Options, refuse_unknown
from skep.engine.log_drivers.transport import (
    ANYWHERE,
    LogConnection,
    RemoteAddress,
    RemoteTlsFiles,
    connect,
    host_and_port,
)
from skep.errors import InvalidArgument
from skep.linux.network.guard import Guard
from skep.model.values.times import SECOND_NS

KNOWN = frozenset(
    f"syslog-{name}"
    for name in ("address", "facility", "tls-ca-cert", "tls-cert", "tls-key", "tls-skip-verify", "format")
)
_FACILITIES = (
    *("kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp"),
    *("", "", "", ""),
    *(f"local{number}" for number in range(8)),
)
_FORMATS = ("", "rfc3164", "rfc5424", "rfc5424micro")
# Facility and severities of RFC 5424.
_DAEMON, _ERROR, _INFORMATION = 3, 3, 6
_PORT = 514
"""Default port of syslog."""
_SCHEMES = ("unix", "unixgram", "udp", "tcp", "tcp+tls")
_LOCAL_SOCKETS = ("/dev/log", "/var/run/syslog", "/var/run/log")


def check(options: Options) -> None:
    """Check the driver's options.  Raises: InvalidArgument, in Docker's words."""
    refuse_unknown("syslog", options, KNOWN)
    for endpoint in _endpoints(options) if options.get("syslog-address") else ():
        # Only at the creation: later, the server may be away for a while.
        if endpoint.path and not os.path.exists(endpoint.path):
            raise InvalidArgument(f"stat {endpoint.path}: no such file or directory")
    _facility(options.get("syslog-facility", ""))
    if options.get("syslog-format", "") not in _FORMATS:
        raise InvalidArgument("Invalid syslog format")


class Syslog:
    """A connection to a syslog server."""

    def __init__(self, options: Options, facts: LogFacts, guard: Guard = ANYWHERE) -> None:
        self._guard = guard
        self._tag = tag_of(options, facts)
        self._endpoints = _endpoints(options)
        self._facility = _facility(options.get("syslog-facility", ""))
        self._format = options.get("syslog-format", "")
        self._counts_bytes = options.get("syslog-address", "").startswith("tcp+tls:") and self._format in (
            "rfc5424",
            "rfc5424micro",
        )
        self._hostname = facts.hostname
        self.confirms_each = self._endpoints[0].network in ("udp", "unixgram")
        self._connection: LogConnection | None = None

    async def open(self) -> None:
        """Connect to the server.  Without an address, connect to the first existing syslog socket of the machine."""
        last = OSError(errno.ENOENT, "there is no socket of a syslog server")
        for endpoint in self._endpoints:
            try:
                self._connection = await connect(endpoint, self._guard)
                return
            except OSError as error:
                last = error
        raise last

    async def send(self, message: LogMessage) -> None:
        if not message.line:
            return
        assert self._connection is not None, "it is open"
        await self._connection.send(self.framed(message))

    async def flush(self) -> None:
        """Do nothing, because a syslog server does not acknowledge messages."""

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def framed(self, message: LogMessage) -> bytes:
        """Encode ``message`` for the connection."""
        severity = _ERROR if message.stream is StandardStream.STDERR else _INFORMATION
        head = _head(
            self._format, (self._facility << 3) | severity, message.timestamp_ns, self._hostname, self._tag
        )
        whole = head.encode() + message.line
        if not whole.endswith(b"\n"):
            whole += b"\n"
        return b"%d %b" % (len(whole), whole) if self._counts_bytes else whole


def _head(format: str, priority: int, moment_ns: int, hostname: str, tag: str) -> str:
    # The protocol has the time in the sender's time zone, as Docker sends it.
    moment = datetime.fromtimestamp(moment_ns // SECOND_NS).astimezone()
    pid = os.getpid()
    if format in ("", "rfc3164"):
        name = f"{hostname} " if format else ""
        return f"<{priority}>{moment:%b} {moment.day:2d} {moment:%H:%M:%S} {name}{tag}[{pid}]: "
    fraction = f".{moment_ns % SECOND_NS // 1000:06d}" if format == "rfc5424micro" else ""
    offset = f"{moment:%z}"
    zone = "Z" if offset in ("", "+0000") else f"{offset[:3]}:{offset[3:5]}"
    return f"<{priority}>1 {moment:%Y-%m-%dT%H:%M:%S}{fraction}{zone} {hostname} {tag} {pid} {tag} - "


def _facility(text: str) -> int:
    if not text:
        return _DAEMON
    if text in _FACILITIES:
        return _FACILITIES.index(text)
    if text.isascii() and text.isdigit() and len(text) < 4 and int(text) <= 23:
        return int(text)
    raise InvalidArgument("invalid syslog facility")


def _endpoints(options: Options) -> Sequence[RemoteAddress]:
    """Return the possible addresses of the server.  Raises: InvalidArgument."""
    address = options.get("syslog-address", "")
    if not address:
        return [
            RemoteAddress(network=network, path=path)
            for network in ("unixgram", "unix")
            for path in _LOCAL_SOCKETS
        ]
    if address.partition("://")[0] not in _SCHEMES:
        raise InvalidArgument(f"syslog-address should be in form proto://address, got {address}")
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise InvalidArgument(f'parse "{address}": {error}') from error
    if parts.scheme in ("unix", "unixgram"):
        return [RemoteAddress(network=parts.scheme, path=parts.path)]
    host, port = host_and_port(parts.netloc, _PORT)
    tls = None
    if parts.scheme == "tcp+tls":
        tls = RemoteTlsFiles(
            ca=options.get("syslog-tls-ca-cert", ""),
            certificate=options.get("syslog-tls-cert", ""),
            key=options.get("syslog-tls-key", ""),
            verifies="syslog-tls-skip-verify" not in options,
        )
    return [RemoteAddress(network=parts.scheme.partition("+")[0], host=host, port=port, tls=tls)]

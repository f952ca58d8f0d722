"""Sends a message as mail, by SMTP with TLS.

A small client on asyncio, because the standard library's blocks a thread that no deadline ends.

Source: RFC 5321 (SMTP), RFC 3207 (STARTTLS), RFC 4954 (AUTH), RFC 4616 (PLAIN).
"""

import asyncio
import base64
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate
from typing import Any

from skep.linux.network.guard import Guard
from skep.manager.notify.addresses import TargetAddress
from skep.manager.notify.messages import Message
from skep.model.values.times import SECOND_NS

_LINES_MAX = 64
"""Largest number of lines in one response.  A server has a few dozen extensions at most."""
_CLOSE_S = 5.0
"""Seconds for a server to read the end of the connection.  It has the mail by then."""


class MailRefused(Exception):
    """The mail server refused a command."""


class MailServerUnreachable(Exception):
    """No connection to the mail server came about, because of ``os_error``."""

    def __init__(self, host: str, port: int, os_error: OSError) -> None:
        super().__init__(f"cannot connect to {host}:{port}: {os_error}")
        self.host, self.port, self.os_error = host, port, os_error


async def send_mail(address: TargetAddress, password: str, message: Message, guard: Guard) -> None:
    """Send ``message`` to all recipients.  The caller sets a deadline.

    Raises:
        MailServerUnreachable: No address of the server responds.
        MailRefused: It refuses the mail, or offers no TLS although there is a password.
        OSError, EOFError: The connection fails later.
    """
    context = await asyncio.to_thread(ssl.create_default_context)
    async with _connect(address, guard, context if address.is_tls else None) as connection:
        await connection.expect(220)
        extensions = await connection.greet()
        if not address.is_tls and "STARTTLS" in extensions:
            await connection.command("STARTTLS", 220)
            await connection.start_tls(context, address.host)
            extensions = await connection.greet()
        elif not address.is_tls and password:
            raise MailRefused("the mail server offers no STARTTLS, so it does not get the password")
        if password:
            plain = base64.b64encode(f"\0{address.user}\0{password}".encode()).decode()
            await connection.command(f"AUTH PLAIN {plain}", 235, shown="AUTH")
        await connection.command(f"MAIL FROM:<{address.sender}>", 250)
        for recipient in address.recipients:
            await connection.command(f"RCPT TO:<{recipient}>", 250, 251)
        await connection.command("DATA", 354)
        # A line that begins with a dot gets another one, because a single dot ends the mail.
        content = mail_of(address, message).as_bytes(policy=SMTP)
        lines = content.replace(b"\r\n.", b"\r\n..")
        connection.writer.write(lines + (b"" if lines.endswith(b"\r\n") else b"\r\n"))
        await connection.command(".", 250, shown="the message")
        connection.writer.write(b"QUIT\r\n")  # the server has the mail, whatever it responds


def mail_of(address: TargetAddress, message: Message) -> EmailMessage:
    """Return the mail.  Its Message-ID is the same at every attempt, so mail servers drop a second copy."""
    mail = EmailMessage()
    mail["From"], mail["To"] = address.sender, ", ".join(address.recipients)
    mail["Subject"] = message.subject
    mail["Date"] = formatdate(message.at_ns / SECOND_NS)
    mail["Message-ID"] = f"<{message.id}@{address.sender.rpartition('@')[2]}>"
    mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody's absence responds to it
    mail.set_content(message.text)
    return mail


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Continue with TLS.  A new reader drops what came before it, which anyone on the path may have sent."""
        loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport = await loop.start_tls(self.writer.transport, protocol, context, server_hostname=host)
        assert transport is not None, "the connection is open"
        protocol.connection_made(transport)
        self._reader, self.writer = reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def greet(self) -> Sequence[str]:
        """Say hello, and return the names of the server's extensions."""
        lines = await self.command("EHLO [127.0.0.1]", 250)  # a literal, because the host may have no name
        return [line.upper().split(" ")[0] for line in lines[1:]]

    async def command(self, line: str, *codes: int, shown: str = "") -> Sequence[str]:
        """Send a command and return the lines of its response.  ``shown`` replaces it in errors."""
        self.writer.write(f"{line}\r\n".encode())
        await self.writer.drain()
        return await self.expect(*codes, after=shown or line)

    async def expect(self, *codes: int, after: str = "the connection") -> Sequence[str]:
        """Return the lines of a response with one of ``codes``.  Raises: MailRefused, OSError, EOFError."""
        lines: list[str] = []
        while len(lines) < _LINES_MAX:
            try:
                line = (await self._reader.readuntil(b"\n")).decode(errors="replace").rstrip()
            except asyncio.LimitOverrunError as error:
                raise MailRefused("the mail server sends a line without end") from error
            lines.append(line[4:])
            if line[3:4] != "-":
                if line[:3] not in map(str, codes):
                    raise MailRefused(f"the mail server responded {line} to {after}")
                return lines
        raise MailRefused("the mail server sends a response without end")


@asynccontextmanager
async def _connect(
    address: TargetAddress, guard: Guard, tls: ssl.SSLContext | None
) -> AsyncIterator[_Connection]:
    """Connect to the first address that ``guard`` allows and that responds.  The name is not resolved again."""
    loop = asyncio.get_running_loop()
    try:
        infos = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise MailServerUnreachable(address.host, address.port, error) from error
    last: OSError = OSError(errno.EADDRNOTAVAIL, f"{address.host} has no address")
    for family, _, _, _, found in infos:
        try:
            guard.check(str(found[0]))
            reader, writer = await _open(family, found, tls, address.host)
        except OSError as error:
            last = error
            continue
        connection = _Connection(reader, writer)
        try:
            yield connection
        finally:
            connection.writer.close()
            # Abort later, because closing waits for a server that does not read.
            loop.call_later(_CLOSE_S, connection.writer.transport.abort)
        return
    raise MailServerUnreachable(address.host, address.port, last)


async def _open(
    family: int, found: tuple[Any, ...], tls: ssl.SSLContext | None, host: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        await asyncio.get_running_loop().sock_connect(connection, found)
        name = host if tls is not None else None
        return await asyncio.open_connection(sock=connection, ssl=tls, server_hostname=name)
    except BaseException:
        connection.close()
        raise

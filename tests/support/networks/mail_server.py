"""A small mail server on loopback, for clients that send one mail in a connection."""

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class MailServer:
    """Accepts mail, and keeps it.

    ``tls`` is offered as STARTTLS.  ``refusals`` are responses to commands, by their first word.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, credentials: str = "") -> None:
        self.tls = tls
        self.credentials = credentials
        self.refusals: dict[str, str] = {}
        self.mails: list[str] = []
        self.commands: list[str] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_secure, is_known = writer.get_extra_info("ssl_object") is not None, False
        writer.write(b"220 mail.test ready\r\n")
        while line := (await reader.readline()).decode().rstrip():
            word, _, rest = line.partition(" ")
            self.commands.append(f"{word} over TLS" if is_secure else word)
            if (refusal := self.refusals.get(word)) is not None:
                writer.write(f"{refusal}\r\n".encode())
                continue
            match word:
                case "EHLO":
                    offers = ["mail.test", "SIZE 1000", *(["STARTTLS"] if self.tls and not is_secure else [])]
                    marks = ["-"] * (len(offers) - 1) + [" "]
                    lines = [f"250{mark}{offer}\r\n" for mark, offer in zip(marks, offers, strict=True)]
                    writer.write("".join(lines).encode())
                case "STARTTLS":
                    assert self.tls is not None
                    # A response that whoever is on the path adds before the handshake.
                    writer.write(b"220 go ahead\r\n250 injected\r\n")
                    await writer.start_tls(self.tls)
                    is_secure = True
                case "AUTH":
                    given = base64.b64decode(rest.partition(" ")[2]).decode()
                    is_known = given == self.credentials
                    writer.write(b"235 welcome\r\n" if is_known else b"535 wrong password\r\n")
                case "DATA":
                    writer.write(b"354 end with a dot\r\n")
                    content = (await reader.readuntil(b"\r\n.\r\n"))[:-5].decode()
                    self.mails.append(content.replace("\r\n..", "\r\n."))
                    writer.write(b"250 kept\r\n")
                case "QUIT":
                    break
                case _:
                    writer.write(b"250 ok\r\n")
        writer.close()


@asynccontextmanager
async def a_mail_server(
    offered: ssl.SSLContext | None = None, *, tls: ssl.SSLContext | None = None, credentials: str = ""
) -> AsyncIterator[MailServer]:
    """``offered``: with STARTTLS.  ``tls``: from the first byte."""
    mail = MailServer(offered, credentials)
    server = await asyncio.start_server(mail.serve, "127.0.0.1", 0, ssl=tls)
    mail.port = server.sockets[0].getsockname()[1]
    async with server:
        yield mail

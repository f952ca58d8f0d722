"""Sends one message to one target, over HTTP or as mail.

Every attempt has one deadline, connects only to addresses that the target may have, and follows no redirect.
Connections are not kept, because messages are rare and an address may change.
"""

import asyncio
import hashlib
import hmac
import os
import socket
import ssl
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver
from yarl import URL

from skep.aio.clock import Clock
from skep.errors import InvalidArgument, reason_of
from skep.linux.network.guard import Guard
from skep.manager.notify.addresses import TargetAddress, TargetKind, parsed_address
from skep.manager.notify.mail import MailRefused, MailServerUnreachable, send_mail
from skep.manager.notify.messages import Message
from skep.manager.notify.records import Target
from skep.model.history import cut
from skep.model.networks.addresses import parted
from skep.model.node import Node
from skep.model.task_end import on_one_line
from skep.model.values.times import SECOND_NS
from skep.store.interface import View

SEND_S = 20.0
"""Time limit in seconds for one attempt: connection, TLS, request and response.  Chat services respond in one."""
_RESPONSE_BYTES_MAX = 1024
"""Bytes of a response that are read.  The rest is not needed, however long it is."""
_REASON_CHARACTERS_MAX = 200
"""Longest reason of a failure.  A web server may respond with a page."""
_NOT_CONNECTED = "Connect call failed"
"""Words of asyncio's error of a connection."""
_NO_TLS = "it does not speak TLS at this port"
_NO_TLS_REASONS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")
"""OpenSSL's reasons if the first bytes of the other side are no TLS record.  The last one is OpenSSL 3.2's."""
_RULE = "needs --allow-internal"
ID_HEADER, SIGNATURE_HEADER = "Skep-Notification-Id", "Skep-Signature"


class SendFailed(Exception):
    """The target did not accept the message."""


class MessageSender:
    """Sends messages from this manager."""

    def __init__(self, view: Callable[[], View], clock: Clock, send_s: float = SEND_S) -> None:
        self._view = view
        self._clock = clock
        self._send_s = send_s

    async def send(self, target: Target, message: Message) -> str:
        """Send a message within ``send_s``.  Returns the reason of a failure, without credentials, or an empty text."""
        try:
            async with asyncio.timeout(self._send_s):
                await self._send(target, message)
        except TimeoutError:
            return f"it did not respond within {self._send_s:g} s"
        except SendFailed as error:  # in our words, with what the target said masked already
            return cut(on_one_line(str(error)), _REASON_CHARACTERS_MAX)
        except (
            aiohttp.ClientError,
            EOFError,
            InvalidArgument,
            MailRefused,
            MailServerUnreachable,
            OSError,
            UnicodeError,
            ValueError,
        ) as error:
            reason = on_one_line(words_of(error)) or type(error).__name__
            return cut(_without_credentials(reason, target), _REASON_CHARACTERS_MAX)
        return ""

    async def _send(self, target: Target, message: Message) -> None:
        address = parsed_address(target.url)
        guard = _guard(self._view, target)
        if address.kind is TargetKind.MAIL:
            await send_mail(address, target.secret, message, guard)
            return
        method, url, body, headers = request_of(
            address, target.secret, message, self._clock.now_ns() // SECOND_NS
        )

        async with (
            aiohttp.ClientSession(
                connector=guarded_connector(guard), cookie_jar=aiohttp.DummyCookieJar()
            ) as session,
            session.request(
                method, URL(url, encoded=True), data=body, headers=headers, allow_redirects=False
            ) as response,
        ):
            if 300 <= response.status < 400:
                host = urlsplit(response.headers.get("Location", "")).hostname or "another address"
                raise SendFailed(f"it redirects to {host}, which is not followed: use the final URL")
            if not 200 <= response.status < 300:
                text = (await response.content.read(_RESPONSE_BYTES_MAX)).decode(errors="replace")
                said = _without_credentials(on_one_line(f"{response.reason}: {text}"), target)
                raise SendFailed(f"it responded {response.status} {said}".rstrip(": "))


def guarded_connector(guard: Guard, resolver: AbstractResolver | None = None) -> "aiohttp.TCPConnector":
    """Return a connector for one request, which connects only to addresses that ``guard`` allows.

    ``resolver`` is None to look up names in the process's default threads.
    """

    def allowed(info: tuple[Any, ...]) -> socket.socket:
        guard.check(str(info[4][0]))
        return socket.socket(info[0], info[1], info[2])

    return aiohttp.TCPConnector(socket_factory=allowed, force_close=True, resolver=resolver)


def check_destination(view: View, target: Target) -> None:
    """Check the target's host if it is an IP address or ``localhost``.  Names are checked for each message.

    Raises: InvalidArgument: no message to the target would be sent.
    """
    host = parsed_address(target.url).host
    try:
        _guard(lambda: view, target).check("127.0.0.1" if host == "localhost" else host)
    except PermissionError as error:
        raise InvalidArgument(str(error.strerror)) from error
    except ValueError:  # the host is a name
        return


def _guard(view: Callable[[], View], target: Target) -> Guard:
    return Guard(lambda: node_addresses(view()), is_restricted=not target.allows_internal, rule=_RULE)


def words_of(error: Exception) -> str:
    """Return why an attempt failed, in words that a user of the target understands.

    asyncio's error of a refused connection has the address in place of the cause, aiohttp adds its TLS settings, and
    errors of TLS have codes of their library.
    """
    if isinstance(error, aiohttp.ClientConnectorError | MailServerUnreachable):
        cause = getattr(error, "certificate_error", None) or error.os_error
        return f"cannot connect to {error.host}:{error.port}: {words_of(cause)}"
    match error:
        case ssl.SSLCertVerificationError():
            return f"its certificate is not trusted: {error.verify_message}"
        case ssl.SSLError():
            return _NO_TLS if error.reason in _NO_TLS_REASONS else reason_of(error)
        case asyncio.IncompleteReadError():
            return "it closed the connection before it responded"
        case OSError() if error.errno and _NOT_CONNECTED in str(error):
            return os.strerror(error.errno)
        case OSError():
            return error.strerror or str(error)
    return str(error)


def node_addresses(view: View) -> Collection[str]:
    """Return the addresses of all nodes of the cluster."""
    found = set()
    for node in view.find(Node):
        manager = node.manager_status
        found.add(node.status.addr)
        found.add(parted(manager.addr)[0] if manager is not None and manager.addr else "")
    return found


def request_of(
    address: TargetAddress, secret: str, message: Message, now_s: int
) -> tuple[str, str, bytes, Mapping[str, str]]:
    """Return method, URL, body and headers of the request with a message."""
    headers = {"Content-Type": "application/json", "User-Agent": "skep", ID_HEADER: message.id}
    match address.kind:
        case TargetKind.SLACK:
            return "POST", address.url, msgspec.json.encode({"text": _escaped(message.text)}), headers
        case TargetKind.MATRIX:
            path = f"_matrix/client/v3/rooms/{quote(address.room, safe='')}/send/m.room.message/{quote(message.id)}"
            content = {"msgtype": "m.notice", "body": message.text}
            headers["Authorization"] = f"Bearer {secret}"
            return "PUT", f"{address.url.rstrip('/')}/{path}", msgspec.json.encode(content), headers
        case _:
            body = msgspec.json.encode(message.body)
            if secret:
                headers[SIGNATURE_HEADER] = signature(secret, body, now_s)
            return "POST", address.url, body, headers


def signature(secret: str, body: bytes, now_s: int) -> str:
    """Return the signature of a webhook: its time, and the HMAC-SHA256 of time and body, as Stripe's webhooks have."""
    digest = hmac.new(secret.encode(), b"%d." % now_s + body, hashlib.sha256).hexdigest()
    return f"t={now_s},v1={digest}"


def _escaped(text: str) -> str:
    """Return ``text`` for Slack, where ``<!channel>`` would notify everyone.

    Source: https://api.slack.com/reference/surfaces/formatting (Escaping text).
    """
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _without_credentials(reason: str, target: Target) -> str:
    """Return ``reason`` without the parts of the target's URL that may be credentials, and without its secret."""
    parts = urlsplit(target.url)
    for text in sorted({target.secret, parts.path.strip("/"), parts.query, parts.username or ""}, key=len):
        if len(text) > 1:
            reason = reason.replace(text, "***")
    return reason

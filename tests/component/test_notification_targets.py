"""Messages reach real web and mail servers, and nothing that a target must not reach."""

import asyncio
import hashlib
import hmac
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.notify.messages import Message
from skep.manager.notify.records import Target
from skep.manager.notify.sending import SEND_S, MessageSender
from skep.store.interface import View
from skep.store.state import State
from tests.support.builders import a_node
from tests.support.networks.mail_server import a_mail_server
from tests.support.security.api_authority import Authority, an_authority

MESSAGE = Message(id="t1-1", cluster="default", cluster_id="c1", at_ns=1_800_000_000 * 10**9, is_test=True)
SECRET = "hush-hush"


def a_target(url: str, *, secret: str = SECRET, allows_internal: bool = True) -> Target:
    return Target(id="t1", name="ops", url=url, secret=secret, allows_internal=allows_internal)


def a_view() -> View:
    view = State()
    node = a_node("n1")
    node = replace(node, status=replace(node.status, addr="10.7.7.7"))
    view.table_by_type[type(node)].store(node.id, None, node, moves=True)
    return view


async def send(
    url: str, *, secret: str = SECRET, allows_internal: bool = True, send_s: float = SEND_S
) -> str:
    """Return the reason of a failure, which never has a credential."""
    target = a_target(url, secret=secret, allows_internal=allows_internal)
    reason = await MessageSender(a_view, SystemClock(), send_s).send(target, MESSAGE)
    assert SECRET not in reason
    assert "path-key" not in reason
    return reason


class Receiver:
    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.response = web.Response(text="ok")
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.requests.append((request.method, request.raw_path, dict(request.headers), body))
        return web.Response(
            status=self.response.status, headers=self.response.headers, body=self.response.body
        )


@asynccontextmanager
async def a_receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", receiver.handle)
    async with TestServer(app) as server:
        receiver.url = f"http://127.0.0.1:{server.port}/path-key"
        yield receiver


async def test_a_webhook_gets_signed_json() -> None:
    async with a_receiver() as receiver:
        assert await send(receiver.url) == ""
    [(method, path, headers, body)] = receiver.requests
    assert (method, path) == ("POST", "/path-key")
    stamp, digest = (part.partition("=")[2] for part in headers["Skep-Signature"].split(","))
    assert digest == hmac.new(SECRET.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    assert headers["Skep-Notification-Id"] == json.loads(body)["ID"] == "t1-1"
    assert SECRET.encode() not in body


async def test_slack_gets_its_text_without_a_signature() -> None:
    async with a_receiver() as receiver:
        assert await send(f"slack+{receiver.url}", secret="") == ""
    [(method, path, headers, body)] = receiver.requests
    assert (method, path) == ("POST", "/path-key")
    assert json.loads(body) == {"text": MESSAGE.text}
    assert headers["Content-Type"] == "application/json"
    assert "Skep-Signature" not in headers


async def test_matrix_gets_a_put_whose_repetition_is_the_same_transaction() -> None:
    async with a_receiver() as receiver:
        base = receiver.url.removesuffix("/path-key")
        for _ in range(2):
            assert await send(f"matrix+{base}/!room:example.org") == ""
    path = "/_matrix/client/v3/rooms/%21room%3Aexample.org/send/m.room.message/t1-1"
    assert [(method, target) for method, target, _, _ in receiver.requests] == [("PUT", path)] * 2
    assert receiver.requests[0][2]["Authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_named_and_not_followed(status: int) -> None:
    async with a_receiver() as inside, a_receiver() as receiver:
        receiver.response = web.Response(status=status, headers={"Location": inside.url})
        reason = await send(receiver.url)
    assert reason == "it redirects to 127.0.0.1, which is not followed: use the final URL"
    assert inside.requests == []


async def test_a_refusal_is_shown_shortened_and_without_the_credentials_that_it_repeats() -> None:
    async with a_receiver() as receiver:
        receiver.response = web.Response(
            status=403, text=f"no {SECRET} for /path-key \x1b[31m" + "page " * 10_000
        )
        reason = await send(receiver.url)
    assert reason.startswith("it responded 403 Forbidden: no *** for /*** page page")
    assert len(reason) <= 200


async def test_a_short_path_masks_nothing_of_the_reason() -> None:
    """A path such as ``/403`` or ``/it`` is in the words of every reason."""
    async with a_receiver() as receiver:
        receiver.response = web.Response(status=403, text="no entry for /403")
        assert (
            await send(receiver.url.replace("path-key", "403"))
            == "it responded 403 Forbidden: no entry for /***"
        )


async def test_a_refused_connection_is_named_with_its_cause() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    assert await send(f"http://{address}/") == f"cannot connect to {address}: Connection refused"


async def test_a_refused_connection_to_a_mail_server_is_named_with_its_cause() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    reason = await send(f"smtp://127.0.0.1:{port}?from=a@b.c&to=d@e.f", secret="")
    assert reason == f"cannot connect to 127.0.0.1:{port}: Connection refused"


@pytest.mark.parametrize("form", ["https://{}/", "smtps://{}?from=a@b.c&to=d@e.f"], ids=["https", "smtps"])
async def test_a_server_without_tls_is_named_as_such(form: str) -> None:
    async with a_mail_server() as server:
        address = f"127.0.0.1:{server.port}"
        reason = await send(form.format(address), secret="")
    assert reason == f"cannot connect to {address}: it does not speak TLS at this port"


async def test_a_mail_server_that_closes_the_connection_is_named_as_such() -> None:
    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        reason = await send(f"smtp://127.0.0.1:{port}?from=a@b.c&to=d@e.f", secret="")
    assert reason == "it closed the connection before it responded"


@pytest.mark.parametrize("url", ["http://{}/", "slack+http://{}/", "smtp://{}?from=a@b.c&to=d@e.f"])
async def test_a_server_that_hangs_is_given_up(url: str) -> None:
    async with asyncio.timeout(10):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            reason = await send(url.format(address), secret="", send_s=0.3)
            assert reason == "it did not respond within 0.3 s"


async def test_a_server_that_never_ends_its_response_is_given_up() -> None:
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 100_000)
        await writer.drain()
        await reader.read()  # until the client is gone
        writer.close()

    server = await asyncio.start_server(trickle, "127.0.0.1", 0)
    async with server, asyncio.timeout(10):
        reason = await send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
    assert reason.startswith("it responded 500 No: xxx")


@pytest.mark.parametrize("form", ["http://{}/", "matrix+http://{}/!r:x", "smtp://{}?from=a@b.c&to=d@e.f"])
@pytest.mark.parametrize(
    ("host", "rule"),
    [
        ("127.0.0.1", "an address of this machine"),
        ("localhost", "an address of this machine"),
        ("[::1]", "an address of this machine"),
        ("[::ffff:127.0.0.1]", "an address of this machine"),
        ("0.0.0.0", "an address of this machine"),
        ("169.254.169.254", "a link-local address"),
        ("10.7.7.7", "an address of another node"),
    ],
)
async def test_internal_addresses_need_permission(form: str, host: str, rule: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        reason = await send(form.format(f"{host}:{port}"), allows_internal=False)
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody has connected
    assert rule in reason
    assert "needs --allow-internal" in reason


async def test_a_name_that_cannot_be_resolved_is_shown() -> None:
    assert (await send("http://none.invalid/")).startswith("cannot connect to none.invalid:80: ")
    mail = await send("smtp://none.invalid?from=a@b.c&to=d@e.f", secret="")
    assert mail.startswith("cannot connect to none.invalid:")
    assert "Errno" not in mail


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    made = an_authority(tmp_path / "ca")
    monkeypatch.setenv("SSL_CERT_FILE", str(made.root))
    return made


def served(authority: Authority) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.pair("mail"))
    return context


def mail_url(scheme: str, port: int, user: str = "skep@") -> str:
    return f"{scheme}://{user}localhost:{port}?from=skep@example.org&to=ops@example.org,duty@example.org"


@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
async def test_a_mail_goes_over_tls_with_a_password(scheme: str, authority: Authority) -> None:
    context = served(authority)
    tls: dict[str, Any] = {"tls": context} if scheme == "smtps" else {"offered": context}
    async with a_mail_server(**tls, credentials=f"\0skep\0{SECRET}") as server:
        assert await send(mail_url(scheme, server.port)) == ""
    [mail] = server.mails
    assert "Subject: [default] Test message" in mail
    assert "Message-ID: <t1-1@example.org>" in mail
    assert "To: ops@example.org, duty@example.org" in mail
    assert server.commands.count("RCPT over TLS") == 2
    assert "AUTH over TLS" in server.commands
    assert SECRET not in mail


async def test_a_mail_server_without_tls_gets_mail_but_no_password() -> None:
    async with a_mail_server() as server:
        reason = await send(mail_url("smtp", server.port))
        assert reason == "the mail server offers no STARTTLS, so it does not get the password"
        assert "AUTH" not in server.commands
        assert await send(mail_url("smtp", server.port, user=""), secret="") == ""
    assert len(server.mails) == 1


async def test_a_mail_server_with_a_certificate_of_another_authority_gets_nothing(
    authority: Authority, tmp_path: Path
) -> None:
    other = served(an_authority(tmp_path / "other"))
    async with a_mail_server(other, credentials=f"\0skep\0{SECRET}") as server:
        reason = await send(mail_url("smtp", server.port))
        assert reason.startswith("its certificate is not trusted: ")
    assert "MAIL" not in " ".join(server.commands)


async def test_what_a_mail_server_refuses_is_shown(authority: Authority) -> None:
    async with a_mail_server(served(authority), credentials="\0skep\0other") as server:
        reason = await send(mail_url("smtp", server.port))
        assert reason == "the mail server responded 535 wrong password to AUTH"
        server.credentials, server.refusals = f"\0skep\0{SECRET}", {"RCPT": "550 no such user"}
        reason = await send(mail_url("smtp", server.port))
        assert "550 no such user to RCPT TO:<ops@example.org>" in reason
    assert server.mails == []

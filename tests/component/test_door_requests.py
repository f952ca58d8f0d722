"""Requests at the front door's HAProxy: gRPC, retries, cookies, clients' addresses, and hostile and slow clients."""

import asyncio
import json
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from msgspec.structs import replace

from skep.dataplane.door import configuration
from skep.model.door.payloads import DoorPayload
from skep.model.values.ids import NodeId
from skep.security.authority import Authority
from tests.component.test_held_requests import directory
from tests.support.networks.door_rig import NODE, DoorRig, a_door
from tests.support.security.external_ca import server_certificate

__all__ = ["directory"]

pytestmark = pytest.mark.needs("haproxy", "root")

ONE, TWO = "127.0.0.2", "127.0.0.3"
WEB = {"skep.http": "a.example"}
GET = b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n"
SECRET = b"GET /secret HTTP/1.1\r\nHost: a.example\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n"
"""A request that an attacker hides in the body of another one."""


@asynccontextmanager
async def a_site(directory: Path, labels: dict[str, str] | None = None) -> AsyncIterator[DoorRig]:
    """Run a front door with the host ``a.example`` and two tasks."""
    async with a_door(directory) as rig, rig.tasks(ONE, TWO):
        rig.service("web", {**WEB, **(labels or {})})
        await rig.apply()
        rig.task("t1", "web", ONE)
        rig.task("t2", "web", TWO)
        await rig.apply()
        yield rig


def body_of(response: bytes) -> dict[str, object]:
    """Return the request as the task got it."""
    head, _, body = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), response
    found: dict[str, object] = json.loads(body)
    return found


def forwarded_for(response: bytes) -> object:
    headers = body_of(response)["headers"]
    assert isinstance(headers, dict)
    return headers["x-forwarded-for"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# -- gRPC ---------------------------------------------------------------------------------------------------------


class Echo(grpc.GenericRpcHandler):
    """A gRPC server's only method, which responds to each message at once."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if details.method == "/echo/Each":
            return grpc.stream_stream_rpc_method_handler(self.each)
        return None

    async def each(
        self, messages: AsyncIterator[bytes], call: grpc.aio.ServicerContext
    ) -> AsyncIterator[bytes]:
        async for one in messages:
            yield one + b" again"
        call.set_trailing_metadata((("said", "all"),))


@pytest.mark.parametrize("is_secure", [False, True])
async def test_grpc_streams_pass_in_both_directions(tmp_path: Path, is_secure: bool) -> None:
    (tmp_path / "volume").mkdir()
    root = Authority.create(name="sites")
    async with a_door(tmp_path / "volume") as rig:
        server = grpc.aio.server(handlers=[Echo()])
        server.add_insecure_port(f"{ONE}:{rig.task_port}")
        await server.start()
        rig.service("web", {**WEB, "skep.http.protocol": "h2c"})
        rig.task("t1", "web", ONE)
        await rig.apply()
        if is_secure:
            chain, key = server_certificate(root, "a.example")
            await rig.send(DoorPayload(certificates={"a.example": f"{chain.decode()}{key.decode()}"}))
            channel = grpc.aio.secure_channel(
                f"127.0.0.1:{rig.tls_port}",
                grpc.ssl_channel_credentials(root.root_pem),
                options=[("grpc.ssl_target_name_override", "a.example")],
            )
        else:
            named = [("grpc.default_authority", "a.example")]
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{rig.port}", options=named)
        async with asyncio.timeout(10), channel:
            call = channel.stream_stream("/echo/Each")()
            for number in range(3):  # each response comes before the next message is sent
                await call.write(b"%d" % number)
                assert await call.read() == b"%d again" % number
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK
            assert ("said", "all") in tuple(await call.trailing_metadata())
            missing = channel.unary_unary("/echo/None")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await missing(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, (
                "the status of a response without a body"
            )
        await server.stop(0)


# -- retries and failing tasks ------------------------------------------------------------------------------------


@asynccontextmanager
async def bare_tasks(rig: DoorRig) -> AsyncIterator[Counter[str]]:
    """Serve two tasks.  One reads requests and closes without a response.  Yields the number of requests of each."""
    got: Counter[str] = Counter()

    async def serve(name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            got[name] += 1
            if name == "responds":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    servers = [
        await asyncio.start_server(lambda r, w, name=name: serve(name, r, w), address, rig.task_port)
        for name, address in (("dies", ONE), ("responds", TWO))
    ]
    try:
        yield got
    finally:
        for server in servers:
            server.close()


async def test_only_repeatable_requests_are_sent_again_once_a_task_has_got_them(tmp_path: Path) -> None:
    async with a_door(tmp_path) as rig, bare_tasks(rig) as got:
        rig.service("web", WEB)
        rig.task("t1", "web", ONE)
        rig.task("t2", "web", TWO)
        await rig.apply()
        for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE"):
            statuses = [(await rig.ask("a.example/", method=method))[0] for _ in range(4)]
            assert statuses == [200] * 4, method
        assert got["dies"] > 0
        for method in ("POST", "PATCH"):
            got.clear()
            statuses = [(await rig.ask("a.example/", method=method))[0] for _ in range(4)]
            assert sorted(statuses) == [200, 200, 502, 502], method
            assert got == {"dies": 2, "responds": 2}, f"{method} reached a task twice"
        rig.service("web", {**WEB, "skep.http.response-header.X-New": "new"})
        del rig.endpoints["t1"]
        rig.task("t3", "web", "127.0.0.4")  # nothing listens there, so no task got the request
        await rig.apply()
        assert [(await rig.ask("a.example/", method="POST"))[0] for _ in range(4)] == [200] * 4


@asynccontextmanager
async def a_silent_task(rig: DoorRig, address: str) -> AsyncIterator[tuple[Counter[str], asyncio.Event]]:
    """Serve a task that responds once the event is set.  Yields the number of requests by method, and the event."""
    got: Counter[str] = Counter()
    responds = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got[(await reader.readuntil(b"\r\n\r\n")).split()[0].decode()] += 1
        await responds.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate")
        writer.close()

    async with await asyncio.start_server(serve, address, rig.task_port):
        yield got, responds
        responds.set()


@pytest.mark.parametrize("is_left_out", [False, True])
async def test_requests_at_a_node_that_no_longer_responds_are_sent_again(
    tmp_path: Path, is_left_out: bool
) -> None:
    """``is_left_out``: no manager is reachable, and the node has noticed it by its own probes."""
    other = NodeId("node2")
    async with a_door(tmp_path) as rig, rig.tasks(TWO), a_silent_task(rig, ONE) as (got, _):
        rig.nodes = (NODE, other)
        rig.service("web", WEB)
        rig.task("t1", "web", ONE, node=other)
        rig.task("t2", "web", TWO)
        await rig.apply()
        methods = ("GET", "PUT", "DELETE", "POST") * 2
        sent = [asyncio.create_task(rig.ask("a.example/", method=one, data=b"12")) for one in methods]
        await until(lambda: sum(got.values()) >= 4)
        reached = dict(got)
        if is_left_out:
            lost = replace(rig.endpoints["t1"], is_serving=False, is_left_out=True)
            rig.endpoints["t1"] = lost
        else:
            rig.nodes = (NODE,)
            del rig.endpoints["t1"]
        await rig.apply()
        async with asyncio.timeout(5):
            statuses = Counter(
                (method, status)
                for method, (status, *_) in zip(methods, await asyncio.gather(*sent), strict=True)
            )
        posts = reached.get("POST", 0)
        assert {key: count for key, count in statuses.items() if key[1] != 200} == (
            {("POST", 502): posts} if posts else {}
        )
        assert got == reached, "no request went there again"
        assert {(await rig.ask_task("a.example/"))["task"] for _ in range(4)} == {TWO}


@contextmanager
def a_task_that_accepts_nothing(rig: DoorRig, address: str) -> Iterator[None]:
    """Let connections to an address wait, as if no node had it: the kernel drops what a full queue is sent."""
    with ExitStack() as sockets:
        server = sockets.enter_context(socket.socket())
        server.bind((address, rig.task_port))
        server.listen(0)
        for _ in range(3):
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((address, rig.task_port))
        yield


async def test_requests_that_connect_to_a_lost_node_are_sent_to_another_task(tmp_path: Path) -> None:
    other = NodeId("node2")
    async with a_door(tmp_path) as rig, rig.tasks(TWO):
        rig.nodes = (NODE, other)
        rig.service("web", WEB)
        rig.task("t1", "web", ONE, node=other)
        rig.task("t2", "web", TWO)
        await rig.apply()
        with a_task_that_accepts_nothing(rig, ONE):
            sent = [asyncio.create_task(rig.ask("a.example/", method=one)) for one in ("GET", "POST") * 20]
            await until(lambda: sum(one.done() for one in sent) == 20)
            rig.nodes = (NODE,)
            del rig.endpoints["t1"]
            await rig.apply()
            async with asyncio.timeout(8):
                found = await asyncio.gather(*sent)
        assert {status for status, *_ in found} == {200}


async def test_a_task_that_was_stopped_responds_until_it_has_ended(tmp_path: Path) -> None:
    """Its node has no other task, so it leaves the table, as a node that is down does."""
    other = NodeId("node2")
    async with a_door(tmp_path) as rig, rig.tasks(TWO), a_silent_task(rig, ONE) as (got, responds):
        rig.nodes = (NODE, other)
        rig.service("web", WEB)
        rig.task("t1", "web", ONE, node=other)
        await rig.apply()
        sent = asyncio.create_task(rig.ask("a.example/"))
        await until(lambda: got["GET"] == 1)
        rig.task("t2", "web", TWO)
        rig.task("t1", "web", ONE, node=other, is_serving=False)
        await rig.apply()
        rig.nodes = (NODE,)
        del rig.endpoints["t1"]
        await rig.apply()
        responds.set()
        status, text, _ = await sent
        assert (status, text) == (200, "late")


async def test_a_task_that_fails_several_times_in_a_row_is_left_out_for_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configuration, "LEFT_OUT_S", 1)

    async def ask(rig: DoorRig) -> tuple[int, str]:
        """Ask for a page that only the first task fails to respond to."""
        status, text, _ = await rig.ask("a.example/?fails=" + ONE)
        return status, json.loads(text)["task"]

    async with a_site(tmp_path, {"skep.http.max-failures": "3"}) as rig:
        reloads = rig.reloads()
        seen = Counter([await ask(rig) for _ in range(30)])
        assert seen.keys() == {(200, TWO), (500, ONE)}
        assert seen[500, ONE] == 3
        async with asyncio.timeout(10):  # it gets requests again
            while (await ask(rig))[1] == TWO:
                pass
        del rig.endpoints["t1"]
        await rig.apply()
        rig.task("t4", "web", ONE)  # another task at the address is not judged by the former one
        await rig.apply()
        assert {(await rig.ask_task("a.example/"))["task"] for _ in range(6)} == {ONE, TWO}
        assert rig.reloads() == reloads


async def test_a_cookie_keeps_a_client_at_its_task_until_that_ends(tmp_path: Path) -> None:
    async with a_site(tmp_path, {"skep.http.sticky": "true"}) as rig:
        first, cookies = set(), set()
        for _ in range(4):
            _, text, headers = await rig.ask("a.example/")
            first.add(json.loads(text)["task"])
            cookies.add(headers["Set-Cookie"].partition(";")[0])
        assert (first, len(cookies)) == ({ONE, TWO}, 2), "clients without a cookie are divided"
        sent = {"Cookie": min(cookies)}
        own = (await rig.ask_task("a.example/", sent))["task"]
        rig.service("more", {"skep.http": "more.example"})  # a reload
        await rig.apply()
        assert {(await rig.ask_task("a.example/", sent))["task"] for _ in range(8)} == {own}
        seen = await rig.ask_task("a.example/", sent)
        assert "skep-door" not in json.dumps(seen["headers"]), "the cookie is the front door's own"
        rig.task("t1" if own == ONE else "t2", "web", str(own), is_serving=False)
        await rig.apply()
        assert {(await rig.ask_task("a.example/", sent))["task"] for _ in range(4)} == {ONE, TWO} - {own}


async def test_a_client_that_was_idle_during_a_reload_reaches_later_tasks(directory: Path) -> None:
    """Its connection belongs to the former process, which knows the ended tasks alone."""
    async with a_door(directory) as rig, rig.tasks(TWO):
        rig.service("web", WEB)
        rig.task("t1", "web", ONE)
        await rig.apply()
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)

        async def ask() -> object:
            writer.write(b"GET / HTTP/1.1\r\nHost: a.example\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n")
            async with asyncio.timeout(5):
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                response = head + await reader.readexactly(length)
            assert forwarded_for(response) == "127.0.0.1"
            return body_of(response)["task"]

        async with rig.tasks(ONE):
            assert await ask() == ONE
            rig.service("more", {"skep.http": "more.example"})
            await rig.apply()
        assert rig.reloads() == 2
        rig.task("t2", "web", TWO)
        del rig.endpoints["t1"]
        await rig.apply()
        assert await ask() == TWO
        writer.close()


# -- clients ------------------------------------------------------------------------------------------------------


async def test_the_proxy_protocol_names_the_client_and_is_required(tmp_path: Path) -> None:
    async with a_door(tmp_path, accepts_proxy=True) as rig, rig.tasks(ONE):
        rig.service("web", {**WEB, "skep.http.allow": "192.0.2.0/24,2001:db8::/32"})
        rig.task("t1", "web", ONE)
        await rig.apply()
        for version, client, own in (("4", "192.0.2.7", "192.0.2.1"), ("6", "2001:db8::7", "2001:db8::1")):
            header = f"PROXY TCP{version} {client} {own} 1234 80\r\n".encode()
            assert forwarded_for(await rig.exchange(header + GET)) == client
            await until(lambda client=client: f'"client":"{client}"' in rig.log())
        stranger = await rig.exchange(b"PROXY TCP4 198.51.100.7 192.0.2.1 1234 80\r\n" + GET)
        assert b" 403 " in stranger
        assert b" 200 " not in await rig.exchange(GET)


async def test_clients_reach_it_by_ipv6_and_keep_their_address(tmp_path: Path) -> None:
    async with a_site(tmp_path) as rig:
        assert forwarded_for(await rig.exchange(GET, address="::1")) == "::1"
        assert forwarded_for(await rig.exchange(GET)) == "127.0.0.1"
        await until(lambda: '"client":"::1"' in rig.log())


async def test_slow_clients_are_ended_and_delay_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configuration, "HEAD_S", 2)
    async with a_site(tmp_path) as rig:
        async with asyncio.TaskGroup() as group:
            slow = [group.create_task(rig.exchange(GET[:30])) for _ in range(500)]
            for number in range(30):
                assert (await rig.ask("a.example/"))[0] == 200, number
            assert not any(one.done() for one in slow)
        assert all(b" 408 " in one.result() for one in slow)


async def test_paths_and_hosts_of_any_form_are_one_line_of_json_in_the_log(tmp_path: Path) -> None:
    async with a_site(tmp_path) as rig:
        paths = ['/"}', "/\\u0000\\", "/%22%0a%00", "/%[src]", "/{}<>^`|", "/'$HOME"]
        for path in paths:
            await rig.exchange(GET.replace(b"GET / ", f"GET {path} ".encode()))
        await rig.exchange(GET.replace(b"a.example", b'a"b\\.example'))
        await rig.exchange(GET)
        await until(lambda: len(lines_of(rig)) >= len(paths) + 1)
        assert [one["path"] for one in lines_of(rig)][: len(paths)] == paths
        assert {one["client"] for one in lines_of(rig)} == {"127.0.0.1"}


def lines_of(rig: DoorRig) -> list[dict[str, object]]:
    """Return the lines of the access log, without those of requests that HAProxy could not parse."""
    found = [json.loads(line) for line in rig.log().splitlines() if '"path"' in line]
    return [one for one in found if one["status"] != 400]


def request(*headers: str, start: str = "POST / HTTP/1.1", body: bytes = b"0\r\n\r\n" + SECRET) -> bytes:
    return "\r\n".join((start, "Host: a.example", *headers, "", "")).encode() + body


def http2_request(*headers: tuple[str, str], path: str = "/") -> bytes:
    """Return a request of HTTP/2, which HAProxy translates to HTTP/1.1 for the task."""
    unchecked = H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
    connection = H2Connection(unchecked)
    connection.initiate_connection()
    first = ((":method", "POST"), (":path", path), (":scheme", "http"), (":authority", "a.example"))
    connection.send_headers(1, [*first, *headers])
    connection.send_data(1, SECRET, end_stream=True)
    return connection.data_to_send()


LINE = re.compile(r"[a-z0-9-]+: [ -~]*")


def heads_in(data: bytes) -> list[str]:
    """Return the heads of the requests in a stream, whose bodies end where their heads say."""
    found = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end
        found.append(head.decode("latin-1"))
        if length := re.search(rb"(?im)^content-length: (\d+)\r?$", head):
            data = data[int(length[1]) :]
        if re.search(rb"(?im)^transfer-encoding: chunked\r?$", head):
            size = 1
            while size:
                line, _, data = data.partition(b"\r\n")
                size = int(line, 16)
                assert data[size : size + 2] == b"\r\n"
                data = data[size + 2 :]
    return found


@pytest.mark.parametrize(
    "sent",
    [
        request("Content-Length: 5", f"Content-Length: {5 + len(SECRET)}"),
        request(f"Content-Length: 5, {5 + len(SECRET)}"),
        request(f"Content-Length: +{5 + len(SECRET)}"),
        request("Content-Length: 0x5"),
        request("Content-Length: -1"),
        request("Content-Length : 5"),
        request(f"Content-Length: {1 << 64}"),
        request(f"Content-Length: {5 + len(SECRET)}", "Transfer-Encoding: chunked"),
        request("Transfer-Encoding: chunked", f"Content-Length: {5 + len(SECRET)}"),
        request(f"Content-Length: {5 + len(SECRET)}", "Transfer-Encoding: xchunked"),
        request(f"Content-Length: {5 + len(SECRET)}", "Transfer-Encoding : chunked"),
        request(f"Content-Length: {5 + len(SECRET)}", "Transfer-Encoding:\x0bchunked"),
        request(f"Content-Length: {5 + len(SECRET)}", "X: 1\rTransfer-Encoding: chunked"),
        request(f"Content-Length: {5 + len(SECRET)}", "X: 1\nTransfer-Encoding: chunked"),
        request(f"Content-Length: {5 + len(SECRET)}", "Transfer-Encoding:", " chunked"),
        request(f"Content-Length: {5 + len(SECRET)}", "Transfer-Encoding: chunked, identity"),
        request("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
        request("Transfer-Encoding: chunked", body=b"5;\r\n0\r\n\r\n\r\n0\r\n\r\n" + SECRET),
        request("Transfer-Encoding: chunked", body=b"0x0\r\n\r\n" + SECRET),
        request("Transfer-Encoding: chunked", body=b"-1\r\n\r\n" + SECRET),
        request("Transfer-Encoding: chunked", body=b"fffffffffffffffff\r\n" + SECRET),
        request("Transfer-Encoding: chunked", start="POST / HTTP/1.0"),
        request(": x", "Content-Length: 5"),
        request("X Y: 1", "Content-Length: 5"),
        request("Host: b.example", "Content-Length: 5"),
        request("Content-Length: 5", start="POST http://b.example/ HTTP/1.1"),
        request("Content-Length: 5", start="POST /\x00 HTTP/1.1"),
        request("Content-Length: 5", start="POST / HTTP/1.1 HTTP/1.1"),
        http2_request(),
        http2_request(("content-length", "0")),
        http2_request(("content-length", "5"), ("content-length", str(len(SECRET)))),
        http2_request(("transfer-encoding", "chunked")),
        http2_request(("connection", "transfer-encoding")),
        http2_request(("x", "1\r\ntransfer-encoding: chunked")),
        http2_request(("x: 1\r\ntransfer-encoding", "chunked")),
        http2_request(("host", "b.example")),
        http2_request(path="/ HTTP/1.1\r\ntransfer-encoding: chunked\r\nx:"),
    ],
)
async def test_a_task_gets_no_request_that_the_front_door_has_not_seen(tmp_path: Path, sent: bytes) -> None:
    """Also if lengths and encodings conflict: the task would have to read the bytes in the same way."""
    streams: list[bytearray] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        streams.append(got := bytearray())
        with suppress(asyncio.CancelledError):
            while part := await reader.read(1 << 16):
                got.extend(part)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" * part.count(b" HTTP/1."))
        writer.close()

    async with a_door(tmp_path) as rig:
        server = await asyncio.start_server(serve, ONE, rig.task_port)
        rig.service("web", WEB)
        rig.task("t1", "web", ONE)
        await rig.apply()
        await rig.exchange(sent, GET, within_s=3)
        await rig.exchange(GET)  # the connection to the task may be used again
        server.close()
    heads = [head for stream in streams for head in heads_in(bytes(stream))]
    assert any(head.startswith("GET / ") for head in heads), "a later client has its own request"
    for head in heads:
        _, *lines = head.lower().split("\r\n")
        assert all(LINE.fullmatch(line) for line in lines), lines
        assert [line for line in lines if line.startswith("x-forwarded-for")] == [
            "x-forwarded-for: 127.0.0.1"
        ]
        assert [line for line in lines if line.startswith("host")] == ["host: a.example"]
        assert sum(line.startswith(("content-length", "transfer-encoding")) for line in lines) <= 1
        assert "6.6.6.6" not in head, "only a body may have it"

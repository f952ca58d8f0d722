"""Logs of users below the administrator reach no machine of the cluster, whatever a name resolves to."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from skep.engine.containers.container import StandardStream
from skep.engine.log_drivers.facts import LogFacts
from skep.engine.log_drivers.message import LogMessage, LogSink
from skep.engine.log_drivers.sender import SINKS
from skep.engine.log_drivers.transport import ANYWHERE, RemoteAddress, connect
from skep.linux.network.guard import Guard

FACTS = LogFacts(
    id="1" * 64, name="web", image_id="sha256:2", image="web", command="sh", created="", hostname="node1"
)
LINE = LogMessage(line=b"hello", stream=StandardStream.STDOUT, timestamp_ns=1)
OPTIONS = {
    "syslog tcp": ("syslog", "syslog-address", "tcp://{}"),
    "syslog tls": ("syslog", "syslog-address", "tcp+tls://{}"),
    "syslog udp": ("syslog", "syslog-address", "udp://{}"),
    "fluentd": ("fluentd", "fluentd-address", "{}"),
    "fluentd tls": ("fluentd", "fluentd-address", "tls://{}"),
    "gelf tcp": ("gelf", "gelf-address", "tcp://{}"),
    "gelf udp": ("gelf", "gelf-address", "udp://{}"),
    "splunk": ("splunk", "splunk-url", "http://{}"),
    "splunk tls": ("splunk", "splunk-url", "https://{}"),
}


def a_sink(kind: str, address: str, guard: Guard) -> LogSink:
    driver, option, form = OPTIONS[kind]
    options = {option: form.format(address), "splunk-token": "secret"}
    return SINKS[driver](options, FACTS, guard)


async def sent(sink: LogSink) -> None:
    """Raises: OSError."""
    try:
        await sink.open()
        await sink.send(LINE)
        await sink.flush()
    finally:
        await sink.close()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """One of loopback where nobody may connect, by TCP and UDP; a connection fails the test."""
    connected: list[Any] = []

    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append("tcp")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    number = server.sockets[0].getsockname()[1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as datagrams:
        datagrams.bind(("127.0.0.1", number))
        yield number
        with pytest.raises(BlockingIOError):
            datagrams.recv(1)
    server.close()
    assert connected == []


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]"])
async def test_nothing_reaches_this_machine(port: int, kind: str, host: str) -> None:
    with pytest.raises(OSError, match=r"only an administrator may choose for logs|has no address"):
        await sent(a_sink(kind, f"{host}:{port}", Guard()))


@pytest.mark.parametrize("kind", OPTIONS)
async def test_a_name_counts_by_its_address_at_the_time_of_the_connection(
    port: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was another one's when the service was made, and is not looked up again after the check."""
    loop, looked_up = asyncio.get_running_loop(), 0
    resolve = loop.getaddrinfo

    async def getaddrinfo(host: str, *args: Any, **options: Any) -> Sequence[Any]:
        nonlocal looked_up
        looked_up += host == "logs.example"
        return await resolve("127.0.0.1" if host == "logs.example" else host, *args, **options)

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    with pytest.raises(OSError, match="an address of this machine"):
        await sent(a_sink(kind, f"logs.example:{port}", Guard()))
    assert looked_up == 1


@pytest.mark.parametrize("kind", ["syslog tcp", "syslog udp", "fluentd", "gelf tcp", "gelf udp"])
async def test_the_address_that_was_checked_is_the_one_that_is_used(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name may have another one a moment later."""
    loop, looked_up = asyncio.get_running_loop(), list[str]()
    resolve = loop.getaddrinfo

    async def getaddrinfo(host: str, *args: Any, **options: Any) -> Sequence[Any]:
        looked_up.append(host)
        return await resolve("127.0.0.1" if looked_up == ["logs.example"] else "192.0.2.1", *args, **options)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        await sent(a_sink(kind, f"logs.example:{port}", ANYWHERE))
    assert looked_up == ["logs.example"]


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("255.255.255.255", "this machine"),
        ("169.254.169.254", "link-local"),
        ("fe80::1%lo", "link-local"),
        ("127.8.8.8", "this machine"),
        ("::1", "this machine"),
        ("::", "this machine"),
        ("198.51.100.7", "another node"),
        ("::ffff:198.51.100.7", "another node"),
        ("2001:db8::7", "another node"),
        ("2001:0db8:0::7", "another node"),
    ],
)
def test_addresses_of_the_cluster_are_refused(address: str, what: str) -> None:
    guard = Guard(lambda: {"198.51.100.7", "2001:db8::7"})
    with pytest.raises(PermissionError, match=what):
        guard.check(address)
    ANYWHERE.check(address)


def test_an_address_of_another_machine_is_not_this_ones_where_any_may_be_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with ``ip_nonlocal_bind``, which keepalived sets."""
    monkeypatch.setattr(socket.socket, "bind", lambda *_: None)
    Guard().check("198.51.100.8")


@pytest.mark.parametrize(
    "device", ["skep-gw", "skep-ingress", "docker0", "docker_gwbridge", "br-0123456789ab"]
)
def test_containers_of_the_machine_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ports that are not published are open to the machine."""
    monkeypatch.setattr(socket, "if_indextoname", lambda _: device)
    with pytest.raises(PermissionError, match="container of this machine"):
        Guard().check("198.51.100.8")


def test_an_address_of_an_interface_is_this_machines() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent: only a route is chosen
        own = probe.getsockname()[0]
    with pytest.raises(PermissionError, match="this machine"):
        Guard().check(own)


@pytest.mark.parametrize("address", ["198.51.100.8", "10.0.0.1", "2001:db8::8"])
def test_other_addresses_are_anyones(address: str) -> None:
    Guard(lambda: {"198.51.100.7"}).check(address)


@pytest.mark.parametrize("network", ["unix", "unixgram"])
async def test_sockets_of_the_machine_are_an_administrators(tmp_path: Path, network: str) -> None:
    path = str(tmp_path / "socket")
    with pytest.raises(PermissionError, match="only an administrator"):
        await connect(RemoteAddress(network=network, path=path), Guard())
    with pytest.raises(FileNotFoundError):
        await connect(RemoteAddress(network=network, path=path), ANYWHERE)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_collector_leads_the_token_nowhere_else(status: int) -> None:
    requests: list[web.Request] = []

    async def respond(request: web.Request) -> web.Response:
        requests.append(request)
        return web.Response(status=status, headers={"Location": f"http://localhost:{server.port}/elsewhere"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", respond)
    async with TestServer(app, host="127.0.0.1") as server:
        with pytest.raises(ConnectionError, match=f"failed to send event - {status}"):
            await sent(a_sink("splunk", f"127.0.0.1:{server.port}", ANYWHERE))
    assert [request.path for request in requests] == ["/services/collector/event/1.0"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("64:ff9b::7f00:1", "an address of this machine"),
        ("64:ff9b::a9fe:a9fe", "a link-local address"),
        ("64:ff9b::c633:6407", "an address of another node"),
        ("64:ff9b:1::a9fe:a9fe", "a link-local address"),
        ("::127.0.0.1", "an address of this machine"),
        ("::ffff:169.254.169.254", "a link-local address"),
        ("2002:7f00:1::", "an address of this machine"),
        ("2001:0:c633:6407::", "an address of another node"),
        ("fd00:ec2::254", "a cloud's metadata service"),
        ("100.100.100.200", "a cloud's metadata service"),
        ("168.63.129.16", "a cloud's metadata service"),
        ("64:ff9b::a83f:8110", "a cloud's metadata service"),
    ],
)
def test_addresses_that_lead_to_guarded_ones_are_refused(address: str, words: str) -> None:
    with pytest.raises(
        PermissionError, match=f"{re.escape(address)} is {words}, which only an administrator"
    ):
        Guard(lambda: {"198.51.100.7"}).check(address)


@pytest.mark.parametrize("address", ["64:ff9b::c633:6408", "2001:db8::7", "198.51.100.8"])
def test_addresses_behind_gateways_are_allowed(address: str) -> None:
    Guard(lambda: {"198.51.100.7"}).check(address)

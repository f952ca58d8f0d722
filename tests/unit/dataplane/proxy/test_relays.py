"""One published port that cannot be relayed, or a plan that cannot be read, ends no other port."""

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from skep.dataplane.net_process.protocol import Reservation
from skep.dataplane.ports import bind
from skep.dataplane.proxy.relay import ConnectionRelays
from skep.dataplane.proxy.relays import RelayPort
from skep.dataplane.proxy.tcp import TcpRelay
from skep.dataplane.proxy.udp import UdpRelay
from skep.errors import AlreadyExists
from tests.support.engine.oci_rig import QuickClock


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        number: int = one.getsockname()[1]
        return number


def a_held(port: int) -> tuple[Reservation, socket.socket]:
    """``port`` of loopback, as the net process holds it."""
    return Reservation("tcp", port, "mesh:1", "127.0.0.1"), bind("tcp", port, "127.0.0.1")


async def answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def a_relay(port: int, address: str = "127.0.0.1") -> RelayPort:
    return RelayPort(protocol="tcp", address=address, port=port, backends=(("127.0.0.1", 1),))


async def test_a_port_that_cannot_be_and_a_plan_that_cannot_be_read_end_no_other_port(tmp_path: Path) -> None:
    plan, first, second = tmp_path / "relays", free_port(), free_port()
    plan.write_bytes(msgspec.json.encode([a_relay(70000), a_relay(first), a_relay(1, "odd\0address")]))
    held = [a_held(first), a_held(second)]
    relays = ConnectionRelays(plan, QuickClock(), lambda: 0.5, lambda: held)
    running = asyncio.create_task(relays.run())
    async with asyncio.timeout(30):
        while not await answers(first):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        plan.write_bytes(b"\xff")
        await relays.apply()
        assert await answers(first)
        plan.write_bytes(msgspec.json.encode([a_relay(second)]))
        while not await answers(second) or await answers(first):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not running.done()
    running.cancel()
    await asyncio.wait([running])
    for _, opened in held:
        opened.close()


async def test_a_relay_serves_on_the_socket_that_holds_its_port_and_leaves_it_held(tmp_path: Path) -> None:
    plan, port = tmp_path / "relays", free_port()
    plan.write_bytes(msgspec.json.encode([a_relay(port)]))
    held: list[tuple[Reservation, socket.socket]] = []
    relays = ConnectionRelays(plan, QuickClock(), lambda: 0.5, lambda: held)
    await relays.apply()
    assert not await answers(port), "a port that is not held is not relayed"
    held.append(a_held(port))
    await relays.apply()
    assert await answers(port)
    plan.write_bytes(b"[]")
    await relays.apply()
    assert not await answers(port), "the port is held only: nobody would answer"
    with pytest.raises(AlreadyExists):
        bind("tcp", port, "127.0.0.1")
    plan.write_bytes(msgspec.json.encode([a_relay(port)]))
    await relays.apply()
    assert await answers(port)
    relays.end("tcp", port, "127.0.0.1")
    held.pop()[1].close()
    await asyncio.sleep(0)
    bind("tcp", port, "127.0.0.1").close()


async def test_a_port_that_is_released_while_its_relay_opens_is_free(tmp_path: Path) -> None:
    plan, port = tmp_path / "relays", free_port()
    plan.write_bytes(msgspec.json.encode([a_relay(port)]))
    held = [a_held(port)]
    relays = ConnectionRelays(plan, QuickClock(), lambda: 0.5, lambda: held)
    applying = asyncio.create_task(relays.apply())
    await asyncio.sleep(0)
    relays.end("tcp", port, "127.0.0.1")
    held.pop()[1].close()
    await applying
    await asyncio.sleep(0)
    bind("tcp", port, "127.0.0.1").close()


async def test_as_many_clients_as_the_limit_says_are_relayed_and_those_that_leave_do_not_count() -> None:
    listener, backends = socket.create_server(("127.0.0.1", 0)), list[asyncio.StreamWriter]()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backends.append(writer)
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*address)

    async def echoes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"hello")
        try:
            return await reader.read(5) == b"hello"
        except ConnectionResetError:
            return False

    address = listener.getsockname()
    async with await asyncio.start_server(echo, "127.0.0.1", 0) as backend, asyncio.timeout(20):
        target = backend.sockets[0].getsockname()
        relay = TcpRelay(
            RelayPort(protocol="tcp", address=address[0], port=address[1], backends=(target,)),
            lambda: 0.5,
            lambda call: call(),
            connections_max=3,
        )
        await relay.open(listener)
        clients = [await connect() for _ in range(3)]
        assert [await echoes(*one) for one in clients] == [True] * 3
        assert not await echoes(*await connect())
        reader, writer = clients.pop()
        writer.close()
        await backends[2].wait_closed()
        while not await echoes(*(another := await connect())):
            pass
        relay.close(ends_connections=True)
        for reader, _ in (*clients, another):
            assert await reader.read() == b""


async def test_a_datagram_for_which_no_descriptor_is_free_is_lost_and_no_error() -> None:
    refusals, errors, loop = [1], list[object](), asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: errors.append(context))

    def in_namespace(call: Callable[[], socket.socket]) -> socket.socket:
        if refusals:
            refusals.pop()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return call()

    listener = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    listener.bind(("::1", 0))
    address = listener.getsockname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as task:
        task.bind(("127.0.0.1", 0))
        port = RelayPort(protocol="udp", address="::1", port=address[1], backends=(task.getsockname(),))
        relay = UdpRelay(port, listener, QuickClock(), lambda: 0.5, in_namespace)
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
            async with asyncio.timeout(20):
                client.sendto(b"lost", address)
                while refusals:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                client.sendto(b"hello", address)
                assert await loop.sock_recv(task, 100) == b"hello"
        relay.close()
    assert errors == []


async def test_a_client_at_an_ipv4_address_gets_the_responses() -> None:
    """As the playground's clients at 127.0.0.1."""
    loop = asyncio.get_running_loop()
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    listener.bind(("127.0.0.1", 0))
    address = listener.getsockname()
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_INET, kind) as task, socket.socket(socket.AF_INET, kind) as client:
        task.bind(("127.0.0.1", 0))
        port = RelayPort(protocol="udp", address="127.0.0.1", port=address[1], backends=(task.getsockname(),))
        relay = UdpRelay(port, listener, QuickClock(), lambda: 0.5, lambda call: call())
        client.connect(address)
        async with asyncio.timeout(20):
            await loop.sock_sendall(client, b"hello")
            data, peer = await loop.sock_recvfrom(task, 100)
            await loop.sock_sendto(task, data.upper(), peer)
            assert await loop.sock_recv(client, 100) == b"HELLO"
        relay.close()

"""The net process: host ports that outlive the node process, a crash, and a change of version."""

import asyncio
import os
import random
import signal
import socket
import time
from pathlib import Path

import msgspec
import pytest

from skep.aio.clock import SystemClock
from skep.dataplane.net_process.client import MESH, NetClient
from skep.dataplane.ports import AddressNotHere
from skep.dataplane.proxy.relays import RelayPort
from skep.errors import AlreadyExists, Unavailable
from skep.linux.detached import identify
from skep.linux.files import replace_file
from skep.node.supervision.supervisor import terminate, wait_end
from skep.paths import Paths
from tests.support.networks.names_lab import forks, net, net_process


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    (tmp_path / "run").mkdir()
    return Paths(tmp_path / "data", tmp_path / "run")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


async def test_a_reserved_port_cannot_be_bound_until_it_is_released(paths: Paths) -> None:
    async with forks(paths) as started, net(paths, started) as client:
        port = await client.reserve("tcp", 0)
        assert not is_free(port)
        with pytest.raises(AlreadyExists, match="port is already allocated"):
            await client.reserve("tcp", port)
        assert await client.reserve("udp", port) == port, "another protocol is another port"
        assert set(await client.list_held()) == {("tcp", port, ""), ("udp", port, "")}
        await client.release("tcp", port)
        await client.release("tcp", port)
        assert is_free(port)


async def test_a_port_that_another_program_uses_is_refused(paths: Paths) -> None:
    with socket.create_server(("0.0.0.0", 0)) as other:
        async with forks(paths) as started, net(paths, started) as client:
            with pytest.raises(AlreadyExists):
                await client.reserve("tcp", other.getsockname()[1])


async def test_ports_are_held_again_after_a_crash_and_calls_wait_for_it(paths: Paths) -> None:
    async with forks(paths) as started, net(paths, started) as client:
        port = await client.reserve("tcp", 0)
        crashed = net_process(paths)
        os.kill(crashed.pid, signal.SIGKILL)
        await wait_end(crashed)
        assert list(await client.list_held()) == [("tcp", port, "")]
        assert net_process(paths) != crashed
        assert not is_free(port)


async def test_the_next_version_takes_the_sockets_over_without_a_gap(paths: Paths) -> None:
    async with forks(paths) as started:
        old_pid = await started.fork("net", ())
        client = NetClient(paths.net_socket, SystemClock(), random.random)
        held = [await client.reserve("tcp", 0) for _ in range(300)]
        client.close()
        old = identify(old_pid)
        assert old is not None

        new_pid = await started.fork("net", ())
        await wait_end(old)
        assert not any(is_free(port) for port in held)
        assert {port for _, port, _ in await client.list_held()} == set(held)
        new = identify(new_pid)
        assert new is not None
        client.close()
        await terminate(new, 5.0)
        assert all(map(is_free, held)), "nothing is held when it has ended"


async def test_a_running_process_of_our_own_version_is_adopted(paths: Paths) -> None:
    async with forks(paths) as first:
        pid = await first.fork("net", ())
        client = NetClient(paths.net_socket, SystemClock(), random.random)
        await client.reserve("tcp", 0)
        client.close()
    async with forks(paths) as second, net(paths, second) as client:
        assert len(list(await client.list_held())) == 1
        assert net_process(paths).pid == pid


async def test_a_process_outlives_its_zygote_and_its_exit_status_is_reported(paths: Paths) -> None:
    async with forks(paths) as started:
        pid = await started.fork("net", ())
        child = identify(pid)
        assert child is not None
        os.kill(pid, signal.SIGKILL)
        await wait_end(child)
        assert await started.reap(pid) == -signal.SIGKILL
        assert await started.reap(pid) is None, "it is gone"


async def test_without_its_zygote_nothing_can_be_started(paths: Paths) -> None:
    async with forks(paths) as started:
        os.kill(started.pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match="restart skep"):
            await started.fork("net", ())


async def test_a_port_is_held_on_one_address_for_one_owner_and_handed_over_so(paths: Paths) -> None:
    async with forks(paths) as started:
        old = identify(await started.fork("net", ()))
        assert old is not None
        client = NetClient(paths.net_socket, SystemClock(), random.random)
        mesh = NetClient(paths.net_socket, SystemClock(), random.random, owner="mesh")
        port = await mesh.reserve("tcp", 0, "127.0.0.1")
        assert await client.reserve("tcp", port, "127.0.0.2") == port, "another address is another port"
        with pytest.raises(AlreadyExists, match=rf"Bind for 127\.0\.0\.1:{port} failed"):
            await client.reserve("tcp", port, "127.0.0.1")
        with pytest.raises(AddressNotHere, match="cannot assign requested address"):
            await client.reserve("tcp", port, "192.0.2.1")
        assert list(await mesh.list_held()) == [("tcp", port, "127.0.0.1")]
        assert list(await client.list_held()) == [("tcp", port, "127.0.0.2")]
        new = identify(await started.fork("net", ()))
        assert new is not None
        await wait_end(old)
        assert list(await mesh.list_held()) == [("tcp", port, "127.0.0.1")]
        await mesh.release("tcp", port, "127.0.0.1")
        assert list(await client.list_held()) == [("tcp", port, "127.0.0.2")]
        mesh.close()
        client.close()
        await terminate(new, 5.0)


async def test_what_is_written_down_is_relayed_and_again_after_a_crash(paths: Paths) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(3)
    with server, socket.create_server(("::1", 0), family=socket.AF_INET6) as reserved:
        port = reserved.getsockname()[1]
        reserved.close()
        relay = RelayPort(
            protocol="tcp", address="::1", port=port, backends=(("127.0.0.1", server.getsockname()[1]),)
        )
        paths.relays.parent.mkdir()
        async with forks(paths) as started, net(paths, started) as client:
            await client.list_held()
            mesh = NetClient(paths.net_socket, SystemClock(), random.random, MESH)
            await mesh.reserve("tcp", port, "::1")
            mesh.close()
            replace_file(paths.relays, msgspec.json.encode([relay]), is_durable=False)
            await asyncio.to_thread(exchange_by_relay, port, server)
            crashed = net_process(paths)
            os.kill(crashed.pid, signal.SIGKILL)
            await wait_end(crashed)
            await asyncio.to_thread(exchange_by_relay, port, server)


def exchange_by_relay(port: int, server: socket.socket) -> None:
    """A word through the relay, as soon as it listens."""
    deadline = time.monotonic() + 10
    while True:
        try:
            with socket.create_connection(("::1", port), timeout=3) as connection:
                accepted, _ = server.accept()
                with accepted:
                    connection.sendall(b"hello")
                    assert accepted.recv(5) == b"hello"
            return
        except OSError:
            assert time.monotonic() < deadline, "no relay listens"
            time.sleep(0.02)


async def test_a_port_that_another_owner_has_got_since_is_not_released(paths: Paths) -> None:
    """A container's port was free for a moment, and then published by the routing mesh."""
    async with forks(paths) as started, net(paths, started) as client:
        mesh = NetClient(paths.net_socket, SystemClock(), random.random, owner=MESH)
        port = await mesh.reserve("tcp", 0)
        await client.release("tcp", port)
        assert list(await mesh.list_held()) == [("tcp", port, "")]
        assert not is_free(port)
        await mesh.release("tcp", port)
        assert is_free(port)
        mesh.close()

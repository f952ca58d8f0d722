"""A net process with containers to serve: namespaces on one switch, backends that send their name, a DNS client."""

import asyncio
import os
import random
import secrets
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from dnslib import EDNS0, QTYPE, DNSHeader, DNSQuestion, DNSRecord

from skep.aio.clock import SystemClock
from skep.dataplane.net_process import process
from skep.dataplane.net_process.client import NetClient
from skep.dataplane.net_process.protocol import ContainerEndpoint, Named, NameServer
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.linux.detached import ProcessIdentity, identify, read_pid_file
from skep.linux.files import replace_file
from skep.model.networks.tables import NetworkTable
from skep.model.values.ids import NetworkId
from skep.node.supervision.supervisor import SupervisionPolicy, Supervisor, terminate, wait_end
from skep.paths import Paths
from tests.support.engine import zygote_rig
from tests.support.engine.zygote_rig import StartedZygote

ANSWER_S = 5.0
BRIDGE = "switch"


@asynccontextmanager
async def forks(paths: Paths) -> AsyncIterator[StartedZygote]:
    """Run a zygote that starts net processes on demand."""

    def run(_: Sequence[str]) -> None:
        # pytest closes its capture file in a forked process
        sys.stdout = sys.stderr = Path(os.environ.get("SKEP_TEST_LOG", os.devnull)).open("a")  # noqa: SIM115
        process.run(paths)

    started = zygote_rig.start({"net": run})
    try:
        yield started
    finally:
        started.end()


@asynccontextmanager
async def net(paths: Paths, started: StartedZygote) -> AsyncIterator[NetClient]:
    """Run a supervised net process.  It is stopped at the end of the block."""
    supervisor = Supervisor(
        "net",
        paths,
        zygote=started,
        clock=SystemClock(),
        rng=random.random,
        ends_with_node=lambda: True,
        policy=SupervisionPolicy(hands_over=True, gives_up=False),
    )
    client = NetClient(paths.net_socket, SystemClock(), random.random)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(supervisor.run())
        try:
            yield client
        finally:
            client.close()
            running.cancel()


def net_process(paths: Paths) -> ProcessIdentity:
    found = read_pid_file(paths.pid_file("net"))
    assert found is not None
    return found


class NamesLab:
    """One node's net process, and containers on one network (10.0.1.0/24, fd00:1::/64)."""

    def __init__(self, paths: Paths, started: StartedZygote) -> None:
        self.paths = paths
        self.client = NetClient(paths.net_socket, SystemClock(), random.random)
        self.namespaces = Namespaces(paths.netns)
        self._zygote = started
        self._opened: list[socket.socket] = []
        self._backends: list[asyncio.AbstractServer | asyncio.DatagramTransport] = []
        self._processes: list[ProcessIdentity] = []

    @property
    def zygote_pid(self) -> int:
        """Return the pid of the process that forks net processes."""
        return self._zygote.pid

    async def start_process(self) -> ProcessIdentity:
        """Start a net process, which takes over from the previous one if there is one."""
        started = identify(await self._zygote.fork("net", ()))
        assert started is not None
        self._processes.append(started)
        await self.client.listing()
        return started

    async def replace_process(self) -> None:
        """Start another net process, which takes over from the current one."""
        before = self._processes[-1]
        await self.start_process()
        await wait_end(before)
        await self.client.listing()  # until now the previous process may have responded

    async def container(self, id: str, *addresses: str) -> Path:
        """Create a namespace with ``addresses`` on the network."""
        path = await self.namespaces.create(id, {"net/ipv4/conf/all/rp_filter": "0"})
        await self.namespaces.run(path, shell, "ip link set lo up")
        if addresses:
            await self._plug(path, id, addresses)
        return path

    async def _plug(self, path: Path, id: str, addresses: Sequence[str]) -> None:
        switch = self.paths.netns / BRIDGE
        if not switch.exists():
            await self.namespaces.create(BRIDGE, {})
            await self.namespaces.run(switch, shell, "ip link add br0 type bridge; ip link set br0 up")
        port = f"v{secrets.token_hex(4)}"
        make = f"ip link add {port} type veth peer name eth0 netns {path}; ip link set {port} master br0 up"
        await self.namespaces.run(switch, shell, make)
        lines = [f"ip address add {one}/{'64 nodad' if ':' in one else '24'} dev eth0" for one in addresses]
        await self.namespaces.run(path, shell, "; ".join(["ip link set eth0 up", *lines]))

    def write(self, table: NetworkTable) -> NetworkId:
        """Write the table as the node process does."""
        self.paths.tables.mkdir(exist_ok=True)
        replace_file(self.paths.tables / table.head.id, msgspec.msgpack.encode(table), is_durable=False)
        return table.head.id

    async def change(self, table: NetworkTable) -> None:
        """Send another version of a table, as the node process does."""
        await self.client.refresh([self.write(table)])

    async def serve(
        self, id: str, *tables: NetworkTable, servers: Sequence[NameServer] = (), single_labels: bool = True
    ) -> None:
        """Serve names in the container's namespace."""
        await self.client.serve(
            Named(
                id=id,
                netns=str(self.paths.netns / id),
                networks=tuple(ContainerEndpoint(table.head.id) for table in tables),
                servers=tuple(servers),
                forwards_single_labels=single_labels,
            )
        )

    async def open(self, id: str, kind: socket.SocketKind, family: int = socket.AF_INET) -> socket.socket:
        """Open a socket in the container's namespace."""
        opened = await self.namespaces.run(self.paths.netns / id, socket.socket, family, kind)
        opened.setblocking(False)
        self._opened.append(opened)
        return opened

    async def resolver(self, id: str, kind: socket.SocketKind = socket.SOCK_DGRAM) -> "Resolver":
        """Create a DNS client in the container."""
        opened = await self.open(id, kind)
        await asyncio.wait_for(asyncio.get_running_loop().sock_connect(opened, ("127.0.0.11", 53)), ANSWER_S)
        return Resolver(opened)

    async def backend(self, id: str, address: str, port: int = 80) -> None:
        """Let the container respond with its name to each TCP line and to each UDP packet."""

        def bound(kind: socket.SocketKind) -> socket.socket:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            opened = socket.socket(family, kind)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind((address, port))
            return opened

        async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while line := await reader.readline():
                writer.write(f"{id} {writer.get_extra_info('peername')[0]} ".encode() + line)
            writer.close()

        path = self.paths.netns / id
        listening = await self.namespaces.run(path, bound, socket.SOCK_STREAM)
        self._backends.append(await asyncio.start_server(converse, sock=listening))
        datagrams = await self.namespaces.run(path, bound, socket.SOCK_DGRAM)
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: _SaysItsName(id), sock=datagrams
        )
        self._backends.append(transport)

    async def connect(self, id: str, address: str, port: int = 80) -> "Conversation":
        """Open a TCP connection from the container."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        opened = await self.open(id, socket.SOCK_STREAM, family)
        await asyncio.wait_for(asyncio.get_running_loop().sock_connect(opened, (address, port)), ANSWER_S)
        return Conversation(opened)

    async def nft(self, id: str, text: str) -> str:
        """Return the output of the nft command in the container's namespace."""
        return await self.namespaces.run(self.paths.netns / id, shell, f"nft '{text}'")

    async def dns_port(self, id: str) -> int:
        """Return the port that receives the container's DNS queries over UDP."""
        rules = await self.nft(id, "list chain ip skep_names out")
        return int(rules.split("udp dport 53 dnat to 127.0.0.11:")[1].split()[0])

    async def close(self) -> None:
        self.client.close()
        for one in (*self._opened, *self._backends):
            one.close()
        for process_ in self._processes:
            await terminate(process_, 5.0)
        for id in self.namespaces.pinned():
            await self.namespaces.destroy(id)
        self.namespaces.close()


class Resolver:
    """Sends one query at a time, and parses the response with an independent library."""

    def __init__(self, opened: socket.socket) -> None:
        self.socket = opened

    async def ask(self, name: str, type: str = "A", *, udp_bytes_max: int = 0) -> DNSRecord:
        question = DNSRecord(
            DNSHeader(id=random.getrandbits(16), rd=1), q=DNSQuestion(name, getattr(QTYPE, type))
        )
        if udp_bytes_max:
            question.add_ar(EDNS0(udp_len=udp_bytes_max))
        answer = DNSRecord.parse(await self.exchange(question.pack()))
        assert answer.header.id == question.header.id
        assert str(answer.q.qname) == str(question.q.qname)
        return answer

    async def exchange(self, message: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(ANSWER_S):
            if self.socket.type == socket.SOCK_DGRAM:
                await loop.sock_sendall(self.socket, message)
                return await loop.sock_recv(self.socket, 65535)
            await loop.sock_sendall(self.socket, struct.pack("!H", len(message)) + message)
            length = await loop.sock_recv(self.socket, 2)
            data = b""
            while len(data) < int.from_bytes(length, "big"):
                piece = await loop.sock_recv(self.socket, 65535)
                assert piece, "closed in the middle of an answer"
                data += piece
            return data

    async def addresses(self, name: str, type: str = "A") -> list[str]:
        answer = await self.ask(name, type)
        assert answer.header.rcode == 0, answer
        return [str(record.rdata) for record in answer.rr]


class Conversation:
    """A TCP connection to a backend, which responds to lines."""

    def __init__(self, opened: socket.socket) -> None:
        self.socket = opened

    async def say(self, line: str = "hello") -> list[str]:
        """Send a line.  Return the backend, the source address it saw, and the line."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(ANSWER_S):
            await loop.sock_sendall(self.socket, f"{line}\n".encode())
            return (await loop.sock_recv(self.socket, 1000)).decode().split()


class _SaysItsName(asyncio.DatagramProtocol):
    def __init__(self, id: str) -> None:
        self._id = id

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self._transport.sendto(f"{self._id} {address[0]} ".encode() + data, address)


async def wait_until(condition: Callable[[], Awaitable[bool]], *, within_s: float = 5.0) -> None:
    """Return once ``condition`` is true.  It depends on other processes, or on the kernel."""
    async with asyncio.timeout(within_s):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def shell(command: str) -> str:
    """Run a command in the calling thread's namespace, and return its output."""
    done = subprocess.run(["/bin/sh", "-ec", command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

"""Traffic between the containers of two nodes, and the frames that an observer between the nodes sees."""

import asyncio
import itertools
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from skep.aio.clock import SystemClock
from skep.dataplane.netns.kernel.namespaces import inside

TEXT = b"the queen is dead, long live the queen "
PORT = 7000
CLOCK = SystemClock()
_ETH_P_ALL = 3


class End(NamedTuple):
    """A container: its network namespace and its address."""

    namespace: Path
    address: str


def sockets_of(source: End, target: End, kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    """Return a sender in one container and a receiver in the other, not connected yet."""
    out = inside(source.namespace, lambda: socket.socket(socket.AF_INET, kind))
    into = inside(target.namespace, lambda: socket.socket(socket.AF_INET, kind))
    into.bind((target.address, PORT))
    into.settimeout(5)
    out.settimeout(5)
    return out, into


def transfer(source: End, target: End, content: bytes) -> bytes:
    """Send ``content`` over TCP, and return what arrives."""
    out, into = sockets_of(source, target, socket.SOCK_STREAM)
    with out, into:
        into.listen()
        out.connect((target.address, PORT))
        connection, _ = into.accept()
        with connection:
            sending = threading.Thread(target=lambda: (out.sendall(content), out.close()))
            sending.start()
            received = bytearray()
            while part := connection.recv(1 << 20):
                received += part
            sending.join()
    return bytes(received)


@contextmanager
def captured_in(namespace: Path, device: str) -> Iterator[list[bytes]]:
    """Capture all frames on a device, in both directions.  The list is complete once the block has ended."""

    def opened() -> socket.socket:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        raw.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)  # SO_RCVBUFFORCE
        raw.bind((device, 0))
        return raw

    raw = inside(namespace, opened)
    raw.settimeout(0.1)
    seen: list[bytes] = []
    is_over = threading.Event()

    def read() -> None:
        while True:
            try:
                seen.append(raw.recv(1 << 17))
            except TimeoutError:
                if is_over.is_set():
                    return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield seen
    finally:
        is_over.set()
        reader.join()
        raw.close()


def udp_to(seen: list[bytes], port: int) -> list[bytes]:
    """Return the UDP payloads to ``port`` (IPv4) among the captured frames."""
    return [
        frame[42:]
        for frame in seen
        if frame[12:14] == b"\x08\x00"
        and frame[23] == socket.IPPROTO_UDP
        and not int.from_bytes(frame[20:22], "big") & 0x1FFF  # a later fragment has no UDP header
        and frame[36:38] == port.to_bytes(2, "big")
    ]


class Pings:
    """Sends numbered UDP datagrams from one container to the other, one every few milliseconds."""

    def __init__(self, source: End, target: End) -> None:
        self._source = source
        self._target = target
        self._is_over = threading.Event()
        self.sent = 0
        self.arrived: list[tuple[int, float]] = []

    @contextmanager
    def running(self) -> Iterator["Pings"]:
        out, into = sockets_of(self._source, self._target, socket.SOCK_DGRAM)
        into.settimeout(0.3)

        def send() -> None:
            while not self._is_over.wait(0.002):
                out.sendto(self.sent.to_bytes(4, "big"), (self._target.address, PORT))
                self.sent += 1

        def receive() -> None:
            while True:
                try:
                    number = int.from_bytes(into.recv(64), "big")
                except TimeoutError:
                    if self._is_over.is_set():
                        return
                else:
                    self.arrived.append((number, CLOCK.monotonic()))

        threads = [threading.Thread(target=run) for run in (send, receive)]
        with out, into:
            for thread in threads:
                thread.start()
            try:
                yield self
            finally:
                self._is_over.set()
                for thread in threads:
                    thread.join()

    async def wait_arrived(self, more: int, within_s: float = 10.0) -> None:
        wanted = len(self.arrived) + more
        async with asyncio.timeout(within_s):
            while len(self.arrived) < wanted:
                await CLOCK.sleep(0.005)

    @property
    def longest_gap_s(self) -> float:
        times = [at for _, at in self.arrived]
        return max(after - before for before, after in itertools.pairwise(times))

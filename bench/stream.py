"""Throughput of one TCP stream between two containers, and the duration of a round trip.

* ``python -m bench.stream serve ADDRESS``: prints the bytes of one connection and the seconds they took.
* ``python -m bench.stream send ADDRESS SECONDS``: sends for that long.
* ``python -m bench.stream echo ADDRESS``, ``ask ADDRESS``: small messages back and forth.  Prints the median in
  seconds.
"""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

PORT = 5201
_CHUNK = 256 * 1024
_MESSAGE_BYTES = 64
_ROUND_TRIPS = 2000
_START_S = 10.0


def gigabits(source: Path, target: Path, address: str, seconds: float) -> float:
    """Return the Gbit/s of one stream from the namespace ``source`` to ``address`` in ``target``, as the receiver
    counts.
    """
    with _server(target, "serve", address) as server:
        client = [*_inside(source), "send", address, str(seconds)]
        subprocess.run(client, check=True, timeout=seconds + _START_S)
        received, took_s = _line(server).split()
        return int(received) * 8 / float(took_s) / 1e9


def round_trip_us(source: Path, target: Path, address: str) -> float:
    """Return the median of a small request and its response on a kept connection, in microseconds."""
    with _server(target, "echo", address):
        client = [*_inside(source), "ask", address]
        asked = subprocess.run(client, check=True, timeout=_START_S * 3, capture_output=True, text=True)
        return float(asked.stdout) * 1e6


@contextmanager
def _server(namespace: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run the listening end."""
    server = subprocess.Popen([*_inside(namespace), *words], stdout=subprocess.PIPE, text=True)
    try:
        if _line(server).strip() != "ready":
            raise RuntimeError(f"no server in {namespace}")
        yield server
    finally:
        server.kill()
        server.communicate()


def _line(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    return server.stdout.readline()


def _inside(namespace: Path) -> list[str]:
    return ["nsenter", f"--net={namespace}", sys.executable, "-m", "bench.stream"]


def serve(address: str) -> None:
    """Count the bytes of one connection."""
    with socket.create_server((address, PORT)) as listener:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        connection, _ = listener.accept()
        buffer = bytearray(_CHUNK)
        total, began = 0, time.monotonic()
        with connection:
            while length := connection.recv_into(buffer):
                total += length
        sys.stdout.write(f"{total} {time.monotonic() - began}\n")
        sys.stdout.flush()


def send(address: str, seconds: float) -> None:
    """Send for that long."""
    data = bytes(_CHUNK)
    with socket.create_connection((address, PORT), timeout=_START_S) as connection:
        over = time.monotonic() + seconds
        while time.monotonic() < over:
            connection.sendall(data)


def echo(address: str) -> None:
    """Send back the bytes of one connection."""
    with socket.create_server((address, PORT)) as listener:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            while data := connection.recv(_MESSAGE_BYTES):
                connection.sendall(data)


def ask(address: str) -> None:
    """Make two thousand round trips, one after the other."""
    message = bytes(_MESSAGE_BYTES)
    took = []
    with socket.create_connection((address, PORT), timeout=_START_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_ROUND_TRIPS):
            began = time.perf_counter()
            connection.sendall(message)
            connection.recv(_MESSAGE_BYTES)
            took.append(time.perf_counter() - began)
    sys.stdout.write(f"{median(took)}\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", address]:
            serve(address)
        case ["send", address, seconds]:
            send(address, float(seconds))
        case ["echo", address]:
            echo(address)
        case ["ask", address]:
            ask(address)

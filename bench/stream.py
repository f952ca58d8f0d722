"""Between two containers: how fast one TCP stream goes, and how long a round trip takes.

``python -m bench.stream serve ADDRESS``: prints the bytes of one connection and the seconds they took.
``python -m bench.stream send ADDRESS SECONDS``: sends for that long.
``python -m bench.stream echo ADDRESS``, ``ask ADDRESS``: small messages back and forth; prints the median in seconds.
"""

import socket
import subprocess
import sys
import time
from statistics import median

from bench.overlay_pair import Side, in_namespace

PORT = 5201
_CHUNK = 256 * 1024
_MESSAGE_BYTES = 64
_ROUND_TRIPS = 2000
_START_S = 10.0


def gigabits(source: Side, target: Side, seconds: float) -> float:
    """Gbit/s of one stream from ``source``'s container to ``target``'s, as the receiver counts them."""
    python = (sys.executable, "-m", "bench.stream")
    server = subprocess.Popen(
        in_namespace(target.container, *python, "serve", target.address), stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline().strip() == "ready"
        client = in_namespace(source.container, *python, "send", target.address, str(seconds))
        subprocess.run(client, check=True, timeout=seconds + _START_S)
        received, took_s = server.stdout.readline().split()
        return int(received) * 8 / float(took_s) / 1e9
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


def round_trip_us(source: Side, target: Side) -> float:
    """Median of a small request and its answer on a kept connection, in microseconds."""
    python = (sys.executable, "-m", "bench.stream")
    server = subprocess.Popen(
        in_namespace(target.container, *python, "echo", target.address), stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline().strip() == "ready"
        client = in_namespace(source.container, *python, "ask", target.address)
        asked = subprocess.run(client, check=True, timeout=_START_S * 3, capture_output=True, text=True)
        return float(asked.stdout) * 1e6
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


def serve(address: str) -> None:
    """Count what one connection brings."""
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
    """Give back what one connection brings."""
    with socket.create_server((address, PORT)) as listener:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            while data := connection.recv(_MESSAGE_BYTES):
                connection.sendall(data)


def ask(address: str) -> None:
    """Two thousand round trips, one after the other."""
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

"""One TCP stream between two containers: how fast it goes.

``python -m bench.stream serve ADDRESS``: prints the bytes of one connection and the seconds they took.
``python -m bench.stream send ADDRESS SECONDS``: sends for that long.
"""

import socket
import subprocess
import sys
import time

from bench.overlay_pair import Side, in_namespace

PORT = 5201
_CHUNK = 256 * 1024
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


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", address]:
            serve(address)
        case ["send", address, seconds]:
            send(address, float(seconds))

"""Load generators and servers for ``bench.names`` and ``bench.virtual``, run as separate processes.

``ask`` sends queries at an even rate on sockets that were opened in containers.  ``serve`` responds to each byte with
a byte.  ``request`` times requests.  Results are written to standard output as JSON: seconds, one list.
"""

import json
import random
import select
import socket
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

DEADLINE_S = 5.0


def ask(descriptors: Sequence[int], rate: int, seconds: float, names: Sequence[str]) -> list[float]:
    """Return the times of responses.  A query without a response takes ``DEADLINE_S``."""
    sockets = [socket.socket(fileno=one) for one in descriptors]
    by_descriptor = {one.fileno(): one for one in sockets}
    poll = select.epoll()
    for one in sockets:
        poll.register(one, select.EPOLLIN)
    questions = [question(name) for name in names]
    sent: dict[tuple[int, int], float] = {}
    took = []
    begun, asked, total = time.perf_counter(), 0, int(rate * seconds)
    while asked < total or sent:
        now = time.perf_counter()
        if now - begun > seconds + DEADLINE_S:
            break
        while asked < total and begun + asked / rate <= now:
            one, id = sockets[asked % len(sockets)], (asked // len(sockets)) & 0xFFFF
            # Count from the moment when it was due, because a late query counts as a late response.
            sent[one.fileno(), id] = begun + asked / rate
            one.send(id.to_bytes(2, "big") + random.choice(questions))
            asked += 1
        for descriptor, _ in poll.poll(0 if asked < total else 0.01):
            try:
                while True:
                    answer = by_descriptor[descriptor].recv(4096)
                    when = sent.pop((descriptor, int.from_bytes(answer[:2], "big")))
                    took.append(time.perf_counter() - when)
            except BlockingIOError:
                pass
    return took + [DEADLINE_S] * len(sent)


def question(name: str) -> bytes:
    """Return a query for the address of ``name``, without its id, which comes first."""
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.split("."))
    return struct.pack("!HHHHH", 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"


def serve(address: str) -> None:
    """Respond to each byte, one connection after the other."""
    with socket.create_server((address, 80), backlog=128) as listening:
        print("ready", flush=True)
        while True:
            connection, _ = listening.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection, suppress(ConnectionResetError):
                while data := connection.recv(100):
                    connection.sendall(data)


def request(address: str, count: int, is_new: bool) -> list[float]:
    """Return the times of ``count`` requests, each over a new connection or all over one."""
    took = []
    connection = None
    for _ in range(count):
        begun = time.perf_counter()
        if connection is None or is_new:
            connection = socket.create_connection((address, 80), timeout=DEADLINE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Close with a reset, so that no port stays busy afterwards.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(b"x")
        connection.recv(1)
        took.append(time.perf_counter() - begun)
        if is_new:
            connection.close()
    return took


def main(words: Sequence[str]) -> None:
    """Run one of the three functions in the module's docstring."""
    match words:
        case ["ask", rate, seconds, descriptors, *names]:
            took = ask([int(one) for one in descriptors.split(",")], int(rate), float(seconds), names)
            print(json.dumps(took))
        case ["serve", address]:
            serve(address)
        case ["request", address, count, kind]:
            print(json.dumps(request(address, int(count), kind == "new")))
        case _:
            raise SystemExit(f"not understood: {words}")


if __name__ == "__main__":
    main(sys.argv[1:])

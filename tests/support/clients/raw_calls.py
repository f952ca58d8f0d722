"""Sends handwritten requests to a unix socket, including requests that no client library would send."""

import json
import socket
from contextlib import closing
from typing import Any, NamedTuple


class Answered(NamedTuple):
    """A response until the end of its connection."""

    status: int
    text: str

    @property
    def document(self) -> Any:
        return json.loads(self.text)


def connected(path: str, timeout_s: float = 30) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(timeout_s)
    made.connect(path)
    return made


def received(connection: socket.socket) -> Answered:
    """Return everything that arrives until the other end closes.  Status 0: nothing arrived."""
    data = b""
    while part := connection.recv(65536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return Answered(int(head.split()[1]) if head else 0, body.decode())


def call(path: str, request: str, body: bytes = b"", timeout_s: float = 30) -> Answered:
    """Send ``call(path, "GET /info")`` on a new connection."""
    length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    head = f"{request} HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n{length}\r\n"
    with closing(connected(path, timeout_s)) as connection:
        connection.sendall(head.encode() + body)
        return received(connection)

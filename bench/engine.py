"""A small Engine API client for measurements: standard library, one kept connection, nothing specific to a system.

It replaces `skep.api.client.client`, because every result includes the client's own cost.  So the client is
synchronous, cheap, and the same for each measured commit.
"""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

API_VERSION = "v1.41"


class EngineError(Exception):
    """The engine answered with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Engine:
    """One endpoint (a unix socket).  Not thread-safe."""

    def __init__(self, path: Path, timeout_s: float = 120.0) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._connection: _UnixConnection | None = None

    def close(self) -> None:
        """Close the kept connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def raw(
        self, method: str, path: str, body: bytes | None = None, type_: str = "application/json"
    ) -> bytes:
        """Send one request, and return the body.  A kept connection that the server has closed is opened again
        once.
        """
        for attempt in (1, 2):
            connection = self._connection or _UnixConnection(self.path, self._timeout_s)
            self._connection = connection
            try:
                headers = {"Content-Type": type_} if body is not None else {}
                connection.request(method, f"/{API_VERSION}{path}", body=body, headers=headers)
                response = connection.getresponse()
                data = response.read()
            except (ConnectionError, http.client.HTTPException):
                self._connection = None
                connection.close()
                if attempt == 2 or method != "GET":
                    raise
                continue
            if response.will_close:
                self._connection = None
                connection.close()
            if response.status >= 400:
                raise EngineError(response.status, data.decode("utf-8", "replace"))
            return data
        raise AssertionError("unreachable")

    def drain(self, path: str, silence_s: float) -> tuple[int, float]:
        """GET ``path`` on a separate connection, and discard the body.

        Return its length and the seconds until its last byte.  A stream that is silent for ``silence_s`` has ended.
        """
        began = last = time.monotonic()
        received = 0
        with suppress(TimeoutError):
            for chunk in self._streamed(path, silence_s):
                received += len(chunk)
                last = time.monotonic()
        return received, last - began

    def listen(self, path: str, window_s: float) -> bytes:
        """Return the output of the stream ``path`` within ``window_s``, on a separate connection."""
        until = time.monotonic() + window_s
        received = []
        with suppress(TimeoutError):
            for chunk in self._streamed(path, window_s):
                if time.monotonic() > until:
                    break
                received.append(chunk)
        return b"".join(received)

    def _streamed(self, path: str, silence_s: float) -> Iterator[bytes]:
        connection = _UnixConnection(self.path, silence_s)
        try:
            connection.request("GET", f"/{API_VERSION}{path}")
            response = connection.getresponse()
            if response.status >= 400:
                raise EngineError(response.status, response.read().decode("utf-8", "replace"))
            while chunk := response.read1(1 << 20):
                yield chunk
        finally:
            connection.close()

    def call(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """Send JSON and return JSON. ``query`` values that are dicts are encoded as JSON (``filters``)."""
        if query:
            words = {key: json.dumps(v) if isinstance(v, dict) else v for key, v in query.items()}
            path = f"{path}?{urlencode(words)}"
        data = self.raw(method, path, None if body is None else json.dumps(body).encode())
        return json.loads(data) if data.strip() else None

    def get(self, path: str, **query: Any) -> Any:
        return self.call("GET", path, **query)

    def post(self, path: str, body: Any = None, **query: Any) -> Any:
        return self.call("POST", path, body, **query)

    def delete(self, path: str) -> Any:
        return self.call("DELETE", path)

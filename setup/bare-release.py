"""Start the installed node, make a cluster of it, and run a container.

``bare-release.sh`` runs this with the tarball's Python.
"""

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import tarfile
import time
from typing import Any

SOCKET = "/run/skep/skep.sock"
STATIC = "/opt/skep/current/libexec/skep/tini-static"
DEADLINE_S = 120


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(SOCKET)


def ask(method: str, path: str, body: Any = None) -> Any:
    """Send a request, and return the decoded response."""
    connection = _Connection("localhost", timeout=60)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = "application/x-tar" if isinstance(body, bytes) else "application/json"
    connection.request(method, path, raw, {"Content-Type": kind})
    response = connection.getresponse()
    text = response.read()
    assert response.status < 300, (path, response.status, text)
    return json.loads(text) if text and path != "/_ping" and "fromSrc" not in path else text


def image() -> bytes:
    """Return the files of an image: one static program."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(STATIC, "init")
    return buffer.getvalue()


def wait_for_node(daemon: "subprocess.Popen[bytes]") -> None:
    """Wait until the node answers."""
    began = time.monotonic()
    while True:
        assert daemon.poll() is None, "the daemon has ended"
        assert time.monotonic() - began < DEADLINE_S, "the daemon does not answer"
        try:
            ask("GET", "/_ping")
            return
        except OSError:
            time.sleep(0.2)


def main() -> None:
    """Run the course, and stop the node."""
    subprocess.run(["/opt/skep/current/libexec/skep/ip", "link", "set", "lo", "up"], check=True)
    daemon = subprocess.Popen(["/usr/local/bin/skep", "daemon"])
    try:
        wait_for_node(daemon)
        ask("POST", "/swarm/init", {"ListenAddr": "127.0.0.1:2377", "AdvertiseAddr": "127.0.0.1"})
        subprocess.run(["/usr/local/bin/skep", "status"], check=True)
        ask("POST", "/images/create?fromSrc=-&repo=static&tag=1", image())
        created = ask("POST", "/containers/create", {"Image": "static:1", "Cmd": ["/init", "--version"]})
        ask("POST", f"/containers/{created['Id']}/start")
        ended = ask("POST", f"/containers/{created['Id']}/wait")
        assert ended["StatusCode"] == 0, ended
        ask("DELETE", f"/containers/{created['Id']}")
        print("a container ran, and ended with 0", os.uname().release)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(60)


if __name__ == "__main__":
    main()

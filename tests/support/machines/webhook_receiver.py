"""A receiver of webhooks in a node's network namespace."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.machines.playground_rig import TestNode

_RECEIVE = """
import http.server, sys

class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with open(sys.argv[1], "ab") as file:
            file.write(body + b"\\n")
        self.send_response(204)
        self.end_headers()

http.server.HTTPServer(("", 8080), Receiver).serve_forever()
"""


@contextmanager
def a_receiver(node: TestNode, path: Path) -> Iterator[None]:
    """Receive webhooks on port 8080 of a node, into lines of a file."""
    path.touch()
    inside = ("nsenter", f"--net={node.description['netns']}")
    with subprocess.Popen(
        [*inside, sys.executable, "-c", _RECEIVE, str(path)], stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.kill()

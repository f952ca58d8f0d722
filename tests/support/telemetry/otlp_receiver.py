"""A small collector of traces.  It writes each request's body as one line to a file.

``python otlp_receiver.py PORT FILE`` serves until it is killed.  It may run in another network namespace.
"""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Receiver(ThreadingHTTPServer):
    """Receives traces.  ``statuses``: statuses of the next responses, followed by 200."""

    daemon_threads = True

    def __init__(self, port: int, file: Path) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.file = file
        self.statuses: list[int] = []
        file.touch()


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        is_trace = (self.path, self.headers["Content-Type"]) == ("/v1/traces", "application/json")
        status = (self.server.statuses or [200]).pop(0) if is_trace else 404
        if status == 200:
            with self.server.file.open("ab") as file:
                file.write(body + b"\n")
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def do_GET(self) -> None:
        """Handle the request of a client that follows a redirect of its POST."""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Do not log to stderr."""


if __name__ == "__main__":
    Receiver(int(sys.argv[1]), Path(sys.argv[2])).serve_forever()

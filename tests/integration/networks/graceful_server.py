"""A web server that stops as one should: on SIGTERM it finishes what it has, and says ``Connection: close``.

``graceful_server.py PORT``.  Answers with its host's name, the client's address (as a proxy tells it, if there is one),
and ``serving``, or ``stopping`` once it has been signalled to stop; ``/slow/SECONDS`` takes that long.  The status is
that of the environment's ``STATUS``.
It ends when its last client has gone.
"""

import os
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = socket.gethostname()
STATUS = int(os.environ.get("STATUS", "200"))
stopping = threading.Event()
clients = threading.Semaphore(0)
open_now = 0
turn = threading.Condition()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        global open_now
        with turn:
            open_now += 1
        super().setup()

    def finish(self) -> None:
        global open_now
        super().finish()
        with turn:
            open_now -= 1
            turn.notify_all()

    def do_GET(self) -> None:
        if self.path.startswith("/slow/"):
            time.sleep(float(self.path.rpartition("/")[2]))
        state = "stopping" if stopping.is_set() else "serving"
        client = self.headers.get("X-Forwarded-For", self.client_address[0])
        body = f"{NAME} {client} {state}".encode()
        self.send_response(STATUS)
        self.send_header("Content-Length", str(len(body)))
        if stopping.is_set():
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *words: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    # As many as nginx accepts.  With the default of 5, the kernel drops what a burst sends, and clients repeat it for
    # up to a minute.
    request_queue_size = 511


def main() -> None:
    # Before it listens: the kernel drops a signal that the first process of a container has no handler for.
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    server = Server(("", int(sys.argv[1])), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while not stopping.wait(0.1):
        pass
    with turn:
        turn.wait_for(lambda: not open_now)


main()

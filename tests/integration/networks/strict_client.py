"""Clients without retries: ``strict_client.py URL...``; ends on SIGTERM and tells what it saw, as JSON.

For each URL two clients: one opens a connection per request, one keeps its connection until the server closes it.
With ``--fresh`` only the first kind.  With ``--at-least N`` each pair asks on until it has had so many answers; with
``--pause S`` each client waits between requests.  With ``--method POST`` they send an empty body.  With ``--ca FILE``
they use TLS, and ``--name`` is the name that they expect and request.  Each word of ``failed`` begins with the time at
which the request began.
"""

import argparse
import http.client
import json
import signal
import ssl
import sys
import threading
import time
from urllib.parse import urlsplit

parser = argparse.ArgumentParser()
parser.add_argument("--at-least", type=int, default=0)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--fresh", action="store_true")
parser.add_argument("--method", default="GET")
parser.add_argument("--ca")
parser.add_argument("--name")
parser.add_argument("urls", nargs="+")
words = parser.parse_args()

over = threading.Event()
answered: dict[str, int] = {}
failed: list[str] = []
turn = threading.Lock()


class NamedConnection(http.client.HTTPSConnection):
    """A connection to the address of a node, for a name that leads to it."""

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        self.sock = ssl.create_default_context(cafile=words.ca).wrap_socket(
            self.sock, server_hostname=words.name
        )


def ask(connection: http.client.HTTPConnection, path: str) -> bool:
    """One request; whether the connection may be used again."""
    began = time.time()
    try:
        connection.request(words.method, path, headers={"Host": words.name} if words.name else {})
        response = connection.getresponse()
        server = response.read().split()[0].decode()
        if response.status != http.HTTPStatus.OK:
            raise http.client.HTTPException(f"{response.status} {response.reason}")
    except (OSError, http.client.HTTPException, IndexError) as error:
        with turn:
            failed.append(f"{began:.3f} {connection.host}:{connection.port} {type(error).__name__}: {error}")
        connection.close()
        return False
    with turn:
        answered[server] = answered.get(server, 0) + 1
    return not response.will_close


def run(url: str, keeps: bool) -> None:
    parts = urlsplit(url)
    kind = NamedConnection if words.ca else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=10)
    asked = 0
    while not over.is_set() or asked < words.at_least / 2:
        if not (ask(connection, parts.path or "/") and keeps):
            connection.close()
        asked += 1
        time.sleep(words.pause)


signal.signal(signal.SIGTERM, lambda *_: over.set())
kinds = (False,) if words.fresh else (False, True)
threads = [threading.Thread(target=run, args=(url, keeps)) for url in words.urls for keeps in kinds]
for thread in threads:
    thread.start()
print("asking", flush=True)
for thread in threads:
    thread.join()
json.dump({"answered": answered, "failed": failed}, sys.stdout)

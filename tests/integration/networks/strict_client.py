"""Clients without retries: ``strict_client.py URL... < /dev/null``; ends on SIGTERM and tells what it saw, as JSON.

For each URL two clients: one opens a connection per request, one keeps its connection until the server closes it.
"""

import http.client
import json
import signal
import sys
import threading
from urllib.parse import urlsplit

over = threading.Event()
answered: dict[str, int] = {}
failed: list[str] = []
turn = threading.Lock()


def ask(connection: http.client.HTTPConnection, path: str) -> bool:
    """One request; whether the connection may be used again."""
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        server = answer.read().split()[0].decode()
    except (OSError, http.client.HTTPException, IndexError) as error:
        with turn:
            failed.append(f"{connection.host}:{connection.port} {type(error).__name__}: {error}")
        connection.close()
        return False
    with turn:
        answered[server] = answered.get(server, 0) + 1
    return not answer.will_close


def run(url: str, keeps: bool) -> None:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    while not over.is_set():
        if not (ask(connection, parts.path or "/") and keeps):
            connection.close()


signal.signal(signal.SIGTERM, lambda *_: over.set())
threads = [threading.Thread(target=run, args=(url, keeps)) for url in sys.argv[1:] for keeps in (False, True)]
for thread in threads:
    thread.start()
print("asking", flush=True)
for thread in threads:
    thread.join()
json.dump({"answered": answered, "failed": failed}, sys.stdout)

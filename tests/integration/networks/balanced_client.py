"""Clients behind a load balancer, without retries: ``balanced_client.py --rotation FOLDER PORT...``; ends on SIGTERM.

Each file of the folder is a node in rotation, with its address.  A connection holds its file's lock.  Whoever takes a
node out of rotation renames its file, and then waits for the lock: after that, no connection uses the node.
For each port two clients: one opens a connection per request, one keeps it for some requests.  With ``--at-least N``
they ask on until they have had so many answers.  Tells what it saw as JSON, like ``strict_client.py``.
"""

import argparse
import fcntl
import http.client
import json
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO

KEPT = 20
"""Requests on one connection, so that a connection holds its node for less than a second."""

parser = argparse.ArgumentParser()
parser.add_argument("--rotation", type=Path, required=True)
parser.add_argument("--at-least", type=int, default=0)
parser.add_argument("--pause", type=float, default=0.01)
parser.add_argument("ports", nargs="+", type=int)
words = parser.parse_args()

over = threading.Event()
answered: dict[str, int] = {}
failed: list[str] = []
turn = threading.Lock()


def held() -> IO[str]:
    """Hold a node in rotation: its file, locked."""
    while True:
        path = random.choice([one for one in words.rotation.iterdir() if not one.name.startswith(".")])
        try:
            file = path.open()
        except FileNotFoundError:
            continue
        fcntl.flock(file, fcntl.LOCK_SH)
        if path.exists():
            return file
        file.close()


def ask(connection: http.client.HTTPConnection) -> bool:
    """One request; whether the connection may be used again."""
    began = time.time()
    place = f"{connection.host}:{connection.port}"
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        server = response.read().split()[0].decode()
        if response.status != http.HTTPStatus.OK:
            raise http.client.HTTPException(f"{response.status} {response.reason}")
    except (OSError, http.client.HTTPException, IndexError) as error:
        with turn:
            failed.append(f"{began:.3f} +{time.time() - began:.3f} s {place} {type(error).__name__}: {error}")
        return False
    with turn:
        answered[f"{place} {server}"] = answered.get(f"{place} {server}", 0) + 1
    return not response.will_close


def run(port: int, count: int) -> None:
    asked = 0
    least = words.at_least / len(threads)
    while not over.is_set() or asked < least:
        with held() as file:
            connection = http.client.HTTPConnection(file.read().strip(), port, timeout=10)
            for _ in range(count):
                asked += 1
                goes_on = ask(connection)
                time.sleep(words.pause)
                if not goes_on:
                    break
            connection.close()


signal.signal(signal.SIGTERM, lambda *_: over.set())
threads = [threading.Thread(target=run, args=(port, count)) for port in words.ports for count in (1, KEPT)]
for thread in threads:
    thread.start()
print("asking", flush=True)
for thread in threads:
    thread.join()
json.dump({"answered": answered, "failed": failed}, sys.stdout)

"""A client whose requests begin at fixed times: ``open_loop_client.py --rate 500 --ca FILE --name NAME ADDRESS``.

A request that waits delays no other one.  Most requests use a connection that is idle, and every 25th one a new
connection.  Nothing is repeated.  Ends on SIGTERM once each request has its response or its error, and prints JSON: the
requests by the tenth of a second in which they began, responses by body, and each failure with the times at which its
request began, its connection began to open, and it failed.
"""

import argparse
import asyncio
import json
import signal
import ssl
import sys
import time
from collections import Counter

parser = argparse.ArgumentParser()
parser.add_argument("--rate", type=float, required=True)
parser.add_argument("--ca", required=True)
parser.add_argument("--name", required=True)
parser.add_argument("address")
words = parser.parse_args()

FRESH = 25
KEPT_S = 3.0
"""Seconds after which an idle connection is closed, far less than the server keeps it."""
WITHIN_S = 40.0
REQUEST = f"GET / HTTP/1.1\r\nHost: {words.name}\r\n\r\n".encode()
CONTEXT = ssl.create_default_context(cafile=words.ca)

began: Counter[int] = Counter()
answered: Counter[str] = Counter()
failed: list[dict[str, object]] = []
late_s: list[float] = []
"""How much later than planned each request began."""


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, opened: float) -> None:
        self.reader, self.writer, self.opened = reader, writer, opened
        self.used = time.monotonic()


idle: list[Connection] = []


async def opened() -> Connection:
    at = time.time()
    reader, writer = await asyncio.open_connection(
        words.address, 443, ssl=CONTEXT, server_hostname=words.name, ssl_handshake_timeout=WITHIN_S
    )
    return Connection(reader, writer, at)


async def exchange(connection: Connection) -> bool:
    """Send a request, and return whether the connection may be used again."""
    connection.writer.write(REQUEST)
    head = (await connection.reader.readuntil(b"\r\n\r\n")).decode().lower()
    body = await connection.reader.readexactly(int(head.partition("content-length: ")[2].partition("\r")[0]))
    status = head.split()[1]
    if status != "200":
        raise ValueError(f"status {status}")
    answered[body.split()[0].decode()] += 1
    return "connection: close" not in head


async def ask(*, is_fresh: bool) -> None:
    at = opening = time.time()
    began[int(at * 10)] += 1
    connection = None
    while idle and not is_fresh and connection is None:
        connection = idle.pop()
        if connection.reader.at_eof() or time.monotonic() - connection.used > KEPT_S:
            connection.writer.close()
            connection = None
    try:
        async with asyncio.timeout(WITHIN_S):
            connection = connection or await opened()
            is_kept = await exchange(connection)
    except (OSError, EOFError, TimeoutError, ValueError) as error:
        opened_at = connection.opened if connection is not None else opening
        failed.append(
            {
                "began": at,
                "opened": opened_at,
                "ended": time.time(),
                "error": f"{type(error).__name__}: {error}",
            }
        )
        is_kept = False
    if connection is not None and is_kept and not is_fresh:
        connection.used = time.monotonic()
        idle.append(connection)
    elif connection is not None:
        connection.writer.close()


async def main() -> None:
    is_over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, is_over.set)
    print("asking", flush=True)
    first, count = time.monotonic(), 0
    async with asyncio.TaskGroup() as group:
        while not is_over.is_set():
            due = first + count / words.rate
            if (left_s := due - time.monotonic()) > 0:
                await asyncio.sleep(left_s)
            late_s.append(time.monotonic() - due)
            count += 1
            group.create_task(ask(is_fresh=count % FRESH == 0))
            if count % 50 == 0:  # so that requests under way continue when this process is late
                await asyncio.sleep(0)
    late_s.sort()
    result = {
        "began": began,
        "answered": answered,
        "failed": failed,
        "late_s": late_s[len(late_s) * 99 // 100],
    }
    json.dump(result, sys.stdout)


asyncio.run(main())

#!/usr/bin/env python3
"""A request to the engine at DOCKER_HOST, for lines of a script: the body to stdout, the status to stderr.

``api [-k] [-f PATH]... [-x NAME]... [-u] METHOD PATH [-H 'NAME: VALUE']... [-d BODY | -d @FILE]``: ``-k`` shows only
which fields a document has and of which kind, ``-f`` only those at these paths, ``-x`` all but those of this name,
``-u`` asks for a stream (``Upgrade``).  It exits with 1 if the status says that the request failed.
"""

import argparse
import json
import os
import re
import socket
import sys
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from urllib.parse import quote

TIMEOUT_S = 50


class Connection(HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(os.environ["DOCKER_HOST"].removeprefix("unix://"))


def shape(value: object) -> object:
    """The fields of a document, with an example of their kind; of a list the first element."""
    match value:
        case dict():
            return {key: shape(one) for key, one in sorted(value.items())}
        case list():
            return [shape(one) for one in value[:1]]
        case None:
            return None
        case bool():
            return False
        case int() | float():
            return 0
    return ""


def at(value: object, path: str) -> object:
    for step in path.split("."):
        if isinstance(value, list):
            value = value[int(step)] if int(step) < len(value) else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def without(value: object, names: list[str]) -> object:
    match value:
        case dict():
            return {key: without(one, names) for key, one in value.items() if key not in names}
        case list():
            return [without(one, names) for one in value]
    return value


def printable(body: bytes) -> str:
    return re.sub(r"[^ -~\n]", lambda found: f"\\x{ord(found[0]):02x}", body.decode("latin-1"))


def body_of(response: HTTPResponse, connection: Connection, is_stream: bool) -> bytes:
    if not is_stream or response.status != 101:
        return response.read()
    rest = response.fp.peek()  # what came with the head
    while part := connection.sock.recv(65536):
        rest += part
    return rest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", "--kinds", action="store_true")
    parser.add_argument("-f", "--field", action="append", default=[])
    parser.add_argument("-x", "--without", action="append", default=[])
    parser.add_argument("-u", "--upgrade", action="store_true")
    parser.add_argument("-H", "--header", action="append", default=[])
    parser.add_argument("-d", "--data", default="")
    parser.add_argument("method")
    parser.add_argument("path")
    given = parser.parse_args()
    data = Path(given.data[1:]).read_text() if given.data.startswith("@") else given.data
    headers = {"Content-Type": "application/json"} if data else {}
    headers |= {"Connection": "Upgrade", "Upgrade": "tcp"} if given.upgrade else {}
    headers |= dict(header.split(": ", 1) for header in given.header)
    connection = Connection("docker")
    connection.request(given.method, quote(given.path, safe="/?=&%:."), data.encode() or None, headers)
    response = connection.getresponse()
    body = body_of(response, connection, given.upgrade)
    print(response.status, file=sys.stderr)
    try:
        document = json.loads(body)
    except ValueError:
        sys.stdout.write(printable(body))
        return response.status >= 400
    document = without(document, given.without)
    if given.field:
        document = {path: at(document, path) for path in given.field}
    json.dump(shape(document) if given.kinds else document, sys.stdout)
    return response.status >= 400


if __name__ == "__main__":
    sys.exit(main())

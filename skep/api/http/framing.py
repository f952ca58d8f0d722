"""Parses the heads of HTTP/1.1 requests, finds the ends of their bodies (RFC 9112, section 6), and decides which
process serves them.

Ambiguous messages (two lengths, a length with chunks, folded lines) count as malformed, because the web server that
gets them next might split them differently.
"""

import re
from collections.abc import Iterable

import msgspec

from skep.errors import InvalidArgument

HEAD_BYTES_MAX = 64 * 1024
"""Longest head of a request, which is far above what clients send."""
_LINE_BYTES_MAX = 4096
"""Longest line with the size of a chunk, with its extensions."""


class Malformed(InvalidArgument):
    """These bytes are not an HTTP/1.1 message."""


class Head(msgspec.Struct, frozen=True):
    """First line and headers of a message.  Header names are in lower case, and values have no blanks around them."""

    first_line: bytes
    headers: tuple[tuple[bytes, bytes], ...]

    def all(self, name: bytes) -> list[bytes]:
        """Return the values of all headers called ``name``, which is in lower case."""
        return [value for key, value in self.headers if key == name]

    def tokens(self, name: bytes) -> list[bytes]:
        """Return the comma-separated words of all headers called ``name``, in lower case."""
        return [word.strip().lower() for value in self.all(name) for word in value.split(b",")]

    def with_headers(self, *headers: tuple[bytes, bytes], without: Iterable[bytes] = ()) -> bytes:
        """Return the head as sent, with ``headers`` in place of those with the same names."""
        dropped = {*without, *(name.lower() for name, _ in headers)}
        kept = [(name, value) for name, value in self.headers if name not in dropped]
        lines = [self.first_line, *(b"%s: %s" % pair for pair in (*kept, *headers))]
        return b"\r\n".join(lines) + b"\r\n\r\n"


class Body:
    """Finds the end of one body in a stream of bytes.

    ``take`` splits received data into the part that belongs to the body, and the rest.
    """

    is_complete = True

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """Split ``data``.  This base class has no body."""
        return b"", data


class Sized(Body):
    """A body of a fixed length."""

    def __init__(self, length: int) -> None:
        self.bytes_left = length
        self.is_complete = length == 0

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """Split ``data`` at the end of the body."""
        mine, rest = data[: self.bytes_left], data[self.bytes_left :]
        self.bytes_left -= len(mine)
        self.is_complete = self.bytes_left == 0
        return mine, rest


class Chunked(Body):
    """A body that ends with a chunk of size zero and the trailers."""

    def __init__(self) -> None:
        self.is_complete = False
        self._data_left = 0
        """Remaining bytes of the current chunk, including its line end."""
        self._line = b""
        """The incomplete current line."""
        self._in_trailers = False

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """Split ``data`` at the end of the body.  Raises: Malformed."""
        position = 0
        while position < len(data) and not self.is_complete:
            if self._data_left:
                step = min(self._data_left, len(data) - position)
                self._data_left -= step
                position += step
            else:
                position = self._take_line(data, position)
        return data[:position], data[position:]

    def _take_line(self, data: bytes, start: int) -> int:
        end = data.find(b"\n", start)
        self._line += data[start:] if end < 0 else data[start : end + 1]
        if len(self._line) > _LINE_BYTES_MAX:
            raise Malformed("line of a chunk is too long")
        if end < 0:
            return len(data)
        line, self._line = self._line.rstrip(b"\r\n"), b""
        if self._in_trailers:
            self.is_complete = not line
        else:
            size = _chunk_size(line)
            self._in_trailers = size == 0
            self._data_left = size + 2 if size else 0
        return end + 1


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip(b" \t")
    if not 0 < len(digits) <= 15 or not all(digit in b"0123456789abcdefABCDEF" for digit in digits):
        raise Malformed("malformed chunk size")
    return int(digits, 16)


class RequestHead(msgspec.Struct, frozen=True):
    """The head of a request."""

    head: Head
    method: str
    target: str
    """Path and query as sent."""

    @property
    def upgrades(self) -> bool:
        """Whether the connection stops being HTTP after this request (attach, exec, BuildKit's session)."""
        return b"upgrade" in self.head.tokens(b"connection") or bool(self.head.all(b"upgrade"))

    def body(self) -> Body:
        """Return the body after the head.  Raises: Malformed."""
        encodings = self.head.tokens(b"transfer-encoding")
        lengths = set(self.head.all(b"content-length"))
        if encodings and (lengths or encodings != [b"chunked"]):
            raise Malformed("malformed transfer encoding")
        if encodings:
            return Chunked()
        if not lengths:
            return Body()
        length = lengths.pop()
        if lengths or not length.isdigit() or len(length) > 18:
            raise Malformed("malformed content length")
        return Sized(int(length))


def parse_request(raw: bytes) -> RequestHead:
    """Parse ``raw``, which is everything up to the empty line.  Raises: Malformed."""
    head = _parse(raw)
    parts = head.first_line.split(b" ")
    if len(parts) != 3 or parts[2] not in (b"HTTP/1.1", b"HTTP/1.0") or not parts[0].isalpha():
        raise Malformed("malformed request line")
    try:
        target = parts[1].decode("ascii")
    except UnicodeDecodeError as error:
        raise Malformed("malformed request target") from error
    if target.startswith(("http://", "https://")):  # the absolute form, which clients send to a proxy
        target = "/" + target.split("/", 3)[3] if target.count("/") > 2 else "/"
    if not target.startswith("/"):
        raise Malformed("malformed request target")
    return RequestHead(head, parts[0].decode(), target)


def _parse(raw: bytes) -> Head:
    if b"\0" in raw or raw.count(b"\n") != raw.count(b"\r\n"):
        raise Malformed("malformed header")
    first_line, *lines = raw.removesuffix(b"\r\n\r\n").split(b"\r\n")
    headers = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or name != name.strip() or b" " in name:
            raise Malformed("malformed header")
        headers.append((name.lower(), value.strip(b" \t")))
    return Head(first_line, tuple(headers))


class Incoming(msgspec.Struct, frozen=True):
    """The parts of a request that are needed to route it and to find its end."""

    method: str
    target: str
    body: Body
    upgrades: bool


def read_head(raw: bytes) -> Incoming:
    """Parse ``raw``, which is everything up to the empty line.  Raises: Malformed."""
    match = _PLAIN_REQUEST.fullmatch(raw)
    if match is None:
        request = parse_request(raw)
        return Incoming(request.method, request.target, request.body(), request.upgrades)
    method, target, length = match.groups()
    return Incoming(method.decode(), target.decode(), Sized(int(length)) if length else Body(), False)


def with_target(raw: bytes, target: str) -> bytes:
    """Return the head ``raw``, which ``read_head`` has accepted, with another path and query."""
    first_line, rest = raw.split(b"\r\n", 1)
    method, _, version = first_line.split(b" ")
    return b"%b %b %b\r\n%b" % (method, target.encode("ascii"), version, rest)


_OTHER_LINES = (
    rb"(?:(?!content-length:|transfer-encoding:|connection:|keep-alive:|expect:|upgrade:)"
    rb"[!#-'*+.0-9A-Z^-z|~-]+:[^\r\n\0]*\r\n)*"
)
_LENGTH_LINE = rb"content-length:[ \t]*([0-9]{1,5})[ \t]*\r\n"
# Matches a request without a body and without headers about the connection. One match is faster than parsing the head.
_PLAIN_REQUEST = re.compile(
    rb"(GET|POST|PUT|DELETE) (/[!-~]*) HTTP/1\.1\r\n(?i:%s(?:%s%s)?)\r\n"
    % (_OTHER_LINES, _LENGTH_LINE, _OTHER_LINES)
)


def plain_ping(data: bytes) -> tuple[str, str | None] | None:
    """Return method and version if ``data`` is a complete, plain ``/_ping``, else None.

    A plain request has no body, no header about the connection, and no further request after it.
    """
    match = _PLAIN_PING.fullmatch(data)
    if match is None:
        return None
    method, version = match.groups()
    return method.decode(), version.decode() if version is not None else None


_PLAIN_PING = re.compile(rb"(GET|HEAD) (?:/v([0-9.]+))?/_ping HTTP/1\.1\r\n(?i:%s)\r\n" % _OTHER_LINES)


def is_for_manager(path: str) -> bool:
    """Return whether the manager process serves requests for ``path``.  ``path``: without version and query.

    By this rule, the node process passes connections to the manager process, and the manager process passes them back.
    """
    return _MANAGER.fullmatch(path) is not None


def is_readable(method: str, path: str) -> bool:
    """Return whether a manager may answer a worker's request, if the cluster allows it.

    Such a request changes nothing, and shows no secret.
    """
    return method == "GET" and _READABLE.fullmatch(path) is not None


def path_of(target: str) -> str:
    """Return the path in ``target`` without its version, as it is routed: ``//v1.41/info/?x=1`` -> ``/info``."""
    return _VERSION.sub("/", plain_path(raw_path_of(target)), count=1)


def raw_path_of(target: str) -> str:
    """Return the path in ``target`` as it was sent."""
    return target.partition("#")[0].partition("?")[0]


def plain_path(path: str) -> str:
    """Return ``path`` without doubled slashes and without a slash at its end.

    Clients that join a base URL and a path send such paths.  Every process routes and authorizes the plain path.
    """
    if "//" in path or (path.endswith("/") and len(path) > 1):
        return "/" + _SLASHES.sub("/", path).strip("/")
    return path


_SLASHES = re.compile(r"//+")


_VERSION = re.compile(r"^/v[0-9][0-9.]*/")
_MANAGER = re.compile(
    # requests about the node's own membership must work without a manager, which serves the rest of /swarm
    r"/swarm(?!/(?:init|join|leave|unlock)\Z)(?:/.*)?"
    r"|/(?:services|tasks|nodes|secrets|configs)(?:/.*)?"
    r"|/skep/(?:access|backup|catalog|certificates|door|events|history|jobs|notify|quorum|rebalance|state|users|verify"
    r"|what-if|view(?:/stream)?|doctor/network"
    r"|(?:access|certificates|cluster|notify|registrations|stacks|tasks|services|users|what-if)/.+)"
    r"|/ui(?:/.*)?"
)
_READABLE = re.compile(r"/(?:services|tasks|nodes|networks)(?:/[^/]+)?|/(?:skep/)?events|/skep/history")

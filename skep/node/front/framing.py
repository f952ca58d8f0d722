"""HTTP/1.1 heads, and where the body behind a head ends (RFC 9112, section 6).

Whatever could be read in two ways (a length twice, a length beside chunks, folded lines) is refused: the manager
behind us must see the same messages as we do.
"""

import re
from collections.abc import Iterable

import msgspec

from skep.errors import InvalidArgument

HEAD_BYTES_MAX = 64 * 1024
_LINE_BYTES_MAX = 4096


class Malformed(InvalidArgument):
    """These bytes are no HTTP/1.1 message."""


class Head(msgspec.Struct, frozen=True):
    """First line and headers; names in lower case, in their order, values without outer blanks."""

    first_line: bytes
    headers: tuple[tuple[bytes, bytes], ...]

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]

    def tokens(self, name: bytes) -> list[bytes]:
        """The comma-separated words of all headers called ``name``, in lower case."""
        return [word.strip().lower() for value in self.all(name) for word in value.split(b",")]

    @property
    def is_last(self) -> bool:
        """Whether the connection ends with this message."""
        options = self.tokens(b"connection")
        return b"close" in options or (b"HTTP/1.0" in self.first_line and b"keep-alive" not in options)

    def with_headers(self, *headers: tuple[bytes, bytes], without: Iterable[bytes] = ()) -> bytes:
        """The head as sent, with ``headers`` in place of any of the same names."""
        dropped = {*without, *(name.lower() for name, _ in headers)}
        kept = [(name, value) for name, value in self.headers if name not in dropped]
        lines = [self.first_line, *(b"%s: %s" % pair for pair in (*kept, *headers))]
        return b"\r\n".join(lines) + b"\r\n\r\n"


class Request(msgspec.Struct, frozen=True):
    """The head of a request."""

    head: Head
    method: str
    target: str
    """Path and query as sent."""

    @property
    def upgrades(self) -> bool:
        """The connection stops being HTTP after this request (attach, exec, BuildKit's session)."""
        return b"upgrade" in self.head.tokens(b"connection") or bool(self.head.all(b"upgrade"))


def parse_request(raw: bytes) -> Request:
    """``raw``: everything up to the empty line.  Raises: Malformed."""
    head = _parse(raw)
    parts = head.first_line.split(b" ")
    if len(parts) != 3 or parts[2] not in (b"HTTP/1.1", b"HTTP/1.0") or not parts[0].isalpha():
        raise Malformed("malformed request line")
    try:
        target = parts[1].decode("ascii")
    except UnicodeDecodeError as error:
        raise Malformed("malformed request target") from error
    if target.startswith(("http://", "https://")):  # absolute form, as to a proxy
        target = "/" + target.split("/", 3)[3] if target.count("/") > 2 else "/"
    if not target.startswith("/"):
        raise Malformed("malformed request target")
    return Request(head, parts[0].decode(), target)


class Response(msgspec.Struct, frozen=True):
    """The head of a response."""

    head: Head
    status: int


def parse_response(raw: bytes) -> Response:
    """``raw``: everything up to the empty line.  Raises: Malformed."""
    head = _parse(raw)
    parts = head.first_line.split(b" ", 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
        raise Malformed("malformed status line")
    return Response(head, int(parts[1]))


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


class PlainRequest(msgspec.Struct, frozen=True):
    """As much as is asked of a request that goes on as it came.  ``body_bytes``: at most 99,999."""

    method: str
    target: str
    body_bytes: int


def plain_request(raw: bytes) -> PlainRequest | None:
    """A request that has its body's length at most, and says nothing about the connection; None: another, or none.

    Such a one need not be taken apart: what ``parse_request`` and ``body_of_request`` say of it is known.
    """
    match = _PLAIN_REQUEST.fullmatch(raw)
    if match is None:
        return None
    method, target, length = match.groups()
    return PlainRequest(method.decode(), target.decode(), int(length or 0))


def plain_answer_bytes(raw: bytes) -> int | None:
    """The length of the body behind the head of a likewise plain answer to a GET, POST, PUT or DELETE."""
    match = _PLAIN_ANSWER.fullmatch(raw)
    return int(match[1]) if match is not None else None


_OTHER_LINES = (
    rb"(?:(?!content-length:|transfer-encoding:|connection:|keep-alive:|expect:|upgrade:)"
    rb"[!#-'*+.0-9A-Z^-z|~-]+:[^\r\n\0]*\r\n)*"
)
_LENGTH_LINE = rb"content-length:[ \t]*([0-9]{1,5})[ \t]*\r\n"
_PLAIN_REQUEST = re.compile(
    rb"(GET|POST|PUT|DELETE) (/[!-~]*) HTTP/1\.1\r\n(?i:%s(?:%s%s)?)\r\n"
    % (_OTHER_LINES, _LENGTH_LINE, _OTHER_LINES)
)
_PLAIN_ANSWER = re.compile(
    rb"HTTP/1\.1 (?!204|304)[2-5][0-9][0-9] [^\r\n\0]*\r\n(?i:%s%s%s)\r\n"
    % (_OTHER_LINES, _LENGTH_LINE, _OTHER_LINES)
)


class Body:
    """Finds the end of one body in a stream of bytes.

    ``take`` splits what arrived: the part that still belongs to the body, and the rest.
    """

    is_complete = True

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        return b"", data

    def ends_within(self, size: int) -> bool:
        """Whether it is known that at most ``size`` bytes are still to come."""
        return self.is_complete


class NoBody(Body):
    pass


class UntilClose(Body):
    """Ends with the connection."""

    is_complete = False

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        return data, b""


class Sized(Body):
    """Ends after so many bytes."""

    def __init__(self, length: int) -> None:
        self._missing = length
        self.is_complete = length == 0

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        mine, rest = data[: self._missing], data[self._missing :]
        self._missing -= len(mine)
        self.is_complete = self._missing == 0
        return mine, rest

    def ends_within(self, size: int) -> bool:
        return self._missing <= size


class Chunked(Body):
    """Ends with the chunk of size zero and the trailers behind it."""

    def __init__(self) -> None:
        self.is_complete = False
        self._data_left = 0
        """Bytes of the present chunk, with its line end, that are still to come."""
        self._line = b""
        """The beginning of a line whose end has not come yet."""
        self._in_trailers = False

    def take(self, data: bytes) -> tuple[bytes, bytes]:
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


def body_of_request(request: Request) -> Body:
    """Where the body behind ``request`` ends.  Raises: Malformed."""
    return _body(request.head) or NoBody()


def body_of_response(response: Response, method: str) -> Body:
    """Where the body behind ``response`` to a request with ``method`` ends.  Raises: Malformed."""
    if method == "HEAD" or response.status < 200 or response.status in (204, 304):
        return NoBody()
    return _body(response.head) or UntilClose()


def _body(head: Head) -> Body | None:
    encodings = head.tokens(b"transfer-encoding")
    lengths = set(head.all(b"content-length"))
    if encodings and (lengths or encodings != [b"chunked"]):
        raise Malformed("malformed transfer encoding")
    if encodings:
        return Chunked()
    if not lengths:
        return None
    length = lengths.pop()
    if lengths or not length.isdigit() or len(length) > 18:
        raise Malformed("malformed content length")
    return Sized(int(length))

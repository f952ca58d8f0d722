"""DNS messages (RFC 1035, EDNS by RFC 6891), as far as a server of few record types needs them.

Queries come from containers and are not trusted: for any bytes ``parse`` returns a query, an error response or nothing,
and never raises.  The name in a question may not be compressed, so there are no loops.  A response is never longer than
the query allows, and marked as truncated if records were left out.
"""

import struct
from ipaddress import ip_address

import msgspec

A, PTR, MX, AAAA, SRV, OPT, ANY = 1, 12, 15, 28, 33, 41, 255
IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED, BADVERS = 0, 1, 2, 3, 4, 5, 16

QUERY_BYTES_MAX = 4096
"""Longer datagrams are refused without parsing; over TCP a longer message ends the connection."""
UDP_BYTES_MIN = 512
UDP_BYTES_MAX = 4096
TCP_BYTES_MAX = 65535
_HEADER = struct.Struct("!HHHHHH")
_RECORD = struct.Struct("!HHIH")
_QR, _OPCODE, _TC, _RD, _RA, _CD = 0x8000, 0x7800, 0x0200, 0x0100, 0x0080, 0x0010
_NAME_BYTES_MAX = 255
_LABEL_BYTES_MAX = 63
_OPT_BYTES = 11
_ADDRESS_BYTES = {A: 4, AAAA: 16}


class Query(msgspec.Struct, frozen=True):
    """A query with one question.  ``name``: lower case without the last dot; ``question``: as in the message."""

    id: int
    flags: int
    name: str
    type: int
    class_: int
    question: bytes
    udp_bytes_max: int = UDP_BYTES_MIN
    """Of a response over UDP."""
    has_options: bool = False
    """It has an OPT record, so the response has one too."""


class Record(msgspec.Struct, frozen=True):
    """A resource record.  ``data`` as on the wire; ``owner``: as on the wire, empty: the question's name."""

    type: int
    data: bytes
    owner: bytes = b""


def parse(data: bytes) -> Query | bytes | None:
    """The query; bytes: the error response to a malformed one; None: no response is sent.

    Messages with other than one question are malformed.  Source: miekg/dns, acceptfunc.go, which moby uses.
    """
    if len(data) < _HEADER.size:
        return None
    id, flags, questions, answers, authorities, additional = _HEADER.unpack_from(data)
    if flags & _QR:
        return None
    if flags & _OPCODE:
        return _bare(id, flags, NOTIMP)
    if len(data) > QUERY_BYTES_MAX or questions != 1 or answers or authorities or additional > 2:
        return _bare(id, flags, FORMERR)
    read = _question(data)
    if read is None:
        return _bare(id, flags, FORMERR)
    name, end = read
    type_, class_ = struct.unpack_from("!HH", data, end - 4)
    query = Query(id, flags, name, type_, class_, data[_HEADER.size : end])
    return query if not additional else _with_options(query, data, end, additional)


def reply(
    query: Query,
    code: int = NOERROR,
    answers: tuple[Record, ...] = (),
    extra: tuple[Record, ...] = (),
    *,
    ttl_s: int = 0,
    bytes_max: int = UDP_BYTES_MIN,
) -> bytes:
    """The response to ``query`` in at most ``bytes_max``; if records do not fit, it is marked as truncated."""
    room = bytes_max - _HEADER.size - len(query.question) - (_OPT_BYTES if query.has_options else 0)
    packed, answered, room = _packed(answers, ttl_s, room)
    more, added, _ = _packed(extra, ttl_s, room) if answered == len(answers) else (b"", 0, 0)
    flags = _QR | _RA | (query.flags & (_RD | _CD)) | (code & 0xF)
    if answered < len(answers):
        flags |= _TC
    options = b""
    if query.has_options:
        options = b"\0" + _RECORD.pack(OPT, UDP_BYTES_MAX, (code >> 4) << 24, 0)
        added += 1
    return _HEADER.pack(query.id, flags, 1, answered, 0, added) + query.question + packed + more + options


def encode_question(name: str, type: int) -> bytes:
    """The question as encoded in a message.  Raises: ValueError: ``name`` cannot be a DNS name."""
    return encoded(name) + struct.pack("!HH", type, IN)


def encode_query(id: int, question: bytes) -> bytes:
    """A query with this question only."""
    return _HEADER.pack(id, _RD, 1, 0, 0, 0) + question


def addresses_in(data: bytes, question: bytes) -> tuple[str, ...]:
    """The addresses in a response to ``question`` (``is_response``), sorted; empty if it is malformed."""
    count = int.from_bytes(data[6:8], "big")
    at: int | None = _HEADER.size + len(question)
    found = []
    for _ in range(count):
        at = _past_name(data, at) if at is not None else None
        if at is None or at + _RECORD.size > len(data):
            break
        type, _, _, length = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        if type in _ADDRESS_BYTES and length == _ADDRESS_BYTES[type]:
            found.append(str(ip_address(data[at : at + length])))
        at += length
    return tuple(sorted(found))


def forwardable(data: bytes, id: int) -> bytes:
    """The same message under another ``id``."""
    return id.to_bytes(2, "big") + data[2:]


def is_response(data: bytes, id: int, question: bytes) -> bool:
    """Whether ``data`` is a response to ``question`` with ``id``, by header and question."""
    if len(data) < _HEADER.size:
        return False
    its_id, flags, questions, _, _, _ = _HEADER.unpack_from(data)
    if its_id != id or not flags & _QR or flags & _OPCODE:
        return False
    if questions == 0:  # a server that could not parse the query does not repeat the question
        return flags & 0xF in (FORMERR, SERVFAIL, NOTIMP, REFUSED)
    start = _HEADER.size
    return questions == 1 and data[start : start + len(question)].lower() == question.lower()


def response_code(data: bytes) -> int:
    """The response code in the header, without the bits of EDNS."""
    return data[3] & 0xF


def fitting(data: bytes, query: Query, bytes_max: int) -> bytes:
    """Another server's response with the client's id; a truncated one if it is too long."""
    if len(data) <= bytes_max:
        return forwardable(data, query.id)
    flags = int.from_bytes(data[2:4], "big") | _TC
    return _HEADER.pack(query.id, flags, 1, 0, 0, 0) + query.question


def encoded(name: str) -> bytes:
    """``name`` as on the wire.  Raises: ValueError: it cannot be a DNS name."""
    parts = []
    for label in name.encode().split(b"."):
        if not 0 < len(label) <= _LABEL_BYTES_MAX:
            raise ValueError(f"{name!r} is no DNS name")
        parts.append(bytes((len(label),)) + label)
    wire = b"".join(parts) + b"\0"
    if len(wire) > _NAME_BYTES_MAX:
        raise ValueError(f"{name!r} is no DNS name")
    return wire


def key(name: str) -> str:
    """``name`` in the form of ``Query.name``."""
    return name.encode().decode("latin-1").lower()


def _question(data: bytes) -> tuple[str, int] | None:
    """(name, offset of the question's end)."""
    at = _HEADER.size
    labels: list[bytes] = []
    size = len(data)
    while at < size:
        length = data[at]
        at += 1
        if length == 0:
            if at + 4 > size or at - _HEADER.size > _NAME_BYTES_MAX:
                return None
            # Bytes are kept one by one: names are compared, never shown.
            return b".".join(labels).decode("latin-1").lower(), at + 4
        if length > _LABEL_BYTES_MAX:  # a pointer, or something that never was
            return None
        label = data[at : at + length]
        # A dot inside a label would read like two labels of ours.
        labels.append(label if b"." not in label else label.replace(b".", b"\0"))
        at += length
    return None


def _with_options(query: Query, data: bytes, at: int, count: int) -> Query | bytes:
    """``query`` with the values of its OPT record."""
    found = False
    for _ in range(count):
        start = at
        passed = _past_name(data, at)
        if passed is None or passed + _RECORD.size > len(data):
            return _bare(query.id, query.flags, FORMERR)
        type_, class_, ttl, length = _RECORD.unpack_from(data, passed)
        at = passed + _RECORD.size + length
        if at > len(data) or (type_ == OPT and (found or data[start] != 0)):
            return _bare(query.id, query.flags, FORMERR)
        if type_ == OPT:
            found = True
            size = min(max(class_, UDP_BYTES_MIN), UDP_BYTES_MAX)
            query = msgspec.structs.replace(query, udp_bytes_max=size, has_options=True)
            if ttl >> 16 & 0xFF:
                return reply(query, BADVERS, bytes_max=size)
    return query


def _past_name(data: bytes, at: int) -> int | None:
    """Offset of the end of the name at ``at``.  Pointers are not followed, so there are no loops."""
    while at < len(data):
        length = data[at]
        if length == 0:
            return at + 1
        if length >= 0xC0:
            return at + 2
        if length > _LABEL_BYTES_MAX:
            return None
        at += 1 + length
    return None


def _packed(records: tuple[Record, ...], ttl_s: int, room: int) -> tuple[bytes, int, int]:
    """(as many records as fit, how many, the room left)."""
    parts = []
    for record in records:
        owner = record.owner or b"\xc0\x0c"
        size = len(owner) + _RECORD.size + len(record.data)
        if size > room:
            break
        room -= size
        parts.append(owner + _RECORD.pack(record.type, IN, ttl_s, len(record.data)) + record.data)
    return b"".join(parts), len(parts), room


def _bare(id: int, flags: int, code: int) -> bytes:
    return _HEADER.pack(id, _QR | _RA | (flags & (_OPCODE | _RD)) | code, 0, 0, 0, 0)

"""Decodes and encodes DNS messages (RFC 1035, EDNS by RFC 6891), as far as a server with few record types needs that.

Queries come from containers and are not trusted.  ``parse`` returns a query, an error response or nothing for any
bytes, and never raises.  The name in a question may not be compressed, which excludes loops.  A response is never
longer than the query allows, and is marked as truncated if records were left out.
"""

import struct
from ipaddress import ip_address

import msgspec

# Types, classes, response codes and header bits of RFC 1035, RFC 2782 (SRV), RFC 3596 (AAAA) and RFC 6891 (OPT).
A, PTR, MX, AAAA, SRV, OPT, ANY = 1, 12, 15, 28, 33, 41, 255
IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED, BADVERS = 0, 1, 2, 3, 4, 5, 16

QUERY_BYTES_MAX = 4096
"""Longest query in bytes.

Longer datagrams are refused without parsing, and over TCP a longer message ends the connection.
"""
UDP_BYTES_MIN = 512
"""Bytes over UDP that every client accepts.  Source: RFC 1035, section 4.2.1."""
UDP_BYTES_MAX = 4096
"""Largest answer over UDP in bytes.  Source: RFC 6891, section 6.2.5, which recommends 4096."""
TCP_BYTES_MAX = 65535
"""Longest message over TCP in bytes, because its length field has two bytes.  Source: RFC 1035, section 4.2.2."""
_HEADER = struct.Struct("!HHHHHH")
_RECORD = struct.Struct("!HHIH")
# Bits of the header, RFC 1035, section 4.1.1.
_QR, _OPCODE, _TC, _RD, _RA, _CD = 0x8000, 0x7800, 0x0200, 0x0100, 0x0080, 0x0010
_NAME_BYTES_MAX = 255
"""Longest name in bytes.  Source: RFC 1035, section 2.3.4."""
_LABEL_BYTES_MAX = 63
"""Longest label of a name in bytes.

Source: RFC 1035, section 2.3.4.  The two highest bits of a length mark a pointer.
"""
_OPT_BYTES = 11
"""An OPT record without options: the root's name, type, class, time to live and length."""
_ADDRESS_BYTES = {A: 4, AAAA: 16}


class Query(msgspec.Struct, frozen=True):
    """A query with one question.  ``name`` is in lower case without the last dot, ``question`` as in the message."""

    id: int
    flags: int
    name: str
    type: int
    class_: int
    question: bytes
    udp_bytes_max: int = UDP_BYTES_MIN
    """Maximum size of a response over UDP."""
    has_options: bool = False
    """Whether the query has an OPT record, so that the response must have one."""


class Record(msgspec.Struct, frozen=True):
    """A resource record.

    ``data`` and ``owner`` are as on the wire.  An empty ``owner`` stands for the question's name.
    """

    type: int
    data: bytes
    owner: bytes = b""


def parse(data: bytes) -> Query | bytes | None:
    """Return the query, or the error response to a malformed query as bytes, or None if no response is sent.

    Messages without exactly one question are malformed.  Source: miekg/dns, acceptfunc.go, which moby uses.
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
    """Return the response to ``query`` in at most ``bytes_max``.  It is marked as truncated if records do not fit."""
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
    """Return the question as encoded in a message.  Raises: ValueError: ``name`` cannot be a DNS name."""
    return encoded(name) + struct.pack("!HH", type, IN)


def encode_query(id: int, question: bytes) -> bytes:
    """Return a query with this question only."""
    return _HEADER.pack(id, _RD, 1, 0, 0, 0) + question


def addresses_in(data: bytes, question: bytes) -> tuple[str, ...]:
    """Return the addresses in a response to ``question`` (``is_response``), sorted.  Empty if it is malformed."""
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
    """Return the same message under another ``id``."""
    return id.to_bytes(2, "big") + data[2:]


def is_response(data: bytes, id: int, question: bytes) -> bool:
    """Return whether ``data`` is a response to ``question`` with ``id``, by header and question."""
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
    """Return the response code in the header, without the bits of EDNS."""
    return data[3] & 0xF


def fitting(data: bytes, query: Query, bytes_max: int) -> bytes:
    """Return another server's response with the client's id, or a truncated one if it is too long."""
    if len(data) <= bytes_max:
        return forwardable(data, query.id)
    flags = int.from_bytes(data[2:4], "big") | _TC
    return _HEADER.pack(query.id, flags, 1, 0, 0, 0) + query.question


def encoded(name: str) -> bytes:
    """Return ``name`` as on the wire.  Raises: ValueError: it cannot be a DNS name."""
    parts = []
    for label in name.encode().split(b"."):
        if not 0 < len(label) <= _LABEL_BYTES_MAX:
            raise ValueError(f"{name!r} is not a DNS name")
        parts.append(bytes((len(label),)) + label)
    wire = b"".join(parts) + b"\0"
    if len(wire) > _NAME_BYTES_MAX:
        raise ValueError(f"{name!r} is not a DNS name")
    return wire


def key(name: str) -> str:
    """Return ``name`` in the form of ``Query.name``."""
    return name.encode().decode("latin-1").lower()


def _question(data: bytes) -> tuple[str, int] | None:
    """Return the name and the offset of the question's end."""
    at = _HEADER.size
    labels: list[bytes] = []
    size = len(data)
    while at < size:
        length = data[at]
        at += 1
        if length == 0:
            if at + 4 > size or at - _HEADER.size > _NAME_BYTES_MAX:
                return None
            # Bytes are kept one by one, because names are compared and never shown.
            return b".".join(labels).decode("latin-1").lower(), at + 4
        if length > _LABEL_BYTES_MAX:  # a pointer, or an unassigned label type
            return None
        label = data[at : at + length]
        # A dot inside a label would look like two labels.
        labels.append(label if b"." not in label else label.replace(b".", b"\0"))
        at += length
    return None


def _with_options(query: Query, data: bytes, at: int, count: int) -> Query | bytes:
    """Return ``query`` with the values of its OPT record."""
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
    """Return the offset of the end of the name at ``at``.  Pointers are not followed, which excludes loops."""
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
    """Return as many records as fit, their number, and the bytes left."""
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

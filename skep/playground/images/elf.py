"""Reads a binary's interpreter and shared libraries from the file itself.

Source: the ELF specification (System V ABI, chapters 4 and 5).  Supports 64-bit little-endian files, the format of all
but one of the architectures in ``archive.py``.
"""

import struct

import msgspec

_MAGIC = b"\x7fELF\x02\x01"
# Source: elf.h: types of segments and dynamic entries.
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5
_SEGMENT = struct.Struct("<IIQQQQQQ")
_ENTRY = struct.Struct("<qQ")


class _Segment(msgspec.Struct, frozen=True):
    type: int
    offset: int
    address: int
    size: int


class Elf(msgspec.Struct, frozen=True):
    """The requirements of a binary.

    ``interpreter`` is empty for a static binary.  ``needed`` has library names like ``libc.so.6``.
    """

    interpreter: str
    needed: tuple[str, ...]


def read(content: bytes) -> Elf | None:
    """Parse a binary.  Return None unless it is a 64-bit little-endian ELF file.  Raises: ValueError: it is damaged."""
    if not content.startswith(_MAGIC):
        return None
    try:
        segments = _segments(content)
        interpreter = next((_text(content, s.offset) for s in segments if s.type == _PT_INTERP), "")
        return Elf(interpreter, _needed(content, segments))
    except (struct.error, OverflowError) as error:
        raise ValueError(f"damaged ELF file: {error}") from error


def _segments(content: bytes) -> list[_Segment]:
    (table,) = struct.unpack_from("<Q", content, 32)
    entry_size, count = struct.unpack_from("<HH", content, 54)
    segments = []
    for index in range(count):
        type, _, offset, address, _, size, _, _ = _SEGMENT.unpack_from(content, table + index * entry_size)
        segments.append(_Segment(type, offset, address, size))
    return segments


def _needed(content: bytes, segments: list[_Segment]) -> tuple[str, ...]:
    dynamic = next((segment for segment in segments if segment.type == _PT_DYNAMIC), None)
    if dynamic is None:
        return ()
    names, table = [], None
    for position in range(dynamic.offset, dynamic.offset + dynamic.size, _ENTRY.size):
        tag, value = _ENTRY.unpack_from(content, position)
        if tag == _DT_NULL:
            break
        if tag == _DT_NEEDED:
            names.append(value)
        elif tag == _DT_STRTAB:
            table = _offset(segments, value)
    if table is None:
        return ()
    return tuple(_text(content, table + name) for name in names)


def _offset(segments: list[_Segment], address: int) -> int:
    """Return the file offset of the byte that is loaded at ``address``."""
    for segment in segments:
        if segment.type == _PT_LOAD and segment.address <= address < segment.address + segment.size:
            return segment.offset + address - segment.address
    raise ValueError(f"damaged ELF file: nothing is loaded at {address:#x}")


def _text(content: bytes, offset: int) -> str:
    end = content.find(b"\0", offset)
    if end < 0:
        raise ValueError("damaged ELF file: a text without an end")
    return content[offset:end].decode()

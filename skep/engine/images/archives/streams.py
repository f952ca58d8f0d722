"""Decompresses streams: gzip, bzip2, xz, zstd or plain.

The unpacking worker imports this module, so this module imports little itself.

Source: moby, pkg/archive/archive.go (DecompressStream).
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

_CHUNK_BYTES = 1 << 20
"""Bytes that are read at a time."""
_XZ_MEMORY_BYTES_MAX = 256 << 20
"""Limit in bytes for the memory that a compressed stream may require.  ``xz -9`` needs 65 MiB."""
_ZSTD_WINDOW_BYTES_MAX = 128 << 20
"""Limit in bytes for the window that a compressed stream may require.

Source: zstd, which refuses larger ones by default.
"""


class MalformedArchive(Exception):
    """The stream is not an archive that can be unpacked.  The text is Docker's."""


class Decompressor(Protocol):
    """Common interface of zlib, bz2 and lzma, for one member or stream at a time."""

    @property
    def eof(self) -> bool:
        """Whether the member has ended."""

    @property
    def unused_data(self) -> bytes:
        """Data after the end of the member."""

    @property
    def needs_input(self) -> bool:
        """Whether more input is needed.  If False, ``decompress(b"")`` returns more output."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Return at most ``max_length`` bytes of output."""


def plain_chunks(source: BinaryIO) -> Iterator[bytes]:
    """Yield the decompressed stream in bounded pieces.  Consecutive members and frames are one stream."""
    head = source.read(6)
    if head.startswith(b"\x1f\x8b\x08"):
        return _decompressed(source, head, _Gzip)
    if head.startswith(b"BZh"):
        return _decompressed(source, head, bz2.BZ2Decompressor)
    if head.startswith(b"\xfd7zXZ\x00"):
        return _decompressed(source, head, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES_MAX))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstd_chunks(source, head)
    return _verbatim(source, head)


def _verbatim(source: BinaryIO, head: bytes) -> Iterator[bytes]:
    if head:
        yield head
    while chunk := source.read(_CHUNK_BYTES):
        yield chunk


def _decompressed(source: BinaryIO, head: bytes, new: Callable[[], Decompressor]) -> Iterator[bytes]:
    decompressor = new()
    data = head
    try:
        while True:
            if decompressor.eof:
                data = decompressor.unused_data or source.read(_CHUNK_BYTES)
                if not data.strip(b"\0"):  # the stream has ended, or only padding follows
                    return
                decompressor = new()
            has_ended = False
            if decompressor.needs_input and not data:
                data = source.read(_CHUNK_BYTES)
                has_ended = not data
            plain = decompressor.decompress(data, _CHUNK_BYTES)
            data = b""
            if plain:
                yield plain
            elif has_ended and not decompressor.eof:
                raise MalformedArchive("unexpected EOF")
    except (OSError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise MalformedArchive(f"invalid compressed data: {error}") from error


class _Gzip:
    """zlib with the interface of bz2 and lzma, which has ``needs_input``."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


def _zstd_chunks(source: BinaryIO, head: bytes) -> Iterator[bytes]:
    import zstandard  # imported here, since it would cost every other layer 10 ms

    class Rejoined:
        """The source stream with the bytes put back that were read to detect the format."""

        def __init__(self) -> None:
            self._head = head

        def read(self, size: int) -> bytes:
            data, self._head = self._head, b""
            return data or source.read(size)

    def chunks() -> Iterator[bytes]:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES_MAX)
        reader = decompressor.stream_reader(Rejoined(), read_across_frames=True)  # type: ignore[arg-type]
        try:
            while chunk := reader.read(_CHUNK_BYTES):
                yield chunk
        except zstandard.ZstdError as error:
            raise MalformedArchive(f"invalid compressed data: {error}") from error

    return chunks()

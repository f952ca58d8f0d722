"""What is made of compressed streams."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from skep.engine.images.archives.streams import MalformedArchive, plain_chunks

FORMS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}
CONTENT = bytes(range(256)) * 5000


def plain(data: bytes) -> bytes:
    return b"".join(plain_chunks(io.BytesIO(data)))


@pytest.mark.parametrize("form", FORMS)
def test_a_compressed_stream_is_recognized(form: str):
    assert plain(FORMS[form](CONTENT)) == CONTENT


@pytest.mark.parametrize("form", FORMS)
def test_streams_that_follow_each_other_are_one(form: str):
    compress = FORMS[form]
    assert plain(compress(CONTENT) + compress(b"and more")) == CONTENT + b"and more"


@pytest.mark.parametrize("form", ["gzip", "bzip2", "xz"])
def test_a_stream_that_ends_too_early_is_malformed(form: str):
    with pytest.raises(MalformedArchive, match="unexpected EOF"):
        plain(FORMS[form](CONTENT)[:-12])


def test_what_follows_a_stream_and_is_none_is_malformed():
    with pytest.raises(MalformedArchive):
        plain(gzip.compress(CONTENT) + b"garbage")


def test_padding_behind_a_stream_is_no_content():
    assert plain(gzip.compress(CONTENT) + bytes(1024)) == CONTENT


@given(st.binary(max_size=200))
def test_any_bytes_are_a_plain_stream_or_malformed(data: bytes):
    with suppress(MalformedArchive):
        plain(data)


def test_a_bomb_comes_in_bounded_pieces():
    bomb = gzip.compress(bytes(200 << 20), compresslevel=9)
    sizes = [len(piece) for piece in plain_chunks(io.BytesIO(bomb))]
    assert sum(sizes) == 200 << 20
    assert max(sizes) <= 1 << 20

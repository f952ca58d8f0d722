"""Files of a result as a client is told of them."""

import tarfile
from pathlib import Path

from skep.engine.buildkit.protocol.filesend import listed
from tests.support.images.archives import a_file, a_tar, an_entry


def test_entries_are_in_the_order_of_a_walk_and_the_first_name_of_a_file_has_its_content(
    tmp_path: Path,
) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(
        a_tar(
            a_file("z", b"content"),
            an_entry("a.b", tarfile.DIRTYPE),
            an_entry("a", tarfile.DIRTYPE),
            an_entry("a/link", tarfile.LNKTYPE, linkname="z"),
            an_entry("a.b/symlink", tarfile.SYMTYPE, linkname="../z"),
            an_entry("pipe", tarfile.FIFOTYPE),
        )
    )
    files = listed(archive)
    assert [(file.stat.path, file.stat.linkname, file.stat.size) for file in files] == [
        (b"a", b"", 0),
        (b"a/link", b"", 7),
        (b"a.b", b"", 0),
        (b"a.b/symlink", b"../z", 0),
        (b"pipe", b"", 0),
        (b"z", b"a/link", 0),
    ]
    begin = files[1].begin
    assert begin is not None
    assert archive.read_bytes()[begin : begin + 7] == b"content"
    assert [file.begin is None for file in files] == [True, False, True, True, True, True]
    assert [file.stat.mode & ~0o7777 for file in files] == [1 << 31, 0, 1 << 31, 1 << 27, 1 << 25, 0]


def test_a_name_that_is_not_utf8_is_sent_as_it_is(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(a_tar(a_file("caf\udce9", b"")))
    assert [file.stat.path for file in listed(archive)] == [b"caf\xe9"]

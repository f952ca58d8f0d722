"""Packs the files of each recipe of the cookbook, so that a reader of the site can take them in one piece."""

import gzip
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Final

COOKBOOK: Final = PurePosixPath("cookbook")
"""The folder of ``docs`` with a page, and a folder of files, for each recipe."""


def archive_of(folder: PurePosixPath) -> PurePosixPath | None:
    """Return the archive with the files of a folder of ``docs``, or None if the folder is not a recipe's."""
    return folder.with_suffix(".tar.gz") if folder.parent == COOKBOOK else None


def packed(files: Iterable[tuple[PurePosixPath, Path]]) -> bytes:
    """Return a tar archive, the same bytes for the same files.

    Args:
        files: The path in the archive, and the file.  A link is replaced by the file that it leads to.
    """
    tarred = io.BytesIO()
    with tarfile.open(fileobj=tarred, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, source in sorted(files):
            content = source.read_bytes()
            entry = tarfile.TarInfo(str(name))
            entry.size = len(content)
            # Images run some of the files, and git keeps only this bit of their modes.
            entry.mode = 0o755 if source.stat().st_mode & 0o100 else 0o644
            archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(tarred.getvalue(), mtime=0)

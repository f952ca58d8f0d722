"""Directories for the clusters and daemons of tests, in memory if there is enough."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skep.aio.trees import discard_tree_now

_MEMORY, _DISK = Path("/dev/shm"), Path("/var/tmp")
_FREE_MIN = 4 << 30
"""Free bytes that the memory needs.  Each manager takes 200 MB, most of it the log that etcd allocates in advance."""


def parent() -> Path:
    """Return the directory in which clusters of tests keep their data.

    etcd flushes every write.  If several tests use the machine's disk, that may take seconds, and a request fails after
    five, as it should.  No test shows anything about that disk.  Tests of full, slow and failing disks make their own.
    """
    has_room = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= _FREE_MIN
    return _MEMORY if has_room else _DISK


@contextmanager
def a_directory(prefix: str = "skep-test-") -> Iterator[Path]:
    """Make a directory with a short path, because sockets have short paths.  Remove it afterwards."""
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent()))
    try:
        yield directory
    finally:
        discard_tree_now(directory)

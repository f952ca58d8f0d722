"""Executes an OCI runtime (runc, crun) from sealed memory, which makes starts faster.

A process in a container must never get access to a runtime's file that it could write to (CVE-2019-5736).  So the
runtime executes a protected copy of itself before it enters a container.  runc 1.1 and crun mount their own file
read-only for a moment.  This costs each start and each exec a mount, an unmount and a second loading of the program,
and systemd reads the mount table twice.  Later versions of runc copy it to memory.  No version makes a copy if it was
executed from a memory file to which nothing can write.

Source: runc, libcontainer/nsenter/cloned_binary.c (is_self_cloned), contrib/cmd/memfd-bind; crun,
src/libcrun/cloned_binary.c.
"""

import errno
import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

import structlog

from skep.linux.descriptors import set_aside_descriptor

log = structlog.get_logger()

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
"""Seals of the memory file.  It must be exactly these, because runc 1.1 and crun compare for equality."""
_MFD_EXEC = 0x10
"""Flag of Linux 6.3 that makes the memory file executable even if the sysctl vm.memfd_noexec is 1."""


class SealedProgram:
    """A copy of a runtime in memory, refreshed when the runtime's file changes.

    Other runtimes, and scripts around a runtime, are executed from their files, because they may inspect their own
    path.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._path = str(file)
        self._version: tuple[int, ...] = ()
        self._descriptor: int | None = None

    def path(self) -> str:
        """Return the path at which to execute the runtime while this process runs.

        If memory files do not work, it is the runtime's own path.

        The first call, and the first call after an upgrade, blocks for about 10 ms to copy 10 MB.
        """
        try:
            version = _version(self._file)
        except OSError:  # the caller will report the reason when it executes the runtime
            return self._path
        if version != self._version:
            try:
                self._path = self._take(_sealed_copy(self._file))
            except OSError as error:
                log.info("runtime not executed from memory", program=str(self._file), reason=str(error))
                self._path = str(self._file)
            self._version = version
        return self._path

    def close(self) -> None:
        """Free the memory.  The next ``path`` makes another copy."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._path, self._version, self._descriptor = str(self._file), (), None

    def _take(self, copy: int) -> str:
        if self._descriptor is None:
            self._descriptor = set_aside_descriptor(copy)
        else:
            # Reuse the descriptor's number, so that a caller that is about to execute the old path gets the new copy
            # and never another file.
            os.dup2(copy, self._descriptor, inheritable=False)
            os.close(copy)
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"


def _version(file: Path) -> tuple[int, ...]:
    status = os.stat(file)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _sealed_copy(file: Path) -> int:
    """Copy a runtime to sealed memory and return its descriptor.

    Raises: OSError: the file is not a known runtime, or the kernel refuses.
    """
    with open(file, "rb") as source, open(_memory(file.resolve().name), "wb") as memory:
        if not file.resolve().name.startswith(("runc", "crun")) or source.read(4) != b"\x7fELF":
            raise OSError(errno.ENOEXEC, "neither runc nor crun")
        source.seek(0)
        shutil.copyfileobj(source, memory)
        memory.flush()
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
        # Open it again, because the kernel does not execute a file that is open for writing.
        copy = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    if not os.access(f"/proc/self/fd/{copy}", os.X_OK):
        os.close(copy)
        raise PermissionError(errno.EACCES, "memory files are not executable here")
    return copy


def _memory(name: str) -> int:
    flags = os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC
    with suppress(OSError):
        return os.memfd_create(name, flags | _MFD_EXEC)
    return os.memfd_create(name, flags)

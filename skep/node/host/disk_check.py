"""Checks that this node can write to its disk, every few seconds, and sets a condition while it cannot.

The disk may be full, mounted read-only by the kernel, or not responding, or descriptors or memory may be used up.
Operations then fail with errors of their own, and this condition names their common cause.
"""

import asyncio
import errno
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from skep.aio.clock import Clock, tick
from skep.aio.failures import describe_error
from skep.linux.files import replace_file
from skep.model.node_reports.conditions import ConditionName
from skep.node.host.conditions import Conditions
from skep.node.host.disk_space import space_of

PERIOD_S = 5.0
"""Seconds between two test writes."""
HANG_S = 10.0
"""Seconds after which an unfinished write is reported."""
_PROBE = ".writable"
_BLOCK = bytes(4096)
_ADVICE = {
    errno.ENOSPC: "free some space, the node then resumes by itself",
    errno.EDQUOT: "free some space, the node then resumes by itself",
    errno.EROFS: "look for errors of the disk in the kernel's log, and mount it again",
    errno.EIO: "the disk fails: see the kernel's log",
    errno.EMFILE: "the node process has too many files open: restart skep, containers keep running",
    errno.ENFILE: "the machine has too many files open",
    errno.ENOMEM: "the machine has no memory left",
}


_NO_INODES = "the disk has space, but each file needs an inode: remove files, the node then resumes by itself"
"""The kernel names a missing inode like a full disk, but freeing space does not help then."""


def inodes_percent(directory: Path) -> float:
    """Return the used percentage of the inodes of ``directory``'s disk, or 0 if unknown or created on demand."""
    try:
        found = space_of(str(directory))
    except OSError:
        return 0.0
    return found.inodes_percent if found is not None else 0.0


class DiskCheck:
    """Writes a block to each directory and keeps the condition ``disk`` current.

    Also keeps the condition ``store-full``, with the text that the manager writes into the file ``store_full`` while
    its store lacks space.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        conditions: Conditions,
        clock: Clock,
        store_full: Path | None = None,
        changed: Callable[[], None] = lambda: None,
        inodes: Callable[[Path], float] = inodes_percent,
    ) -> None:
        """``changed`` is called when a condition has begun, ended or changed.  ``inodes`` may block."""
        self._changed = changed
        self._inodes_percent = inodes
        self._store_full = store_full
        self._directories = directories
        self._conditions = conditions
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk-check")
        self._writing: asyncio.Future[str] | None = None

    async def run(self) -> None:
        """Check every ``PERIOD_S`` until cancelled."""
        while True:
            found, before = await self.look(), self._conditions.present()
            self._conditions.report(ConditionName.DISK, found)
            self._conditions.report(ConditionName.STORE_FULL, self._store_full_text())
            if self._conditions.present() != before:
                self._changed()
            await tick(self._clock, PERIOD_S)

    async def look(self, within_s: float = HANG_S) -> str:
        """Write once.  Return a sentence about the problem, or an empty text if the writes succeed."""
        if self._writing is None:
            self._writing = asyncio.get_running_loop().run_in_executor(self._thread, self._write)
        done, _ = await asyncio.wait((self._writing,), timeout=within_s)
        if not done:
            return f"the disk below {self._directories[0]} does not answer: a write takes longer than {within_s:g} s"
        writing, self._writing = self._writing, None
        return writing.result()

    def _store_full_text(self) -> str:
        try:
            return self._store_full.read_text().rstrip(".") if self._store_full is not None else ""
        except OSError:
            return ""

    def _write(self) -> str:
        for directory in self._directories:
            try:
                replace_file(directory / _PROBE, _BLOCK, mode=0o600)
            except Exception as error:
                number = error.errno if isinstance(error, OSError) else None
                reason = (
                    error.strerror if isinstance(error, OSError) and error.strerror else describe_error(error)
                )
                advice = _ADVICE.get(number, "") if number is not None else ""
                if number == errno.ENOSPC and self._inodes_percent(directory) == 100:
                    reason, advice = "no inodes left", _NO_INODES
                return f"cannot write to {directory}: {reason}" + (f" ({advice})" if advice else "")
        return ""

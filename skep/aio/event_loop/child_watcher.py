"""Detection of ended child processes in asyncio."""

import asyncio
import sys


def watch_children_by_pidfd() -> None:
    """Detect the end of children by pidfd, as later Python versions do.  Python 3.11 uses a thread per child instead.

    Call it before the event loop starts.
    """
    if sys.version_info < (3, 12):
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())

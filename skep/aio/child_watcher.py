"""How asyncio learns that a child process has ended."""

import asyncio
import sys


def watch_children_by_pidfd() -> None:
    """Wait for children by pidfd.  Python 3.11 keeps a thread for each child otherwise; later versions do this.

    To be called before the event loop starts.
    """
    if sys.version_info < (3, 12):
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())

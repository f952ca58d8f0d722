"""Removes and walks directory trees in threads, because both may take minutes and must not delay other work."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import structlog

from skep.linux import trees

log = structlog.get_logger()

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

_removers = ThreadPoolExecutor(max_workers=16, thread_name_prefix="remove-tree")
_walkers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="walk-tree")


async def remove_tree(path: Path, *, keep: str = "") -> None:
    """Remove ``path`` with everything in it.  If cancelled, it stops soon and leaves the rest.

    ``keep`` names an entry of ``path`` that is removed last.  Raises: OSError: a part could not be removed
    (``trees.NotRemoved``).
    """
    stop = threading.Event()
    work = asyncio.get_running_loop().run_in_executor(_removers, partial(trees.remove_tree, path, stop, keep))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        # The thread must end first, as it could otherwise remove files that are created afterwards.
        await asyncio.wait((work,))
        work.cancelled() or work.exception()
        raise


async def walk_tree(walk: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
    """Run ``walk``, which accesses every file of a tree, and return its result."""
    return await asyncio.get_running_loop().run_in_executor(_walkers, walk, *arguments)


async def discard_tree(path: Path) -> None:
    """Remove a tree.  A failure is logged, and the next start of the process removes the rest."""
    try:
        await remove_tree(path)
    except OSError as error:
        log.warning("directory not removed", path=str(path), error=str(error))


def discard_tree_now(path: Path) -> None:
    """Do the same as ``discard_tree``, in code that already runs in a thread."""
    try:
        trees.remove_tree(path)
    except OSError as error:
        log.warning("directory not removed", path=str(path), error=str(error))

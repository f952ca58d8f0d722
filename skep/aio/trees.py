"""Removal and walks of directory trees in threads of their own: either may take minutes, and no other work waits."""

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
    """Remove ``path`` with all that is in it; cancelled, it ends soon and leaves the rest.

    ``keep``: the name of an entry of ``path`` that goes last.
    Raises: OSError: something is left (``trees.NotRemoved``).
    """
    stop = threading.Event()
    work = asyncio.get_running_loop().run_in_executor(_removers, partial(trees.remove_tree, path, stop, keep))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait((work,))  # no thread may remove what is made again afterwards
        work.cancelled() or work.exception()
        raise


async def walk_tree(walk: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
    """The result of ``walk``, which looks at every file of a tree."""
    return await asyncio.get_running_loop().run_in_executor(_walkers, walk, *arguments)


async def discard_tree(path: Path) -> None:
    """Remove a tree; what cannot be removed is logged, and left for the next start of the process."""
    try:
        await remove_tree(path)
    except OSError as error:
        log.warning("not removed", path=str(path), error=str(error))


def discard_tree_now(path: Path) -> None:
    """The same, for code that runs in a thread already."""
    try:
        trees.remove_tree(path)
    except OSError as error:
        log.warning("not removed", path=str(path), error=str(error))

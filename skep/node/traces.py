"""What a swarm leaves on a node's disk, and its removal."""

import asyncio

import structlog

from skep.aio.trees import discard_tree_now
from skep.node.participation import Parts
from skep.node.supervision.identity import read_pid_file
from skep.node.supervision.supervisor import STOP_GRACE_S, terminate
from skep.paths import Paths

log = structlog.get_logger()


def wipe(paths: Paths) -> None:
    """Forget the swarm.  ``node.json`` goes first: without it the rest is an unfinished leave.

    By certificates and manager it is known as such, so they go last.
    """
    paths.node_json.unlink(missing_ok=True)
    for directory in (paths.tables, paths.kept_tables, paths.certificates, paths.manager):
        discard_tree_now(directory)


async def forget_swarm(paths: Paths) -> None:
    """End a manager process that lives though nothing here supervises it any more, and ``wipe``."""
    await _end_stray_manager(paths)
    await asyncio.to_thread(wipe, paths)


async def _end_stray_manager(paths: Paths) -> None:
    stray = read_pid_file(paths.pid_file("manager"))
    if stray is not None:
        await terminate(stray, STOP_GRACE_S)


async def clear_unfinished(paths: Paths, parts: Parts) -> None:
    """Remove what an init or a leave that did not come to its end left behind."""
    await _end_stray_manager(paths)
    if paths.manager.exists() or paths.certificates.exists():
        log.warning("traces of an unfinished init or leave are removed")
        await parts.remove_tasks()
        wipe(paths)

"""Removal of a cluster's data from a node's disk."""

import asyncio

import structlog

from skep.aio.trees import discard_tree_now
from skep.linux.detached import read_pid_file
from skep.node.runner import ClusterWork
from skep.node.supervision.supervisor import STOP_GRACE_S, terminate
from skep.paths import Paths

log = structlog.get_logger()


def remove_cluster_data(paths: Paths) -> None:
    """Remove everything that belongs to the cluster.

    ``node.json`` is removed first: without it the rest is an unfinished leave.  That is recognized by the certificates
    and the manager's directory, so they are removed last.
    """
    paths.node_json.unlink(missing_ok=True)
    for directory in (
        *(paths.tables, paths.kept_tables, paths.certificates),
        *(paths.removed_manager, paths.manager),
    ):
        discard_tree_now(directory)


async def forget_swarm(paths: Paths) -> None:
    """End a manager process that is no longer supervised, and remove the cluster's data."""
    await _end_unsupervised_manager(paths)
    await asyncio.to_thread(remove_cluster_data, paths)


async def _end_unsupervised_manager(paths: Paths) -> None:
    running = read_pid_file(paths.pid_file("manager"))
    if running is not None:
        await terminate(running, STOP_GRACE_S)


async def clear_unfinished(paths: Paths, work: ClusterWork) -> None:
    """Remove what an init, a join or a leave that was interrupted has left on this node."""
    await _end_unsupervised_manager(paths)
    if paths.manager.exists() or paths.certificates.exists():
        log.warning("traces of an unfinished init or leave are removed")
        await work.remove_all()
        remove_cluster_data(paths)

"""Steps to leave a cluster: Docker's warnings, the removal from the raft group, and the removal of the cluster's data.

Source: moby 20.10, daemon/cluster/swarm.go (Leave).
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import structlog

from skep.aio.trees import discard_tree_now
from skep.api.client.client import ApiClient
from skep.errors import SkepError, Unavailable
from skep.linux.detached import read_pid_file
from skep.linux.files import file_exists
from skep.node.cluster.runner import ClusterWork
from skep.node.supervision.supervisor import STOP_GRACE_S, terminate
from skep.paths import Paths
from skep.security.keypair import KeyPair
from skep.security.tls import MANAGER_NAME, client_context
from skep.wire import methods
from skep.wire import skep_pb2 as pb
from skep.wire.client import open_channel

log = structlog.get_logger()

RESIGN_TIMEOUT_S = 6.0
"""Time limit in seconds.  Longer than the other manager waits while it removes the member."""

_LEAVING = "You are attempting to leave the swarm on a node that is participating as a manager. "
_LAST_MANAGER = (
    "Removing the last manager erases all current state of the swarm. Use `--force` to ignore this message. "
)
_LEAVING_END = (
    "The only way to restore a swarm that has lost consensus is to reinitialize it with `--force-new-cluster`. "
    "Use `--force` to suppress this message."
)


def objection_to_leaving(nodes: Iterable[Mapping[str, Any]] | None) -> str:
    """Return Docker's warning for ``docker swarm leave`` on a manager.

    ``nodes`` are from ``GET /nodes``, or None if the manager does not respond.
    """
    if nodes is None:
        return f"{_LEAVING}Doing so may lose the consensus of your cluster. {_LEAVING_END}"
    statuses = [node["ManagerStatus"] for node in nodes if "ManagerStatus" in node]
    reachable = sum(status.get("Reachability") == "reachable" for status in statuses)
    if len(statuses) <= 1:
        return _LEAVING + _LAST_MANAGER
    if reachable - 1 <= len(statuses) // 2:
        return (
            f"{_LEAVING}Removing this node leaves {reachable - 1} managers out of {len(statuses)}. "
            f"Without a Raft quorum your swarm will be inaccessible. {_LEAVING_END}"
        )
    return _LEAVING + _LEAVING_END


async def objection(manager_api: ApiClient) -> str:
    """Ask this node's manager for the nodes, and return Docker's warning (see ``objection_to_leaving``)."""
    try:
        return objection_to_leaving(await manager_api.get("/nodes"))
    except SkepError:
        return objection_to_leaving(None)


async def leave_manager_group(managers: Sequence[str], pair: KeyPair) -> bool:
    """Ask the other managers (``ip:port``) in turn to remove this manager's etcd member.  Return whether one did.

    They refuse if the remaining members would have no quorum.  A member that leaves without being removed still counts
    for the quorum of the others.
    """
    for manager in managers:
        try:
            async with open_channel(manager, client_context(pair), MANAGER_NAME) as channel:
                await channel.call(methods.RESIGN, pb.ResignRequest(), timeout_s=RESIGN_TIMEOUT_S)
        except SkepError as error:
            log.warning("not removed from the managers", manager=manager, reason=str(error))
        else:
            return True
    return False


def remove_cluster_data(paths: Paths) -> None:
    """Remove everything that belongs to the cluster.

    ``node.json`` is removed first: without it, the next start recognizes an unfinished leave.  It does so by the
    certificates and the manager's directory, so these are removed last.
    """
    paths.node_json.unlink(missing_ok=True)
    for directory in (
        *(paths.tables, paths.kept_tables, paths.certificates),
        *(paths.removed_manager, paths.manager),
    ):
        discard_tree_now(directory)


async def forget_swarm(paths: Paths) -> None:
    """Stop a manager process that is no longer supervised, and remove the cluster's data."""
    await _end_unsupervised_manager(paths)
    await asyncio.to_thread(remove_cluster_data, paths)


async def _end_unsupervised_manager(paths: Paths) -> None:
    running = read_pid_file(paths.pid_file("manager"))
    if running is not None:
        await terminate(running, STOP_GRACE_S)


async def clear_unfinished(paths: Paths, work: ClusterWork) -> None:
    """Remove leftovers of an interrupted init, join or leave from this node."""
    await _end_unsupervised_manager(paths)
    if file_exists(paths.manager) or file_exists(paths.certificates):
        log.warning("removing leftovers of an unfinished init, join or leave")
        await work.remove_all()
        remove_cluster_data(paths)


async def clear_former(paths: Paths) -> None:
    """Remove what a leave could not remove, because a new manager would continue with the former swarm's data.

    Raises: Unavailable: it still cannot be removed.
    """
    if file_exists(paths.manager):
        await asyncio.to_thread(remove_cluster_data, paths)
    if file_exists(paths.manager):
        raise Unavailable(f"{paths.manager} has data of a former swarm: remove this directory and try again")

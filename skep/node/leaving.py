"""Why a manager does not leave unasked, in Docker's words.

Source: moby 20.10, daemon/cluster/swarm.go (Leave).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from skep.errors import SkepError
from skep.node.local_api import LocalApi

_LEAVING = "You are attempting to leave the swarm on a node that is participating as a manager. "
_LAST_MANAGER = (
    "Removing the last manager erases all current state of the swarm. Use `--force` to ignore this message. "
)
_LEAVING_END = (
    "The only way to restore a swarm that has lost consensus is to reinitialize it with `--force-new-cluster`. "
    "Use `--force` to suppress this message."
)


def objection_to_leaving(nodes: Iterable[Mapping[str, Any]] | None) -> str:
    """What speaks against it.  ``nodes``: as ``GET /nodes`` shows them; None: the manager does not answer."""
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


async def objection(manager_api: LocalApi) -> str:
    """What speaks against it, as far as this node's manager knows."""
    try:
        return objection_to_leaving(await manager_api.get("/nodes"))
    except SkepError:
        return objection_to_leaving(None)

"""The ``Swarm`` object of ``/info``, and Docker's error texts for requests that need a manager.

Source: moby 20.10, daemon/cluster/{swarm,cluster}.go, cli/command/system/info.go (the warning).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from skep.agent.session.managers import KnownManager
from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.api.client.client import ApiClient
from skep.errors import SkepError
from skep.linux.network.route_lookup import source_address
from skep.model.networks.addresses import host_of
from skep.model.swarm import FROZEN
from skep.model.values.ids import NodeId
from skep.model.values.times import Timestamp
from skep.node.cluster.local import LocalNode

log = structlog.get_logger()

_UNSPECIFIED = frozenset({"", "0.0.0.0", "::"})
NO_SWARM = "This node is not part of a swarm"
IN_A_SWARM = (
    'This node is already part of a swarm. Use "docker swarm leave" to leave this swarm and join another one.'
)
NOT_IN_A_SWARM = (
    'This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" '
    "to connect this node to swarm and try again."
)
NOT_A_MANAGER = (
    "This node is not a swarm manager. Worker nodes can't be used to view or modify cluster state. "
    "Please run this command on a manager node or promote the current node to a manager."
)
LOCKED = (
    "Swarm is encrypted and needs to be unlocked before it can be used. "
    'Please use "docker swarm unlock" to unlock it.'
)
LEAVING_LOCKED = (
    "Swarm is encrypted and locked. Please unlock it first or use `--force` to ignore this message."
)
TIMED_OUT = (
    "Timeout was reached before node joined. The log of skep says what it waited for; "
    "this node kept nothing of the attempt."
)
TWO_MANAGERS = """WARNING: Running Swarm in a two-manager configuration. This configuration provides
         no fault tolerance, and poses a high risk to lose control over the cluster.
         Refer to https://docs.docker.com/engine/swarm/admin_guide/ to configure the
         Swarm for fault-tolerance."""

NO_LEADER = (
    "The swarm does not have a leader. It's possible that too few managers are online. "
    "Make sure more than half of the managers are online."
)
_TIMEOUT_S = 7.0
"""Time limit in seconds for requests to this node's manager.  Without quorum, it responds after 5 s."""


def why_waiting(mark: Path) -> str:
    """Return the condition for which this node's starting manager waits, from its file ``mark``, or an empty text.

    Shown as ``Error`` of ``/info``.
    """
    try:
        own_error = mark.read_text()
    except OSError:
        return ""
    return f"{NO_LEADER} {own_error}".strip()


def why_no_vote(mark: Path) -> str:
    """Return why an admitted manager has no vote yet, from its file ``mark``, or an empty text if unknown."""
    try:
        return mark.read_text()
    except OSError:
        return ""


def local_section(
    node: LocalNode | None, *, status: str, error: str, managers: Sequence[KnownManager]
) -> dict[str, Any]:
    """Return the fields that need no manager.

    Args:
        status: ``LocalNodeState``.
        managers: The last list that the agent received, or empty to use the list in ``node.json``.
    """
    section: dict[str, Any] = {
        "NodeID": "",
        "NodeAddr": "",
        "LocalNodeState": status,
        "ControlAvailable": False,
        "Error": error,
        "RemoteManagers": None,
    }
    if node is not None:
        section["NodeID"] = node.node_id
        section["NodeAddr"] = _address(node, managers)
        section["RemoteManagers"] = tuple(managers) or node.managers or None
    return section


def _address(node: LocalNode, managers: Sequence[KnownManager]) -> str:
    """Return the node's advertised address, else its listen address, else the source address towards a manager.

    A worker that joined without an address listens on all addresses, so none can be shown from its settings.  Source:
    moby 20.10, daemon/cluster/noderunner.go (actualLocalAddr is the source address of a connection to a manager).
    """
    own = host_of(node.advertise_addr) or node.local_addr
    if own not in _UNSPECIFIED:
        return own
    found = (source_address(host_of(one.addr)) for one in (*managers, *node.managers))
    return next(filter(None, found), own)


async def cluster_section(manager_api: ApiClient) -> dict[str, Any]:
    """Return the fields that need a manager, with ``Warnings``.

    Without a leader, return only ``Error`` and the number of managers.
    """
    try:
        quorum = await manager_api.get("/skep/quorum", timeout_s=_TIMEOUT_S)
        if not quorum["HasLeader"]:
            return {
                "ControlAvailable": True,
                "Error": lost_quorum(quorum),
                "Managers": len(quorum["Managers"]),
            }
        swarm = await manager_api.get("/swarm", timeout_s=_TIMEOUT_S)
        nodes = await manager_api.get("/nodes", timeout_s=_TIMEOUT_S)
        expiring = await manager_api.get("/_skep/warnings", timeout_s=_TIMEOUT_S)
    except SkepError as error:
        return {"ControlAvailable": NO_LEADER in str(error), "Error": str(error)}
    managers = sum("ManagerStatus" in node for node in nodes)
    swarm.pop("JoinTokens", None)
    info = {"ControlAvailable": True, "Nodes": len(nodes), "Managers": managers, "Cluster": swarm}
    warnings = [TWO_MANAGERS] if managers == 2 else []
    warnings += [*frozen_warnings(nodes), *expiring]
    return info | ({"Warnings": warnings} if warnings else {})


async def quorum_lost_at(manager_api: ApiClient) -> Timestamp:
    """Return when this node's manager lost contact with a quorum.  Empty if it has not, or does not respond."""
    try:
        quorum = await manager_api.get("/skep/quorum", timeout_s=_TIMEOUT_S)
    except SkepError:
        return Timestamp("")
    return Timestamp(quorum.get("Since", ""))


def lost_quorum(quorum: Mapping[str, Any]) -> str:
    """Return the text of ``Error`` without a leader: Docker's text, the managers that do not respond, and this
    manager's own error.

    ``quorum`` is the response to ``GET /skep/quorum``.
    """
    managers = quorum["Managers"]
    silent = [manager["Hostname"] for manager in managers if not manager["IsReachable"]]
    sentences = [NO_LEADER]
    if silent:
        verb = "does" if len(silent) == 1 else "do"
        sentences.append(
            f"{len(managers) - len(silent)} of {len(managers)} managers answer: {', '.join(silent)} {verb} not."
        )
    if error := quorum.get("Error"):
        sentences.append(error)
    return " ".join(sentences)


def frozen_warnings(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return why tasks of failed nodes are not replaced, or nothing if they are.  ``nodes`` are from ``GET /nodes``."""
    for node in nodes:
        message = node["Status"].get("Message", "")
        if FROZEN in message:
            return [f"WARNING: {message[message.index(FROZEN) :]}"]
    return []


async def wait_ready(manager_api: ApiClient, node_id: NodeId, clock: Clock) -> None:
    """Wait until the manager of this node shows the node as ready."""
    backoff = Backoff(0.01, 0.02)
    while True:
        try:
            if manager_api.has_socket:
                shown = await manager_api.get(f"/nodes/{node_id}")
                if shown["Status"]["State"] == "ready":
                    return
        except SkepError as error:
            log.debug("manager not ready yet", reason=str(error))
        await backoff.sleep(clock)

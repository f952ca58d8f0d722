"""Helpers for tests of several managers."""

from collections.abc import Mapping

from docker.errors import DockerException
from requests.exceptions import RequestException

from tests.support.machines.playground_rig import TestNode, wait_until

LEADER, REACHABLE, UNREACHABLE, WORKER = "leader", "reachable", "unreachable", ""


def roles(seen_by: TestNode) -> dict[str, str]:
    """Return the MANAGER STATUS of ``node ls`` in lower case, by host name.  Empty if this node does not respond.

    A machine that joined twice is listed twice.  Its role is that of the manager's entry.
    """
    try:
        nodes = seen_by.client().api.nodes()
    except (DockerException, RequestException):
        return {}
    managers_last = sorted(nodes, key=lambda node: _status(node) != WORKER)
    return {node["Description"]["Hostname"]: _status(node) for node in managers_last}


def _status(node: Mapping[str, object]) -> str:
    status = node.get("ManagerStatus")
    if not isinstance(status, Mapping):
        return WORKER
    return LEADER if status.get("Leader") else str(status["Reachability"])


def leader(seen_by: TestNode) -> str:
    """Return the host name of the leader. Empty without a leader."""
    leading = [name for name, status in roles(seen_by).items() if status == LEADER]
    assert len(leading) <= 1, f"several lead: {leading}"
    return leading[0] if leading else ""


def wait_managers(seen_by: TestNode, *names: str) -> str:
    """Wait until exactly ``names`` are managers, all respond, and one leads.  Return the leader."""

    def settled() -> str:
        shown = {name: status for name, status in roles(seen_by).items() if status != WORKER}
        response = set(shown) == set(names) and all(s in {LEADER, REACHABLE} for s in shown.values())
        return leader(seen_by) if response else ""

    return wait_until(settled, f"{', '.join(names)} manage, as {seen_by.name} sees it", 60)


def others(name: str, *names: str) -> list[str]:
    """Return ``names`` without ``name``."""
    return [one for one in names if one != name]


def write(node: TestNode, name: str) -> None:
    """Create a secret through this node, as a write whose result remains visible."""
    node.client().api.create_secret(name, b"content")


def can_write(node: TestNode, name: str) -> bool:
    """Return whether a write through this node is accepted now."""
    try:
        write(node, name)
    except (DockerException, RequestException):
        return False
    return True


def secrets(node: TestNode) -> set[str]:
    """Return the names of all secrets, as this node shows them."""
    return {secret["Spec"]["Name"] for secret in node.client().api.secrets()}

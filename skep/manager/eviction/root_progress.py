"""Decides how an eviction replaces the root, and for which nodes it waits.  Pure."""

from collections.abc import Iterable
from typing import Literal, TypeAlias

import msgspec

from skep.manager.eviction.steps import Eviction, has_new_root, is_rotating_root, names
from skep.model.node import Node, NodeState
from skep.model.swarm import Swarm
from skep.security.trust import is_issued_by, root_digest

NO_ROOT_KEY = "the external CA of the current root must sign the next one: run docker swarm ca --rotate"

Action: TypeAlias = Literal["rotate", "replace gossip keys"]
"""Start a rotation, or replace the docker nodes' keys although the root is not replaced yet."""


class RootProgress(msgspec.Struct, frozen=True):
    """Reason for a wait, or an empty string if the root is replaced, and an action that must come first."""

    waits_for: str
    action: Action | None = None


def root_progress(
    eviction: Eviction, swarm: Swarm, nodes: Iterable[Node], *, has_root_key: bool
) -> RootProgress:
    """Return how far the root is replaced, and what can be done now."""
    if has_new_root(eviction, swarm):
        return RootProgress("")
    if not is_rotating_root(eviction, swarm):
        if not has_root_key:
            return RootProgress(NO_ROOT_KEY)
        return RootProgress("waiting for nodes to renew their certificates", "rotate")
    waiting = [node for node in nodes if not is_issued_by(node.description.tls_info, swarm.tls_info)]
    if not waiting:
        return RootProgress("the root is being replaced")
    if all(node.status.state is not NodeState.READY for node in waiting):
        # These may be away for days, and the overlay step comes after the root, so replace the keys now.
        return RootProgress(
            f"waiting for nodes that are down to return and renew their certificates: {names(waiting)}",
            "replace gossip keys",
        )
    return RootProgress(f"waiting for nodes to renew their certificates: {names(waiting)}")


def waits_for_restarts(swarm: Swarm, managers: Iterable[Node]) -> str:
    """Return which managers' etcd still trusts the former root, or an empty string if none does."""
    wanted = root_digest(swarm.tls_info.trust_root.encode())
    waiting = [node for node in managers if node.peer_roots != wanted]
    return f"waiting for managers to restart etcd one after another: {names(waiting)}" if waiting else ""

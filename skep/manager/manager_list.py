"""Finds commits that change the list of managers.

A cluster has a handful of managers and thousands of workers, each of which registers.  Without this filter, every
registration would make the loops that only look at managers read all nodes again.
"""

from collections.abc import Callable

from skep.model.node import Node, NodeRole
from skep.store.interface import Commit, Created, Deleted, Updated


def affects_managers(commit: Commit) -> bool:
    """Return whether a node in ``commit`` is, was or will become a manager."""
    for event in commit.events:
        match event:
            case Created(Node() as node) | Deleted(Node() as node):
                if _is_manager(node):
                    return True
            case Updated(Node() as old, Node() as new):
                if _is_manager(old) or _is_manager(new):
                    return True
    return False


def on_manager_change(act: Callable[[], None]) -> Callable[[Commit], None]:
    """Return an ``on_commit`` for ``run_informer`` that calls ``act`` for each commit that affects managers."""

    def on_commit(commit: Commit) -> None:
        if affects_managers(commit):
            act()

    return on_commit


def _is_manager(node: Node) -> bool:
    is_certified = node.certificate is not None and node.certificate.role is NodeRole.MANAGER
    return node.spec.role is NodeRole.MANAGER or node.manager_status is not None or is_certified

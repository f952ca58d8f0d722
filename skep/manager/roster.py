"""Which commits are news to those who look at the managers alone.

A cluster has a handful of managers and thousands of workers, each of which registers: whoever looked at all nodes
whenever one of them changed would do so thousands of times for nothing.
"""

from collections.abc import Callable

from skep.model.node import Node, NodeRole
from skep.store.interface import Commit, Created, Deleted, Updated


def concerns_managers(commit: Commit) -> bool:
    """Whether a node in ``commit`` is, was or is to be a manager."""
    for event in commit.events:
        match event:
            case Created(Node() as node) | Deleted(Node() as node):
                if _is_manager(node):
                    return True
            case Updated(Node() as old, Node() as new):
                if _is_manager(old) or _is_manager(new):
                    return True
    return False


def on_change_of_managers(act: Callable[[], None]) -> Callable[[Commit], None]:
    """A ``note`` for ``follow``: calls ``act`` for each commit that concerns managers."""

    def note(commit: Commit) -> None:
        if concerns_managers(commit):
            act()

    return note


def _is_manager(node: Node) -> bool:
    is_certified = node.certificate is not None and node.certificate.role is NodeRole.MANAGER
    return node.spec.role is NodeRole.MANAGER or node.manager_status is not None or is_certified

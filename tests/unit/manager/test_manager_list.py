"""A watch of the managers gets events of managers only."""

import pytest
from msgspec.structs import replace

from skep.manager.manager_list import affects_managers
from skep.model.node import (
    ManagerStatus,
    Node,
    NodeCertificate,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    Reachability,
)
from skep.store.interface import Commit, Created, Deleted, Event, Updated
from tests.support.builders import a_node, a_service

WORKER = a_node("w1")
BACK = replace(WORKER, status=NodeStatus(state=NodeState.DOWN))
TO_BE = replace(WORKER, spec=NodeSpec(role=NodeRole.MANAGER))
CERTIFIED = replace(WORKER, certificate=NodeCertificate(role=NodeRole.MANAGER))
PRESENT = replace(
    WORKER, manager_status=ManagerStatus(reachability=Reachability.REACHABLE, addr="10.0.0.1:2377")
)


def commit(*events: Event) -> Commit:
    return Commit(7, events)


def test_thousands_of_workers_come_change_and_go_without_a_new_list() -> None:
    service = a_service("web")
    assert not affects_managers(
        commit(Created(WORKER), Updated(WORKER, BACK), Deleted(BACK), Created(service))
    )


@pytest.mark.parametrize("manager", [TO_BE, CERTIFIED, PRESENT])
def test_the_manager_list_follows_additions_changes_removals_and_promotions(manager: Node) -> None:
    assert affects_managers(commit(Created(WORKER), Created(manager)))
    assert affects_managers(commit(Deleted(manager)))
    assert affects_managers(commit(Updated(manager, replace(manager, description=manager.description))))
    assert affects_managers(commit(Updated(WORKER, manager)))
    assert affects_managers(commit(Updated(manager, WORKER)))

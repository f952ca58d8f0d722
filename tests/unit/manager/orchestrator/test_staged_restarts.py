"""Staged updates of a service that restarts with the updates of another one (``skep.depends-on``)."""

from typing import cast

import pytest
from msgspec.structs import replace

from skep.manager.services.dependent_services import _restart
from skep.model.service import UpdateState
from skep.store.interface import Transaction
from tests.support.managers.rollouts import a_world, advance, state, wanted
from tests.unit.manager.orchestrator.test_staged_updates import (
    ALL_AT_ONCE,
    BLUE_GREEN,
    CANARY,
    NOW,
    a_canary,
    begun,
    counts,
    pass_time,
    percent,
)


@pytest.mark.parametrize("labels", [CANARY, BLUE_GREEN])
def test_old_tasks_stay_if_the_update_of_a_dependency_restarts_the_service(labels: dict[str, str]) -> None:
    """The new tasks are replaced, and the steps begin again."""
    world = a_world(update=ALL_AT_ONCE)
    world.update(a_canary(labels=labels))
    advance(world)
    old = {task.id for task in wanted(world, "app:1")}
    _restart(cast("Transaction", world), world.service, NOW)
    assert percent(world) == 0
    advance(world)
    new = wanted(world, "app:2")
    assert {task.id for task in wanted(world, "app:1")} == old
    assert {task.spec.force_update for task in new} == {1}
    for _ in range(3):
        pass_time(world, 101)
    assert counts(world) == (0, 4)
    assert state(world) is UpdateState.COMPLETED


def test_a_paused_staged_update_stays_paused_if_a_dependency_restarts_the_service() -> None:
    world = begun()
    assert world.service.update_status is not None
    status = replace(world.service.update_status, state=UpdateState.PAUSED)
    world.put(replace(world.service, update_status=status))
    _restart(cast("Transaction", world), world.service, NOW)
    advance(world)
    assert (state(world), percent(world), len(wanted(world, "app:1"))) == (UpdateState.PAUSED, 0, 4)

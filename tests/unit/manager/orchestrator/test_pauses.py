"""A decision about a large service pauses often: counted are the calls between two pauses, the same on any machine."""

from collections.abc import Iterable

import pytest
from msgspec.structs import replace

from skep.manager.orchestrator.convergence import deciding
from skep.model.service import Service, UpdateConfig, UpdateState, UpdateStatus
from skep.model.task import Task
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.counted_calls import most_calls_between_pauses
from tests.support.managers.worlds import World

SLOTS = 4000
CALLS_MAX = 2 * SLOTS
"""Two for each slot are a few milliseconds of 20,000."""


@pytest.mark.parametrize("state", [None, UpdateState.UPDATING, UpdateState.PAUSED])
@pytest.mark.parametrize("outdated", [0, SLOTS // 2, SLOTS])
def test_no_step_of_a_decision_takes_more_than_two_calls_for_each_slot(
    state: UpdateState | None, outdated: int
) -> None:
    old = a_service(replicas=SLOTS, image="busybox:1")
    spec = a_service_spec(replicas=SLOTS, image="busybox:2", update=UpdateConfig(parallelism=500))
    status = UpdateStatus(state=state) if state is not None else None
    service = replace(a_service(version=2, spec=spec), update_status=status)
    world = World(service, _tasks(old, service, outdated), [a_node(f"n{number}") for number in range(7)])
    world.specs[old.spec_version] = old.spec
    situation = replace(world.situation, overcommitted=lambda _: frozenset())
    assert most_calls_between_pauses(deciding(situation)) <= CALLS_MAX


def _tasks(old: Service, new: Service, outdated: int) -> Iterable[Task]:
    for slot in range(1, SLOTS + 1):
        yield a_task(slot=slot, node=f"n{slot % 7}", service=old if slot <= outdated else new)

"""What follows what is decided by stamps that are written in order, whatever the clocks of the managers say."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.control.jobs import run_job
from skep.manager.control.services import create_service
from skep.manager.services.job_runs import is_candidate, joined_at, retried
from skep.model.node import Node
from skep.model.options.schedules import CRON
from skep.model.service import (
    GlobalJob,
    JobStatus,
    ReplicatedJob,
    RestartCondition,
    RestartPolicy,
    Service,
    ServiceMode,
    UpdateState,
    UpdateStatus,
)
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.values.ids import ClusterId, NodeId, ServiceId
from skep.model.values.times import SECOND_NS, Timestamp, timestamp, unix_ns
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec
from tests.support.managers.worlds import World

AHEAD = timestamp(3 * 10**18)
"""After everything that the decisions of ``World`` stamp: another leader's clock was ahead."""


def live(world: World) -> list[Task]:
    return [task for task in world.tasks.values() if task.is_active]


@pytest.mark.parametrize("created_at", [AHEAD, timestamp(10**18)])
def test_after_a_retry_as_many_attempts_follow_as_the_policy_allows_whatever_the_clocks_say(
    created_at: Timestamp,
) -> None:
    """The youngest task is one of another slot, which another leader made."""
    policy = RestartPolicy(condition=RestartCondition.ON_FAILURE, max_attempts=1, delay=0)
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=2, total_completions=2))
    service = a_service("job", restart=policy)
    spec = replace(service.spec, mode=mode)
    world = World(replace(service, spec=spec, job_status=JobStatus(last_execution=timestamp(10**18))))
    world.settle()
    one, other = sorted(live(world), key=lambda task: task.slot)
    world.put(replace(other, created_at=created_at))
    world.report(other.id, TaskState.COMPLETE)
    for _ in range(2):
        world.report(live(world)[0].id, TaskState.FAILED)
        world.settle()
    assert live(world) == []
    world.put(replace(world.service, job_status=retried(world, world.service)))  # type: ignore[arg-type]
    before = len(world.tasks)
    for _ in range(10):
        world.settle()
        for task in live(world):
            world.report(task.id, TaskState.FAILED)
    assert len(world.tasks) - before == 2, "the retry, and one attempt more"
    assert one.slot == 1


def test_a_task_that_fails_after_a_retry_of_another_one_is_retired_before_its_slot_is_filled_again() -> None:
    policy = RestartPolicy(condition=RestartCondition.ON_FAILURE, delay=0)
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=2, total_completions=2))
    service = a_service("job", restart=policy)
    spec = replace(service.spec, mode=mode)
    world = World(replace(service, spec=spec, job_status=JobStatus(last_execution=timestamp(10**18))))
    world.settle()
    world.put(replace(world.service, job_status=retried(world, world.service)))  # type: ignore[arg-type]
    for _ in range(3):
        world.report(live(world)[0].id, TaskState.FAILED)
        world.settle()
        wanted = Counter(task.slot for task in world.tasks.values() if task.is_wanted)
        assert wanted == {1: 1, 2: 1}


def test_a_task_that_is_made_after_a_user_resumed_an_update_is_not_tolerated() -> None:
    world = World(a_service(replicas=1, state=UpdateState.UPDATING), nodes=[a_node("n1")])
    world.put(
        replace(
            world.service,
            update_status=UpdateStatus(state=UpdateState.UPDATING, tolerated_until=AHEAD),
        )
    )
    world.settle()
    (task,) = live(world)
    assert unix_ns(task.created_at) > unix_ns(AHEAD)


@given(
    events=st.lists(
        st.tuples(st.sampled_from(["node", "plain", "again", "nightly"]), st.integers(-3600, 3600)),
        max_size=12,
    )
)
def test_a_run_of_a_global_job_has_the_nodes_that_existed_when_it_was_asked_for(
    events: list[tuple[str, int]],
) -> None:
    """Each request is answered by a manager with a clock of its own."""
    asyncio.run(_lived(events))


async def _lived(events: list[tuple[str, int]]) -> None:
    store = MemoryStore(SystemClock())
    mode = ServiceMode(global_job=GlobalJob())
    existed: dict[ServiceId, set[NodeId]] = {}

    def begin(tx: Transaction) -> None:
        tx.raise_level(4)
        tx.put(Swarm(id=ClusterId("c")))

    await store.update(begin)
    for number, (what, skew_s) in enumerate(events):
        now_ns = 2 * 10**18 + number * SECOND_NS + skew_s * SECOND_NS
        now, nodes = timestamp(now_ns), {node.id for node in store.view().find(Node)}

        def joins(tx: Transaction, number: int = number, now_ns: int = now_ns) -> None:
            tx.put(replace(a_node(f"n{number}"), created_at=joined_at(tx, now_ns)))

        if what == "node":
            await store.update(joins)
        elif what == "again" and existed:
            id = max(existed)
            await store.update(run_job, id, now=now, replaces=True)
            existed[id] = nodes
        elif what != "again":
            labels = {CRON: "@hourly"} if what == "nightly" else {}
            spec = replace(a_service_spec(f"j{number}"), mode=mode, labels=labels)
            made = await store.update(
                create_service, spec, new_id=lambda number=number: f"j{number}", new_name=str, now=now
            )
            if what == "plain":
                existed[made.id] = nodes
    view = store.view()
    for id, nodes in existed.items():
        service = view.get(Service, id)
        assert {node.id for node in view.find(Node) if is_candidate(node, service)} == nodes

"""How long a prepared task waits for the end of the one that it replaces."""

import asyncio
from random import Random

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.changes import StartTask
from skep.manager.orchestrator.loop import Orchestrator
from skep.model.node import Availability, NodeState
from skep.model.options.labels import DRAIN_NOW
from skep.model.service import RestartPolicy
from skep.model.swarm import DispatcherConfig, Swarm, SwarmSpec
from skep.model.task import Task, TaskState
from skep.model.values.ids import ClusterId, NodeId, TaskId
from skep.model.values.times import SECOND_NS
from skep.store.interface import Commit, Transaction, Updated
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.rollouts import wanted
from tests.support.managers.worlds import World

READY = TaskState.READY


def a_world(*, grace_s: int | None = None, labels: dict[str, str] | None = None) -> World:
    """One task runs, on n1."""
    spec = replace(a_service_spec(restart=RestartPolicy(delay=0)), labels=labels or {})
    container = spec.task_template.container_spec
    assert container is not None
    if grace_s is not None:
        container = replace(container, stop_grace_period=grace_s * SECOND_NS)
    spec = replace(spec, task_template=replace(spec.task_template, container_spec=container))
    world = World(a_service(spec=spec), nodes=[a_node("n1"), a_node("n2")])
    world.settle()
    (task,) = wanted(world)
    world.put(replace(task, node_id=NodeId("n1")))
    world.report(task.id, TaskState.RUNNING)
    return world


def drained(world: World) -> tuple[TaskId, Task]:
    """The task that is to stop, and the one that waits for it."""
    (old,) = wanted(world)
    world.nodes[NodeId("n1")] = a_node("n1", availability=Availability.DRAIN, labels={DRAIN_NOW: "true"})
    world.settle()
    (new,) = wanted(world)
    assert new.desired_state is READY
    return old.id, new


@pytest.mark.parametrize(
    ("grace_s", "labels", "waits_s"),
    [
        (None, {}, 10 + 2 + 30),
        (300, {}, 300 + 2 + 30),
        (0, {"skep.drain": "0s"}, 30),
        (1, {"skep.drain": "2m"}, 1 + 240 + 30),
    ],
)
def test_a_task_that_never_reports_its_end_is_waited_for_as_long_as_it_may_take(
    grace_s: int | None, labels: dict[str, str], waits_s: float
) -> None:
    """It drains twice, once for new connections and once for those that it has, and then has its stop grace."""
    world = a_world(grace_s=grace_s, labels=labels)
    world.now = 100.0
    _, new = drained(world)
    assert world.steps() == [Recheck(100.0 + waits_s)]
    world.now = 100.0 + waits_s
    assert world.steps() == [StartTask(new)]


@pytest.mark.parametrize(("silence_s", "waits_s"), [(15.0, 42.0), (90.0, 192.0)])
def test_a_node_that_may_be_silent_for_long_is_waited_for_until_it_would_be_down(
    silence_s: float, waits_s: float
) -> None:
    """Only then it counts whether it was cut off, and by when it has stopped the task itself."""
    world = a_world(labels={"skep.on-disconnect": "stop"})
    world.silence_s = silence_s
    drained(world)
    assert world.steps() == [Recheck(waits_s)]


def come_and_go(world: World, state: NodeState) -> None:
    before = world.nodes[NodeId("n1")]
    after = replace(before, status=replace(before.status, state=state))
    world.nodes[before.id] = after
    world.seen.record(Commit(1, (Updated(before, after),)), world.now)


def test_a_node_that_comes_back_has_the_time_to_stop_what_was_retired_while_it_was_away() -> None:
    world = a_world(labels={"skep.on-disconnect": "stop", "skep.on-disconnect-delay": "15m"})
    come_and_go(world, NodeState.DOWN)
    old, new = drained_while_down(world)
    world.now = 600.0
    come_and_go(world, NodeState.READY)
    assert world.steps() == [Recheck(642.0)], "it hears only now that the task is to stop"
    world.report(old, TaskState.SHUTDOWN)
    assert world.steps() == [StartTask(new)]


def drained_while_down(world: World) -> tuple[TaskId, Task]:
    (old,) = wanted(world)
    down = world.nodes[NodeId("n1")]
    world.nodes[down.id] = replace(down, spec=replace(down.spec, availability=Availability.DRAIN))
    world.settle()
    (new,) = wanted(world)
    return old.id, new


def test_how_long_a_node_may_be_silent_is_what_the_cluster_sets() -> None:
    """60 s between heartbeats: a node that is cut off is down after three minutes."""
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    store = MemoryStore(clock)
    web = a_service()

    def write(tx: Transaction) -> None:
        dispatcher = DispatcherConfig(heartbeat_period=60 * SECOND_NS)
        tx.put(Swarm(id=ClusterId("cluster"), spec=SwarmSpec(dispatcher=dispatcher)))
        tx.put(a_node("n1"))
        service = tx.put(web)
        tx.put(a_task("old", node="n1", service=service, desired=TaskState.SHUTDOWN))
        tx.put(a_task("new", service=service, desired=READY, state=TaskState.NEW))

    def is_started() -> bool:
        return store.view().get(Task, "new").desired_state is TaskState.RUNNING

    loop.run_until_complete(store.update(write))
    running = loop.create_task(Orchestrator(store, clock, lambda: "t1", Random(1)).run())
    for seconds, is_due in ((371.0, False), (2.0, True)):
        loop.run_until_complete(clock.sleep(seconds))
        assert is_started() is is_due
    running.cancel()
    loop.run_until_complete(asyncio.wait([running]))
    loop.close()

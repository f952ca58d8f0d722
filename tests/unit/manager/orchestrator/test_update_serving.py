"""A service never serves with less than its update policy allows, whatever comes in the middle of an update."""

from collections.abc import Iterable

import pytest
from msgspec.structs import replace

from skep.manager.orchestrator.changes import ReplaceTask, RetireTask
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.replacement.early_failures import step_seconds_max
from skep.model.node import NodeState
from skep.model.service import (
    PortConfig,
    PublishMode,
    ServiceSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
    UpdateState,
)
from skep.model.task import Preemption, Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.rollouts import AT_ONCE, a_spec, state, wanted
from tests.support.managers.worlds import World

READY, RUNNING = TaskState.READY, TaskState.RUNNING


def slots_without_service(tasks: Iterable[Task]) -> set[int]:
    """Slots in which nothing serves: nothing runs that is wanted to.  What is on its way to removal has no slot."""
    kept = [task for task in tasks if task.desired_state < TaskState.REMOVE]
    serving = {task.slot for task in kept if task.is_wanted and task.status.state is RUNNING}
    return {task.slot for task in kept} - serving


class Slow:
    """A world in which preparing, starting and stopping take their time, and nothing ever fails."""

    def __init__(self, world: World, seconds: tuple[int, int, int]) -> None:
        """``seconds``: to prepare, to start and to stop."""
        self.world = world
        self._seconds = seconds
        self._since: dict[tuple[str, str], float] = {}

    def live(self, seconds: int) -> None:
        for _ in range(seconds):
            self.decide()
            for task in list(self.world.tasks.values()):
                self._go_on(task)
                self.decide()
            self.world.now += 1

    def decide(self) -> None:
        """Take the orchestrator's steps, and check of each what it takes away."""
        for _ in range(20):
            changes = self.world.changes()
            if not changes:
                return
            for change in changes:
                before = slots_without_service(self.world.tasks.values())
                self.world.apply([change])
                after = slots_without_service(self.world.tasks.values())
                config = self.world.situation.rollout_config
                if config.parallelism and after - before:
                    assert len(after) <= config.parallelism, (change, sorted(after))
        raise AssertionError("it never settles")

    def _go_on(self, task: Task) -> None:
        prepare_s, start_s, stop_s = self._seconds
        status, is_stopping = task.status.state, not task.is_wanted
        if status.is_terminal:
            return
        if is_stopping:
            self._after(task, "stop", stop_s, TaskState.SHUTDOWN)
        elif status < READY:
            self._after(task, "prepare", prepare_s, READY)
        elif status is READY and task.desired_state is RUNNING:
            self._after(task, "start", start_s, RUNNING)

    def _after(self, task: Task, what: str, seconds: int, then: TaskState) -> None:
        began = self._since.setdefault((task.id, what), self.world.now)
        if self.world.now - began >= seconds:
            status = replace(task.status, state=then)
            self.world.put(replace(task, node_id=NodeId("n1"), status=status))


def a_running_service(replicas: int) -> World:
    world = World(a_service(spec=a_spec(replicas=replicas)), nodes=[a_node("n1")])
    for slot in range(1, replicas + 1):
        world.put(a_task(slot=slot, node="n1", service=world.service))
    return world


@pytest.mark.parametrize("image", ["app:3", "app:1"])
@pytest.mark.parametrize("parallelism", [1, 2])
@pytest.mark.parametrize("order", [UpdateOrder.STOP_FIRST, UpdateOrder.START_FIRST])
def test_no_update_takes_away_more_than_its_policy_allows_whenever_it_comes(
    parallelism: int, image: str, order: UpdateOrder
) -> None:
    """Two updates in the middle of a first one, at any second of it; the last may return to where it began."""
    config = UpdateConfig(parallelism=parallelism, monitor=SECOND_NS, order=order)
    for gap_s in range(5, 36, 6):
        world = a_running_service(3)
        slow = Slow(world, (1, 1, 10))
        for requested in ("app:2", "app:4", image):
            world.update(a_spec(requested, replicas=3, update=config))
            slow.live(gap_s)
        world.seen = ObservedTimes(world.now)
        slow.live(70)
        assert state(world) is UpdateState.COMPLETED
        assert len(wanted(world, image)) == 3
        assert slots_without_service(world.tasks.values()) == set()


def test_an_update_soon_after_another_one_leaves_the_last_replica_alone() -> None:
    """The last of three still stops for the first update, and the second one begins with the first two."""
    world = a_running_service(3)
    slow = Slow(world, (0, 0, 10))
    two = UpdateConfig(parallelism=2)
    world.update(a_spec("app:2", replicas=3, update=two))
    slow.live(20)
    assert slots_without_service(world.tasks.values()) == {3}
    world.update(a_spec("app:3", replicas=3, update=two))
    slow.live(2)
    assert len(slots_without_service(world.tasks.values())) == 2
    slow.live(60)
    assert state(world) is UpdateState.COMPLETED
    assert len(wanted(world, "app:3")) == 3


def test_slots_that_do_not_serve_come_first_and_as_many_at_a_time_as_any() -> None:
    """Their tasks find no node, say, and the update is to change that."""
    world = a_running_service(5)
    for task in [task for task in world.tasks.values() if task.slot > 2]:
        world.put(replace(task, node_id="", status=replace(task.status, state=TaskState.PENDING)))
    world.update(a_spec("app:2", replicas=5, update=UpdateConfig(parallelism=2, monitor=SECOND_NS)))
    world.settle()
    assert {task.slot for task in wanted(world, "app:2")} == {3, 4}
    Slow(world, (1, 1, 1)).live(60)
    assert len(wanted(world, "app:2")) == 5


def test_a_task_that_comes_to_run_as_it_is_replaced_is_not_stopped_beside_another_one() -> None:
    """The decision was about a slot that did not serve; by the time it is written the slot does."""
    world = a_running_service(3)
    for task in [task for task in world.tasks.values() if task.slot > 1]:
        world.report(task.id, TaskState.STARTING)
    world.update(a_spec("app:2", replicas=3, update=UpdateConfig(parallelism=1, monitor=SECOND_NS)))
    changes = world.changes()
    (replaced,) = [change for change in changes if isinstance(change, ReplaceTask)]
    world.report(replaced.task.id, RUNNING)
    before = slots_without_service(world.tasks.values())
    assert len(before) == 1, "the case that is to be tested"
    world.apply(changes)
    assert slots_without_service(world.tasks.values()) == before
    Slow(world, (1, 1, 1)).live(60)
    assert len(wanted(world, "app:2")) == 3


def test_an_update_that_overtakes_a_failing_one_stops_no_more_slots_than_it_may() -> None:
    """The failing one went on to the second slot; restarts in both slots make tasks of the new version."""
    world = a_running_service(3)
    tolerant = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.CONTINUE)
    world.update(a_spec("app:2", replicas=3, update=tolerant))
    for _ in range(2):
        world.settle()
        for task in wanted(world, "app:2"):
            world.report(task.id, TaskState.REJECTED)
    world.update(a_spec("app:3", replicas=3, update=tolerant))
    world.settle()
    attempts = wanted(world, "app:3")
    assert len(attempts) == 2, "the case that is to be tested"
    for task in attempts:
        world.report(task.id, READY)
    world.settle()
    assert len(slots_without_service(world.tasks.values())) == 1
    Slow(world, (1, 1, 1)).live(60)
    assert len(wanted(world, "app:3")) == 3


def test_a_task_that_is_overdue_as_it_waits_for_its_turn_stops_no_further_slot() -> None:
    """The new task of the first slot hangs; restarts have made those of the others, which are ready."""
    world = a_running_service(3)
    tolerant = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.CONTINUE)
    (hanging,) = [task for task in world.tasks.values() if task.slot == 1]
    world.update(a_spec("app:2", replicas=3, update=tolerant))
    stopped = replace(hanging.status, state=TaskState.SHUTDOWN)
    world.put(replace(hanging, desired_state=TaskState.SHUTDOWN, status=stopped))
    world.put(a_task(slot=1, node="n1", service=world.service, state=TaskState.PREPARING, desired=READY))
    for at, slot in ((1, 3), (20, 2)):
        world.now = at
        world.put(a_task(slot=slot, node="n1", service=world.service, state=READY, desired=READY))
        world.settle()
        assert slots_without_service(world.tasks.values()) == {1}
    deadline_s = 1 + step_seconds_max(world.service.spec)  # since the first of them was started
    for at in (deadline_s, deadline_s + 2):
        world.now = at
        world.settle()
        assert slots_without_service(world.tasks.values()) == {1, 2}
    Slow(world, (1, 1, 1)).live(60)
    assert len(wanted(world, "app:2")) == 3
    assert slots_without_service(world.tasks.values()) == set()


def test_a_task_that_never_came_to_run_does_not_keep_new_ones_from_a_node_for_ever() -> None:
    """It holds the host port of the only node, and ``parallelism`` waits for the slot that is refused it."""
    port = PortConfig(target_port=80, published_port=80, publish_mode=PublishMode.HOST)

    def a_spec_of(image: str) -> ServiceSpec:
        return a_service_spec(replicas=2, image=image, ports=(port,), restart=AT_ONCE)

    service = a_service(spec=a_spec_of("hanging:1"))
    world = World(service, nodes=[a_node("n1")])
    world.put(a_task(slot=1, service=service, state=TaskState.PENDING))
    world.put(a_task(slot=2, node="n1", service=service, state=TaskState.PREPARING))
    world.update(a_spec_of("app:2"))
    world.settle()
    (new,) = wanted(world, "app:2")
    assert new.slot == 1
    status = replace(new.status, state=TaskState.PENDING, err="no suitable node (...)")
    world.put(replace(new, status=status))
    world.settle()
    assert {task.slot for task in wanted(world, "app:2")} == {1, 2}
    assert wanted(world, "hanging:1") == []


def test_an_attempt_of_an_overtaken_update_beside_the_task_that_serves_is_retired_at_once() -> None:
    """It serves nothing, and holds the host port that another slot's new task is refused."""
    port = PortConfig(target_port=80, published_port=80, publish_mode=PublishMode.HOST)

    def a_spec_of(image: str) -> ServiceSpec:
        return a_service_spec(replicas=2, image=image, ports=(port,), restart=AT_ONCE)

    service = a_service(spec=a_spec_of("app:1"))
    world = World(service, nodes=[a_node("n1"), a_node("n2")])
    world.put(a_task(slot=1, node="n1", service=service, state=RUNNING))
    world.put(a_task(slot=2, service=service, state=TaskState.PENDING))
    world.update(a_spec_of("hanging:1"))
    world.put(a_task(slot=1, node="n2", service=world.service, state=TaskState.PREPARING))
    world.update(a_spec_of("app:2"))
    world.settle()
    assert wanted(world, "hanging:1") == []
    (served,) = wanted(world, "app:1")
    assert served.slot == 1
    assert [task.slot for task in wanted(world, "app:2")] == [2]


def test_a_task_that_is_stopped_does_not_stand_for_a_new_one_with_the_same_spec() -> None:
    """Its slot returns to its spec while it stops, labels change, and the history has nothing of the update between."""
    world = a_running_service(2)
    (other,) = [task for task in world.tasks.values() if task.slot == 2]
    world.put(replace(other, spec=replace(other.spec, force_update=1), spec_version=Version(index=0)))
    world.update(a_spec("app:2", replicas=2))
    world.settle()
    (between,) = wanted(world, "app:2")
    world.report(between.id, READY)
    world.settle()
    assert slots_without_service(world.tasks.values()) == {1}
    world.update(a_spec("app:1", replicas=2))
    world.settle()
    del world.tasks[between.id]
    world.update(replace(world.service.spec, labels={"more": "words"}))
    world.settle()
    world.prepare_all()
    world.settle()
    assert slots_without_service(world.tasks.values()) == {1}
    Slow(world, (1, 1, 10)).live(60)
    assert not any(task.spec.force_update for task in wanted(world))
    assert slots_without_service(world.tasks.values()) == set()


def a_successor(order: UpdateOrder) -> tuple[World, Task, Task]:
    """Return an update whose new task, on n2, lets the old one on n1 stop.  Lost tasks are not replaced at once."""
    update = UpdateConfig(parallelism=1, order=order)
    labels = {"skep.on-disconnect-delay": "10m"}
    world = World(
        service := a_service(spec=replace(a_spec(replicas=1, update=update), labels=labels)),
        nodes=[a_node("n1"), a_node("n2")],
    )
    world.put(old := a_task(node="n1", service=service))
    world.update(replace(a_spec("app:2", replicas=1, update=update), labels=labels))
    world.settle()
    (new,) = wanted(world, "app:2")
    new = replace(new, node_id=NodeId("n2"))
    reached = RUNNING if order is UpdateOrder.START_FIRST else READY
    world.put(replace(new, status=replace(new.status, state=reached)))
    return world, old, new


@pytest.mark.parametrize("order", UpdateOrder)
@pytest.mark.parametrize("is_decided_before", [False, True])
def test_an_old_task_stays_while_the_node_of_its_successor_is_lost(
    order: UpdateOrder, *, is_decided_before: bool
) -> None:
    world, old, _ = a_successor(order)
    decided = world.changes() if is_decided_before else []
    world.nodes[NodeId("n2")] = a_node("n2", state=NodeState.DOWN)
    world.apply(decided or world.changes())
    world.settle()
    assert world.tasks[old.id].is_wanted
    world.nodes[NodeId("n2")] = a_node("n2")
    world.settle()
    assert not world.tasks[old.id].is_wanted


@pytest.mark.parametrize("order", UpdateOrder)
def test_an_old_task_stays_if_its_successor_was_preempted_since_the_decision(order: UpdateOrder) -> None:
    world, old, new = a_successor(order)
    decided = world.changes()
    assert [one.task.id for one in decided if isinstance(one, RetireTask)] == [old.id]
    world.put(replace(world.tasks[new.id], preemption=Preemption(task_id=TaskId("vip"))))
    world.apply(decided)
    assert world.tasks[old.id].is_wanted

"""Random events around a ``World``, for properties of decisions where features meet."""

from copy import copy, deepcopy
from random import Random

from msgspec.structs import replace

from skep.errors import SkepError
from skep.manager.control.updates import pause_update, resume_update
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.model.node import Availability, NodeState
from skep.model.options.labels import MIN_AVAILABLE, ON_DISCONNECT, ON_DISCONNECT_DELAY, PROGRESS_DEADLINE
from skep.model.service import (
    ReplicatedService,
    RestartCondition,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
    UpdateState,
    UpdateStatus,
)
from skep.model.staging.updates import CANARY, UPDATE, UPDATE_STEP_TIME, UPDATE_STEPS
from skep.model.task import Preemption, Relocation, Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.times import SECOND_NS, ZERO_TIME, unix_ns
from tests.support.builders import a_node, a_service, a_service_spec
from tests.support.managers.worlds import World

NODES = ("n1", "n2", "n3")
GOOD = "good"
"""Image of the last update."""
FAILED, RUNNING = TaskState.FAILED, TaskState.RUNNING


class RandomWorld:
    """Changes a world by one random event at a time.

    Args:
        seed: Decides about all events.
        has_minimum: Whether every spec has ``skep.min-available``.
        delay_s: Longest delay between the slots of an update.

    Attributes:
        newest_before_term: Creation time of the newest task when the leader's term began.
    """

    def __init__(self, seed: int, *, has_minimum: bool = False, delay_s: int = 3) -> None:
        self.random = Random(seed)
        self.has_minimum, self.delay_s = has_minimum, delay_s
        self.newest_before_term = ZERO_TIME
        self.world = self._begin()

    def _begin(self) -> World:
        self.is_global = not self.has_minimum and self.random.random() < 0.25
        service = replace(a_service("web", is_global=self.is_global), spec=self._spec("a"))
        return World(service, nodes=map(a_node, NODES))

    def fork(self) -> World:
        """Return a copy of the world, to see what another order of events would lead to."""
        world = copy(self.world)
        world.tasks, world.nodes = dict(world.tasks), dict(world.nodes)
        world.payloads, world.specs, world.seen = (
            dict(world.payloads),
            dict(world.specs),
            deepcopy(world.seen),
        )
        return world

    def step(self) -> None:
        """Let one thing happen.  Half of the events are reports of tasks."""
        events = (self._pass_time, self._update, self._roll_back, self._pause_or_resume, self._change_node)
        weights = (1, 1, 1, 1, 3)
        if self.random.random() < 0.5:
            self._report()
        elif self.random.random() < 0.05:
            self._begin_term()
        elif self.random.random() < 0.1:
            self._preempt()
        elif self.random.random() < 0.1:
            self._relocate()
        else:
            self.random.choices(events, weights)[0]()

    def end_well(self) -> None:
        """Let all nodes be ready and a last update without fault come, and carry out everything for a while."""
        for id in NODES:
            self.world.put(a_node(id))
        for task in self.world.tasks.values():
            self.world.put(replace(task, relocation=None))
        self._ask_for_the_last()
        for _ in range(120):
            self.world.settle()
            for task in [*self.world.tasks.values()]:
                self._obey(task)
            self.world.now += self.random.choice((0.5, 3.0, 12.0))

    def _ask_for_the_last(self) -> None:
        choose = self.random.choice
        update = UpdateConfig(parallelism=choose((0, 1, 2)), order=choose((None, *UpdateOrder)))
        spec = a_service_spec(replicas=3, image=GOOD, update=update, is_global=self.is_global)
        self.world.update(replace(spec, labels=self._labels()))

    def _obey(self, task: Task) -> None:
        """Report the next state of the task, as its node does if nothing fails."""
        if task.status.state.is_terminal:
            return
        if not task.is_wanted:
            self.world.report(task.id, TaskState.SHUTDOWN)
        elif not task.node_id:
            self._place(task)
        elif task.desired_state is TaskState.COMPLETE and task.status.state is RUNNING:
            self.world.report(task.id, TaskState.COMPLETE)
        else:
            self.world.report(task.id, TaskState.READY if task.desired_state is TaskState.READY else RUNNING)

    # -- events ------------------------------------------------------------------------------------------------

    def _report(self) -> None:
        if not (tasks := [task for task in self.world.tasks.values() if not task.status.state.is_terminal]):
            return
        task = self.random.choice(tasks)
        if not task.is_wanted:
            if task.status.state >= TaskState.ASSIGNED:
                ends = (TaskState.SHUTDOWN, FAILED, TaskState.COMPLETE)
                self.world.report(task.id, self.random.choice(ends))
        elif not task.node_id:
            self._place(task)
        elif self.world.nodes[task.node_id].status.state is NodeState.READY:
            self.world.report(task.id, self.random.choice(self._next_states(task)))

    def _next_states(self, task: Task) -> list[TaskState]:
        goal = TaskState.READY if task.desired_state is TaskState.READY else RUNNING
        states = [goal, TaskState.REJECTED if task.status.state < TaskState.READY else FAILED]
        if goal is RUNNING:
            states.append(FAILED)
        if task.status.state is RUNNING:
            states.append(TaskState.COMPLETE)
        return [state for state in states if state > task.status.state] or [task.status.state]

    def _place(self, task: Task) -> None:
        able = [
            node.id
            for node in self.world.nodes.values()
            if node.status.state is NodeState.READY and node.spec.availability is Availability.ACTIVE
        ]
        if able:
            status = replace(task.status, state=TaskState.ASSIGNED)
            self.world.put(replace(task, node_id=self.random.choice(able), status=status))

    def _pass_time(self) -> None:
        self.world.now += self.random.choice((0.5, 3.0, 12.0, 40.0))

    def _update(self) -> None:
        spec = self.world.service.spec
        chance = self.random.random()
        if chance < 0.4:
            spec = replace(spec, labels={**spec.labels, "x": str(self.random.random())})
        elif chance < 0.6 and not self.is_global:
            mode = ServiceMode(replicated=ReplicatedService(replicas=self.random.choice((1, 2, 3))))
            spec = replace(spec, mode=mode)
        else:
            spec = self._spec(self.random.choice("abc"))
        self.world.update(spec)

    def _roll_back(self) -> None:
        service = self.world.service
        if service.previous_spec is not None:
            status = UpdateStatus(state=UpdateState.ROLLBACK_STARTED, message="manually requested rollback")
            self.world.put(
                replace(
                    service,
                    spec=service.previous_spec,
                    previous_spec=service.spec,
                    update_status=replace(status, started_at=service.updated_at),
                )
            )

    def _pause_or_resume(self) -> None:
        world, id = self.world, self.world.service.id
        try:
            if self.random.random() < 0.5:
                pause_update(world, id, now=world.service.updated_at)  # type: ignore[arg-type]
            else:
                resume_update(world, id)  # type: ignore[arg-type]
        except SkepError:
            pass  # there is nothing to pause or resume

    def _change_node(self) -> None:
        state = self.random.choice((NodeState.READY, NodeState.READY, NodeState.DOWN))
        availability = self.random.choice(
            (Availability.ACTIVE, Availability.ACTIVE, Availability.DRAIN, Availability.PAUSE)
        )
        self.world.put(a_node(self.random.choice(NODES), state=state, availability=availability))

    def _begin_term(self) -> None:
        self.world.seen = ObservedTimes(self.world.now)
        self.newest_before_term = max(
            (one.created_at for one in self.world.tasks.values()), key=unix_ns, default=ZERO_TIME
        )

    def _preempt(self) -> None:
        if tasks := [task for task in self.world.tasks.values() if task.is_active and task.node_id]:
            preemption = Preemption(service="important", task_id=TaskId("important"))
            self.world.put(replace(self.random.choice(tasks), preemption=preemption))

    def _relocate(self) -> None:
        """Have a running task moved for an even spread, or take such a move back, as the rebalancing loop does."""
        if tasks := [task for task in self.world.tasks.values() if task.is_active and task.node_id]:
            task = self.random.choice(tasks)
            if task.relocation is not None:
                self.world.put(replace(task, relocation=None))
            elif task.status.state is RUNNING and not self.is_global:
                target = NodeId(self.random.choice(NODES))
                self.world.put(replace(task, relocation=Relocation(target=target)))

    # -- the spec ----------------------------------------------------------------------------------------------

    def _spec(self, image: str) -> ServiceSpec:
        choose = self.random.choice
        restart = RestartPolicy(
            condition=choose((None, *RestartCondition)),
            delay=choose((0, SECOND_NS)),
            max_attempts=choose((None, None, 1, 2, 3)),
            window=choose((None, None, None, 20 * SECOND_NS)),
        )
        update = UpdateConfig(
            parallelism=choose((0, 1, 2)),
            delay=choose((0, self.delay_s * SECOND_NS)),
            failure_action=choose(tuple(UpdateFailureAction)),
            monitor=choose((0, 2 * SECOND_NS)),
            max_failure_ratio=choose((0.0, 0.4)),
            order=choose((None, *UpdateOrder)),
        )
        spec = a_service_spec(
            replicas=choose((1, 2, 3)),
            image=image,
            update=update,
            rollback=update,
            restart=restart,
            is_global=self.is_global,
        )
        labels = self._labels()
        if self.random.random() < 0.2:
            labels[PROGRESS_DEADLINE] = "15s"
        return replace(spec, labels=labels)

    def _labels(self) -> dict[str, str]:
        choose, labels = self.random.choice, dict[str, str]()
        if not self.is_global and (self.has_minimum or self.random.random() < 0.3):
            labels[MIN_AVAILABLE] = choose(("1", "50%", "100%"))
        if not self.is_global and self.random.random() < 0.25:
            labels |= {UPDATE: CANARY, UPDATE_STEPS: "5%,50%", UPDATE_STEP_TIME: "5s"}
        if self.random.random() < 0.3:
            labels |= {
                ON_DISCONNECT: choose(("keep", "stop", "replace")),
                ON_DISCONNECT_DELAY: choose(("0s", "20s")),
            }
        return labels

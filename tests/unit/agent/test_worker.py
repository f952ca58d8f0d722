"""The worker, on an executor that only pretends."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from skep.agent.executor.interface import Controller, Rejected, Running
from skep.agent.executor.simulated import Behavior, SimulatedController, SimulatedExecutor, SimulatedMachine
from skep.agent.tasks.task_files import TaskFiles
from skep.agent.tasks.worker import Worker, stop_reason
from skep.aio.clock import Clock, SystemClock
from skep.errors import SkepError
from skep.model.assignment import AssignmentSet
from skep.model.container import ContainerSpec
from skep.model.options.labels import DRAIN, LAST_LINES, ON_DISCONNECT, ON_DISCONNECT_DELAY
from skep.model.service import Limits, ResourceRequirements, TaskSpec
from skep.model.task import AssignedTask, ContainerStatus, Task, TaskState, TaskStatus, Trust
from skep.model.task_end import TaskEnd
from skep.model.values.ids import ServiceId, TaskId
from tests.support.managers.fake_worker import a_session

QUICK = Behavior(prepare_s=0.0, start_s=0.0, shutdown_s=0.0)
RUNNING = TaskState.RUNNING
DEADLINE_S = 30
"""Generous: it is meant for what never comes, not for what comes late on a busy machine."""


def assigned(
    id: str, desired: TaskState = RUNNING, observed: TaskState = TaskState.ASSIGNED, memory: int = 0
) -> AssignedTask:
    resources = ResourceRequirements(limits=Limits(memory_bytes=memory)) if memory else None
    spec = TaskSpec(container_spec=ContainerSpec(image="i"), resources=resources)
    return AssignedTask(
        task=Task(
            id=TaskId(id),
            service_id=ServiceId("s"),
            slot=1,
            spec=spec,
            desired_state=desired,
            status=TaskStatus(state=observed),
        ),
        service_name="web",
    )


def complete(*tasks: AssignedTask) -> AssignmentSet:
    return AssignmentSet(complete=True, tasks=tasks)


def difference(*tasks: AssignedTask, removed: tuple[str, ...] = ()) -> AssignmentSet:
    return AssignmentSet(complete=False, tasks=tasks, removed_tasks=tuple(map(TaskId, removed)))


class Reports:
    """What was reported, in order, and a way to wait for it."""

    def __init__(self) -> None:
        self.reported: dict[str, list[TaskStatus]] = {}
        self._changed_event = asyncio.Event()

    def report(self, task_id: TaskId, status: TaskStatus) -> None:
        self.reported.setdefault(task_id, []).append(status)
        self._changed_event.set()

    def states(self, id: str) -> list[TaskState]:
        return [status.state for status in self.reported.get(id, ())]

    async def wait(self, id: str, state: TaskState) -> TaskStatus:
        async with asyncio.timeout(DEADLINE_S):
            while state not in self.states(id):
                self._changed_event.clear()
                await self._changed_event.wait()
        return next(status for status in self.reported[id] if status.state is state)


class Node:
    """A node with a disk and a machine, on which workers come and go."""

    def __init__(self, directory: Path, behavior: Behavior = QUICK, clock: Clock | None = None) -> None:
        self.clock = clock or SystemClock()
        self.directory = directory
        self.machine = SimulatedMachine()
        self.behavior = behavior
        self.reports = Reports()
        self.controllers: dict[str, type[SimulatedController]] = {}
        self.unlisted: Exception | None = None
        """Why its left-over tasks cannot be listed."""

    @asynccontextmanager
    async def working(self) -> AsyncIterator[Worker]:
        self.reports = Reports()
        executor = ChoosingExecutor(self)
        worker = Worker(
            executor=executor,
            files=TaskFiles(self.directory),
            reports=self.reports,
            clock=self.clock,
            session_state=a_session(),
        )
        async with asyncio.TaskGroup() as group:
            running = group.create_task(worker.run())
            yield worker
            running.cancel()

    async def wait_empty(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.machine.processes:  # noqa: ASYNC110  # there is no event
                await asyncio.sleep(0)


class ChoosingExecutor(SimulatedExecutor):
    """Gives some tasks a controller of another kind."""

    def __init__(self, node: Node) -> None:
        super().__init__(SystemClock(), random.Random(1), node.machine, node.behavior)
        self._node = node
        self._kinds: Mapping[str, type[SimulatedController]] = node.controllers

    def controller(self, task: AssignedTask, registry_auth: str = "") -> Controller:
        controller = self._kinds.get(task.task.id, SimulatedController)(self, task)
        if isinstance(controller, Private):
            controller.registry_auth = registry_auth
        return controller

    async def leftovers(self) -> Sequence[TaskId]:
        if self._node.unlisted is not None:
            raise self._node.unlisted
        return await super().leftovers()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


async def test_a_task_is_reported_in_every_state_once_and_in_order(node: Node) -> None:
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        status = await node.reports.wait("a", RUNNING)
        assert node.reports.states("a") == [
            *(TaskState.ACCEPTED, TaskState.PREPARING, TaskState.READY, TaskState.STARTING, RUNNING)
        ]
        assert status.message == "started"
        assert status.container_status is not None
        assert status.container_status.pid > 0
        assert worker.statuses()[TaskId("a")] == status


async def test_a_prepared_task_starts_when_it_is_wanted(node: Node) -> None:
    async with node.working() as worker:
        await worker.assign(complete(assigned("a", TaskState.READY)))
        await node.reports.wait("a", TaskState.READY)
        assert not node.machine.processes[TaskId("a")].started
        await worker.assign(difference(assigned("a")))
        await node.reports.wait("a", RUNNING)


async def test_an_end_with_an_error_is_failed_with_dockers_words(node: Node) -> None:
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await node.reports.wait("a", RUNNING)
        node.machine.crash(TaskId("a"), 7)
        status = await node.reports.wait("a", TaskState.FAILED)
        assert (status.message, status.err) == ("started", "task: non-zero exit (7)")
        assert status.container_status is not None
        assert status.container_status.exit_code == 7


async def test_a_good_end_is_complete(tmp_path: Path) -> None:
    node = Node(tmp_path, msgspec.structs.replace(QUICK, run_s=0.01))
    async with node.working() as worker:
        await worker.assign(complete(assigned("a", TaskState.COMPLETE)))
        status = await node.reports.wait("a", TaskState.COMPLETE)
        assert (status.message, status.err) == ("finished", "")


@pytest.mark.parametrize("desired", [TaskState.SHUTDOWN, TaskState.REMOVE])
async def test_a_running_task_is_shut_down(node: Node, desired: TaskState) -> None:
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await node.reports.wait("a", RUNNING)
        await worker.assign(difference(assigned("a", desired)))
        status = await node.reports.wait("a", TaskState.SHUTDOWN)
        assert (status.message, status.err) == ("shutdown", "")
        assert node.machine.processes[TaskId("a")].exit_code == 143


class Endless(SimulatedController):
    """Preparing it never ends."""

    async def prepare(self) -> None:
        await asyncio.Event().wait()


async def test_a_shutdown_interrupts_a_preparation_under_way(node: Node) -> None:
    node.controllers["a"] = Endless
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await node.reports.wait("a", TaskState.PREPARING)
        await worker.assign(difference(assigned("a", TaskState.SHUTDOWN)))
        await node.reports.wait("a", TaskState.SHUTDOWN)


async def test_a_removed_task_leaves_nothing(node: Node) -> None:
    async with node.working() as worker:
        await worker.assign(complete(assigned("a"), assigned("b")))
        await node.reports.wait("a", RUNNING)
        await node.reports.wait("b", RUNNING)
        await worker.assign(difference(removed=("a",)))
        assert set(worker.statuses()) == {"b"}
        await worker.assign(complete())
        await node.wait_empty()
    assert list(node.directory.iterdir()) == []


async def test_a_restart_adopts_what_runs_without_a_manager(node: Node) -> None:
    async with node.working() as worker:
        await worker.assign(complete(assigned("a"), assigned("b")))
        await node.reports.wait("a", RUNNING)
        await node.reports.wait("b", RUNNING)
    before = dict(node.machine.processes)
    node.machine.crash(TaskId("b"), 3)  # while no process observes it
    async with node.working() as worker:
        status = await node.reports.wait("b", TaskState.FAILED)
        assert status.err == "task: non-zero exit (3)"
        assert worker.statuses()[TaskId("a")].state is RUNNING
    assert node.machine.processes == before


async def test_after_a_restart_every_task_is_reported_though_its_session_began_earlier(node: Node) -> None:
    async with node.working() as worker:
        await worker.assign(complete(assigned("a"), assigned("b")))
        await node.reports.wait("a", RUNNING)
        await node.reports.wait("b", RUNNING)
    async with node.working() as worker:
        assert worker.statuses() == {}, "what a session would report that began now"
        await worker.wait_ready()
        assert set(worker.statuses()) == {"a", "b"}
        assert node.reports.states("a")[:1] == [RUNNING]
        assert node.reports.states("b")[:1] == [RUNNING]


async def test_an_ended_task_is_never_run_again(node: Node) -> None:
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await node.reports.wait("a", RUNNING)
        node.machine.crash(TaskId("a"), 3)
        await node.reports.wait("a", TaskState.FAILED)
    async with node.working() as worker:
        # The manager has not received the end and sends its last state.
        await worker.assign(complete(assigned("a")))
        await asyncio.sleep(0)
        assert worker.statuses()[TaskId("a")].state is TaskState.FAILED
        await worker.assign(complete(assigned("c", observed=TaskState.COMPLETE)))
        assert worker.statuses()[TaskId("c")].state is TaskState.COMPLETE
        await node.wait_empty()


async def test_leftovers_go_with_the_first_complete_set_and_not_before(node: Node) -> None:
    node.machine.new_process(TaskId("x"))
    async with node.working() as worker:
        await worker.assign(difference(assigned("a")))
        await node.reports.wait("a", RUNNING)
        assert "x" in node.machine.processes
        await worker.assign(complete(assigned("a")))
        async with asyncio.timeout(DEADLINE_S):
            while "x" in node.machine.processes:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert "a" in node.machine.processes


class Refused(SimulatedController):
    async def prepare(self) -> None:
        raise Rejected("No such image: nosuch:latest")


class Broken(SimulatedController):
    """A bug of ours."""

    async def start(self) -> Running:
        raise KeyError("surprise")


class Late(SimulatedController):
    async def start(self) -> Running:
        raise SkepError("starting container failed: out of luck")


class Unmade(SimulatedController):
    def __init__(self, executor: SimulatedExecutor, task: AssignedTask) -> None:
        raise RecursionError("deep")


class Unexplained(Refused):
    async def fetch_end(self) -> TaskEnd | None:
        raise OSError("no disk")


class Unseen(SimulatedController):
    def observed(self) -> Running | None:
        raise KeyError("no record")

    async def start(self) -> Running:
        self._require().started = True
        return Running(container=ContainerStatus())


async def test_errors_of_one_task_do_not_touch_another(node: Node) -> None:
    node.unlisted = ValueError("odd folder")
    node.controllers |= {"refused": Refused, "broken": Broken, "late": Late}
    node.controllers |= {"unmade": Unmade, "unexplained": Unexplained, "unseen": Unseen}
    async with node.working() as worker:
        await worker.assign(complete(*map(assigned, (*node.controllers, "good"))))
        unmade = await node.reports.wait("unmade", TaskState.REJECTED)
        assert unmade.err == "RecursionError: deep"
        unexplained = await node.reports.wait("unexplained", TaskState.REJECTED)
        assert unexplained.err == "No such image: nosuch:latest"
        await node.reports.wait("unseen", RUNNING)
        refused = await node.reports.wait("refused", TaskState.REJECTED)
        assert (refused.message, refused.err) == ("preparing", "No such image: nosuch:latest")
        broken = await node.reports.wait("broken", TaskState.FAILED)
        assert broken.err == "KeyError: 'surprise'"
        late = await node.reports.wait("late", TaskState.FAILED)
        assert (late.message, late.err) == ("starting", "starting container failed: out of luck")
        await node.reports.wait("good", RUNNING)


class Limited(SimulatedController):
    """On a node that cannot give its tasks everything."""

    def observed(self) -> Running | None:
        found = super().observed()
        return found and msgspec.structs.replace(
            found, warnings=("this node may not give CAP_BPF", "w" * 5000)
        )


async def test_what_the_node_could_not_give_a_task_is_in_its_message(node: Node) -> None:
    node.controllers["limited"] = Limited
    async with node.working() as worker:
        await worker.assign(complete(assigned("limited"), assigned("good")))
        assert (await node.reports.wait("good", RUNNING)).message == "started"
        status = await node.reports.wait("limited", RUNNING)
        assert status.message.startswith("started; this node may not give CAP_BPF; www")
        assert (len(status.message), status.err) == (2000, "")


class Stubborn(SimulatedController):
    """Cannot be removed at the first try."""

    tries = 0

    async def remove(self) -> None:
        type(self).tries += 1
        if self.tries == 1:
            raise SkepError("device or resource busy")
        await super().remove()


class NeverStops(SimulatedController):
    """Never stops when it is asked to."""

    async def shutdown(self, drain_s: float = 0.0) -> None:
        await asyncio.Event().wait()


async def test_leaving_the_swarm_kills_containers_that_do_not_stop(node: Node) -> None:
    node.controllers["t1"] = NeverStops
    async with node.working() as worker:
        await worker.assign(complete(assigned("t1"), assigned("t2")))
        for id in ("t1", "t2"):
            await node.reports.wait(id, RUNNING)
        await worker.clear()
        await node.wait_empty()
        assert worker.statuses() == {}


async def test_a_removal_that_fails_is_tried_again(node: Node) -> None:
    node.controllers["a"] = Stubborn
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await node.reports.wait("a", RUNNING)
        await worker.assign(complete())
        await node.wait_empty()
    assert Stubborn.tries == 2


async def test_the_end_of_an_earlier_removal_does_not_hide_a_later_one(node: Node) -> None:
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await node.reports.wait("a", RUNNING)
        earlier = asyncio.create_task(asyncio.sleep(0))
        await earlier
        await worker.assign(complete())
        later = worker.removals[TaskId("a")]
        worker.forget_removal(TaskId("a"), earlier)
        assert worker.removals[TaskId("a")] is later
        await later
        assert TaskId("a") not in worker.removals


class Counted(SimulatedController):
    updates: tuple[int, ...] = ()

    async def update(self, task: AssignedTask) -> None:
        resources = task.task.spec.resources
        assert resources is not None
        assert resources.limits is not None
        type(self).updates += (resources.limits.memory_bytes,)


async def test_new_limits_reach_a_running_task_once(node: Node) -> None:
    node.controllers["a"] = Counted
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await node.reports.wait("a", RUNNING)
        await worker.assign(difference(assigned("a", memory=5)))
        await worker.assign(difference(assigned("a", memory=5)))
        async with asyncio.timeout(DEADLINE_S):
            while not Counted.updates:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert Counted.updates == (5,)
        assert node.reports.states("a").count(RUNNING) == 1


class Relabeled(SimulatedController):
    updates: tuple[Mapping[str, str], ...] = ()

    async def update(self, task: AssignedTask) -> None:
        type(self).updates += (task.service_labels,)


async def test_labels_that_change_while_a_task_runs_take_effect_without_a_restart(node: Node) -> None:
    """Also after a restart of the node process.  The controller gets what it needs at the task's end."""
    node.controllers["a"] = Relabeled
    stops = {ON_DISCONNECT: "stop", ON_DISCONNECT_DELAY: "20s"}
    kept = {**stops, LAST_LINES: "3"}
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await node.reports.wait("a", RUNNING)
        for labels in (stops, kept, kept):
            await worker.assign(difference(msgspec.structs.replace(assigned("a"), service_labels=labels)))
            task = worker.tasks()[TaskId("a")]
            assert not stop_reason(task, 19.0)
            assert stop_reason(task, 20.0)
        async with asyncio.timeout(DEADLINE_S):
            while not Relabeled.updates:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert Relabeled.updates == (kept,)
        assert node.reports.states("a").count(RUNNING) == 1
    async with node.working() as worker:
        await worker.wait_ready()
        assert worker.tasks()[TaskId("a")].service_labels == kept


class SlowToStart(Relabeled):
    updates: tuple[Mapping[str, str], ...] = ()
    begins: asyncio.Event

    async def start(self) -> None:
        type(self).begins.set()
        await asyncio.Event().wait()


async def test_labels_that_change_while_a_task_starts_are_its_controllers_too(node: Node) -> None:
    """One that becomes healthy late, or never, is the one whose last lines its owner wants more of."""
    SlowToStart.begins = asyncio.Event()
    node.controllers["a"] = SlowToStart
    more = {LAST_LINES: "100"}
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await SlowToStart.begins.wait()
        await worker.assign(difference(msgspec.structs.replace(assigned("a"), service_labels=more)))
        async with asyncio.timeout(DEADLINE_S):
            while not SlowToStart.updates:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert SlowToStart.updates == (more,)


class Trusted(SimulatedController):
    updates: tuple[Trust, ...] = ()

    async def update(self, task: AssignedTask) -> None:
        type(self).updates += (task.trust,)


async def test_a_right_that_is_withdrawn_while_a_task_runs_is_withdrawn_from_its_controller(
    node: Node,
) -> None:
    """The controller creates the next container if the node restarts the task without a manager."""
    node.controllers["a"] = Trusted
    async with node.working() as worker:
        trusted = msgspec.structs.replace(assigned("a"), trust=Trust(logs=True))
        await worker.assign(complete(trusted))
        await node.reports.wait("a", RUNNING)
        await worker.assign(complete(assigned("a")))
        async with asyncio.timeout(DEADLINE_S):
            while not Trusted.updates:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert Trusted.updates == (Trust(),)
        assert node.reports.states("a").count(RUNNING) == 1


class Drained(SimulatedController):
    """Its clients never go; it ends when it is to wait for them no more."""

    waited: tuple[float, ...] = ()

    async def shutdown(self, drain_s: float = 0.0) -> None:
        type(self).waited += (drain_s,)
        if drain_s:
            await asyncio.Event().wait()
        await super().shutdown()


@pytest.mark.parametrize("stop", [TaskState.SHUTDOWN, TaskState.REMOVE])
async def test_a_stop_waits_for_clients_as_long_as_the_service_says_now(node: Node, stop: TaskState) -> None:
    """The label was changed while the task ran; then the service is removed while its task waits."""
    node.controllers["a"] = Drained
    Drained.waited = ()
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await node.reports.wait("a", RUNNING)
        for desired, drain in ((RUNNING, "90s"), (stop, "90s"), (TaskState.REMOVE, "0s")):
            labels = {DRAIN: drain}
            await worker.assign(
                difference(msgspec.structs.replace(assigned("a", desired), service_labels=labels))
            )
            async with asyncio.timeout(DEADLINE_S):
                while desired is stop and not Drained.waited:  # noqa: ASYNC110
                    await asyncio.sleep(0)
        await node.reports.wait("a", TaskState.SHUTDOWN)
    assert Drained.waited == (90.0, 0.0)


class Private(SimulatedController):
    """Its image needs credentials."""

    registry_auth = ""

    async def prepare(self) -> None:
        if not self.registry_auth:
            raise Rejected("No such image: i: pull access denied")
        await super().prepare()


async def test_a_task_that_was_not_prepared_gets_its_credentials_after_a_restart_of_the_node(
    node: Node,
) -> None:
    """They are in memory only, and the first assignment brings them again."""
    given = AssignmentSet(complete=True, tasks=(assigned("a"),), registry_auths={TaskId("a"): "secret"})
    node.controllers["a"] = Endless
    async with node.working() as worker:
        await worker.assign(given)
        await node.reports.wait("a", TaskState.PREPARING)
    node.controllers["a"] = Private
    async with node.working() as worker:
        await node.reports.wait("a", TaskState.PREPARING)
        for _ in range(20):
            await asyncio.sleep(0)
        await worker.assign(given)
        await node.reports.wait("a", RUNNING)
        assert TaskState.REJECTED not in node.reports.states("a")


async def test_a_task_whose_image_is_refused_with_its_credentials_is_rejected(node: Node) -> None:
    node.controllers["a"] = Endless
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await node.reports.wait("a", TaskState.PREPARING)
    node.controllers["a"] = Private
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        status = await node.reports.wait("a", TaskState.REJECTED)
        assert status.err == "No such image: i: pull access denied"


async def test_no_credentials_are_written_to_disk(node: Node) -> None:
    change = AssignmentSet(
        complete=True, tasks=(assigned("a"),), registry_auths={TaskId("a"): "c2VjcmV0LXBhc3N3b3Jk"}
    )
    async with node.working() as worker:
        await worker.assign(change)
        await node.reports.wait("a", RUNNING)
    written = b"".join(path.read_bytes() for path in node.directory.iterdir())
    assert b'"id"' in written.lower()
    assert b"c2VjcmV0" not in written


async def test_a_torn_task_file_is_left_out(node: Node) -> None:
    (node.directory / "torn.json").write_text('{"assigned": {')
    async with node.working() as worker:
        await worker.assign(complete(assigned("a")))
        await node.reports.wait("a", RUNNING)

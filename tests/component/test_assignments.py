"""Assignments to nodes and statuses from them, over real mutual TLS on loopback."""

import asyncio
from contextlib import AbstractAsyncContextManager

import msgspec
import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import (
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from skep.model.container import ConfigReference, ContainerSpec, FileTarget, Mount, SecretReference
from skep.model.node import Node, NodeState
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import TaskSpec
from skep.model.task import Task, TaskState
from skep.model.task_end import KeptLine, TaskEnd
from skep.model.values.ids import ConfigId, SecretId
from skep.model.values.times import timestamp
from skep.store.interface import Transaction
from skep.store.kinds import Payload
from skep.store.memory import MemoryStore
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from tests.support.managers.wire_rig import (
    Cluster,
    FakeWorker,
    a_session,
    a_worker,
    an_agent,
    put,
    service_task,
    until,
)

WATCHED = 20
"""Commits by which a watch may be behind."""


@pytest.fixture
async def cluster():
    async with Cluster().serving() as serving:
        yield serving


async def test_an_assigned_task_reaches_the_node_and_its_status_the_store(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        await put(cluster, service, task)
        await until(lambda: task.id in worker.tasks)
        assigned = worker.tasks[task.id]
        assert assigned.service_name == service.spec.name
        assert assigned.task.spec.container_spec == cluster.view.get(Task, task.id).spec.container_spec
        worker.report(task.id, TaskState.RUNNING, "started")
        await cluster.until(lambda view: view.get(Task, task.id).status.state is TaskState.RUNNING)
        assert cluster.view.get(Task, task.id).status.message == "started"


async def test_a_task_is_not_sent_before_it_is_assigned(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        pending = msgspec.structs.replace(
            task, status=msgspec.structs.replace(task.status, state=TaskState.PENDING)
        )
        other_service, other = service_task(agent.node_id)
        await put(cluster, service, pending)
        await put(cluster, other_service, other)
        await until(lambda: other.id in worker.tasks)
        assert task.id not in worker.tasks


async def test_a_changed_desired_state_and_a_removed_task_reach_the_node(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        await put(cluster, service, task)
        await until(lambda: task.id in worker.tasks)
        await put(cluster, msgspec.structs.replace(task, desired_state=TaskState.SHUTDOWN))
        await until(lambda: worker.tasks[task.id].task.desired_state is TaskState.SHUTDOWN)
        await cluster.store.update(lambda tx: tx.delete(Task, task.id))
        await until(lambda: task.id not in worker.tasks)
        assert [change.complete for change in worker.sets] == [True] + [False] * (len(worker.sets) - 1)


async def test_what_is_deleted_while_the_managers_watch_lags_reaches_its_node(tmp_path):
    cluster = Cluster()
    cluster.store = MemoryStore(SystemClock(), watch_capacity=WATCHED)
    elsewhere = MemoryStore(SystemClock(), cluster.store.cluster)

    def remove(tx: Transaction) -> None:
        tx.delete(Task, task.id)
        tx.delete(Node, gone.identity.node_id)

    async with cluster.serving():
        pair, gone = await a_worker(cluster, tmp_path), await a_worker(cluster, tmp_path / "gone")
        async with (
            an_agent(cluster, pair, tmp_path) as (agent, worker),
            a_session(cluster, gone) as (channel, session_id),
        ):
            service, task = service_task(agent.node_id)
            await put(cluster, service, task)
            await until(lambda: task.id in worker.tasks)
            later = [Payload(id=f"later{number}") for number in range(WATCHED + 2)]
            await asyncio.gather(
                elsewhere.update(remove),
                *(elsewhere.update(lambda tx, one=one: tx.put(one)) for one in later),
            )
            await until(lambda: task.id not in worker.tasks)
            with pytest.raises(NotFound, match="node not registered"):
                await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id=session_id))


async def test_a_nodes_own_report_is_not_sent_back_to_it(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        await put(cluster, service, task)
        await until(lambda: task.id in worker.tasks)
        messages = len(worker.sets)
        for state in (TaskState.ACCEPTED, TaskState.PREPARING, TaskState.RUNNING):
            worker.report(task.id, state)
        await cluster.until(lambda view: view.get(Task, task.id).status.state is TaskState.RUNNING)
        other_service, other = service_task(agent.node_id)
        await put(cluster, other_service, other)
        await until(lambda: other.id in worker.tasks)
        assert len(worker.sets) == messages + 1


async def test_secrets_and_configs_come_with_the_task_and_go_with_it(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        secret = Secret(id=SecretId("s1"), spec=SecretSpec(name="password"))
        config = Config(id=ConfigId("c1"), spec=ConfigSpec(name="settings", data=b"plain"))
        container = ContainerSpec(
            image="busybox:1",
            secrets=(
                SecretReference(file=FileTarget(name="p"), secret_id=secret.id, secret_name="password"),
            ),
            configs=(
                ConfigReference(file=FileTarget(name="/c"), config_id=config.id, config_name="settings"),
            ),
        )
        spec = msgspec.structs.replace(service.spec, task_template=TaskSpec(container_spec=container))
        service = msgspec.structs.replace(service, spec=spec)
        task = msgspec.structs.replace(task, spec=spec.task_template)
        await put(cluster, secret, Payload(id="secret/s1", data=b"hidden"), config, service, task)
        await put(cluster, Payload(id=f"registry/{service.id}", data=b"e30="))
        await until(lambda: task.id in worker.tasks)
        change = next(change for change in worker.sets if change.tasks)
        assert [(file.name, file.data) for file in change.secrets] == [("password", b"hidden")]
        assert [(file.name, file.data) for file in change.configs] == [("settings", b"plain")]
        worker.report(task.id, TaskState.FAILED)
        await until(lambda: worker.sets[-1].removed_secrets == ("s1",))
        assert worker.sets[-1].removed_configs == ("c1",)
        assert task.id in worker.tasks


async def test_a_restarted_manager_loses_nothing(tmp_path):
    cluster = Cluster()
    async with cluster.serving():
        pair = await a_worker(cluster, tmp_path)
        service, task = service_task(pair.identity.node_id)
        await put(cluster, service, task)
    port = cluster.port
    worker = FakeWorker()
    async with cluster.serving(port), an_agent(cluster, pair, tmp_path, worker) as (agent, _):
        await until(lambda: task.id in worker.tasks)
        worker.report(task.id, TaskState.RUNNING)
        await cluster.until(lambda view: view.get(Task, task.id).status.state is TaskState.RUNNING)
        first = cluster.node(agent.node_id).session
    # The manager is gone; the next agent finds its successor, which knows what was reported.
    async with cluster.serving(port), an_agent(cluster, pair, tmp_path) as (_, worker):
        await until(lambda: task.id in worker.tasks)
        assert worker.sets[0].complete
        assert worker.tasks[task.id].task.status.state is TaskState.RUNNING
        assert cluster.node(agent.node_id).session != first


async def test_a_session_outlives_its_managers_restart_by_a_new_one(tmp_path):
    """The agent runs on while the manager is replaced; what happened meanwhile arrives on both sides."""
    cluster = Cluster()
    worker = FakeWorker()
    async with Restartable(cluster) as restart:
        pair = await a_worker(cluster, tmp_path)
        async with an_agent(cluster, pair, tmp_path, worker) as (agent, _):
            service, task = service_task(agent.node_id)
            await put(cluster, service, task)
            await until(lambda: task.id in worker.tasks)
            await restart.stop()
            worker.report(task.id, TaskState.RUNNING)
            other_service, other = service_task(agent.node_id)
            await put(cluster, other_service, other)
            await restart.start()
            await cluster.until(lambda view: view.get(Task, task.id).status.state is TaskState.RUNNING)
            await until(lambda: other.id in worker.tasks)
            assert cluster.node(agent.node_id).status.state is NodeState.READY


KILLED = TaskEnd(
    cause="signal",
    signal="SIGKILL",
    lines=tuple(KeptLine(timestamp=timestamp(n), stream="stderr", text=f"line {n}") for n in range(1, 4)),
)


async def test_why_a_task_ended_is_kept_with_it(cluster, tmp_path):
    worker = FakeWorker()
    async with an_agent(cluster, await a_worker(cluster, tmp_path), tmp_path, worker) as (agent, _):
        service, task = service_task(agent.node_id)
        await put(cluster, service, task)
        await until(lambda: task.id in worker.tasks)
        worker.report(task.id, TaskState.FAILED, end=KILLED)
        await cluster.until(lambda view: view.get(Task, task.id).status.state is TaskState.FAILED)
        assert cluster.view.get(Task, task.id).status.end == KILLED


@pytest.mark.parametrize("lines", [0, 2])
async def test_the_cluster_says_how_many_lines_are_kept(cluster, tmp_path, lines):
    worker = FakeWorker()
    labels = {"skep.last-lines": str(lines)}
    await cluster.store.update(
        lambda tx: tx.put(replace(cluster.swarm, spec=replace(cluster.swarm.spec, labels=labels)))
    )
    async with an_agent(cluster, await a_worker(cluster, tmp_path), tmp_path, worker) as (agent, _):
        service, task = service_task(agent.node_id)
        await put(cluster, service, task)
        await until(lambda: task.id in worker.tasks)
        worker.report(task.id, TaskState.FAILED, end=KILLED)
        await cluster.until(lambda view: view.get(Task, task.id).status.state is TaskState.FAILED)
        assert cluster.view.get(Task, task.id).status.end == replace(KILLED, lines=KILLED.lines[3 - lines :])


class WithoutEnds(Cluster):
    """A manager of an earlier version."""

    def _services(self, *arguments):
        return [one for one in super()._services(*arguments) if one.method is not methods.REPORT_STATUSES]


async def test_a_manager_without_ends_gets_the_statuses_alone(tmp_path):
    async with WithoutEnds().serving() as cluster:
        worker = FakeWorker()
        async with an_agent(cluster, await a_worker(cluster, tmp_path), tmp_path, worker) as (agent, _):
            service, task = service_task(agent.node_id)
            await put(cluster, service, task)
            await until(lambda: task.id in worker.tasks)
            worker.report(task.id, TaskState.FAILED, "lost", end=KILLED)
            await cluster.until(lambda view: view.get(Task, task.id).status.state is TaskState.FAILED)
            kept = cluster.view.get(Task, task.id).status
            assert (kept.message, kept.end) == ("lost", None)


class Restartable:
    """A serving cluster that a test can stop and start on the same port."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._serving: AbstractAsyncContextManager[None] | None = None

    async def start(self) -> None:
        self._serving = self._cluster.serving(self._cluster.port)
        await self._serving.__aenter__()

    async def stop(self) -> None:
        assert self._serving is not None
        await self._serving.__aexit__(None, None, None)
        self._serving = None

    async def __aenter__(self):
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._serving is not None:
            await self.stop()


async def report(channel, session_id: str, task_id: str, state: TaskState) -> None:
    update = pb.UpdateTaskStatusRequest.TaskStatusUpdate(
        task_id=task_id, status=pb.TaskStatus(state=pb.TaskState.ValueType(state.number))
    )
    await channel.call(
        methods.UPDATE_TASK_STATUS, pb.UpdateTaskStatusRequest(session_id=session_id, updates=[update])
    )


async def test_a_node_cannot_report_another_nodes_task(cluster, tmp_path):
    mine, theirs = await a_worker(cluster, tmp_path), await a_worker(cluster, tmp_path)
    service, task = service_task(theirs.identity.node_id)
    await put(cluster, service, task)
    async with a_session(cluster, mine) as (channel, session_id):
        with pytest.raises(PermissionDenied, match="not assigned this node"):
            await report(channel, session_id, task.id, TaskState.RUNNING)
        await report(channel, session_id, "gone", TaskState.RUNNING)
    assert cluster.view.get(Task, task.id).status.state is TaskState.ASSIGNED


async def test_states_never_go_back(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    service, task = service_task(pair.identity.node_id)
    await put(cluster, service, task)
    async with a_session(cluster, pair) as (channel, session_id):
        for state in (TaskState.RUNNING, TaskState.PREPARING, TaskState.ORPHANED, TaskState.NEW):
            await report(channel, session_id, task.id, state)
            assert cluster.view.get(Task, task.id).status.state is TaskState.RUNNING
        await report(channel, session_id, task.id, TaskState.FAILED)
        assert cluster.view.get(Task, task.id).status.state is TaskState.FAILED


async def test_a_status_with_nonsense_in_it_is_an_invalid_argument(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with a_session(cluster, pair) as (channel, session_id):
        status = pb.TaskStatus(state=pb.TaskState.ValueType(513))
        update = pb.UpdateTaskStatusRequest.TaskStatusUpdate(task_id="x", status=status)
        with pytest.raises(InvalidArgument, match="unknown task state 513"):
            await channel.call(
                methods.UPDATE_TASK_STATUS,
                pb.UpdateTaskStatusRequest(session_id=session_id, updates=[update]),
            )


async def test_engines_get_assignments_by_swarmkits_own_call(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    service, task = service_task(pair.identity.node_id)
    await put(cluster, service, task)
    async with (
        a_session(cluster, pair) as (channel, session_id),
        channel.stream(methods.ASSIGNMENTS) as tasks,
    ):
        await tasks.send(pb.AssignmentsRequest(session_id=session_id), end=True)
        message = await tasks.receive()
        assert (message.type, message.applies_to, message.results_in) == (0, "", "1")
        assert [change.assignment.task.id for change in message.changes] == [task.id]
        await cluster.store.update(lambda tx: tx.delete(Task, task.id))
        message = await tasks.receive()
        assert (message.type, message.applies_to, message.results_in) == (1, "1", "2")
        assert message.changes[0].action == pb.AssignmentChange.REMOVE


async def test_a_task_swarmkit_has_no_words_for_does_not_keep_others_from_the_node(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    service, good = service_task(pair.identity.node_id)
    odd_service, odd = service_task(pair.identity.node_id)
    template = TaskSpec(container_spec=ContainerSpec(image="x", mounts=(Mount(type="image", target="/x"),)))
    odd_service = msgspec.structs.replace(
        odd_service, spec=msgspec.structs.replace(odd_service.spec, task_template=template)
    )
    await put(cluster, service, good, odd_service, msgspec.structs.replace(odd, spec=template))
    async with an_agent(cluster, pair, tmp_path) as (_, worker):
        await until(lambda: good.id in worker.tasks)
        assert odd.id not in worker.tasks


async def test_assignments_of_an_earlier_incarnation_are_refused_until_a_later_one_comes(cluster, tmp_path):
    """What a manager of the cluster before a restore says counts for nothing, in an open session and in new ones."""
    pair = await a_worker(cluster, tmp_path)
    cluster.store.cluster.incarnation = 7
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, first = service_task(agent.node_id)
        await put(cluster, service, first)
        await until(lambda: first.id in worker.tasks)

        cluster.store.cluster.incarnation = 6
        reported = len(worker.sets)
        sessions = {cluster.node(agent.node_id).session.session_id}
        service, later = service_task(agent.node_id)
        await put(cluster, service, later)

        def tried_again() -> bool:
            sessions.add(cluster.node(agent.node_id).session.session_id)
            return len(sessions) == 3  # so one complete session, with all its assignments, lies between

        await until(tried_again, within_s=20)
        assert len(worker.sets) == reported
        assert set(worker.tasks) == {first.id}

        cluster.store.cluster.incarnation = 8
        await until(lambda: later.id in worker.tasks, within_s=20)
        assert set(worker.tasks) == {first.id, later.id}


async def test_assignments_say_which_incarnation_they_are_of(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    cluster.store.cluster.incarnation = 7
    async with (
        a_session(cluster, pair) as (channel, session_id),
        channel.stream(methods.REVISED_ASSIGNMENTS) as call,
    ):
        await call.send(pb.AssignmentsRequest(session_id=session_id), end=True)
        message = await call.receive()
        assert message.incarnation == 7
        assert message.revision > 0

"""Nodes and a manager over real mutual TLS on loopback: joining, sessions, assignments, statuses, logs."""

import asyncio
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from skep.aio.clock import SystemClock
from skep.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from skep.manager.logbroker.broker import IncompleteLogs
from skep.model.container import ConfigReference, ContainerSpec, FileTarget, SecretReference
from skep.model.ids import ConfigId, NodeId, SecretId, new_id
from skep.model.logs import LogLine, LogQuery, LogStream
from skep.model.node import Availability, Node, NodeRole, NodeState
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import TaskSpec
from skep.model.task import Task, TaskState
from skep.node.joining import join, renew
from skep.security import keypair
from skep.security.authority import Authority
from skep.security.keypair import KeyPair
from skep.security.tls import client_context, joining_context
from skep.security.tokens import join_token
from skep.store.kinds import Payload
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.client import connected
from tests.builders import a_service, a_task
from tests.wire_rig import MANAGER_ID, Cluster, FakeWorker, an_agent, until

CLOCK = SystemClock()


@pytest.fixture
async def cluster():
    async with Cluster().serving() as serving:
        yield serving


async def a_worker(cluster: Cluster, directory: Path):
    """A key pair of a node that joined."""
    pair = await join(cluster.address, cluster.swarm.join_tokens.worker, CLOCK)
    keypair.save(pair, directory)
    return pair


async def put(cluster: Cluster, *objects: msgspec.Struct) -> None:
    await cluster.store.update(lambda tx: [tx.put(object) for object in objects])


def service_task(node: NodeId, **more: object) -> tuple[object, Task]:
    service = a_service(f"web{new_id()[:6]}")
    return service, a_task(new_id(), node=node, service=service, state=TaskState.ASSIGNED, **more)


@asynccontextmanager
async def a_session(cluster: Cluster, pair: KeyPair):
    """A connection with a registered session, by hand: gives the channel and the session's id."""
    async with (
        connected(cluster.address, client_context(pair), "swarm-manager") as channel,
        channel.stream(methods.SESSION) as call,
    ):
        await call.send(pb.SessionRequest(), end=True)
        message = await call.receive()
        yield channel, message.session_id


# -- joining --------------------------------------------------------------------------------------------------------


async def test_a_worker_token_makes_a_worker(cluster):
    pair = await join(cluster.address, cluster.swarm.join_tokens.worker, CLOCK, Availability.DRAIN)
    assert pair.identity.cluster_id == cluster.id
    assert pair.identity.role is NodeRole.WORKER
    node = cluster.node(pair.identity.node_id)
    assert node.spec.availability is Availability.DRAIN
    assert node.certificate is not None
    assert node.certificate.state == "issued"


async def test_a_wrong_token_is_refused_with_dockers_words(cluster):
    wrong = join_token(cluster.authority.root_pem, "0" * 25)
    with pytest.raises(InvalidArgument, match="A valid join token is necessary to join this cluster"):
        await join(cluster.address, wrong, CLOCK)
    assert len(cluster.view.find(Node)) == 1


async def test_a_token_of_another_cluster_is_noticed_before_the_secret_is_sent(cluster):
    foreign = join_token(Authority.create().root_pem, "0" * 25)
    with pytest.raises(FailedPrecondition, match="remote CA does not match fingerprint"):
        await join(cluster.address, foreign, CLOCK)


async def test_no_token_at_all_is_an_invalid_argument(cluster):
    with pytest.raises(InvalidArgument, match="invalid join token"):
        await join(cluster.address, "SWMTKN-1-x-y", CLOCK)


async def test_a_second_manager_is_refused_with_a_sentence(cluster):
    with pytest.raises(FailedPrecondition, match="does not take further managers yet"):
        await join(cluster.address, cluster.swarm.join_tokens.manager, CLOCK)


async def test_a_node_renews_with_its_certificate_alone(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    renewed = await renew(cluster.address, pair, CLOCK)
    assert renewed.identity == pair.identity
    assert renewed.key_pem != pair.key_pem


async def test_a_removed_node_cannot_renew(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    await cluster.store.update(lambda tx: tx.delete(Node, pair.identity.node_id))
    with pytest.raises(PermissionDenied, match="not part of this swarm"):
        await renew(cluster.address, pair, CLOCK)


@pytest.mark.parametrize("csr", [b"", b"nonsense", b"-----BEGIN CERTIFICATE REQUEST-----\nAA==\n"])
async def test_a_request_that_cannot_be_read_gets_no_certificate(cluster, csr):
    token = cluster.swarm.join_tokens.worker
    context = joining_context(cluster.authority.root_pem)
    async with connected(cluster.address, context, "swarm-ca") as channel:
        with pytest.raises(InvalidArgument, match="certificate request"):
            await channel.call(
                methods.ISSUE_NODE_CERTIFICATE, pb.IssueNodeCertificateRequest(csr=csr, token=token)
            )


# -- who may call ---------------------------------------------------------------------------------------------------


async def test_without_a_certificate_only_joining_is_possible(cluster):
    context = joining_context(cluster.authority.root_pem)
    async with connected(cluster.address, context, "swarm-manager") as channel:
        with pytest.raises(PermissionDenied):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest())


async def test_a_certificate_of_another_cluster_counts_for_nothing(cluster):
    pair = cluster.pair(new_id(), cluster="another-cluster")
    async with connected(cluster.address, client_context(pair), "swarm-manager") as channel:
        with pytest.raises(PermissionDenied):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest())


async def test_a_certificate_of_another_root_ends_the_connection(cluster):
    stranger = Cluster()
    pair = stranger.pair(new_id(), cluster=cluster.id).with_root(cluster.authority.root_pem)
    with pytest.raises(Unavailable):
        async with connected(cluster.address, client_context(pair), "swarm-manager") as channel:
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest())


async def test_a_node_does_not_talk_to_a_manager_of_another_root(cluster):
    pair = Cluster().pair(new_id())
    with pytest.raises(Unavailable, match="not trusted"):
        async with connected(cluster.address, client_context(pair), "swarm-manager"):
            pass


async def test_a_workers_certificate_does_not_pass_for_a_managers():
    cluster = Cluster()
    async with cluster.serving():
        pair = cluster.pair(new_id(), NodeRole.WORKER)
        async with connected(cluster.address, client_context(pair), "swarm-manager") as channel:
            with pytest.raises((PermissionDenied, Unimplemented)):
                await channel.call(methods.GET_UNLOCK_KEY, pb.GetUnlockKeyRequest())


async def test_an_unknown_method_is_unimplemented(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    method = methods.Unary("/docker.swarmkit.v1.Dispatcher/Tasks", pb.HeartbeatRequest, pb.HeartbeatResponse)
    async with connected(cluster.address, client_context(pair), "swarm-manager") as channel:
        with pytest.raises(Unimplemented):
            await channel.call(method, pb.HeartbeatRequest())


async def test_an_engine_with_the_manager_token_hears_why_it_cannot_be_one(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    method = methods.Unary(
        "/docker.swarmkit.v1.RaftMembership/Join", pb.HeartbeatRequest, pb.HeartbeatResponse
    )
    async with connected(cluster.address, client_context(pair), "swarm-manager") as channel:
        with pytest.raises(FailedPrecondition, match="workers only"):
            await channel.call(method, pb.HeartbeatRequest())


async def test_a_message_over_four_megabytes_is_refused_and_the_connection_lives(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with connected(cluster.address, client_context(pair), "swarm-manager") as channel:
        with pytest.raises(ResourceExhausted, match="larger than max"):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id="x" * (5 << 20)))
        with pytest.raises(NotFound, match="node not registered"):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id="x"))


async def test_a_stranger_may_send_little(cluster):
    context = joining_context(cluster.authority.root_pem)
    async with connected(cluster.address, context, "swarm-ca") as channel:
        with pytest.raises(ResourceExhausted, match="larger than max"):
            await channel.call(
                methods.ISSUE_NODE_CERTIFICATE, pb.IssueNodeCertificateRequest(csr=b"x" * 100_000)
            )


# -- sessions -------------------------------------------------------------------------------------------------------


async def test_a_node_that_registers_is_ready_and_described(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        node = cluster.node(agent.node_id)
        assert node.status.state is NodeState.READY
        assert node.status.addr == "127.0.0.1"
        assert node.description.hostname == "worker"
        assert node.description.tls_info.trust_root == cluster.authority.root_pem.decode()
        assert node.session is not None
        assert node.session.manager_id == MANAGER_ID
        assert [peer.addr for peer in agent.managers] == [cluster.address]


async def test_a_node_that_goes_silent_is_down_after_its_grace(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        await asyncio.sleep(0)
    assert cluster.node(agent.node_id).status.state is NodeState.READY  # a broken session is not a dead node
    await cluster.until(lambda view: view.get(Node, agent.node_id).status.state is NodeState.DOWN)
    assert cluster.node(agent.node_id).status.message == "heartbeat failure"


async def test_a_node_that_returns_is_ready_again(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        pass
    await cluster.until(lambda view: view.get(Node, agent.node_id).status.state is NodeState.DOWN)
    async with an_agent(cluster, pair, tmp_path, worker):
        assert cluster.node(agent.node_id).status.state is NodeState.READY


async def test_heartbeats_keep_a_node_ready(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        session = cluster.node(agent.node_id).session
        await asyncio.sleep(1.5)  # seven periods, twice the grace
        node = cluster.node(agent.node_id)
        assert node.status.state is NodeState.READY
        assert node.session == session


async def test_a_removed_node_gets_no_session(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    await cluster.store.update(lambda tx: tx.delete(Node, pair.identity.node_id))
    with pytest.raises(PermissionDenied, match="was removed"):
        async with a_session(cluster, pair):
            pass


async def test_a_second_session_ends_the_first(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with (
        a_session(cluster, pair) as (channel, earlier),
        a_session(cluster, pair) as (_, later),
    ):
        assert earlier != later
        with pytest.raises(InvalidArgument, match="session invalid"):
            await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id=earlier))
        await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest(session_id=later))


async def test_a_manager_without_a_quorum_takes_no_session_and_gives_up_those_it_has(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, _):
        cluster.store.cut()
        await until(lambda: not agent.registered.is_set())
        cluster.store.mend()
        async with asyncio.timeout(10):
            await agent.registered.wait()


# -- assignments and statuses ---------------------------------------------------------------------------------------


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


async def test_a_task_is_not_told_before_it_is_assigned(cluster, tmp_path):
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


async def test_a_wish_that_changes_and_a_task_that_goes_reach_the_node(cluster, tmp_path):
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


class Restartable:
    """A serving cluster that a test can stop and start on the same port."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._serving = None

    async def start(self) -> None:
        self._serving = self._cluster.serving(self._cluster.port)
        await self._serving.__aenter__()

    async def stop(self) -> None:
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
    from skep.model.container import Mount

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


# -- logs -----------------------------------------------------------------------------------------------------------


def a_line(task: Task, text: bytes, **more: object) -> LogLine:
    return LogLine(task_id=task.id, stream=LogStream.STDERR, timestamp_ns=5, data=text, **more)


async def test_a_subscription_brings_the_lines_of_a_services_tasks(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        await put(cluster, service, task)
        worker.lines = [a_line(task, b"one\n", attrs={"k": "v"}), a_line(task, b"two")]
        await until(lambda: agent.node_id in cluster.logs._listeners)
        query = LogQuery(services=(service.id,), tail=5, since_ns=3, streams=(LogStream.STDERR,))
        lines = [line async for line in cluster.logs.subscribe(query)]
        assert [line.data for line in lines] == [b"one\n", b"two"]
        assert lines[0].node_id == agent.node_id
        assert lines[0].service_id == service.id
        assert lines[0].attrs == {"k": "v"}
        assert lines[0].stream is LogStream.STDERR
        assert worker.queries == [query]


async def test_a_followed_subscription_ends_on_the_node_when_its_reader_goes(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        await put(cluster, service, task)
        worker.lines = [a_line(task, b"one\n")]
        await until(lambda: agent.node_id in cluster.logs._listeners)
        async with aclosing(cluster.logs.subscribe(LogQuery(tasks=(task.id,), follow=True))) as lines:
            assert (await anext(lines)).data == b"one\n"
            worker.lines.append(a_line(task, b"later\n"))
            worker.more_lines.set()
            assert (await anext(lines)).data == b"later\n"
        await until(lambda: worker.closed_logs == 1)


async def test_a_follower_hears_of_tasks_that_come_later(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        worker.lines = [a_line(task, b"one\n")]
        await put(cluster, service)
        await until(lambda: agent.node_id in cluster.logs._listeners)
        async with aclosing(cluster.logs.subscribe(LogQuery(services=(service.id,), follow=True))) as lines:
            first = asyncio.ensure_future(anext(lines))
            await asyncio.sleep(0.02)
            await put(cluster, task)
            assert (await asyncio.wait_for(first, 5)).data == b"one\n"


async def test_nodes_that_do_not_answer_are_named(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    service, task = service_task(pair.identity.node_id)
    unscheduled = a_task("t-nowhere", service=service, state=TaskState.PENDING)
    await put(cluster, service, task, unscheduled)
    with pytest.raises(IncompleteLogs) as caught:
        async for _ in cluster.logs.subscribe(LogQuery(services=(service.id,))):
            pass
    assert f"node {pair.identity.node_id} is not available" in str(caught.value)
    assert "task t-nowhere has not been scheduled" in str(caught.value)


async def test_lines_of_other_nodes_tasks_are_dropped(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        foreign_service, foreign = service_task(MANAGER_ID)
        await put(cluster, service, task, foreign_service, foreign)
        worker.lines = [a_line(foreign, b"forged\n"), a_line(task, b"own\n")]
        await until(lambda: agent.node_id in cluster.logs._listeners)
        lines = [line async for line in cluster.logs.subscribe(LogQuery(tasks=(task.id,)))]
        assert [line.data for line in lines] == [b"own\n"]


async def test_a_slow_reader_holds_up_only_itself(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        await put(cluster, service, task)
        worker.lines = [a_line(task, b"x" * 1000)] * 20_000
        await until(lambda: agent.node_id in cluster.logs._listeners)
        async with aclosing(cluster.logs.subscribe(LogQuery(tasks=(task.id,), follow=True))) as lines:
            await anext(lines)
            worker.report(task.id, TaskState.RUNNING)
            await cluster.until(lambda view: view.get(Task, task.id).status.state is TaskState.RUNNING)
            session = cluster.node(agent.node_id).session
            await asyncio.sleep(1)  # several graces of heartbeats
            assert cluster.node(agent.node_id).session == session
            assert cluster.node(agent.node_id).status.state is NodeState.READY
        await until(lambda: worker.closed_logs == 1)

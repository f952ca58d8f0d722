"""Logs of tasks, from nodes to readers."""

import asyncio
from contextlib import AsyncExitStack, aclosing, suppress

import msgspec
import pytest
from msgspec.structs import replace

from skep.errors import Unavailable
from skep.manager.control.nodes import remove_node
from skep.manager.logbroker.broker import SUBSCRIPTIONS_MAX, IncompleteLogs
from skep.manager.logbroker.subscription import LIMITS, LogLimits
from skep.model.logs import LogLine, LogQuery, LogStream
from skep.model.node import Node, NodeState, NodeStatus
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.task_end import KeptLine, TaskEnd
from skep.model.values.ids import TaskId
from skep.model.values.times import timestamp
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from tests.support.builders import a_service, a_task
from tests.support.managers.wire_rig import (
    MANAGER_ID,
    Cluster,
    a_session,
    a_worker,
    an_agent,
    put,
    service_task,
    until,
)


@pytest.fixture
async def cluster(request):
    async with Cluster(logs=getattr(request, "param", LIMITS)).serving() as serving:
        yield serving


def a_line(task: Task, text: bytes, **more: object) -> LogLine:
    return LogLine(task_id=task.id, stream=LogStream.STDERR, timestamp_ns=5, data=text, **more)


async def test_a_subscription_brings_the_lines_of_a_services_tasks(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        await put(cluster, service, task)
        worker.lines = [a_line(task, b"one\n", attrs={"k": "v"}), a_line(task, b"two")]
        await until(lambda: agent.node_id in cluster.logs.listeners)
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
        await until(lambda: agent.node_id in cluster.logs.listeners)
        async with aclosing(cluster.logs.subscribe(LogQuery(tasks=(task.id,), follow=True))) as lines:
            assert (await anext(lines)).data == b"one\n"
            worker.lines.append(a_line(task, b"later\n"))
            worker.more_lines.set()
            assert (await anext(lines)).data == b"later\n"
        await until(lambda: worker.closed_logs == 1)


async def test_a_follower_gets_the_logs_of_later_tasks(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        worker.lines = [a_line(task, b"one\n")]
        await put(cluster, service)
        await until(lambda: agent.node_id in cluster.logs.listeners)
        async with aclosing(cluster.logs.subscribe(LogQuery(services=(service.id,), follow=True))) as lines:
            first = asyncio.ensure_future(anext(lines))
            await asyncio.sleep(0.02)
            await put(cluster, task)
            assert (await asyncio.wait_for(first, 5)).data == b"one\n"


@pytest.mark.parametrize("cluster", [LogLimits(return_s=0.05)], indirect=True)
async def test_nodes_that_do_not_answer_are_named(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    service, task = service_task(pair.identity.node_id)
    unscheduled = a_task("t-nowhere", service=service, state=TaskState.PENDING)
    await put(cluster, service, task, unscheduled)
    with pytest.raises(IncompleteLogs) as caught:
        async for _ in cluster.logs.subscribe(LogQuery(services=(service.id,))):
            pass
    assert f"node {pair.identity.node_id} is not available" in str(caught.value)
    assert f"task {service.spec.name}.1 has not been scheduled" in str(caught.value)


@pytest.mark.parametrize("state", [NodeState.READY, NodeState.UNKNOWN])
async def test_a_node_that_returns_in_a_moment_sends_its_lines(cluster, tmp_path, state):
    """Each node is on its way to a manager after a change of leader or a recovery."""
    pair = await a_worker(cluster, tmp_path)
    service, task = service_task(pair.identity.node_id)
    node = cluster.store.view().get(Node, pair.identity.node_id)
    await put(cluster, service, task, replace(node, status=NodeStatus(state=state)))
    found: list[bytes] = []
    reading = asyncio.create_task(read_into(found, cluster, LogQuery(services=(service.id,))))
    await until(lambda: any(one.pending for one in cluster.logs.subscriptions.values()))
    async with an_agent(cluster, pair, tmp_path) as (_, worker):
        worker.lines = [a_line(task, b"one\n")]
        await asyncio.wait_for(reading, 10)
    assert found == [b"one\n"]


@pytest.mark.parametrize("cluster", [LogLimits(return_s=600.0, response_s=600.0)], indirect=True)
async def test_a_node_that_is_down_is_named_at_once(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    service, task = service_task(pair.identity.node_id)
    node = cluster.store.view().get(Node, pair.identity.node_id)
    await put(cluster, service, task, replace(node, status=NodeStatus(state=NodeState.DOWN)))
    with pytest.raises(IncompleteLogs, match="is not available"):
        await asyncio.wait_for(read_into([], cluster, LogQuery(services=(service.id,))), 30)


async def read_into(found: list[bytes], cluster: Cluster, query: LogQuery) -> None:
    async for line in cluster.logs.subscribe(query):
        found.append(line.data)  # noqa: PERF401 - the lines before an error count


@pytest.mark.parametrize("cluster", [LogLimits(return_s=0.05)], indirect=True)
async def test_lines_of_nodes_that_answer_come_before_the_error_that_names_the_others(cluster, tmp_path):
    pair, away = await a_worker(cluster, tmp_path / "w1"), await a_worker(cluster, tmp_path / "w2")
    gone = away.identity.node_id
    async with an_agent(cluster, pair, tmp_path / "w1") as (agent, worker):
        service, task = service_task(agent.node_id)
        end = TaskEnd(cause="exit", lines=(KeptLine(timestamp=timestamp(1), text="kept"),))
        lost = replace(
            task,
            id=TaskId("t-away"),
            slot=2,
            node_id=gone,
            status=TaskStatus(state=TaskState.FAILED, end=end),
        )
        node = cluster.store.view().get(Node, gone)
        named = replace(node, description=replace(node.description, hostname="w2"))
        await put(cluster, service, task, lost, named)
        worker.lines = [a_line(task, f"{number}\n".encode()) for number in range(500)]
        await until(lambda: agent.node_id in cluster.logs.listeners)
        found: list[bytes] = []
        with pytest.raises(IncompleteLogs) as caught:
            await read_into(found, cluster, LogQuery(services=(service.id,)))
    assert found[:500] == [f"{number}\n".encode() for number in range(500)]
    assert found[-1] == b"kept\n"
    assert str(caught.value).endswith("for the following reasons: node w2 is not available")


@pytest.mark.parametrize("cluster", [LogLimits(response_s=0.05)], indirect=True)
async def test_a_node_that_listens_and_sends_nothing_is_named(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    node = cluster.store.view().get(Node, pair.identity.node_id)
    service, task = service_task(node.id)
    await put(cluster, service, task)
    async with a_session(cluster, pair) as (channel, _), channel.stream(methods.LISTEN_SUBSCRIPTIONS) as call:
        await call.send(pb.ListenSubscriptionsRequest(), end=True)
        await until(lambda: node.id in cluster.logs.listeners)
        node = cluster.store.view().get(Node, node.id)
        await put(cluster, replace(node, description=replace(node.description, hostname="w1")))
        with pytest.raises(IncompleteLogs, match="node w1 did not respond in time"):
            async for _ in cluster.logs.subscribe(LogQuery(services=(service.id,))):
                pass


@pytest.mark.parametrize("cluster", [LogLimits(return_s=0.05)], indirect=True)
@pytest.mark.parametrize(
    ("follow", "since_ns", "tail", "shown"),
    [(False, 2, 2, (3, 4)), (True, 2, 2, (3, 4)), (False, 4, None, (4,))],
)
async def test_what_is_kept_with_the_tasks_of_a_gone_node_is_shown_and_marked(
    cluster, tmp_path, follow, since_ns, tail, shown
):
    pair = await a_worker(cluster, tmp_path)
    service, task = service_task(pair.identity.node_id)
    lines = tuple(KeptLine(timestamp=timestamp(n), stream="stderr", text=f"line {n}") for n in range(1, 5))
    end = TaskEnd(cause="exit", lines=(KeptLine(timestamp=timestamp(1), text="out"), *lines))
    await put(cluster, service, replace(task, status=TaskStatus(state=TaskState.FAILED, end=end)))
    query = LogQuery(
        services=(service.id,), streams=(LogStream.STDERR,), since_ns=since_ns, tail=tail, follow=follow
    )
    found = []
    with suppress(IncompleteLogs):
        async with aclosing(cluster.logs.subscribe(query)) as reading:
            async for line in reading:
                found.append(line)
                if follow and len(found) == 3:
                    break
    assert [line.data for line in found[1:]] == [f"line {n}\n".encode() for n in shown]
    assert found[0].data.startswith(f"skep: node {pair.identity.node_id} does not answer".encode())
    assert all("skep-kept" in line.attrs for line in found)


@pytest.mark.parametrize("has_lines", [True, False])
async def test_a_removed_node_is_named_without_an_error(cluster, tmp_path, has_lines):
    """With the name that it had: the task has its id only."""
    pair = await a_worker(cluster, tmp_path)
    node = cluster.store.view().get(Node, pair.identity.node_id)
    service, task = service_task(node.id)
    lines = (KeptLine(timestamp=timestamp(1), stream="stderr", text="bye"),) if has_lines else ()
    status = TaskStatus(state=TaskState.FAILED, end=TaskEnd(cause="exit", lines=lines))
    named = replace(node, description=replace(node.description, hostname="w7"))
    await put(cluster, named, service, replace(task, status=status))
    await cluster.store.update(remove_node, node.id, force=True, now_ns=1)
    query = LogQuery(services=(service.id,))
    found = [line.data.decode() async for line in cluster.logs.subscribe(query)]
    if has_lines:
        assert found == ["skep: node w7 was removed; the last lines kept with the task:\n", "bye\n"]
    else:
        assert found == ["skep: node w7 was removed\n"]


async def test_the_lines_of_a_node_that_answers_are_not_shown_twice(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        end = TaskEnd(cause="exit", lines=(KeptLine(text="kept"),))
        await put(cluster, service, replace(task, status=TaskStatus(state=TaskState.FAILED, end=end)))
        worker.lines = [a_line(task, b"kept\n")]
        await until(lambda: agent.node_id in cluster.logs.listeners)
        lines = [line async for line in cluster.logs.subscribe(LogQuery(tasks=(task.id,)))]
        assert [line.attrs for line in lines] == [{}]


async def test_lines_of_other_nodes_tasks_are_dropped(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        foreign_service, foreign = service_task(MANAGER_ID)
        await put(cluster, service, task, foreign_service, foreign)
        worker.lines = [a_line(foreign, b"forged\n"), a_line(task, b"own\n")]
        await until(lambda: agent.node_id in cluster.logs.listeners)
        lines = [line async for line in cluster.logs.subscribe(LogQuery(tasks=(task.id,)))]
        assert [line.data for line in lines] == [b"own\n"]


async def test_a_slow_reader_holds_up_only_itself(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with an_agent(cluster, pair, tmp_path) as (agent, worker):
        service, task = service_task(agent.node_id)
        await put(cluster, service, task)
        worker.lines = [a_line(task, b"x" * 1000)] * 20_000
        await until(lambda: agent.node_id in cluster.logs.listeners)
        async with aclosing(cluster.logs.subscribe(LogQuery(tasks=(task.id,), follow=True))) as lines:
            await anext(lines)
            worker.report(task.id, TaskState.RUNNING)
            await cluster.until(lambda view: view.get(Task, task.id).status.state is TaskState.RUNNING)
            session = cluster.node(agent.node_id).session
            await asyncio.sleep(1)  # several graces of heartbeats
            assert cluster.node(agent.node_id).session == session
            assert cluster.node(agent.node_id).status.state is NodeState.READY
        await until(lambda: worker.closed_logs == 1)


@pytest.mark.parametrize("cluster", [LogLimits(hold_s=60.0)], indirect=True)
async def test_the_lines_of_several_nodes_come_in_the_order_of_their_times(cluster, tmp_path):
    async with AsyncExitStack() as stack:
        service, workers = a_service(), []
        await put(cluster, service)
        for number in range(3):
            pair = await a_worker(cluster, tmp_path / str(number))
            agent, worker = await stack.enter_async_context(an_agent(cluster, pair, tmp_path / str(number)))
            task = a_task(f"t{number}", node=agent.node_id, service=service, slot=number + 1)
            await put(cluster, task)
            worker.lines = [
                LogLine(task_id=task.id, timestamp_ns=stamp, data=b"%d\n" % stamp)
                for stamp in range(number, 300, 3)
            ]
            workers.append((task, worker))
            await until(lambda agent=agent: agent.node_id in cluster.logs.listeners)
        lines = [line.data async for line in cluster.logs.subscribe(LogQuery(services=(service.id,)))]
        assert lines == [b"%d\n" % stamp for stamp in range(300)]

        for _, worker in workers:
            worker.ends_its_past = True
        follow = cluster.logs.subscribe(LogQuery(services=(service.id,), follow=True))
        async with aclosing(follow), asyncio.timeout(20):
            assert [(await anext(follow)).data for _ in range(300)] == lines
            task, worker = workers[1]
            for stamp in (1000, 1001):  # what one of them writes now waits for no other
                worker.lines.append(LogLine(task_id=task.id, timestamp_ns=stamp, data=b"now\n"))
                worker.more_lines.set()
                assert (await anext(follow)).timestamp_ns == stamp


@pytest.mark.parametrize("cluster", [LogLimits(hold_s=0.05)], indirect=True)
async def test_lines_wait_for_a_node_that_sends_none_for_a_moment_only(cluster, tmp_path):
    pair, other = [await a_worker(cluster, tmp_path / name) for name in ("one", "other")]
    async with (
        an_agent(cluster, pair, tmp_path / "one") as (agent, worker),
        a_session(cluster, other) as (channel, _),
        channel.stream(methods.LISTEN_SUBSCRIPTIONS) as silent,
    ):
        await silent.send(pb.ListenSubscriptionsRequest(), end=True)
        service, task = service_task(agent.node_id)
        other_task = a_task("t-silent", node=other.identity.node_id, service=service, slot=2)
        await put(cluster, service, task, other_task)
        worker.lines = [a_line(task, b"one\n"), a_line(task, b"two\n")]
        await until(lambda: {agent.node_id, other.identity.node_id} <= cluster.logs.listeners.keys())
        async with aclosing(cluster.logs.subscribe(LogQuery(services=(service.id,)))) as lines:
            async with asyncio.timeout(LIMITS.response_s):
                assert [(await anext(lines)).data for _ in range(2)] == [b"one\n", b"two\n"]


@pytest.mark.parametrize("cluster", [LogLimits(silent_s=0.05)], indirect=True)
async def test_a_follower_is_told_of_a_node_that_does_not_answer_any_more(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    service, task = service_task(pair.identity.node_id)
    await put(cluster, service, task)
    query = LogQuery(services=(service.id,), follow=True)
    async with aclosing(cluster.logs.subscribe(query)) as lines, asyncio.timeout(20):
        words = f"skep: node {pair.identity.node_id} does not answer\n".encode()
        assert (await anext(lines)).data == words, "it was away from the beginning"
        async with an_agent(cluster, pair, tmp_path) as (agent, worker):
            worker.lines = [a_line(task, b"one\n")]
            worker.more_lines.set()
            assert (await anext(lines)).data == b"one\n"
            node = cluster.node(agent.node_id)
            assert node.status.state is NodeState.READY
            # A machine that stands still keeps its connections.
            await put(cluster, replace(node, status=NodeStatus(state=NodeState.DOWN)))
            missed = await anext(lines)
            assert (missed.data, missed.task_id) == (b"skep: node worker does not answer\n", task.id)
            worker.lines.append(replace(a_line(task, b"two\n"), timestamp_ns=6))
            worker.more_lines.set()
            assert (await anext(lines)).data == b"two\n"
            await until(lambda: cluster.node(agent.node_id).status.state is NodeState.READY)
        assert (await anext(lines)).data == b"skep: node worker does not answer\n"


async def test_a_thousand_followers_get_every_line_and_leave_nothing(tmp_path):
    async with AsyncExitStack() as stack:
        # A second of one busy processor is no lost session.
        cluster = await stack.enter_async_context(Cluster(heartbeat_s=10).serving())
        pair = await a_worker(cluster, tmp_path)
        agent, worker = await stack.enter_async_context(an_agent(cluster, pair, tmp_path))
        service, task = service_task(agent.node_id)
        await put(cluster, service, task)
        worker.lines = [a_line(task, b"one\n")]
        await until(lambda: agent.node_id in cluster.logs.listeners)

        async def follow():
            async with aclosing(cluster.logs.subscribe(LogQuery(tasks=(task.id,), follow=True))) as lines:
                return [(await anext(lines)).data for _ in range(2)]

        async with asyncio.TaskGroup() as group:
            followers = [group.create_task(follow()) for _ in range(SUBSCRIPTIONS_MAX)]
            await until(lambda: len(worker.queries) == SUBSCRIPTIONS_MAX, 60)
            with pytest.raises(Unavailable, match="too many log streams are open"):
                await anext(cluster.logs.subscribe(LogQuery(tasks=(task.id,))))
            worker.lines.append(a_line(task, b"two\n"))
            worker.more_lines.set()
        assert {tuple(one.result()) for one in followers} == {(b"one\n", b"two\n")}
        await until(lambda: worker.closed_logs == SUBSCRIPTIONS_MAX, 60)
        assert not cluster.logs.subscriptions


async def test_a_node_that_comes_back_goes_on_where_each_of_its_tasks_broke_off(cluster, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    service, task = service_task(pair.identity.node_id)
    _, other = service_task(pair.identity.node_id)
    other = msgspec.structs.replace(other, service_id=service.id)
    await put(cluster, service, task, other)

    def at(task: Task, stamp_ns: int) -> LogLine:
        return LogLine(task_id=task.id, timestamp_ns=stamp_ns, data=b"%d\n" % stamp_ns)

    async with aclosing(cluster.logs.subscribe(LogQuery(services=(service.id,), follow=True))) as lines:
        async with an_agent(cluster, pair, tmp_path) as (_, worker):
            assert (await anext(lines)).data.endswith(b" does not answer\n")
            worker.lines = [at(task, 10), at(other, 50)]
            worker.more_lines.set()
            assert [(await anext(lines)).data for _ in range(2)] == [b"10\n", b"50\n"]
        worker.lines = [at(task, 10), at(task, 20), at(other, 50), at(other, 60)]
        async with an_agent(cluster, pair, tmp_path, worker):
            got = [(await asyncio.wait_for(anext(lines), 10)).data for _ in range(2)]
            assert got == [b"20\n", b"60\n"]
            assert worker.queries[-1].since_ns == 10

"""Two managers over real mTLS: who is silent, sessions that are adopted, logs of nodes that the other one has."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from random import Random

import msgspec
import pytest

from skep.agent.session.managers import KnownManager
from skep.aio.clock import SystemClock
from skep.errors import PermissionDenied, Unavailable
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions.adoption import SessionAdoption
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.manager.link.loop import ManagerLink
from skep.manager.logbroker.broker import IncompleteLogs, LogBroker
from skep.manager.node_facing import LinkRelays
from skep.manager.peer_reports import REGISTERING_MAX, PeerReport, PeerReports
from skep.manager.storage.incarnation import Incarnation
from skep.model.logs import LogLine, LogQuery
from skep.model.node import ManagerStatus, Node, NodeDescription, NodeRole, NodeSpec
from skep.model.values.ids import NodeId, ServiceId, new_id
from skep.security.tls import MANAGER_NAME, ServerTls, client_context
from skep.store.memory import MemoryStore
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import open_channel
from skep.wire.server import serve
from tests.support.managers.wire_rig import (
    Cluster,
    FakeWorker,
    a_worker,
    an_agent_of,
    put,
    service_task,
    until,
)


class Manager:
    """A second or third manager of a cluster, with a replica of its own."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.id = NodeId(f"manager0000000000000000x{number}")
        self.name = f"m{number}"
        self.cluster = cluster
        self.store = MemoryStore(SystemClock(), cluster.store.cluster)
        self.pair = cluster.pair(self.id, NodeRole.MANAGER)
        self.address = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Manager"]:
        clock = SystemClock()
        tls = client_context(self.pair)
        self.reports = PeerReports()
        self.incarnation = Incarnation(1)
        self.link = ManagerLink(
            self.store,
            self.id,
            lambda addr, **bounds: open_channel(addr, tls, MANAGER_NAME, **bounds),
            clock,
            Random(1),
            incarnation=self.incarnation,
            reports=self.reports,
        )
        self.logs = LogBroker(self.store, new_id, clock, self.id, LinkRelays(self.link))
        own = ManagerPeer(node_id=self.id, addr="127.0.0.1:1")
        self.dispatcher = Dispatcher(self.store, own, clock, new_id, Random(1))
        async with AsyncExitStack() as stack:
            bound = await stack.enter_async_context(
                serve(
                    (*self.dispatcher.services(), *self.logs.services(), *self.link.services()),
                    host="127.0.0.1",
                    port=0,
                    tls=ServerTls(self.pair).front,
                    cluster_id=self.cluster.id,
                )
            )
            self.bound = bound
            self.address = f"127.0.0.1:{bound.port}"
            await put(
                self.cluster,
                Node(
                    id=self.id,
                    spec=NodeSpec(role=NodeRole.MANAGER),
                    description=NodeDescription(hostname=self.name),
                    manager_status=ManagerStatus(addr=self.address),
                ),
            )
            running = [asyncio.create_task(loop.run()) for loop in (self.link, self.logs, self.dispatcher)]
            try:
                yield self
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    def is_linked(self, other: "Manager") -> bool:
        try:
            self.link.channel(other.id)
        except Unavailable:
            return False
        return True

    def silent(self) -> set[NodeId]:
        return set(self.link.silent(SystemClock().monotonic()))


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster(heartbeat_s=1.0).serving() as serving:
        yield serving


def line(task_id: str, text: bytes) -> LogLine:
    return LogLine(task_id=task_id, timestamp_ns=5, data=text)  # type: ignore[arg-type]


async def test_a_manager_that_goes_is_silent_and_one_that_comes_is_not(cluster: Cluster) -> None:
    async with Manager(cluster, 1).serving() as one:
        async with Manager(cluster, 2).serving() as two:
            await until(lambda: one.is_linked(two) and two.is_linked(one))
            assert two.id not in one.silent()
        await until(lambda: two.id in one.silent())
        assert one.link.silent(SystemClock().monotonic())[two.id] >= 2.0
        async with Manager(cluster, 2).serving() as again:
            await until(lambda: one.is_linked(again) and again.id not in one.silent())


async def test_managers_report_which_nodes_register_with_them(cluster: Cluster) -> None:
    async with Manager(cluster, 1).serving() as one, Manager(cluster, 2).serving() as two:
        nodes = tuple(NodeId(f"n{number}") for number in range(REGISTERING_MAX + 1))
        one.reports.own = PeerReport(registering=nodes)
        known = frozenset(nodes[:REGISTERING_MAX])
        await until(lambda: two.reports.registering_elsewhere(SystemClock().monotonic()) == known)
        one.reports.own = PeerReport()
        await until(lambda: not two.reports.registering_elsewhere(SystemClock().monotonic()))


async def test_a_manager_that_died_a_moment_ago_is_reachable_still_and_does_not_answer(
    cluster: Cluster,
) -> None:
    async with Manager(cluster, 1).serving() as one, Manager(cluster, 3).serving() as three:
        async with Manager(cluster, 2).serving() as two:
            await until(lambda: one.is_linked(two) and one.is_linked(three))
            assert await one.link.ask() >= {two.id, three.id}
        assert two.id in one.link.reachable(SystemClock().monotonic())
        answered = await one.link.ask()
        assert three.id in answered
        assert two.id not in answered


async def test_a_worker_has_no_part_in_the_link(cluster: Cluster, tmp_path: Path) -> None:
    pair = await a_worker(cluster, tmp_path)
    async with (
        Manager(cluster, 1).serving() as one,
        open_channel(one.address, client_context(pair), MANAGER_NAME) as channel,
    ):
        async with channel.stream(methods.PINGS) as pings:
            await pings.send(skep.Ping(node_id=pair.identity.node_id))
            with pytest.raises(PermissionDenied):
                await pings.receive()
        async with channel.stream(methods.RELAY_LOGS) as relay:
            await relay.send(skep.LogRelay(), end=True)
            with pytest.raises(PermissionDenied):
                await relay.receive()


async def test_a_caller_that_is_no_manager_gets_the_incarnation_and_is_not_believed(
    cluster: Cluster,
) -> None:
    """A later incarnation ends a manager permanently, and anyone with the root's key could send one."""
    observe_incarnation: list[NodeId] = []
    minted = cluster.pair(new_id(), NodeRole.MANAGER)
    async with Manager(cluster, 1).serving() as one:
        one.incarnation.observe = lambda manager, _: bool(observe_incarnation.append(manager))
        async with (
            open_channel(one.address, client_context(minted), MANAGER_NAME) as channel,
            channel.stream(methods.PINGS) as pings,
        ):
            await pings.send(skep.Ping(incarnation=1 << 40, node_id=one.id))
            response = await pings.receive()
            assert response is not None
            assert response.node_id == one.id
        assert observe_incarnation == []
        two = Manager(cluster, 2)
        async with two.serving():
            await until(lambda: two.id in observe_incarnation)


async def test_the_session_of_a_manager_that_went_is_adopted_under_another_id(
    cluster: Cluster, tmp_path: Path
) -> None:
    pair = await a_worker(cluster, tmp_path)
    node_id = pair.identity.node_id
    async with Manager(cluster, 1).serving() as one:
        adoption = SessionAdoption(one.store, one.id, one.link.silent, SystemClock(), new_id, Random(1))
        adopting = asyncio.create_task(adoption.run())
        try:
            async with Manager(cluster, 2).serving() as two:
                async with an_agent_of(
                    [KnownManager(two.id, two.address)], pair, tmp_path, FakeWorker(), Random(1)
                ):
                    session = cluster.node(node_id).session
                    assert session is not None
                    assert session.manager_id == two.id
                await until(lambda: one.is_linked(two))
            await cluster.until(lambda view: owner_of(view.get(Node, node_id)) == one.id)
            adopted = cluster.node(node_id).session
            assert adopted is not None
            assert adopted.session_id != session.session_id
        finally:
            adopting.cancel()


def owner_of(node: Node) -> NodeId | None:
    return node.session.manager_id if node.session is not None else None


@asynccontextmanager
async def a_node_of_two(
    cluster: Cluster, directory: Path
) -> AsyncIterator[tuple[Manager, Manager, NodeId, FakeWorker]]:
    """Two linked managers, and a node whose session the second one has."""
    pair = await a_worker(cluster, directory)
    worker = FakeWorker()
    async with Manager(cluster, 1).serving() as one, Manager(cluster, 2).serving() as two:
        await until(lambda: one.is_linked(two))
        async with an_agent_of(
            [KnownManager(two.id, two.address)], pair, directory, worker, Random(1)
        ) as agent:
            await until(lambda: agent.node_id in two.logs.listeners)
            yield one, two, agent.node_id, worker


async def test_any_manager_gives_the_logs_of_every_node(cluster: Cluster, tmp_path: Path) -> None:
    async with a_node_of_two(cluster, tmp_path) as (one, two, node_id, worker):
        service, task = service_task(node_id)
        await put(cluster, service, task)
        worker.lines = [line(task.id, b"line %d\n" % number) for number in range(3000)]
        for manager in (one, two):
            lines = [entry async for entry in manager.logs.subscribe(LogQuery(services=(service.id,)))]
            assert [entry.data for entry in lines] == [entry.data for entry in worker.lines]
            assert {entry.node_id for entry in lines} == {node_id}
        assert not one.logs.relaying
        assert not two.logs.subscriptions


async def test_a_follower_at_another_manager_gets_later_logs(cluster: Cluster, tmp_path: Path) -> None:
    async with a_node_of_two(cluster, tmp_path) as (one, two, node_id, worker):
        service, task = service_task(node_id)
        await put(cluster, service, task)
        worker.lines = [line(task.id, b"one\n")]
        query = LogQuery(services=(service.id,), follow=True)
        async with aclosing(one.logs.subscribe(query)) as lines:  # type: ignore[type-var]
            assert (await anext(lines)).data == b"one\n"
            worker.lines.append(line(task.id, b"later\n"))
            worker.more_lines.set()
            assert (await anext(lines)).data == b"later\n"
        await until(lambda: worker.closed_logs == 1)
        await until(lambda: not two.logs.subscriptions)


async def test_what_did_not_answer_is_named(cluster: Cluster, tmp_path: Path) -> None:
    pair = await a_worker(cluster, tmp_path)
    node_id = pair.identity.node_id
    async with Manager(cluster, 1).serving() as one:
        async with Manager(cluster, 2).serving() as two:
            await until(lambda: one.is_linked(two))
            async with an_agent_of(
                [KnownManager(two.id, two.address)], pair, tmp_path, FakeWorker(), Random(1)
            ):
                service, task = service_task(node_id)
                await put(cluster, service, task)
            await until(lambda: node_id not in two.logs.listeners)
            assert "node worker is not available" in await missing(one, service.id)
        await until(lambda: not one.is_linked(two))
        assert f"manager {two.name} cannot be reached" in await missing(one, service.id)


async def missing(manager: Manager, service_id: str) -> str:
    query = LogQuery(services=(service_id,))  # type: ignore[arg-type]
    with pytest.raises(IncompleteLogs) as caught:
        async for _ in manager.logs.subscribe(query):
            pass
    return str(caught.value)


class EndsLater(FakeWorker):
    """A log source that ends when it is allowed to."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = asyncio.Event()

    async def read_lines(self, query: LogQuery) -> AsyncIterator[list[LogLine]]:
        async for entries in super().read_lines(query):
            yield entries
        await self.may_end.wait()


async def test_lines_that_wait_for_another_node_are_relayed_before_the_end_of_theirs(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Lines are held until no other node can send earlier ones.  Their node may have ended by then."""
    first, second = [await a_worker(cluster, tmp_path / name) for name in ("first", "second")]
    (service, early), (_, late) = (service_task(one.identity.node_id) for one in (first, second))
    late = msgspec.structs.replace(late, service_id=service.id)
    await put(cluster, service, early, late)
    ended, open_ = FakeWorker(), EndsLater()
    ended.lines = [LogLine(task_id=early.id, timestamp_ns=stamp, data=b"%d\n" % stamp) for stamp in (1, 100)]
    open_.lines = [LogLine(task_id=late.id, timestamp_ns=50, data=b"50\n")]
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(Manager(cluster, number).serving()) for number in (1, 2)]
        await until(lambda: one.is_linked(two))
        peers = [KnownManager(two.id, two.address)]
        for pair, worker in ((first, ended), (second, open_)):
            directory = tmp_path / ("first" if pair is first else "second")
            agent = await stack.enter_async_context(an_agent_of(peers, pair, directory, worker, Random(1)))
            await until(lambda agent=agent: agent.node_id in two.logs.listeners)
        reading = asyncio.ensure_future(all_lines(one, service.id))
        only_second = {second.identity.node_id}
        await until(lambda: [sub.pending for sub in two.logs.subscriptions.values()] == [only_second])
        open_.may_end.set()
        assert await reading == [b"1\n", b"50\n", b"100\n"]


async def all_lines(manager: Manager, service_id: ServiceId) -> list[bytes]:
    return [entry.data async for entry in manager.logs.subscribe(LogQuery(services=(service_id,)))]


class TaskOutput(FakeWorker):
    """A node's log source that begins where the question says, as a real one does."""

    async def read_lines(self, query: LogQuery) -> AsyncIterator[list[LogLine]]:
        lines = super().read_lines(query)
        try:
            async for entries in lines:
                yield [entry for entry in entries if entry.timestamp_ns >= query.since_ns]
        finally:
            await lines.aclose()  # type: ignore[attr-defined]

    def say(self, task_id: str, stamp_ns: int) -> None:
        self.lines.append(LogLine(task_id=task_id, timestamp_ns=stamp_ns, data=b"%d\n" % stamp_ns))  # type: ignore[arg-type]
        self.more_lines.set()


async def test_a_follower_goes_on_with_a_node_that_comes_back_to_another_manager(
    cluster: Cluster, tmp_path: Path
) -> None:
    """And with a task that moves there later; what the node repeats is shown once."""
    pair = await a_worker(cluster, tmp_path)
    node_id, output = pair.identity.node_id, TaskOutput()
    service, task = service_task(node_id)
    await put(cluster, service, task)
    output.say(task.id, 10)
    async with AsyncExitStack() as stack:
        one, two, three = [await stack.enter_async_context(Manager(cluster, n).serving()) for n in (1, 2, 3)]
        await until(lambda: all(one.is_linked(other) for other in (two, three)))
        query = LogQuery(services=(service.id,), follow=True)
        async with aclosing(one.logs.subscribe(query)) as lines:  # type: ignore[type-var]
            async with an_agent_of([KnownManager(two.id, two.address)], pair, tmp_path, output, Random(1)):
                assert (await asyncio.wait_for(anext(lines), 10)).data == b"10\n"
            for stamp_ns, manager in ((20, three), (30, two), (40, one), (50, two)):
                peers = [KnownManager(manager.id, manager.address)]
                async with an_agent_of(peers, pair, tmp_path, output, Random(1)):
                    output.say(task.id, stamp_ns)
                    assert (await asyncio.wait_for(anext(lines), 10)).data == b"%d\n" % stamp_ns
                    _, moved = service_task(node_id)
                    moved = msgspec.structs.replace(moved, service_id=service.id)
                    await put(cluster, moved)
                    output.say(moved.id, stamp_ns + 5)
                    assert (await asyncio.wait_for(anext(lines), 10)).data == b"%d\n" % (stamp_ns + 5)
        await until(lambda: not any(manager.logs.subscriptions for manager in (one, two, three)))


async def test_a_relay_that_breaks_while_the_node_stays_is_asked_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    async with a_node_of_two(cluster, tmp_path) as (one, two, node_id, worker):
        service, task = service_task(node_id)
        await put(cluster, service, task)
        worker.lines = [line(task.id, b"one\n")]
        query = LogQuery(services=(service.id,), follow=True)
        async with aclosing(one.logs.subscribe(query)) as lines:  # type: ignore[type-var]
            assert (await anext(lines)).data == b"one\n"
            two.bound.disconnect(lambda caller: caller.node_id == one.id)
            worker.lines.append(LogLine(task_id=task.id, timestamp_ns=6, data=b"later\n"))
            worker.more_lines.set()
            assert (await asyncio.wait_for(anext(lines), 10)).data == b"later\n"


async def test_many_relayed_followers_that_read_nothing_hold_up_neither_others_nor_the_link(
    cluster: Cluster, tmp_path: Path
) -> None:
    async with a_node_of_two(cluster, tmp_path) as (one, two, node_id, worker):
        service, task = service_task(node_id)
        await put(cluster, service, task)
        worker.lines = [line(task.id, b"x" * 20_000)] * 30
        query = LogQuery(services=(service.id,), follow=True)
        async with AsyncExitStack() as stack:
            for _ in range(105):
                lines = await stack.enter_async_context(aclosing(one.logs.subscribe(query)))  # type: ignore[type-var]
                assert len((await asyncio.wait_for(anext(lines), 60)).data) == 20_000
            link = one.link.channel(two.id)
            async with aclosing(one.logs.subscribe(query)) as lines:  # type: ignore[type-var]
                for _ in range(30):
                    assert len((await asyncio.wait_for(anext(lines), 60)).data) == 20_000
            assert one.link.channel(two.id) is link
            assert two.id not in one.silent()
        await until(lambda: not any(manager.logs.subscriptions for manager in (one, two)))

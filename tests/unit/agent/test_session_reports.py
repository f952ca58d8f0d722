"""What a node reports within a session: tried again a few times, whatever it is, before another manager is tried."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, cast

import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.agent.session.reports import Reports
from skep.agent.session.session import ManagerSession, NodeServices
from skep.errors import SkepError, Unavailable
from skep.model.node import EngineDescription, NodeDescription
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL
from skep.model.task import TaskState, TaskStatus
from skep.model.values.ids import TaskId, VolumeId
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb


class Call:
    """A stream on which nothing comes but first messages and replies to heartbeats."""

    def __init__(self, first: Sequence[Any] = (), reply: Any = None) -> None:
        self._messages = list(first)
        self._reply = reply

    async def send(self, message: Any, *, end: bool = False) -> None:
        pass

    async def receive(self) -> Any:
        if self._messages:
            return self._messages.pop()
        if self._reply is None:
            await asyncio.Event().wait()
        return self._reply

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self) -> Any:
        return await self.receive()


class EndedCall(Call):
    """A stream that the manager has ended without a message."""

    async def __anext__(self) -> Any:
        raise StopAsyncIteration


class Manager:
    """The channel to a manager that cannot write for some calls."""

    address = "m1:2377"

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.failing: dict[Any, int] = {}
        self.ending: Any = None
        """The method whose streams the manager ends at once."""
        self.calls: list[tuple[Any, Any, float]] = []

    @asynccontextmanager
    async def stream(self, method: Any) -> AsyncIterator[Call]:
        if method is methods.SESSION:
            yield Call([pb.SessionMessage(session_id="s1")])
        elif method is methods.HEARTBEATS:
            yield Call(reply=skep.HeartbeatPeriod(period=timedelta(seconds=5)))
        elif method is self.ending:
            yield EndedCall()
        else:
            yield Call()

    async def call(self, method: Any, request: Any, *, timeout_s: float = 0.0) -> Any:
        self.calls.append((method, request, self._clock.monotonic()))
        if self.failing.get(method, 0) > 0:
            self.failing[method] -= 1
            raise Unavailable("no quorum")

    def times(self, method: Any) -> list[float]:
        return [at for one, _, at in self.calls if one is method]


class Host:
    """The agent, as far as a session needs it."""

    def __init__(self) -> None:
        self.session_state = self
        self.is_stopping = False

    def session_message(self, message: object) -> None:
        pass

    def record_response(self, at: float) -> None:
        pass

    def response_timeout_s(self, period_s: float) -> float:
        return 5.0

    def connect(self, address: str, *, timeout_s: float) -> Any:
        raise AssertionError("there are no logs")

    async def is_stopping_within(self, seconds: float) -> bool:
        await asyncio.sleep(seconds)
        return False


class Volumes:
    """One volume that was given up."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def take_reports(self) -> Sequence[VolumeId]:
        await self.left.wait()
        return (VolumeId("v1"),)

    def reported(self, ids: Sequence[VolumeId]) -> None:
        self.left.clear()


class Sink:
    def statuses(self) -> Mapping[TaskId, TaskStatus]:
        return {}


class Node:
    """A session with its manager, on virtual time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.clock = VirtualClock(loop)
        self.manager = Manager(self.clock)
        self.labels: dict[str, str] = {}
        self.changed = asyncio.Event()
        self.reports = Reports()
        self.volumes = Volumes()
        services = NodeServices(
            sink=cast("Any", Sink()),
            reports=self.reports,
            logs=cast("Any", None),
            seen=cast("Any", None),
            volumes=self.volumes,
        )
        session = ManagerSession(
            cast("Any", self.manager),
            cast("Any", Host()),
            services,
            self.clock,
            lambda: NodeDescription(engine=EngineDescription(labels=dict(self.labels))),
            self.changed,
            lambda: 0.5,
        )
        self.running = loop.create_task(session.run())

    def describe(self, **labels: str) -> None:
        self.labels.update({name.replace("_", "-"): value for name, value in labels.items()})
        self.changed.set()


REPORTS: Mapping[Any, Callable[[Node], object]] = {
    methods.DESCRIBE: lambda node: node.describe(disk="full"),
    methods.UPDATE_TASK_STATUS: lambda node: node.reports.report(
        TaskId("t1"), TaskStatus(state=TaskState.RUNNING)
    ),
    methods.UPDATE_VOLUME_STATUS: lambda node: node.volumes.left.set(),
}


def run(body: Callable[[Node], Coroutine[Any, Any, None]], *, ending: Any = None) -> None:
    loop = VirtualLoop()

    async def whole() -> None:
        node = Node(loop)
        node.manager.ending = ending
        await node.clock.sleep(1)
        await body(node)
        node.running.cancel()
        await asyncio.wait([node.running])

    try:
        loop.run_until_complete(whole())
    finally:
        loop.close()


@pytest.mark.parametrize("method", REPORTS, ids=("description", "statuses", "volumes"))
def test_a_moment_without_quorum_ends_no_session_whatever_is_reported(method: Any) -> None:
    async def body(node: Node) -> None:
        node.manager.failing[method] = 3
        REPORTS[method](node)
        await node.clock.sleep(15)
        assert not node.running.done()
        assert len(node.manager.times(method)) == 4
        await node.clock.sleep(100)
        assert len(node.manager.times(method)) == 4, "it was delivered"
        node.manager.failing[method] = 3  # the next one has all its attempts again
        node.manager.calls.clear()
        node.describe(disk="empty")
        REPORTS[method](node)
        await node.clock.sleep(15)
        assert not node.running.done()

    run(body)


@pytest.mark.parametrize("method", REPORTS, ids=("description", "statuses", "volumes"))
def test_a_manager_that_writes_nothing_for_long_is_left(method: Any) -> None:
    async def body(node: Node) -> None:
        node.manager.failing[method] = 1000
        REPORTS[method](node)
        await node.clock.sleep(30)
        assert node.running.done()
        with pytest.raises(SkepError, match="no quorum"):
            await node.running
        assert len(node.manager.times(method)) == 4

    run(body)


def test_what_is_sent_again_is_the_present_description() -> None:
    async def body(node: Node) -> None:
        node.manager.failing[methods.DESCRIBE] = 1
        node.describe(disk="full")
        await node.clock.sleep(0.1)
        node.describe(disk="fuller")
        await node.clock.sleep(30)
        last = node.manager.calls[-1][1]
        assert last.description.engine.labels["disk"] == "fuller"
        assert len(node.manager.times(methods.DESCRIBE)) == 2

    run(body)


@pytest.mark.parametrize(("size", "most"), [(500, 62), (32 * 1024, 20)])
def test_slots_that_use_volumes_are_reported_at_a_bounded_rate(size: int, most: int) -> None:
    """Each task of a job with volumes changes the label; ten minutes of one a second."""

    async def body(node: Node) -> None:
        for second in range(600):
            node.describe(**{SLOT_VOLUMES_LABEL: f"{second:09}".ljust(size, "x")})
            await node.clock.sleep(1)
        times = node.manager.times(methods.DESCRIBE)
        assert most // 3 < len(times) <= most
        sent = sum(len(request.SerializeToString()) for _, request, _ in node.manager.calls)
        assert sent <= 700 * 1024 + size
        node.describe(disk="full")  # nothing else waits for that
        await node.clock.sleep(0.1)
        assert node.manager.calls[-1][1].description.engine.labels["disk"] == "full"

    run(body)


def test_a_slot_is_reported_in_the_end() -> None:
    async def body(node: Node) -> None:
        node.describe(**{SLOT_VOLUMES_LABEL: "x" * 20_000})
        await node.clock.sleep(20)
        node.describe(**{SLOT_VOLUMES_LABEL: "data=web.1@1"})
        await node.clock.sleep(60)
        last = node.manager.calls[-1][1]
        assert last.description.engine.labels[SLOT_VOLUMES_LABEL] == "data=web.1@1"

    run(body)


def test_a_node_says_that_it_reconnects_when_a_manager_ends_the_assignments() -> None:
    async def body(node: Node) -> None:
        await asyncio.wait([node.running])
        assert "m1:2377 ended the stream of assignments: the node reconnects by itself" in str(
            node.running.exception()
        )

    run(body, ending=methods.REVISED_ASSIGNMENTS)

"""Events of the containers, images and volumes of nodes at a manager, over real connections between the two."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from typing import Any, cast

import msgspec
import pytest
from msgspec.structs import replace

from skep.agent.session.managers import KnownManager
from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition, InvalidArgument, PermissionDenied, ResourceExhausted
from skep.manager.telemetry import node_events
from skep.manager.telemetry.events import ClusterEvents, EventMessage
from skep.manager.telemetry.node_events import LIMITS, AllEvents, EventLimits, StreamPosition, WantedEvents
from skep.model.node import Node, NodeState, NodeStatus
from skep.model.values.ids import NodeId
from skep.node import events as events_of_node
from skep.node.container_access import TaskContainers
from skep.node.events import NodeEvents
from skep.wire import skep_pb2 as skep
from tests.component.test_one_exchange import OneContainer
from tests.support.managers.fake_worker import FakeWorker
from tests.support.managers.wire_rig import MANAGER_ID, Cluster, a_worker, an_agent_of, until


class Stream:
    """One client's, from its beginning until ``stop``."""

    def __init__(self, cluster: Any, **wanted: Any) -> None:
        self.got: list[dict[str, Any]] = []
        self.reads_on = True
        self.all = cast("AllEvents", cluster.all_events)
        after = wanted.get("after")
        position = cluster.events.revision_after(after.cluster) if after is not None else None
        source = partial(cluster.events.subscribe_after, position, wanted.get("until_ns"), lambda _: True)
        self.running = asyncio.create_task(self.all.stream(WantedEvents(**wanted), source, self._send))

    async def _send(self, message: Mapping[str, Any] | EventMessage) -> None:
        self.got.append(msgspec.json.decode(msgspec.json.encode(message)))
        if not self.reads_on:
            await asyncio.Event().wait()

    @property
    def cursor(self) -> StreamPosition:
        return StreamPosition.of(self.got[-1]["Cursor"])

    def of(self, type: str) -> list[str]:
        return [one["Action"] for one in self.got if one["Type"] == type]

    def where(self, action: str) -> dict[str, Any]:
        return next(one for one in self.got if one["Action"] == action)

    async def reads(self, count: int, type: str = "container") -> None:
        await until(lambda: len(self.of(type)) >= count)

    async def stop(self) -> None:
        self.running.cancel()
        await asyncio.wait([self.running])


def all_events(serving: Any, **limits: float) -> AllEvents:
    return AllEvents(serving.tunnels, serving.store.view, SystemClock(), msgspec.convert(limits, EventLimits))


@pytest.fixture
async def cluster() -> AsyncIterator[Any]:
    async with Cluster().serving() as started:
        serving = cast("Any", started)
        serving.events = ClusterEvents(serving.store, SystemClock())
        serving.all_events = all_events(serving)
        following = asyncio.create_task(serving.events.run())
        yield serving
        following.cancel()


@asynccontextmanager
async def a_node(cluster: Any, directory: Any, pair: Any, events: NodeEvents) -> AsyncIterator[NodeId]:
    """Its agent, as long as the block runs."""
    access = TaskContainers(cast("Any", OneContainer()), events, cast("Any", None))
    peers = [KnownManager(MANAGER_ID, cluster.address)]
    async with an_agent_of(peers, pair, directory, FakeWorker(), Random(1), containers=access) as agent:
        await until(lambda: agent.node_id in cluster.tunnels.streams)
        await cluster.until(lambda view: view.get(Node, agent.node_id).status.state is NodeState.READY)
        yield agent.node_id


@pytest.fixture
def events() -> NodeEvents:
    return NodeEvents(SystemClock(), life="one")


@pytest.fixture
async def node(cluster, events, tmp_path) -> AsyncIterator[NodeId]:
    pair = await a_worker(cluster, tmp_path)
    async with a_node(cluster, tmp_path, pair, events) as id:
        yield id


def publish(events: NodeEvents, *actions: str) -> None:
    for action in actions:
        events.publish("container", action, "c1", {"name": "web.1", "image": "busybox"})


async def test_events_of_a_node_have_its_name_and_only_what_happens_from_now_on(cluster, node, events):
    events.publish("container", "past", "c0", {}, 1)
    stream = Stream(cluster)
    await until(lambda: "connect" in stream.of("stream"))
    publish(events, "start", "die")
    events.publish("volume", "create", "data", {"driver": "local"})
    await stream.reads(1, "volume")
    assert stream.of("container") == ["start", "die"]
    started = stream.where("start")
    hostname = cluster.store.view().get(Node, node).description.hostname
    assert started["scope"] == "swarm"
    assert started["from"] == "busybox"
    assert started["Actor"]["Attributes"] == {
        "name": "web.1",
        "image": "busybox",
        "com.docker.swarm.node.id": node,
        "node.name": hostname,
    }
    await stream.stop()
    await until(lambda: not cluster.tunnels.open_count)


async def test_another_stream_goes_on_after_any_event_with_what_came_in_between(cluster, node, events):
    first = Stream(cluster)
    await until(lambda: "connect" in first.of("stream"))
    publish(events, "create", "start", "die")
    await first.reads(3)
    await first.stop()
    publish(events, "destroy")
    for at, expected in ((0, ["start", "die", "destroy"]), (2, ["destroy"])):
        cursor = [one for one in first.got if one["Type"] == "container"][at]["Cursor"]
        second = Stream(cluster, after=StreamPosition.of(cursor))
        await second.reads(len(expected))
        assert second.of("container") == expected
        assert "gap" not in second.of("stream")
        await second.stop()


async def test_what_is_not_kept_any_more_is_a_gap_in_the_stream(cluster, node, events):
    first = Stream(cluster)
    await until(lambda: "connect" in first.of("stream"))
    publish(events, "start")
    await first.reads(1)
    await first.stop()
    publish(events, *(f"exec_die {number}" for number in range(events_of_node.KEPT + 1)), "die")
    second = Stream(cluster, after=first.cursor)
    await until(lambda: "die" in second.of("container"))
    gap = second.where("gap")
    assert (gap["Type"], gap["Actor"]["ID"]) == ("stream", node)
    assert second.got.index(gap) < second.got.index(second.where("exec_die 2"))
    assert len(second.of("container")) == events_of_node.KEPT
    await second.stop()


async def test_a_node_that_is_away_is_named_and_gone_on_with_where_it_was(cluster, events, tmp_path):
    pair = await a_worker(cluster, tmp_path)
    async with a_node(cluster, tmp_path, pair, events):
        stream = Stream(cluster)
        await until(lambda: "connect" in stream.of("stream"))
        publish(events, "start")
        await stream.reads(1)
    await until(lambda: "disconnect" in stream.of("stream"))
    publish(events, "die")
    async with a_node(cluster, tmp_path, pair, events):
        await stream.reads(2)
        assert stream.of("container") == ["start", "die"]
        await stream.stop()
    # Its next process has not kept what the last one had.
    async with a_node(cluster, tmp_path, pair, NodeEvents(SystemClock(), life="two")):
        again = Stream(cluster, after=stream.cursor)
        await until(lambda: "gap" in again.of("stream"))
        await again.stop()


class LaterClock(SystemClock):
    """A clock that the test moves on."""

    later_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.later_s


async def test_a_node_that_cannot_be_read_at_first_has_everything_since_the_beginning(
    cluster, tmp_path, events
):
    follow, clock = events.follow, LaterClock()

    async def refuses(*_: object) -> AsyncIterator[Mapping[str, Any]]:
        yield msgspec.Raw(b"no event")  # type: ignore[misc]

    events.follow = refuses
    cluster.all_events = AllEvents(cluster.tunnels, cluster.store.view, clock)
    pair = await a_worker(cluster, tmp_path)
    async with a_node(cluster, tmp_path, pair, events):
        stream = Stream(cluster)
        await until(lambda: "disconnect" in stream.of("stream"))
        publish(events, "start")
        clock.later_s = 20.0
        events.follow = follow
        await until(lambda: "connect" in stream.of("stream"))
        publish(events, "die")
        await stream.reads(1)
        assert stream.of("container")[0] == "start"
        await stream.stop()


async def test_the_nodes_filter_and_the_end_are_those_of_the_request(cluster, node, events):
    publish(events, "start", "die")
    events.publish("image", "pull", "busybox:1", {"name": "busybox"})
    filters = msgspec.json.encode({"event": {"die": True}}).decode()
    stream = Stream(cluster, filters=filters, since="1", until_ns=SystemClock().now_ns())
    async with asyncio.timeout(10):
        await stream.running
    assert [one["Action"] for one in stream.got if one["Type"] != "stream"] == ["die"]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b'{"Type":"service","Action":"remove","Actor":{"ID":"s","Attributes":{}},"timeNano":1,"Cursor":"a.1"}',
        b'{"Type":"container","Action":"die","Actor":{"ID":"s","Attributes":{"a":1}},"timeNano":1,"Cursor":"a.1"}',
        b'{"Type":"container","Action":"die","Actor":{"ID":"s","Attributes":{}},"timeNano":1,"Cursor":"%b"}'
        % (b"9" * 50),
        *(
            b'{"Type":"container","Action":"die","Actor":{"ID":"s","Attributes":{}},"timeNano":%b}' % rest
            for rest in (
                b'1,"Cursor":"\xc3\xa4.1"',  # no client could go on after it
                b'-1,"Cursor":"a.1"',
                b'1%b,"Cursor":"a.1"' % (b"0" * 30),  # more than a docker command can read
                b'1,"Cursor":"a.1","x":%b' % (b"[" * 100_000 + b"]" * 100_000),
            )
        ),
        b"x" * (node_events.LINE_BYTES_MAX + 5),
    ],
)
async def test_what_a_node_sends_and_is_no_event_costs_its_own_part_only(cluster, tmp_path, events, line):
    async def lies(*_: object) -> AsyncIterator[Mapping[str, Any]]:
        yield msgspec.Raw(line)  # type: ignore[misc]
        await asyncio.sleep(60)

    events.follow = lies  # type: ignore[assignment,method-assign]
    pair = await a_worker(cluster, tmp_path)
    async with a_node(cluster, tmp_path, pair, events):
        stream = Stream(cluster)
        await until(lambda: "disconnect" in stream.of("stream"))
        assert not stream.of("container")
        assert not stream.of("service")
        assert not stream.running.done()
        await stream.stop()


async def test_only_what_dockers_clients_know_is_passed_on_of_an_event(cluster, tmp_path, events):
    async def odd(*_: object) -> AsyncIterator[Mapping[str, Any]]:
        more = {"Cursor": "a.1", "time": "late", "scope": 3 * "x", "Type2": [], "from": "busybox"}
        yield {**events_of_node.message_of("container", "die", "c1", {}, 5_000_000_000), **more}
        await asyncio.sleep(60)

    events.follow = odd  # type: ignore[assignment,method-assign]
    pair = await a_worker(cluster, tmp_path)
    async with a_node(cluster, tmp_path, pair, events):
        stream = Stream(cluster)
        await stream.reads(1)
        event = stream.where("die")
        assert event.keys() == {
            *("status", "id", "from", "Type", "Action", "Actor", "scope", "time", "timeNano", "Cursor")
        }
        assert (event["time"], event["scope"], event["status"]) == (5, "swarm", "die")
        await stream.stop()


async def test_an_event_too_long_for_a_manager_is_a_gap_and_the_node_goes_on(cluster, node, events):
    stream = Stream(cluster)
    await until(lambda: "connect" in stream.of("stream"))
    events.publish("container", "create", "c1", {"label": "x" * node_events.LINE_BYTES_MAX})
    publish(events, "start")
    await stream.reads(1)
    assert stream.of("container") == ["start"]
    assert stream.of("stream")[-1] == "gap"
    await stream.stop()


async def test_a_cursor_loses_the_nodes_that_were_removed(cluster, node, events):
    gone = {f"gone{number}": "a.1" for number in range(node_events.NODES_MAX)}
    stream = Stream(cluster, after=StreamPosition(cluster.events.cursor(), gone))
    publish(events, "start")
    await stream.reads(1)
    assert set(StreamPosition.of(stream.got[-1]["Cursor"]).nodes) == {node[:12]}
    await stream.stop()


async def test_nodes_beyond_the_bound_that_join_later_are_named(cluster, node):
    cluster.all_events = all_events(cluster, nodes=1)
    present = cluster.store.view().get(Node, node)
    stream = Stream(cluster, names=[present.description.hostname])
    await until(lambda: "connect" in stream.of("stream"))
    await cluster.store.update(lambda tx: tx.put(replace(present, id=NodeId("0"))))

    def told() -> list[str]:
        found = (one for one in stream.got if (one["Action"], one["Actor"]["ID"]) == ("disconnect", "0"))
        return [one["Actor"]["Attributes"]["reason"] for one in found]

    await until(told)
    assert told() == ["the stream already has events of 1 other nodes"]
    await stream.stop()


async def test_streams_and_nodes_have_bounds(cluster, node):
    every = cast("AllEvents", cluster.all_events)
    with pytest.raises(InvalidArgument, match="node nowhere not found"):
        every.check(WantedEvents(names=["nowhere"]))
    streams = [Stream(cluster) for _ in range(LIMITS.streams)]
    await until(lambda: all(stream.got for stream in streams))
    with pytest.raises(ResourceExhausted, match="clients already read node events"):
        every.check(WantedEvents())
    for stream in streams:
        await stream.stop()
    every.check(WantedEvents())
    with pytest.raises(FailedPrecondition, match="events of at most"):
        all_events(cluster, nodes=0).check(WantedEvents())


async def test_a_client_that_takes_nothing_loses_its_place(cluster, node, events):
    cluster.all_events = all_events(cluster, takes_within_s=0.05, streams=1)
    stream = Stream(cluster)
    await until(lambda: stream.got)
    stream.reads_on = False
    publish(events, "start")
    with pytest.raises(ConnectionResetError, match="took no event"):
        await stream.running
    cast("AllEvents", cluster.all_events).check(WantedEvents())


async def test_nodes_that_cannot_be_read_are_named(cluster, node):
    present = cluster.store.view().get(Node, node)
    engine = replace(present.description.engine, labels={}, engine_version="24.0.7", plugins=())
    other = replace(
        present,
        id=NodeId("other"),
        description=replace(present.description, hostname="d1", engine=engine),
        status=NodeStatus(state=NodeState.DOWN),
        session=None,
    )
    await cluster.store.update(lambda tx: tx.put(other))
    stream = Stream(cluster, names=["d1"])
    await until(lambda: "disconnect" in stream.of("stream"))
    assert stream.where("disconnect")["Actor"]["Attributes"]["name"] == "d1"
    await stream.stop()


async def test_a_tunnel_without_a_container_leads_to_the_events_only(events):
    access = TaskContainers(cast("Any", OneContainer()), events, cast("Any", None))
    for target in ("/containers/json", "/events/x", "/skep/events"):
        request = skep.TunnelRequest(head=f"GET {target} HTTP/1.0\r\n\r\n".encode())
        with pytest.raises(PermissionDenied):
            await access.connect(request)


@pytest.mark.parametrize(
    "text", ["1-2~", "1-2~n1", "1-2~n1.", "1-2~.a.1", "1-2~" + "n" * 13 + ".a.1", "1-2~n1." + "9" * 40]
)
def test_what_is_no_cursor_is_refused(text):
    with pytest.raises(InvalidArgument, match="invalid cursor"):
        StreamPosition.of(text)


def test_a_cursor_is_read_as_it_was_written():
    position = StreamPosition("1-2", {"n2": "b.4", "n1": "a.3"})
    assert str(position) == "1-2~n1.a.3~n2.b.4"
    assert StreamPosition.of(str(position)) == position
    assert StreamPosition.of("1-2") == StreamPosition("1-2", {})

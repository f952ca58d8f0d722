"""Events of the cluster, derived from commits."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.formats.filters import Filters
from skep.errors import InvalidArgument
from skep.manager.ca.expiry_warnings import Expiry
from skep.manager.routes.events import fits
from skep.manager.telemetry.events import (
    BEHIND_MAX,
    KEPT,
    ClusterEvents,
    EventMessage,
    EventsLost,
    messages_of,
)
from skep.model.node import (
    Availability,
    CutOff,
    FailingPath,
    Node,
    NodeDescription,
    NodeSpec,
    NodeState,
    NodeStatus,
)
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import Service, UpdateState, UpdateStatus
from skep.model.task import ContainerStatus, NetworkAttachment, Task, TaskState
from skep.model.task_end import TaskEnd
from skep.model.values.encoding import to_json
from skep.model.values.ids import ConfigId, NodeId, SecretId, VolumeId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS, Timestamp, moment
from skep.model.volume import PublishState, PublishStatus, Volume, VolumeAvailability, VolumeSpec
from skep.store.interface import Created, Deleted, Updated
from skep.store.memory import MemoryStore
from tests.support.builders import a_service, a_task, an_overlay

NOW_NS = 1_700_000_000 * SECOND_NS


def reported(event) -> list[tuple[str, str, dict[str, str]]]:
    return [
        (message.type, message.action, dict(message.actor.attributes))
        for message in messages_of(event, NOW_NS)
    ]


def changed(service: Service, **fields) -> Service:
    return replace(service, **fields)


def test_an_event_is_spelled_as_the_engine_spells_it():
    secret = Secret(
        id=SecretId("s"), created_at=Timestamp("2023-11-14T22:13:20.5Z"), spec=SecretSpec(name="n")
    )
    (message,) = messages_of(Created(secret), 0)
    assert to_json(message) == (
        b'{"Type":"secret","Action":"create","Actor":{"ID":"s","Attributes":{"name":"n"}},'
        b'"time":1700000000,"timeNano":1700000000500000000,"scope":"swarm"}'
    )


def test_task_events_are_those_of_draining_only():
    place = NetworkAttachment(network=an_overlay("net1"), addresses=("10.0.1.7/24",))
    runs = replace(a_task("t1", node="n1", service="web"), networks_attachments=(place,))
    stops = replace(runs, desired_state=TaskState.SHUTDOWN)
    assert reported(Updated(runs, stops)) == [
        (
            "task",
            "drain",
            {
                "com.docker.swarm.task.id": "t1",
                "com.docker.swarm.service.id": "web",
                "com.docker.swarm.node.id": "n1",
                "addresses": "10.0.1.7",
            },
        )
    ]
    ended = replace(stops, status=replace(stops.status, state=TaskState.SHUTDOWN))
    alone = replace(runs, networks_attachments=())
    for event in (
        Created(runs),
        Deleted(stops),
        Updated(stops, ended),
        Updated(stops, replace(stops, desired_state=TaskState.REMOVE)),
        Updated(alone, replace(alone, desired_state=TaskState.SHUTDOWN)),
    ):
        assert reported(event) == []


def test_an_update_of_a_service_names_what_changed():
    old = a_service("web", replicas=1, image="busybox:1")
    new = replace(a_service("web", replicas=3, image="busybox:2"), id=old.id)
    assert reported(Updated(old, new)) == [
        (
            "service",
            "update",
            {
                "name": "web",
                "image.old": "busybox:1",
                "image.new": "busybox:2",
                "replicas.old": "1",
                "replicas.new": "3",
            },
        )
    ]


@pytest.mark.parametrize(
    ("type", "made"),
    [
        ("secret", Secret(id=SecretId("s1"), spec=SecretSpec(name="key"))),
        ("config", Config(id=ConfigId("c1"), spec=ConfigSpec(name="key"))),
    ],
)
def test_a_secret_or_config_has_events_of_its_life_and_of_its_labels(type, made):
    labeled = replace(made, spec=replace(made.spec, labels={"team": "red"}))
    for event, action in (
        (Created(made), "create"),
        (Updated(made, labeled), "update"),
        (Deleted(labeled), "remove"),
    ):
        assert reported(event) == [(type, action, {"name": "key"})]


def test_a_cluster_volume_has_events_of_its_life_of_its_nodes_and_of_what_its_driver_said():
    made = Volume(id=VolumeId("v1"), spec=VolumeSpec(name="data"))
    asked = replace(made, is_creating=True)
    failed = replace(asked, message="no room")
    drained = replace(made, spec=replace(made.spec, availability=VolumeAvailability.DRAIN))
    pending = replace(made, publish_status=(PublishStatus(node_id=NodeId("n1")),))
    there = PublishStatus(node_id=NodeId("n1"), state=PublishState.PUBLISHED)
    published = replace(made, publish_status=(there,))
    for event, action, attributes in (
        (Created(made), "create", {}),
        (Updated(asked, failed), "update", {"message.old": "", "message.new": "no room"}),
        (Updated(made, drained), "update", {"availability.old": "active", "availability.new": "drain"}),
        (Updated(pending, published), "update", {"published.old": "", "published.new": "n1"}),
        (Deleted(made), "remove", {}),
    ):
        assert reported(event) == [("volume", action, {"name": "data", **attributes})]
    assert reported(Updated(made, asked)) == reported(Updated(made, pending)) == []
    (message,) = messages_of(Created(made), NOW_NS)
    assert not fits(message, Filters()), "Docker has none"
    assert fits(message, Filters({"type": ["volume"], "scope": ["swarm"]}))


@pytest.mark.parametrize(
    "made",
    [
        a_service("web"),
        a_task("t1"),
        Node(id=NodeId("n1")),
        Secret(id=SecretId("s1"), spec=SecretSpec(name="key")),
        Config(id=ConfigId("c1"), spec=ConfigSpec(name="key")),
        an_overlay("net1"),
        Volume(id=VolumeId("v1"), spec=VolumeSpec(name="data")),
    ],
    ids=lambda made: type(made).__name__,
)
async def test_objects_of_every_kind_have_events(events, made):
    store, events = events
    start = events.cursor()
    await store.update(lambda tx: tx.put(made))
    await idle()
    (message,) = await read_after(events, start, 1)
    assert (message.type, message.action) == (type(made).__name__.lower(), "create")


def test_service_events_have_the_update_state():
    old = a_service("web")
    new = replace(old, update_status=UpdateStatus(state=UpdateState.UPDATING))
    done = replace(old, update_status=UpdateStatus(state=UpdateState.COMPLETED))
    assert reported(Updated(old, new))[0][2]["updatestate.new"] == "updating"
    assert reported(Updated(new, done))[0][2]["updatestate.old"] == "updating"
    why = "update rolled back because 24 of 200 requests to new tasks failed (12 %), more than 5 %"
    taken_back = replace(old, update_status=UpdateStatus(state=UpdateState.ROLLBACK_STARTED, message=why))
    assert reported(Updated(new, taken_back))[0][2]["updatestate.reason"] == why
    assert "updatestate.reason" not in reported(Updated(new, done))[0][2]


def test_a_service_is_removed_once_when_the_user_removes_it():
    service = a_service("web")
    removed = replace(service, removed_at=Timestamp("2023-11-14T22:13:20Z"))
    assert reported(Updated(service, removed)) == [("service", "remove", {"name": "web"})]
    assert reported(Updated(removed, replace(removed, update_status=UpdateStatus()))) == []
    assert reported(Deleted(removed)) == []


def test_an_event_of_a_node_names_the_nodes_that_it_does_not_reach_and_what_follows():
    well = Node(id="n1", spec=NodeSpec(name="w1"))
    failing = FailingPath(peer=NodeId("n2"), hostname="w2", check="overlay", port="4789/udp")
    sick = replace(well, failing_paths=(failing,))
    words = "w2 4789/udp (overlay)"
    told_sick = {"name": "w1", "paths.failing.old": "", "paths.failing.new": words}
    assert reported(Updated(well, sick)) == [("node", "update", told_sick)]
    told_well = {"name": "w1", "paths.failing.old": words, "paths.failing.new": ""}
    assert reported(Updated(sick, well)) == [("node", "update", told_well)]
    cut_off = CutOff(check="overlay", port="4789/udp", peers=("w2",))
    ((_, _, attributes),) = reported(Updated(sick, replace(sick, cut_off=(cut_off,))))
    assert attributes["overlay.unavailable.new"] == "4789/udp fails between this node and w2"


def test_events_of_a_node_have_what_users_can_see_of_it():
    node = Node(id="n", status=NodeStatus(state=NodeState.READY))
    down = replace(node, status=NodeStatus(state=NodeState.DOWN))
    drained = replace(down, spec=NodeSpec(availability=Availability.DRAIN))
    assert reported(Updated(node, replace(node, attachments=()))) == []
    assert reported(Updated(node, down))[0][2] == {"name": "", "state.old": "ready", "state.new": "down"}
    assert reported(Updated(down, drained))[0][2]["availability.new"] == "drain"


@pytest.mark.parametrize(
    ("filters", "is_taken"),
    [
        ({}, True),
        ({"type": ["service"]}, True),
        ({"type": ["container"]}, False),
        ({"service": ["web"]}, True),
        ({"service": ["db"]}, False),
        ({"node": ["web"]}, True),  # the engine looks at the name, not at the type
        ({"container": ["db"]}, False),
        ({"image": ["web"]}, False),
        ({"event": ["create", "update"]}, True),
        ({"event": ["remove"]}, False),
        ({"scope": ["local"]}, False),
    ],
)
def test_filters_of_events(filters, is_taken):
    (message,) = messages_of(Created(a_service("web")), NOW_NS)
    assert fits(message, Filters(filters)) is is_taken


def everything(_: EventMessage) -> bool:
    return True


@pytest.fixture
async def events():
    store = MemoryStore(SystemClock())
    events = ClusterEvents(store, SystemClock())
    async with asyncio.TaskGroup() as group:
        following = group.create_task(events.run())
        await asyncio.sleep(0)
        yield store, events
        following.cancel()


async def idle() -> None:
    """Let everything run that is ready to."""
    for _ in range(50):
        await asyncio.sleep(0)


async def put(store, name: str) -> None:
    await store.update(lambda tx: tx.put(Secret(id=SecretId(name), spec=SecretSpec(name=name))))


async def first(stream, count: int) -> list[str]:
    names = []
    async for message in stream:
        names.append(message.actor.id)
        if len(names) == count:
            break
    return names


async def test_past_events_come_before_new_ones_without_a_gap(events):
    store, events = events
    await put(store, "a")
    await idle()
    async with aclosing(events.subscribe(0, None, everything)) as stream:
        reading = asyncio.ensure_future(first(stream, 3))
        await idle()
        await put(store, "b")
        await put(store, "c")
        assert await reading == ["a", "b", "c"]


async def test_without_since_only_new_events_come(events):
    store, events = events
    await put(store, "a")
    await idle()
    async with aclosing(events.subscribe(None, None, everything)) as stream:
        reading = asyncio.ensure_future(first(stream, 1))
        await idle()
        await put(store, "b")
        assert await reading == ["b"]


async def test_a_stream_ends_at_its_time(events):
    _, events = events
    async with aclosing(events.subscribe(0, 1, everything)) as stream:
        assert [message async for message in stream] == []


async def test_a_reader_that_is_behind_loses_its_stream(events):
    store, events = events
    async with aclosing(events.subscribe(0, None, everything)) as stream:
        await put(store, "first")
        assert (await anext(stream)).actor.id == "first"
        for number in range(BEHIND_MAX + 2):
            await put(store, f"s{number}")
        await idle()
        assert len([message async for message in stream]) <= BEHIND_MAX


class Named:
    """A view that has services, nodes and tasks."""

    def __init__(self, *objects: Service | Node, tasks: Sequence[Task] = ()) -> None:
        self._objects, self._tasks = objects, tasks

    def lookup(self, kind, id):
        return next((one for one in self._objects if isinstance(one, kind) and one.id == id), None)

    def find(self, kind, **by):
        return [task for task in self._tasks if task.node_id == by["node_id"]]


def told(event, *tasks: Task) -> list[EventMessage]:
    return list(messages_of(event, NOW_NS, Named(WEB, NODE, tasks=tasks)))


WEB = a_service("web")
NODE = Node(id=NodeId("n1"), description=NodeDescription(hostname="w1"))
RUNS = a_task("t1", node="n1", service=WEB)


def now(task: Task, state: TaskState, **more) -> Task:
    return replace(task, status=replace(task.status, state=state, **more))


def test_events_of_a_task_have_its_containers_names_and_the_reason_of_its_end():
    starts = now(RUNS, TaskState.STARTING)
    end = TaskEnd(cause="out-of-memory", signal="SIGKILL")
    failed = now(
        RUNS,
        TaskState.FAILED,
        err="task: non-zero exit (137): out of memory",
        container_status=ContainerStatus(container_id="c", exit_code=137),
        end=end,
    )
    life = [
        Created(now(RUNS, TaskState.NEW)),
        Updated(now(RUNS, TaskState.READY), starts),
        Updated(starts, RUNS),
        Updated(RUNS, replace(RUNS, status=replace(RUNS.status, message="again"))),
        Updated(RUNS, failed),
        Updated(starts, now(RUNS, TaskState.REJECTED, err="No such image")),
        Updated(RUNS, now(RUNS, TaskState.ORPHANED)),
        Deleted(failed),
    ]
    messages = [message for event in life for message in told(event)]
    assert [one.action for one in messages] == ["create", "start", "die", "reject", "lost", "remove"]
    assert {one.type for one in messages} == {"task"}
    died = messages[2].actor
    assert died.id == "t1"
    assert died.attributes == {
        "name": "web.1.t1",
        "com.docker.swarm.task.id": "t1",
        "com.docker.swarm.service.id": WEB.id,
        "com.docker.swarm.service.name": "web",
        "com.docker.swarm.node.id": "n1",
        "node.name": "w1",
        "slot": "1",
        "state": "failed",
        "error": "task: non-zero exit (137): out of memory",
        "exitCode": "137",
        "cause": "out-of-memory",
        "signal": "SIGKILL",
    }
    assert messages[3].actor.attributes["error"] == "No such image"
    of_job = replace(RUNS, job_iteration=Version(index=2))
    assert [one.actor.attributes["slot"] for one in told(Created(of_job))] == ["0"]


def test_tasks_that_run_on_a_node_that_goes_down_are_lost():
    up = Node(id=NodeId("n1"), status=NodeStatus(state=NodeState.READY))
    down = replace(up, status=NodeStatus(state=NodeState.DOWN))
    elsewhere = a_task("t2", node="n2", service=WEB)
    ended = now(a_task("t3", node="n1", service=WEB), TaskState.FAILED)
    lost = [one.actor.id for one in told(Updated(up, down), RUNS, elsewhere, ended) if one.type == "task"]
    assert lost == ["t1"]
    assert [one.type for one in told(Updated(down, down), RUNS)] == []


def test_docker_events_has_those_of_tasks_only_when_they_are_asked_for():
    (created,) = told(Created(RUNS))
    assert not fits(created, Filters())
    assert not fits(created, Filters({"type": ["service"]}))
    assert fits(created, Filters({"type": ["task"]}))
    assert fits(created, Filters({"type": ["task"], "service": ["web"]}))
    assert not fits(created, Filters({"type": ["task"], "service": ["db"]}))
    (drain,) = reported_drain()
    assert fits(drain, Filters())


def reported_drain() -> list[EventMessage]:
    place = NetworkAttachment(network=an_overlay("net1"), addresses=("10.0.1.7/24",))
    runs = replace(RUNS, networks_attachments=(place,))
    return list(messages_of(Updated(runs, replace(runs, desired_state=TaskState.SHUTDOWN)), NOW_NS))


async def read_after(events: ClusterEvents, cursor: str, count: int) -> list[EventMessage]:
    """The next ``count`` events after ``cursor``."""
    found: list[EventMessage] = []
    async with aclosing(events.subscribe_after(events.revision_after(cursor), None, everything)) as stream:
        async for message in stream:
            if message.type != "stream":
                found.append(message)
            if len(found) == count:
                break
    return found


async def test_a_stream_goes_on_at_another_manager_where_it_ended(events):
    store, events = events
    async with other_manager(store) as other:
        start = events.cursor()
        for name in "abcd":
            await put(store, name)
        await idle()
        first_two = await read_after(events, start, 2)
        assert [one.actor.id for one in first_two] == ["a", "b"]
        for manager in (events, other):
            rest = await read_after(manager, first_two[-1].cursor, 2)
            assert [one.actor.id for one in rest] == ["c", "d"]


async def test_of_one_change_all_events_come_again_rather_than_not(events):
    store, events = events
    start = events.cursor()
    await store.update(
        lambda tx: [tx.put(Secret(id=SecretId(name), spec=SecretSpec(name=name))) for name in "abc"]
    )
    await idle()
    first_one, _, last = await read_after(events, start, 3)
    assert [one.actor.id for one in await read_after(events, first_one.cursor, 3)] == ["a", "b", "c"]
    await put(store, "d")
    assert [one.actor.id for one in await read_after(events, last.cursor, 1)] == ["d"]


async def test_a_stream_begins_with_the_cursor_of_what_is_past(events):
    store, events = events
    await put(store, "a")
    await idle()
    async with aclosing(events.subscribe_after(None, None, everything)) as stream:
        begins = await anext(stream)
        assert (begins.type, begins.action, begins.cursor) == ("stream", "progress", events.cursor())
        await put(store, "b")
        assert (await anext(stream)).actor.id == "b"
    await idle()
    assert [one.actor.id for one in await read_after(events, begins.cursor, 1)] == ["b"]


async def test_a_certificate_that_expires_is_told_although_nothing_has_changed_since_the_beginning(events):
    store, events = events
    await put(store, "a")
    await idle()
    expiry = Expiry(kind="node", id="n1", name="n1", not_after=moment(10**18), warning="it expires")
    async with aclosing(events.subscribe_after(None, None, everything)) as stream:
        begins = await anext(stream)
        reading = asyncio.ensure_future(anext(stream))
        await idle()
        events.expires(expiry)
        message = await reading
        assert (message.action, message.actor.id, message.cursor) == ("expire", "n1", begins.cursor)


@asynccontextmanager
async def other_manager(store: MemoryStore) -> AsyncIterator[ClusterEvents]:
    """It follows the same commits."""
    events = ClusterEvents(store, SystemClock())
    async with asyncio.TaskGroup() as group:
        following = group.create_task(events.run())
        await asyncio.sleep(0)
        yield events
        following.cancel()


async def test_what_is_not_kept_is_refused_and_not_left_out(events):
    store, events = events
    start = events.cursor()
    await put(store, "a")
    await idle()
    async with other_manager(store) as younger:
        with pytest.raises(EventsLost, match="no longer has all events after cursor"):
            younger.revision_after(start)
        for number in range(KEPT + 1):
            await put(store, f"s{number}")
            if not number % 500:
                await idle()
        await idle()
        with pytest.raises(EventsLost, match="ask another manager, or list"):
            events.revision_after(start)
    with pytest.raises(EventsLost, match="an earlier incarnation of the cluster"):
        events.revision_after(f"{store.incarnation + 1}-5")
    for cursor in ("5", "1-", "-5", "1-x", "1-5-6", "\u0661-5", "1-" + "9" * 60):
        with pytest.raises(InvalidArgument, match="invalid cursor"):
            events.revision_after(cursor)


async def test_a_slow_reader_gets_an_error_and_delays_no_other(events):
    store, events = events
    async with (
        aclosing(events.subscribe_after(None, None, everything)) as slow,
        aclosing(events.subscribe_after(None, None, everything)) as quick,
    ):
        await anext(slow)
        await anext(quick)
        await put(store, "first")
        assert (await anext(slow)).actor.id == "first"
        for number in range(BEHIND_MAX + 2):
            await put(store, f"s{number}")
            assert (await anext(quick)).actor.id == ("first" if not number else f"s{number - 1}")
        with pytest.raises(EventsLost, match="too slow"):
            [message async for message in slow]

"""The dashboard's view over a store: what viewers hold is what the store shows, however they read."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from random import Random
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.errors import SkepError, Unavailable
from skep.manager.orchestrator.observed_times import STABLE_S
from skep.manager.view.building import WATCHED
from skep.manager.view.followed_rows import LINGER_S, VIEWERS_MAX
from skep.manager.view.loop import ClusterView
from skep.manager.view.rows import ClusterRow, ManagersRow
from skep.model.container import ContainerSpec, HealthConfig, SecretReference
from skep.model.node import NodeState, NodeStatus
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import (
    GlobalJob,
    JobStatus,
    NetworkAttachmentConfig,
    RestartCondition,
    RestartPolicy,
    Service,
    ServiceMode,
    TaskSpec,
)
from skep.model.task import ContainerStatus, Restart, Task, TaskState, TaskStatus
from skep.model.values.ids import ConfigId, SecretId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS, Timestamp, timestamp
from skep.store.interface import Transaction, View
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task, an_overlay

KINDS = ("nodes", "services", "tasks", "networks", "stacks", "volumes", "secrets", "configs")


class Rig:
    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.store = MemoryStore(VirtualClock(loop), watch_capacity=50)
        self.view = ClusterView(self.store, VirtualClock(loop), self.cluster)

    async def cluster(self, _view: View) -> ClusterRow:
        return ClusterRow(
            id="c", name="default", managers=ManagersRow(1, 1, "m1"), warnings=(), replacement_suspended=""
        )

    async def put(self, *objects: Any) -> None:
        def body(tx: Transaction) -> None:
            for one in objects:
                tx.put(one)

        await self.store.update(body)

    async def delete(self, kind: type[Any], id: str) -> None:
        await self.store.update(lambda tx: tx.delete(kind, id))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.view.run())
            yield
            task.cancel()

    async def snapshot(self) -> dict[str, Any]:
        """What a view that begins now shows."""
        view = ClusterView(self.store, self.view._clock, self.cluster)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(view.run())
            found: dict[str, Any] = msgspec.json.decode(await view.snapshot())
            task.cancel()
        return found


class Viewer:
    """Reads the stream into rows."""

    def __init__(self) -> None:
        self.cursor = ""
        self.rows: dict[str, dict[str, Any]] = {}
        self.events: list[str] = []
        self.sent: list[Any] = []

    async def read(self, view: ClusterView, until: Callable[[], bool], rest_s: float = 0.0) -> None:
        """Until ``until()``, with a rest after each event."""
        async with aclosing(view.watch(self.cursor)) as stream:
            async for one in stream:
                if one is not None:
                    self.take(one)
                if until():
                    return
                await asyncio.sleep(rest_s)

    def take(self, one: Any) -> None:
        sent = msgspec.json.decode(one.data)
        self.events.append(one.event)
        self.sent.append(sent)
        self.cursor = one.cursor
        assert sent["cursor"] == one.cursor
        if one.event == "snapshot":
            self.rows = {kind: {row["id"]: row for row in sent[kind]} for kind in KINDS}
            return
        for kind, rows in sent["set"].items():
            if kind != "cluster":
                self.rows[kind].update((row["id"], row) for row in rows)
        for kind, ids in sent["removed"].items():
            for id in ids:
                self.rows[kind].pop(id, None)


def run(body: Callable[[Rig], Awaitable[None]]) -> None:
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:

        async def go() -> None:
            rig = Rig(loop)
            async with rig.running():
                await body(rig)

        loop.run_until_complete(go())
    finally:
        loop.close()
        asyncio.set_event_loop(None)


async def some_change(rig: Rig, random: Random) -> None:
    """Anything that may happen to a cluster."""
    view = rig.store.view()
    services, tasks, nodes = view.find(Service), view.find(Task), view.find(type(a_node("x")))
    number = random.randrange(6)
    match random.randrange(11):
        case 0:
            labels = {"com.docker.stack.namespace": f"stack{number % 2}"} if number % 3 else {}
            service = a_service(f"s{number}", replicas=number, is_global=number == 5)
            await rig.put(replace(service, spec=replace(service.spec, labels=labels)))
        case 1 | 2:
            state = random.choice(
                [TaskState.PENDING, TaskState.RUNNING, TaskState.FAILED, TaskState.SHUTDOWN]
            )
            desired = random.choice([TaskState.RUNNING, TaskState.SHUTDOWN])
            node = f"n{number % 3}" if state is not TaskState.PENDING else ""
            await rig.put(
                a_task(
                    f"t{random.randrange(9)}", service=f"s{number}", node=node, state=state, desired=desired
                )
            )
        case 3 if tasks:
            await rig.delete(Task, random.choice(tasks).id)
        case 4 if services:
            await rig.delete(Service, random.choice(services).id)
        case 5 | 6:
            seen = random.choice([NodeState.READY, NodeState.DOWN])
            await rig.put(replace(a_node(f"n{number % 3}"), status=NodeStatus(state=seen)))
        case 7 if nodes:
            await rig.put(replace(random.choice(nodes), load=random.random()))
        case 8:
            labels = {"com.docker.stack.namespace": "stack0", "skep.stack.revision": str(number)}
            spec = ConfigSpec(name=f"c{number}", labels=labels if number % 2 else {}, data=b"hidden")
            await rig.put(Config(id=ConfigId(f"c{number}"), spec=spec))
        case 9 if services:
            service = random.choice(services)
            await rig.put(replace(service, spec=replace(service.spec, labels={})))
        case 10 if services:
            service = random.choice(services)
            await rig.put(replace(service, removed_at="2026-01-01T00:00:00Z"))
        case _:
            await asyncio.sleep(random.choice([0.01, 0.3, 2.0]))


@pytest.mark.parametrize("seed", range(25))
def test_viewers_that_read_at_any_pace_come_to_hold_what_the_store_shows(seed: int) -> None:
    """Quick ones, slow ones, and one whose connection breaks, over a watch that lags now and then."""
    random = Random(seed)
    is_over = False

    async def changes(rig: Rig) -> None:
        nonlocal is_over
        for _ in range(120):
            try:
                await some_change(rig, random)
            except SkepError:
                continue
            if random.random() < 0.3:
                await asyncio.sleep(random.choice([0.0, 0.05, 0.5]))
        await asyncio.sleep(60)
        is_over = True

    def enough(viewer: Viewer, several: int) -> bool:
        return is_over or len(viewer.events) % several == 0

    async def breaking(rig: Rig, viewer: Viewer) -> None:
        while not is_over:
            left = random.randrange(1, 5)
            await viewer.read(rig.view, partial(enough, viewer, left))
            await asyncio.sleep(random.uniform(0, 2))
        await viewer.read(rig.view, lambda: True)

    async def body(rig: Rig) -> None:
        viewers = [Viewer(), Viewer(), Viewer()]
        async with asyncio.TaskGroup() as group:
            group.create_task(viewers[0].read(rig.view, lambda: is_over))
            group.create_task(viewers[1].read(rig.view, lambda: is_over, rest_s=4.0))
            group.create_task(breaking(rig, viewers[2]))
            group.create_task(changes(rig))
        expected = await rig.snapshot()
        for viewer in viewers:
            assert {
                kind: sorted(rows.values(), key=lambda row: row["id"]) for kind, rows in viewer.rows.items()
            } == {kind: sorted(expected[kind], key=lambda row: row["id"]) for kind in KINDS}
        assert "change" in viewers[0].events

    run(body)


def test_a_viewer_that_comes_from_another_manager_has_this_managers_row_of_the_cluster() -> None:
    async def body(rig: Rig) -> None:
        async def cut_off(view: View) -> ClusterRow:
            return replace(await rig.cluster(view), warnings=("WARNING: this manager has no leader",))

        await rig.put(a_node("n1"))
        other, viewer = ClusterView(rig.store, rig.view._clock, cut_off), Viewer()
        running = asyncio.create_task(other.run())
        await viewer.read(other, lambda: True)
        running.cancel()
        assert viewer.sent[-1]["cluster"]["warnings"]
        await viewer.read(rig.view, lambda: len(viewer.sent) == 2)
        assert viewer.events[1] == "change", "the other rows are the same at every manager"
        assert viewer.sent[1]["set"]["cluster"]["warnings"] == []

    run(body)


def test_nothing_is_followed_before_the_first_viewer_and_after_the_last() -> None:
    async def body(rig: Rig) -> None:
        def is_followed() -> bool:
            return rig.view.rows is not None

        await asyncio.sleep(100)
        assert not is_followed()
        await rig.view.snapshot()
        await asyncio.sleep(LINGER_S / 2)
        assert is_followed()
        await rig.view.snapshot()
        await asyncio.sleep(LINGER_S * 0.75)
        assert is_followed(), "the second one counts"
        await asyncio.sleep(LINGER_S)
        assert not is_followed()
        await rig.view.snapshot()

    run(body)


def test_rows_are_there_before_a_viewer_that_is_expected_and_go_when_none_comes() -> None:
    async def body(rig: Rig) -> None:
        await rig.put(a_service("web"))
        async with rig.running():
            rig.view.prepare()
            await asyncio.sleep(LINGER_S / 2)
            assert rig.view.rows is not None
            assert rig.view.rows.table.number
            await asyncio.sleep(LINGER_S)
            assert rig.view.rows is None

    run(body)


def test_there_is_a_bound_of_viewers_and_one_that_leaves_makes_room() -> None:
    async def body(rig: Rig) -> None:
        streams = [rig.view.watch() for _ in range(VIEWERS_MAX)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(Unavailable, match="32 viewers"):
            await anext(rig.view.watch())
        with pytest.raises(Unavailable, match="32 viewers"):
            await rig.view.snapshot()
        await streams.pop().aclose()
        await rig.view.snapshot()
        for stream in streams:
            await stream.aclose()

    run(body)


def test_changes_of_a_moment_are_one_event() -> None:
    async def body(rig: Rig) -> None:
        viewer = Viewer()

        async def change() -> None:
            await asyncio.sleep(1)
            for number in range(10):
                await rig.put(a_task(f"t{number}"))

        async with asyncio.TaskGroup() as group:
            group.create_task(viewer.read(rig.view, lambda: len(viewer.rows["tasks"]) == 10))
            group.create_task(change())
        assert viewer.events == ["snapshot", "change"]

    run(body)


async def row(rig: Rig, kind: str, id: str) -> Any:
    return next((row for row in (await rig.snapshot())[kind] if row["id"] == id), None)


def test_the_state_of_a_service_is_what_its_tasks_say() -> None:
    async def body(rig: Rig) -> None:
        web = a_service("web", replicas=2)
        await rig.put(web, a_node("n1"), a_task("t1", service=web, node="n1", slot=1))
        pending = a_task("t2", service=web, slot=2, state=TaskState.PENDING)
        await rig.put(pending)
        shown = await row(rig, "services", "web")
        assert (shown["state"], shown["running"], shown["desired"]) == ("converging", 1, 2)
        status = TaskStatus(state=TaskState.PENDING, err="no suitable node")
        await rig.put(replace(pending, status=status))
        shown = await row(rig, "services", "web")
        assert shown["state"] == "degraded"
        assert "no suitable node" in shown["reason"]
        await rig.put(replace(pending, status=TaskStatus(state=TaskState.RUNNING), node_id="n1"))
        shown = await row(rig, "services", "web")
        assert (shown["state"], shown["reason"]) == ("healthy", "")
        down = NodeStatus(state=NodeState.DOWN, message="heartbeat failure")
        await rig.put(replace(a_node("n1"), status=down))
        shown = await row(rig, "services", "web")
        assert (shown["state"], shown["running"]) == ("degraded", 0)
        assert (await row(rig, "tasks", "t1"))["state"] == "unknown"

    run(body)


def test_a_one_shot_service_is_well_when_it_is_done_and_a_job_has_a_total() -> None:
    async def body(rig: Rig) -> None:
        once = RestartPolicy(condition=RestartCondition.NONE)
        migrate = a_service("migrate", replicas=1, restart=once)
        ended = a_task("t1", service=migrate, node="n1", state=TaskState.COMPLETE, desired=TaskState.SHUTDOWN)
        await rig.put(migrate, a_node("n1"), ended)
        shown = await row(rig, "services", "migrate")
        assert (shown["state"], shown["reason"], shown["completed"]) == ("healthy", "", 1)
        await rig.put(replace(ended, status=TaskStatus(state=TaskState.FAILED)))
        assert (await row(rig, "services", "migrate"))["state"] != "healthy"
        job = a_service("job")
        spec = replace(job.spec, mode=ServiceMode(global_job=GlobalJob()))
        job = replace(job, spec=spec, job_status=JobStatus(last_execution=Timestamp("2026-01-01T00:00:00Z")))
        done = a_task(
            "t2", service=job, slot=0, node="n1", state=TaskState.COMPLETE, desired=TaskState.COMPLETE
        )
        await rig.put(job, replace(done, job_iteration=Version()))
        shown = await row(rig, "services", "job")
        assert (shown["completed"], shown["total"]) == (1, 1)

    run(body)


def test_tasks_that_ended_and_were_replaced_are_not_shown() -> None:
    async def body(rig: Rig) -> None:
        await rig.put(
            a_task("old", state=TaskState.FAILED, desired=TaskState.SHUTDOWN),
            a_task("failed", state=TaskState.FAILED),
            a_task("stopping", desired=TaskState.SHUTDOWN),
        )
        assert {one["id"] for one in (await rig.snapshot())["tasks"]} == {"failed", "stopping"}

    run(body)


def test_nothing_secret_is_in_a_snapshot() -> None:
    async def body(rig: Rig) -> None:
        container = ContainerSpec(
            image="busybox:1@sha256:" + "0" * 64,
            env=("PASSWORD=hunter2",),
            args=("--token", "hunter2"),
            healthcheck=HealthConfig(test=("CMD", "hunter2")),
            secrets=(SecretReference(secret_id=SecretId("s1"), secret_name="s1"),),
        )
        web = a_service("web")
        spec = replace(web.spec, task_template=TaskSpec(container_spec=container))
        await rig.put(
            Secret(id=SecretId("s1"), spec=SecretSpec(name="s1")),
            Config(id=ConfigId("c1"), spec=ConfigSpec(name="c1", data=b"hunter2")),
            replace(web, spec=spec),
        )
        await rig.put(replace(a_task("t1", service="web"), spec=spec.task_template))
        found = await rig.snapshot()
        assert "hunter2" not in msgspec.json.encode(found).decode()
        assert [one["services"] for one in found["secrets"]] == [["web"]]
        assert [one["name"] for one in found["configs"]] == ["c1"]
        assert found["services"][0]["image"] == "busybox:1"
        assert found["tasks"][0]["health"] == "healthy"

    run(body)


def test_a_task_that_waits_after_failures_says_so() -> None:
    async def body(rig: Rig) -> None:
        waiting = a_task("t1", state=TaskState.READY, desired=TaskState.READY)
        restart = Restart(failures=3, delay=5, not_before=Timestamp("2026-01-01T10:00:00Z"))
        failed = TaskStatus(
            state=TaskState.FAILED, container_status=ContainerStatus(container_id="c", exit_code=3)
        )
        before = replace(
            a_task("t0", desired=TaskState.SHUTDOWN),
            status=failed,
            created_at=Timestamp("2026-01-01T09:00:00Z"),
        )
        waiting = replace(waiting, restart=restart, created_at=Timestamp("2026-01-01T09:30:00Z"))
        await rig.put(a_service("web", replicas=1), before, waiting)
        shown = await row(rig, "tasks", "t1")
        assert shown["error"] == "exit 3; crash loop, 3 failures in a row; next attempt at 10:00:00 UTC"
        service = await row(rig, "services", "web")
        assert (service["state"], service["reason"]) == ("degraded", "exit 3")

    run(body)


def test_a_crash_loop_is_degraded_while_its_process_runs_and_until_it_has_stayed_up() -> None:
    async def body(rig: Rig) -> None:
        ended = a_task("t0", state=TaskState.FAILED, desired=TaskState.SHUTDOWN)
        ended = replace(ended, created_at=Timestamp("2026-01-01T09:00:00Z"))
        began = asyncio.get_running_loop().time()
        web, now_ns = a_service("web", replicas=1), VirtualClock(rig.loop).now_ns()
        looping = replace(
            a_task("t1", node="n1"),
            restart=Restart(failures=3),
            created_at=Timestamp("2026-01-01T09:30:00Z"),
            status=TaskStatus(state=TaskState.RUNNING, timestamp=timestamp(now_ns)),
        )
        await rig.put(web, a_node("n1"), ended, looping)
        shown = await row(rig, "services", "web")
        assert (shown["state"], shown["running"], shown["reason"]) == ("degraded", 1, "it failed")
        viewer = Viewer()
        await viewer.read(rig.view, lambda: viewer.rows["services"]["web"]["state"] == "healthy")
        assert STABLE_S <= asyncio.get_running_loop().time() - began < STABLE_S + 1
        assert viewer.rows["services"]["web"]["reason"] == ""

    run(body)


def test_a_slow_step_is_followed_by_a_rest_also_without_a_change() -> None:
    """Here crash loops end one after the other, which changes rows without a commit."""
    steps: list[float] = []

    async def slow(_: View) -> ClusterRow:
        steps.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.1)
        return ClusterRow(
            id="c", name="default", managers=ManagersRow(1, 1, "m1"), warnings=(), replacement_suspended=""
        )

    async def body(rig: Rig) -> None:
        now_ns = VirtualClock(rig.loop).now_ns()
        for number in range(20):
            service = a_service(f"s{number}", replicas=1)
            looping = replace(
                a_task(f"t{number}", service=service.id, node="n1"),
                restart=Restart(failures=3),
                status=TaskStatus(
                    state=TaskState.RUNNING, timestamp=timestamp(now_ns + number * SECOND_NS // 4)
                ),
            )
            ended = replace(
                a_task(f"e{number}", service=service.id, state=TaskState.FAILED),
                desired_state=TaskState.SHUTDOWN,
                created_at=Timestamp("2025-01-01T09:00:00Z"),
            )
            await rig.put(service, ended, looping)
        rig.view = ClusterView(rig.store, VirtualClock(rig.loop), slow)
        async with rig.running():
            rig.view.prepare()
            await asyncio.sleep(STABLE_S + 10)
        during = [at for at in steps if at > STABLE_S - 1]
        assert 1 < len(during) < 6, "a rest is fifty times as long as a step, at most 5 s"

    run(body)


def test_networks_have_the_services_that_name_them() -> None:
    async def body(rig: Rig) -> None:
        back = an_overlay("back")
        await rig.put(back)
        web = a_service("web")
        template = replace(web.spec.task_template, networks=(NetworkAttachmentConfig(target=back.id),))
        await rig.put(replace(web, spec=replace(web.spec, task_template=template)))
        assert (await row(rig, "networks", back.id))["services"] == ["web"]

    run(body)


def test_every_kind_that_is_watched_has_rows() -> None:
    assert {kind.__name__ for kind in WATCHED} == {
        "Service", "Task", "Node", "Network", "Secret", "Config", "Volume", "Swarm",
    }  # fmt: skip

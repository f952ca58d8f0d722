"""Whose stop is held back, and for how long."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.aio.clock import SystemClock
from skep.errors import InvalidArgument
from skep.manager.dispatcher.delayed_stops import RESTART_S_MAX, Stops, drain_of
from skep.manager.dispatcher.node_sessions.sessions import Sessions
from skep.model.network import Network
from skep.model.node import ManagerStatus, Node, NodeRole, Reachability
from skep.model.options.labels import check_service_labels
from skep.model.service import Service
from skep.model.swarm import DEFAULT_SWARM_SPEC, Swarm
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import ClusterId, NodeId, TaskId
from skep.model.values.meta import Driver
from skep.model.values.times import Timestamp
from skep.security.authority import Authority
from skep.security.trust import root_digest, tls_info
from skep.store.memory import MemoryStore
from tests.support.builders import a_docker_node, a_node, a_service, a_task, an_overlay
from tests.support.store.damage_rigs import put_all

NET = an_overlay("net1")
WEB = a_service("web")
ROOT = Authority.create().root_pem
PRESENT, FORMER = root_digest(ROOT), "the former"


def on(network: Network | None, **requested: object) -> Task:
    task = a_task("t1", node="n1", service=WEB, **requested)  # type: ignore[arg-type]
    place = NetworkAttachment(network=network, addresses=("10.0.1.2/24",))
    return replace(task, networks_attachments=(place,)) if network else task


def drain(
    new: Task, service: Service | None = WEB, node: Node | None = None, old: Task | None = None
) -> float:
    async def run() -> float:
        store = MemoryStore(SystemClock())
        there = [one for one in (service, node or a_node("n1")) if one is not None]
        await store.update(lambda tx: [tx.put(one) for one in there])
        return drain_of(store.view(), old or replace(new, desired_state=TaskState.RUNNING), new)

    return asyncio.run(run())


def labeled(seconds: str) -> Service:
    return replace(WEB, spec=replace(WEB.spec, labels={"skep.drain": seconds}))


@pytest.mark.parametrize("desired", [TaskState.SHUTDOWN, TaskState.REMOVE])
def test_the_stop_of_a_serving_task_is_held_back_for_a_second_or_as_its_service_says(
    desired: TaskState,
) -> None:
    task = on(NET, desired=desired)
    assert drain(task) == 1.0
    assert drain(task, labeled("5s")) == 5.0
    assert drain(task, labeled("0s")) == 0.0
    assert drain(task, labeled("nonsense")) == 1.0


def test_a_task_without_traffic_stops_at_once() -> None:
    task = on(NET, desired=TaskState.SHUTDOWN)
    host = replace(NET, driver_state=Driver(name="host"))
    removed = replace(WEB, removed_at=Timestamp("2026-01-01T00:00:00Z"))
    engine = replace(a_docker_node("d1"), id=NodeId("n1"))
    assert drain(on(None, desired=TaskState.SHUTDOWN)) == 0.0
    assert drain(on(host, desired=TaskState.SHUTDOWN)) == 0.0
    assert drain(on(NET, desired=TaskState.SHUTDOWN, state=TaskState.STARTING)) == 0.0
    assert drain(on(NET, desired=TaskState.SHUTDOWN, state=TaskState.FAILED)) == 0.0
    assert drain(task, removed) == 0.0
    assert drain(task, None) == 0.0
    assert drain(task, node=engine) == 0.0
    assert drain(task, node=a_node("another")) == 0.0


def test_a_task_that_was_to_stop_already_waits_no_second_time() -> None:
    before = on(NET, desired=TaskState.SHUTDOWN)
    assert drain(on(NET, desired=TaskState.REMOVE), old=before) == 0.0
    assert drain(on(NET, desired=TaskState.RUNNING)) == 0.0


def test_a_label_that_cannot_be_read_is_refused() -> None:
    for word in ("soon", "-1s", "9000h"):
        with pytest.raises(InvalidArgument, match=f"invalid label skep.drain={word}"):
            check_service_labels({"skep.drain": word})
    check_service_labels({"skep.drain": "250ms"})


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    made = VirtualLoop()
    yield made
    made.close()


def a_manager(peer_roots: str) -> Node:
    status = ManagerStatus(addr="m2:2377", reachability=Reachability.REACHABLE)
    return replace(a_node("m2", role=NodeRole.MANAGER), manager_status=status, peer_roots=peer_roots)


async def never(_task: Task, _revision: int) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("peer_roots", "restarted_s", "stopped_s"),
    [(PRESENT, 0.0, 1.0), (FORMER, 3.0, 3.0), (FORMER, 60.0, 1.0 + RESTART_S_MAX)],
    ids=["no restart", "a restart", "one without an end"],
)
def test_a_stop_waits_for_nodes_of_a_manager_whose_etcd_restarts_for_a_new_root(
    loop: VirtualLoop, peer_roots: str, restarted_s: float, stopped_s: float
) -> None:
    """They get no tables meanwhile, and send on connections to what has stopped."""
    clock = VirtualClock(loop)
    store = MemoryStore(clock)
    stopped: list[float] = []
    session = SimpleNamespace(wake_assignments=lambda ids: stopped.extend(clock.monotonic() for _ in ids))
    sessions = cast("Sessions", SimpleNamespace(live=lambda _: session))
    stops = Stops(store, sessions, clock, never)
    swarm = Swarm(id=ClusterId("s1"), spec=DEFAULT_SWARM_SPEC, tls_info=tls_info(ROOT))
    task = on(NET)

    async def live() -> None:
        await put_all(store, swarm, a_manager(peer_roots), WEB, a_node("n1"), task)
        began = clock.monotonic()
        stops.on_update(task, replace(task, desired_state=TaskState.SHUTDOWN), store.view().revision)
        await clock.sleep(restarted_s)
        await put_all(store, a_manager(PRESENT))
        await clock.sleep(60)
        assert [at - began for at in stopped] == [pytest.approx(stopped_s, abs=0.2)]

    running = loop.create_task(stops.run())
    loop.run_until_complete(live())
    running.cancel()
    loop.run_until_complete(asyncio.wait([running]))


@pytest.mark.parametrize("desired", [TaskState.SHUTDOWN, TaskState.REMOVE])
def test_the_delay_of_a_stop_ends_when_the_service_is_removed(loop: VirtualLoop, desired: TaskState) -> None:
    """The stop began with an update or when the service was scaled in, and its clients never leave."""
    clock = VirtualClock(loop)
    store = MemoryStore(clock)
    woken: list[tuple[float, str]] = []
    session = SimpleNamespace(
        wake_assignments=lambda ids: woken.extend((clock.monotonic(), id) for id in ids)
    )
    stops = Stops(store, cast("Sessions", SimpleNamespace(live=lambda _: session)), clock, never)
    service, other = labeled("60s"), a_service("db")
    task, another = on(NET), replace(on(NET), id=TaskId("t2"), service_id=other.id)

    async def live() -> None:
        await put_all(store, service, other, a_node("n1"), task, another)
        for one in (task, another):
            stops.on_update(one, replace(one, desired_state=desired), store.view().revision)
        await clock.sleep(0.5)
        assert woken == []
        removed = replace(service, removed_at=Timestamp("2026-01-01T00:00:00Z"))
        await put_all(store, removed)
        at = clock.monotonic()
        stops.on_service(service, removed)
        assert woken == [(at, task.id)]

    running = loop.create_task(stops.run())
    loop.run_until_complete(live())
    running.cancel()
    loop.run_until_complete(asyncio.wait([running]))

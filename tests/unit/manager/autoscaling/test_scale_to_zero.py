"""When the last task of a service ends, and when a request starts one again."""

import asyncio

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from skep.manager.autoscaling.decision import (
    AT_ZERO,
    Measure,
    Readings,
    Recommendations,
    blocked,
    recommendation,
    to_zero,
)
from skep.manager.autoscaling.state import (
    AutoscalerState,
    AutoscalingCounts,
    Doors,
    Quota,
    Scaling,
    door_nodes,
    has_door,
    idle_times,
    write_replicas,
)
from skep.manager.autoscaling.waking import RefusedWakes, write_wake
from skep.manager.control.quotas import check_quota, set_quota
from skep.manager.control.services import create_service, rollback_service, update_service
from skep.manager.control.updates import start_service, stop_service
from skep.manager.orchestrator.changes import RollBack, apply
from skep.manager.services.quotas import replicas_within_quota
from skep.model.measures.readings import ScalingMeasurements
from skep.model.node import NodeState
from skep.model.options.autoscaling import Autoscaling, is_at_zero
from skep.model.quota import QuotaSpec
from skep.model.service import Autoscaled, Service, ServiceSpec, UpdateSplit, UpdateState, UpdateStatus
from skep.model.task import TaskState
from skep.model.values.ids import NodeId, ServiceId, new_id
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import Timestamp
from skep.store.level import REGISTRATIONS, USERS, ZERO_TASKS
from skep.store.memory import MemoryCluster, MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec, a_task

NOW = Timestamp("2026-01-01T00:00:00Z")
LABELS = {"skep.autoscale": "0..3", "skep.autoscale.idle-after": "1m", "skep.http": "a.example"}
ZERO = Autoscaling(least=0, most=3, idle_after_s=60.0)


def a_web(replicas: int, *, state: UpdateState | None = None, **labels: str) -> Service:
    more = {f"skep.{name.replace('_', '-')}": value for name, value in labels.items()}
    spec = replace(a_service_spec("web", replicas=replicas), labels={**LABELS, **more})
    return a_service("web", spec=spec, state=state) if state is not None else a_service("web", spec=spec)


@pytest.mark.parametrize(
    ("present", "scaling", "idle_s", "known_s", "ends"),
    [
        (1, ZERO, 60.0, 60.0, True),
        (1, ZERO, 59.0, 600.0, False),
        (1, ZERO, None, 600.0, False),  # unknown
        (1, ZERO, 600.0, 59.0, False),  # a new leader, or a request that the reports are too old for
        (2, ZERO, 600.0, 600.0, False),  # the other measures end all but one
        (1, replace(ZERO, least=1), 600.0, 600.0, False),
    ],
)
def test_the_last_task_ends_after_the_idle_time(
    present: int, scaling: Autoscaling, idle_s: float | None, known_s: float, ends: bool
) -> None:
    found = to_zero(present, scaling, idle_s, Recommendations(present, 100.0), 100.0 + known_s)
    assert (found.replicas if found is not None else None) == (0 if ends else None)


def test_a_service_is_idle_if_every_proxy_says_so() -> None:
    one, two, web = NodeId("n1"), NodeId("n2"), ServiceId("web")
    assert idle_times({one, two}, {one: {web: 70.0}, two: {web: 65.0}}) == {web: 65.0}
    assert idle_times({one, two}, {one: {web: 70.0}, two: {}}) == {}
    assert idle_times({one, two}, {one: {web: 70.0}}) == {}
    assert idle_times({one}, {one: {web: 70.0}, two: {web: 1.0}}) == {web: 70.0}
    assert idle_times((), {one: {web: 70.0}}) == {}, "without a front door, no request could wake it"


@pytest.mark.parametrize(("ranges", "replicas"), [("2..3", 2), ("0..3", None)])
async def test_a_schedule_starts_a_service_that_is_scaled_to_zero(ranges: str, replicas: int | None) -> None:
    store = await a_store(a_web(0, **{"autoscale.schedule": f"* * * * * {ranges}"}))
    state = AutoscalerState(
        store.view, SystemClock(), Quota(replicas_within_quota, check_quota), AutoscalingCounts()
    )
    state.start(store.view())
    found = state.decide(ServiceId("web"), ScalingMeasurements(), 1000.0, Doors())
    assert (found.replicas if found is not None else None) == replicas
    if found is not None:
        assert await store.update(write_replicas, found, check_quota)
        assert store.view().get(Service, ServiceId("web")).spec.replicas == replicas


def test_a_measure_of_nothing_keeps_the_last_task() -> None:
    scaling = replace(ZERO, cpu=None, rps=5.0)
    none = Measure(name="rps", target=5.0, sum=0.0, is_total=True)
    assert recommendation(1, scaling, Readings(measures=(none,))).replicas == 1
    assert recommendation(3, scaling, Readings(measures=(none,))).replicas == 1


async def a_store(*objects: object) -> MemoryStore:
    store = MemoryStore(SystemClock(), MemoryCluster())
    for one in objects:
        await store.update(lambda tx, one=one: tx.put(one))  # type: ignore[misc]
    return store


async def test_nodes_with_a_proxy_count_until_it_has_ended_or_they_are_down() -> None:
    door = a_service("door", spec=replace(a_service_spec("door"), labels={"skep.door": "true"}))
    tasks = [
        a_task("runs", service=door, node="n1", state=TaskState.RUNNING),
        a_task("starts", service=door, node="n2", state=TaskState.STARTING),
        a_task("stops", service=door, node="n3", state=TaskState.RUNNING, desired=TaskState.SHUTDOWN),
        a_task("ended", service=door, node="n4", state=TaskState.SHUTDOWN),
        a_task("lost", service=door, node="n5", state=TaskState.RUNNING),
        a_task("other", service=a_service("web"), node="n6", state=TaskState.RUNNING),
    ]
    nodes = [a_node(f"n{number}") for number in (1, 2, 3, 4, 6)]
    store = await a_store(door, *tasks, *nodes, a_node("n5", state=NodeState.DOWN))
    view = store.view()
    assert door_nodes(view, {ServiceId("door")}) == {"n1", "n2", "n3"}
    assert door_nodes(view, ()) == frozenset()
    assert [has_door(view, NodeId(f"n{number}")) for number in (1, 2, 3, 4, 6)] == [
        True,
        True,
        True,
        False,
        False,
    ]


async def decided(store: MemoryStore, *, after_s: float, idle_s: float | None) -> Scaling | None:
    state = AutoscalerState(
        store.view, SystemClock(), Quota(replicas_within_quota, check_quota), AutoscalingCounts()
    )
    state.start(store.view())
    idle = {ServiceId("web"): idle_s} if idle_s is not None else {}
    assert state.decide(ServiceId("web"), ScalingMeasurements(), 1000.0, Doors(idle=idle)) is None, (
        "the leader has just begun"
    )
    return state.decide(ServiceId("web"), ScalingMeasurements(), 1000.0 + after_s, Doors(idle=idle))


async def test_the_leader_decides_once_it_has_seen_the_service_for_the_idle_time() -> None:
    store = await a_store(a_web(1))
    due = await decided(store, after_s=60.0, idle_s=60.0)
    assert due is not None
    assert (due.present, due.replicas, due.reason) == (1, 0, "no request for 60 s")
    assert await decided(store, after_s=59.0, idle_s=60.0) is None
    assert await decided(store, after_s=600.0, idle_s=None) is None


async def test_a_service_during_an_update_keeps_its_task() -> None:
    store = await a_store(a_web(1, state=UpdateState.UPDATING))
    assert await decided(store, after_s=600.0, idle_s=600.0) is None


async def woken(store: MemoryStore) -> bool:
    return await store.update(write_wake, ServiceId("web"), 0, check_quota)


async def test_a_request_starts_one_task_and_its_repetitions_none() -> None:
    store = await a_store(a_web(0))
    service = store.view().get(Service, "web")
    assert is_at_zero(service.spec)
    assert blocked(service) == AT_ZERO
    assert sum(await asyncio.gather(*(woken(store) for _ in range(5)))) == 1
    service = store.view().get(Service, "web")
    assert service.spec == a_web(1).spec
    assert service.autoscaled == Autoscaled(
        before=0, after=1, reason="a request at the front door", at=Timestamp("1970-01-01T00:00:00Z")
    )


@pytest.mark.parametrize("state", [UpdateState.PAUSED, UpdateState.UPDATING, UpdateState.ROLLBACK_PAUSED])
async def test_a_request_also_wakes_a_service_whose_update_does_not_end(state: UpdateState) -> None:
    assert await woken(await a_store(a_web(0, state=state)))


@pytest.mark.parametrize("state", [UpdateState.PAUSED, UpdateState.UPDATING])
async def test_a_request_does_not_end_the_staged_update_of_a_service_that_a_user_scaled_to_zero(
    state: UpdateState,
) -> None:
    split = UpdateSplit(step=1, percent=50, versions=(2,), old=1)
    web = a_web(0, update="canary")
    status = UpdateStatus(state=state, message="as before", split=split)
    store = await a_store(replace(web, previous_spec=web.spec, update_status=status))
    assert await woken(store)
    service = store.view().get(Service, "web")
    assert service.spec.replicas == 1
    assert service.update_status == replace(status, split=replace(split, changes=1))


@pytest.mark.parametrize(
    "service",
    [
        a_web(0, stopped="true"),
        a_web(0, autoscale="1..3"),
        a_web(2),
        replace(a_web(0), removed_at=NOW),
        a_service("web", spec=a_service_spec("web", replicas=0)),
    ],
)
async def test_no_other_service_is_woken(service: Service) -> None:
    store = await a_store(service)
    assert not await woken(store)
    assert (
        store.view().get(Service, "web") == service or store.view().get(Service, "web").spec == service.spec
    )


async def test_a_quota_without_room_refuses_the_task() -> None:
    labels = {**LABELS, STACK_LABEL: "shop"}
    web = a_service("web", spec=replace(a_service_spec("web", replicas=0), labels=labels))
    other = a_service("db", spec=replace(a_service_spec("db"), labels={STACK_LABEL: "shop"}))
    store = await a_store(web, other)
    await store.update(lambda tx: tx.raise_level(USERS))
    await store.update(set_quota, QuotaSpec(name="shop", tasks=1), new_id=new_id, now=NOW)
    with pytest.raises(PermissionDenied, match="quota"):
        await woken(store)
    await store.update(lambda tx: tx.delete(Service, other.id))
    assert await woken(store)


@pytest.mark.parametrize(
    ("labels", "replicas"),
    [
        ({"skep.http": "a.example"}, 1),
        ({"skep.http": "a.example", "skep.autoscale": "2..3"}, 2),
        ({**LABELS, "skep.autoscale": "0..9"}, 0),
        ({**LABELS, "skep.stopped": "true"}, 0),
    ],
)
async def test_a_service_that_no_request_would_wake_any_longer_gets_its_tasks(
    labels: dict[str, str], replicas: int
) -> None:
    """Docker's command line sends the number that it sees, which is 0."""
    store = await a_store(a_web(0))
    service = store.view().get(Service, "web")
    spec: ServiceSpec = replace(service.spec, labels=labels)
    await store.update(lambda tx: tx.raise_level(ZERO_TASKS))
    await store.update(lambda tx: update_service(tx, service.id, spec, service.version.index, now=NOW))
    assert store.view().get(Service, "web").spec.replicas == replicas


@pytest.mark.parametrize(
    "labels", [{"skep.http": "a.example"}, {"skep.http": "a.example", "skep.autoscale": "1..3"}]
)
async def test_a_service_that_leaves_zero_while_it_is_stopped_starts_with_its_tasks(
    labels: dict[str, str],
) -> None:
    store = await a_store(a_web(0))
    await store.update(lambda tx: tx.raise_level(ZERO_TASKS))
    await store.update(lambda tx: stop_service(tx, ServiceId("web"), now=NOW))
    service = store.view().get(Service, "web")
    stopped = replace(service.spec, labels={**labels, "skep.stopped": "true"})
    await store.update(lambda tx: update_service(tx, service.id, stopped, service.version.index, now=NOW))
    await store.update(lambda tx: start_service(tx, ServiceId("web"), now=NOW))
    assert store.view().get(Service, "web").spec.replicas == 1


@pytest.mark.parametrize("ranges", ["1..3", "2..3", None])
async def test_a_rollback_at_zero_leaves_the_service_with_tasks(ranges: str | None) -> None:
    labels = {"skep.http": "a.example"} | ({"skep.autoscale": ranges} if ranges is not None else {})
    before = replace(a_service_spec("web", replicas=2), labels=labels)
    store = await a_store(replace(a_web(1), previous_spec=before))
    await store.update(lambda tx: tx.raise_level(ZERO_TASKS))
    due = await decided(store, after_s=60.0, idle_s=60.0)
    assert due is not None
    assert await store.update(write_replicas, due, check_quota)
    service = store.view().get(Service, "web")
    assert is_at_zero(service.spec)
    await store.update(
        lambda tx: rollback_service(tx, service.id, service.spec, service.version.index, now=NOW)
    )
    service = store.view().get(Service, "web")
    assert service.spec.labels == labels
    assert service.spec.replicas == (1 if ranges == "1..3" else 2)


async def test_managers_of_the_version_before_are_upgraded_first() -> None:
    """They know the level of everything else that is new since, but not the call that wakes a service."""
    store = await a_store()
    await store.update(lambda tx: tx.raise_level(REGISTRATIONS))
    with pytest.raises(FailedPrecondition, match="upgrade the others first"):
        await store.update(
            lambda tx: create_service(tx, a_web(1).spec, new_id=new_id, new_name=lambda _: "web", now=NOW)
        )
    await store.update(lambda tx: tx.raise_level(ZERO_TASKS))
    await store.update(
        lambda tx: create_service(tx, a_web(1).spec, new_id=new_id, new_name=lambda _: "web", now=NOW)
    )


def test_a_refused_wake_is_tried_again_after_growing_times() -> None:
    refusals, tried = RefusedWakes(), list[float]()
    for tenth in range(350):
        if refusals.allow(ServiceId("web"), tenth / 10):
            refusals.add(ServiceId("web"), tenth / 10)
            tried.append(tenth / 10)
    assert tried == [0.0, 2.0, 6.0, 14.0, 22.0, 30.0]
    assert refusals.allow(ServiceId("other"), 30.0)


@pytest.mark.parametrize("is_first", [False, True])
async def test_a_service_that_others_need_keeps_a_task(is_first: bool) -> None:
    needs = {"skep.depends-on": "web=service_healthy"}
    specs = [replace(a_service_spec("front"), labels=needs), a_web(1).spec]
    first, second = specs if is_first else specs[::-1]
    store = await a_store()
    await store.update(lambda tx: tx.raise_level(ZERO_TASKS))

    async def create(spec: ServiceSpec) -> None:
        await store.update(
            lambda tx: create_service(tx, spec, new_id=new_id, new_name=lambda _: "name", now=NOW)
        )

    await create(first)
    with pytest.raises(InvalidArgument, match=r"front depends on web .* use skep\.autoscale=1\.\.3"):
        await create(second)
    other = replace(a_service_spec("other"), labels={"skep.depends-on": "web=service_healthy+optional"})
    if not is_first:
        await create(other)


async def test_a_rollback_after_a_failure_also_leaves_the_service_with_tasks() -> None:
    before = replace(
        a_service_spec("web", replicas=0), labels={"skep.http": "a.example", "skep.autoscale": "2..3"}
    )
    service = replace(a_web(0, state=UpdateState.UPDATING), previous_spec=before)
    store = await a_store(service)
    await store.update(apply, RollBack(store.view().get(Service, "web"), "failed"), new_id, NOW)
    assert store.view().get(Service, "web").spec.replicas == 2

"""What waits during a change freeze and outside of the maintenance window, and what does not."""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from aiohttp.test_utils import TestClient, TestServer
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.aio.clock import SystemClock
from skep.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SkepError,
)
from skep.manager.autoscaling.state import Scaling, write_replicas
from skep.manager.cluster import cluster_of
from skep.manager.control.quotas import check_quota
from skep.manager.orchestrator.changes import ReplaceTask, RetireTask, apply
from skep.manager.orchestrator.global_services import reconcile
from skep.manager.orchestrator.reaper.node_loop import remove_lost
from skep.manager.orchestrator.state import _holds_others
from skep.manager.routes import application
from skep.manager.routes.warnings import freeze_warnings
from skep.manager.schedules.loop import ChangeFreezes
from skep.manager.services.freezes import (
    bring_up_to_date,
    end_freeze,
    freeze_changes,
    has_freezes,
    held_by,
    is_out_of_date,
    set_freeze,
    set_window,
    unless_frozen,
)
from skep.model.node import Availability, Node, NodeState, NodeStatus
from skep.model.options.autoscaling import autoscaling_of
from skep.model.options.freezes import CLUSTER, STACKS_MAX, ChangeFreeze, FreezeRequest, MaintenanceWindow
from skep.model.permissions.access import REVISION_HEADER
from skep.model.service import Resources, Service
from skep.model.swarm import Swarm
from skep.model.task import Preemption, Relocation, Task, TaskState
from skep.model.values.ids import ClusterId, NodeId, TaskId, new_id
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import SECOND_NS, timestamp
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from tests.conformance.manager import a_manager_api
from tests.support.builders import a_node, a_service, a_task
from tests.support.managers.worlds import World
from tests.support.store.damage_rigs import damage

HOUR_NS = 3600 * SECOND_NS
NORTH = a_service("web", constraints=("node.labels.zone == north",))
SHOP = replace(NORTH, spec=replace(NORTH.spec, labels={STACK_LABEL: "shop"}))
SOUTH_NODE = a_node("n1", labels={"zone": "south"})


def a_freeze(*, is_strict: bool = False, by: str = "alice") -> ChangeFreeze:
    return ChangeFreeze(until=timestamp(4 * 10**18), by=by, reason="sale", is_strict=is_strict)


async def a_store(*objects: object, **freezes: ChangeFreeze) -> MemoryStore:
    store = MemoryStore(SystemClock())
    swarm = Swarm(
        id=ClusterId("c"), change_freezes={CLUSTER if k == "cluster" else k: v for k, v in freezes.items()}
    )
    await store.update(lambda tx: [tx.put(one) for one in (swarm, *objects)])  # type: ignore[type-var]
    return store


async def test_a_freeze_holds_the_cluster_or_one_stack() -> None:
    view = (await a_store(cluster=a_freeze())).view()
    assert held_by(view) == held_by(view, "shop") == a_freeze().words(CLUSTER)
    view = (await a_store(shop=a_freeze())).view()
    assert (held_by(view), held_by(view, "blog")) == ("", "")
    assert held_by(view, "shop") == "stack shop is frozen until 2096-10-02 07:06 UTC by alice: sale"


async def test_a_closed_window_holds_everything() -> None:
    store = await a_store()
    window = MaintenanceWindow(cron="0 2 * * *", length=HOUR_NS)
    await store.update(set_window, window, now_ns=0)
    assert held_by(store.view(), "shop") == "the maintenance window is closed until 1970-01-01 02:00 UTC"
    await store.update(set_window, None, now_ns=0)
    assert held_by(store.view()) == ""


async def test_a_closed_window_of_a_stack_holds_that_stack_and_the_clusters_holds_as_well() -> None:
    store = await a_store(SHOP)
    window = MaintenanceWindow(cron="0 2 * * *", length=HOUR_NS)
    with pytest.raises(NotFound, match="stack blog has no services: list stacks with skep stack ls"):
        await store.update(set_window, window, "blog", now_ns=0)
    with pytest.raises(NotFound, match="stack shop has no maintenance window"):
        await store.update(set_window, None, "shop", now_ns=0)
    await store.update(set_window, window, "shop", now_ns=0)
    closed = "the maintenance window of stack shop is closed until 1970-01-01 02:00 UTC"
    assert [held_by(store.view(), stack) for stack in ("", "blog", "shop")] == ["", "", closed]
    await store.update(set_window, window, "shop", now_ns=2 * HOUR_NS)
    assert held_by(store.view(), "shop") == ""
    await store.update(set_window, replace(window, cron="0 5 * * *"), now_ns=2 * HOUR_NS)
    assert held_by(store.view(), "shop") == "the maintenance window is closed until 1970-01-01 05:00 UTC"
    await store.update(set_window, None, "shop", now_ns=0)
    assert store.view().get(Swarm, "c").stack_windows == {}


async def test_a_window_of_a_stack_that_never_meets_the_clusters_is_refused() -> None:
    """Each would wait for the other one for ever.  The cluster's window may be set, so that no stack blocks it."""
    store = await a_store(SHOP)
    night, noon = (MaintenanceWindow(cron=f"0 {hour} * * *", length=HOUR_NS) for hour in (2, 12))
    await store.update(set_window, night, now_ns=0)
    with pytest.raises(
        InvalidArgument, match=r"the cluster's \(0 2 \* \* \* \(UTC\), for 60 minutes\), so nothing of"
    ):
        await store.update(set_window, noon, "shop", now_ns=0)
    await store.update(set_window, night, "shop", now_ns=0)
    await store.update(set_window, noon, now_ns=0)
    assert store.view().get(Swarm, "c").stack_windows["shop"].cron == night.cron


async def test_the_number_of_stacks_with_a_window_is_bounded() -> None:
    window = MaintenanceWindow(cron="0 2 * * *", length=HOUR_NS)
    store = await a_store(SHOP)
    full = {f"s{number}": window for number in range(STACKS_MAX)}
    await store.update(lambda tx: tx.put(replace(tx.get(Swarm, "c"), stack_windows=full)))
    with pytest.raises(ResourceExhausted, match="remove one of them first"):
        await store.update(set_window, window, "shop", now_ns=0)


async def test_the_window_of_a_removed_stack_goes_with_it() -> None:
    store = await a_store(SHOP)
    await store.update(set_window, MaintenanceWindow(cron="0 2 * * *", length=HOUR_NS), "shop", now_ns=0)
    assert not is_out_of_date(store.view(), 0)
    await store.update(lambda tx: tx.delete(Service, SHOP.id))
    assert is_out_of_date(store.view(), 0)
    await store.update(bring_up_to_date, 0)
    assert not has_freezes(store.view())


async def test_the_window_of_a_stack_stays_while_its_services_cannot_be_read() -> None:
    store = await a_store(SHOP)
    await store.update(set_window, MaintenanceWindow(cron="0 2 * * *", length=HOUR_NS), "shop", now_ns=0)
    damage(store.cluster, "service", SHOP.id, "")
    restarted = MemoryStore(SystemClock(), store.cluster)
    assert restarted.view().unreadable(Service)
    await restarted.update(bring_up_to_date, 0)
    assert held_by(restarted.view(), "shop")


async def test_only_stacks_with_services_are_frozen_and_only_once() -> None:
    store = await a_store(SHOP)
    wanted = FreezeRequest(until=timestamp(2 * HOUR_NS))
    with pytest.raises(NotFound, match="stack blog has no services"):
        await store.update(set_freeze, "blog", wanted, by="bob", now_ns=0)
    await store.update(set_freeze, "shop", wanted, by="alice", now_ns=0)
    await store.update(set_freeze, "shop", replace(wanted, is_strict=True), by="bob", now_ns=HOUR_NS)
    assert list(store.view().get(Swarm, "c").change_freezes) == ["shop"]
    assert store.view().get(Swarm, "c").change_freezes["shop"].by == "bob"
    await store.update(end_freeze, "shop")
    with pytest.raises(NotFound, match="stack shop is not frozen"):
        await store.update(end_freeze, "shop")


# --- what waits -------------------------------------------------------------------------------------------------------


def test_tasks_stay_on_a_node_whose_labels_changed_until_the_end_of_the_freeze() -> None:
    task = a_task("old", service=NORTH, node="n1")
    world = World(NORTH, [task], [SOUTH_NODE])
    world.keeps_unfit = True
    assert world.steps() == []
    world.report("old", TaskState.FAILED)
    assert [type(step) for step in world.steps()] == [ReplaceTask], "repairs go on"
    world.put(task)
    world.keeps_unfit = False
    assert [type(step) for step in world.steps()] == [ReplaceTask]


SMALL = a_service(reserve=Resources(nano_cpus=10))
SMALL_NODE = a_node("n1", has=Resources(nano_cpus=1))


@pytest.mark.parametrize("has_freeze", [True, False])
@pytest.mark.parametrize(
    ("service", "node", "relocation"),
    [
        (NORTH, SOUTH_NODE, None),
        (SMALL, SMALL_NODE, None),
        (a_service(), a_node("n1"), Relocation(target=NodeId("n2"))),
    ],
)
async def test_a_task_that_was_about_to_leave_its_node_stays_if_a_freeze_has_begun_since(
    service: Service, node: Node, relocation: Relocation | None, *, has_freeze: bool
) -> None:
    store = await a_store(service, node, a_node("n2"))
    service = store.view().get(Service, service.id)
    old = replace(a_task("old", service=service, node="n1"), relocation=relocation)
    new = a_task("new", service=service, node="n2")
    tasks = [old, new] if relocation is not None else [old]
    await store.update(lambda tx: [tx.put(task) for task in tasks])
    world = World(service, tasks, [node, a_node("n2")])
    decided = [one for one in world.changes() if isinstance(one, ReplaceTask | RetireTask)]
    assert [one.task.id for one in decided] == ["old"], "the case that is to be tested"
    if has_freeze:
        wanted = FreezeRequest(until=timestamp(2 * HOUR_NS))
        await store.update(set_freeze, CLUSTER, wanted, by="alice", now_ns=0)
    await store.update_each(lambda tx, one: apply(tx, one, new_id, timestamp(0)), decided)
    assert store.view().get(Task, "old").is_wanted is has_freeze


def test_a_victim_of_preemption_leaves_a_node_that_does_not_fit_during_a_freeze() -> None:
    victim = replace(a_task("old", service=SMALL, node="n1"), preemption=Preemption(task_id=TaskId("vip")))
    (step,) = World(SMALL, [victim], [SMALL_NODE]).steps()
    assert isinstance(step, ReplaceTask)
    assert step.cause is None, "nothing holds it back"
    victim = replace(victim, spec=NORTH.spec.task_template)
    (step,) = World(NORTH, [victim], [SOUTH_NODE]).steps()
    assert isinstance(step, ReplaceTask)
    assert step.cause is None


def test_a_task_of_a_lost_node_is_replaced_during_a_freeze() -> None:
    lost = replace(SOUTH_NODE, status=NodeStatus(state=NodeState.DOWN))
    world = World(NORTH, [a_task("old", service=NORTH, node="n1")], [lost])
    world.keeps_unfit = True
    assert [type(step) for step in world.steps()] == [ReplaceTask]


def test_a_global_service_keeps_its_task_where_only_the_labels_changed() -> None:
    agent = a_service("agent", is_global=True, constraints=("node.labels.zone == north",))
    task = a_task(slot=0, service=agent, node="n1")
    assert reconcile(agent, [task], [SOUTH_NODE], keeps_unfit=True) == []
    failed = replace(task, status=replace(task.status, state=TaskState.FAILED))
    assert [type(one) for one in reconcile(agent, [failed], [SOUTH_NODE], keeps_unfit=True)] == [RetireTask]
    placement = replace(agent.spec.task_template.placement, constraints=("node.labels.zone == west",))
    template = replace(agent.spec.task_template, placement=placement)
    moved = replace(agent, spec=replace(agent.spec, task_template=template))
    found = reconcile(moved, [task], [SOUTH_NODE], keeps_unfit=True)
    assert [type(one) for one in found] == [RetireTask], "the user has changed the constraints"


@pytest.mark.parametrize(("replicas", "is_written"), [(2, False), (6, True)])
async def test_autoscaling_only_adds_tasks_during_a_freeze(replicas: int, is_written: bool) -> None:
    labels = {"skep.autoscale": "1..10", STACK_LABEL: "shop"}
    service = replace(
        a_service("web", replicas=4), spec=replace(a_service("web", replicas=4).spec, labels=labels)
    )
    scaling = autoscaling_of(labels)
    assert scaling is not None
    one = Scaling(service_id=service.id, present=4, scaling=scaling, replicas=replicas, reason="", now_ns=0)
    store = await a_store(service, shop=a_freeze())
    assert await store.update(write_replicas, one, check_quota) is is_written
    store = await a_store(service, blog=a_freeze())
    assert await store.update(write_replicas, one, check_quota)


async def test_lost_nodes_are_not_removed_during_a_freeze_of_the_cluster() -> None:
    lost = replace(a_node("n1"), status=NodeStatus(state=NodeState.DOWN))
    for store, is_removed in ((await a_store(lost, cluster=a_freeze()), False), (await a_store(lost), True)):
        assert await store.update(remove_lost, NodeId("n1"), lambda _: 1e9, 0) is is_removed
        assert (store.view().lookup(Node, "n1") is None) is is_removed


# --- what a strict freeze refuses -------------------------------------------------------------------------------------


def attempt(stack: str = "shop", **who: bool) -> Callable[[Transaction], bool]:
    return unless_frozen(lambda tx: True, stack, **{"is_override": False, "is_admin": True, **who})


@pytest.mark.parametrize(
    ("freezes", "who", "error"),
    [
        ({"shop": a_freeze()}, {}, None),
        ({"shop": a_freeze(is_strict=True)}, {}, FailedPrecondition),
        ({"blog": a_freeze(is_strict=True)}, {}, None),
        ({"cluster": a_freeze(is_strict=True)}, {}, FailedPrecondition),
        ({"cluster": a_freeze(is_strict=True)}, {"is_override": True}, None),
        ({"cluster": a_freeze(is_strict=True)}, {"is_override": True, "is_admin": False}, PermissionDenied),
        ({"shop": a_freeze(is_strict=True)}, {"is_override": True, "is_admin": False}, None),
    ],
)
async def test_a_strict_freeze_refuses_changes_unless_those_override_it_who_may_end_it(
    freezes: dict[str, ChangeFreeze], who: dict[str, bool], error: type[SkepError] | None
) -> None:
    store = await a_store(**freezes)
    if error is None:
        assert await store.update(attempt(**who))
        return
    with pytest.raises(error, match="is frozen until 2096-10-02 07:06 UTC by alice: sale"):
        await store.update(attempt(**who))


async def test_a_strict_freeze_that_begins_before_the_write_refuses_the_change() -> None:
    """The manager that runs the request may not show the freeze yet, although it was acknowledged."""
    store = await a_store()
    behind = MemoryStore(SystemClock(), store.cluster)
    behind.faults.lag_s = 0.05
    freezes = {CLUSTER: a_freeze(is_strict=True)}
    await store.update(lambda tx: tx.put(replace(cluster_of(tx), change_freezes=freezes)))
    assert not held_by(behind.view()), "the case that is to be tested"
    create = unless_frozen(lambda tx: tx.put(NORTH), is_override=False, is_admin=True)
    with pytest.raises(FailedPrecondition, match="the cluster is frozen until"):
        await behind.update(create)


async def test_a_service_does_not_leave_its_frozen_stack() -> None:
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:

        def freeze(tx: Transaction) -> Service:
            tx.put(replace(cluster_of(tx), change_freezes={"shop": a_freeze(is_strict=True)}))
            return tx.put(SHOP)

        version = (await api.store.update(freeze)).version.index
        web = {"Name": "web", "TaskTemplate": {"ContainerSpec": {"Image": "app"}}}
        body = [{"ID": SHOP.id, "Version": version, "Spec": web}]
        async with client.post("/skep/services/changes", json=body) as response:
            assert "stack shop is frozen until" in await response.text()
        async with client.post(f"/services/{SHOP.id}/update?version={version}", json=web) as response:
            assert "stack shop is frozen until" in await response.text()


async def test_requests_are_refused_by_name_and_pass_with_the_header() -> None:
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        body = {"Until": timestamp(api.clock.now_ns() + HOUR_NS), "Reason": "sale", "IsStrict": True}
        async with client.put("/skep/cluster/freeze", json=body) as response:
            assert response.status == 200
        async with client.get("/skep/cluster/freezes") as response:
            assert (await response.json())["Freezes"][""]["Reason"] == "sale"
        web = {"Name": "web", "TaskTemplate": {"ContainerSpec": {"Image": "app"}}}
        async with client.post("/services/create", json=web) as response:
            assert response.status == 400
            message = (await response.json())["message"]
            assert (
                ": sale. Wait, end it (skep cluster unfreeze), or override it: skep stack deploy" in message
            )
            assert message.endswith("other requests the header X-Skep-Override-Freeze: true")
        async with client.post(
            "/services/create", json=web, headers={"X-Skep-Override-Freeze": "true"}
        ) as response:
            assert response.status == 201
        (node,) = api.store.view().find(Node)
        drain = {"Role": "manager", "Availability": "drain"}
        path = f"/nodes/{node.id}/update?version={node.version.index}"
        async with client.post(path, json=drain) as response:
            assert response.status == 400
        async with client.post(path, json={**drain, "Availability": "pause"}) as response:
            assert response.status == 200
        drained = replace(node, spec=replace(node.spec, availability=Availability.DRAIN))
        version = (await api.store.update(lambda tx: tx.put(drained))).version.index
        path = f"/nodes/{node.id}/update?version={version}"
        now = {**drain, "Labels": {"skep.drain-now": "true"}}
        async with client.post(path, json=now) as response:
            assert response.status == 400, (
                "it stops the tasks that the drain keeps until their replacements run"
            )
        async with client.post(path, json={**drain, "Labels": {"zone": "north"}}) as response:
            assert response.status == 200
        assert [text[:40] for text in freeze_warnings(api.store.view())] == [
            "WARNING: the cluster is frozen until " + body["Until"][:3]
        ]
        async with client.delete("/skep/cluster/freeze") as response:
            assert response.status == 204
        async with client.delete("/services/web") as response:
            assert response.status == 200


async def test_users_see_the_windows_of_their_stacks() -> None:
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        web = {
            "Name": "web",
            "Labels": {STACK_LABEL: "shop"},
            "TaskTemplate": {"ContainerSpec": {"Image": "app"}},
        }
        async with client.post("/services/create", json=web) as response:
            assert response.status == 201
        body = {"Cron": "0 2 * * *", "TimeZone": "UTC", "Length": HOUR_NS}
        async with client.put("/skep/stacks/shop/window", json=body) as response:
            assert response.status == 200
        async with client.put("/skep/stacks/blog/window", json=body) as response:
            assert response.status == 404
        async with client.get("/skep/cluster/freezes") as response:
            found = await response.json()
            assert found["StackWindows"]["shop"]["Cron"] == body["Cron"]
            assert "Window" not in found
        async with client.get("/swarm") as response:
            assert "StackWindows" not in await response.json()
        async with client.delete("/skep/stacks/shop/window") as response:
            assert response.status == 204
        async with client.delete("/skep/stacks/shop/window") as response:
            assert response.status == 404


# --- time -------------------------------------------------------------------------------------------------------------


def test_the_leader_ends_freezes_and_opens_the_window_at_their_times() -> None:
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    store = MemoryStore(clock)

    def words() -> str:
        return held_by(store.view(), "shop")

    async def live() -> None:
        now_ns = clock.now_ns()
        await store.update(lambda tx: [tx.put(one) for one in (Swarm(id=ClusterId("c")), SHOP)])
        until = FreezeRequest(until=timestamp(now_ns + 90 * SECOND_NS))
        await store.update(set_freeze, "shop", until, by="", now_ns=now_ns)
        freezes = asyncio.create_task(ChangeFreezes(store, clock, Random(1)).run())
        await asyncio.sleep(88)
        assert words().startswith("stack shop is frozen")
        await asyncio.sleep(4)
        assert words() == ""
        window = MaintenanceWindow(cron="*/10 * * * *", length=120 * SECOND_NS)
        seen = []
        await store.update(set_window, window, now_ns=clock.now_ns())
        for _ in range(40):
            seen.append(bool(words()))
            await asyncio.sleep(30)
        assert 6 <= seen.count(False) <= 10, "two of ten minutes"
        await store.update(set_window, None, now_ns=clock.now_ns())
        await store.update(set_window, window, "shop", now_ns=clock.now_ns())
        seen.clear()
        for _ in range(40):
            seen.append(bool(words()))
            await asyncio.sleep(30)
        assert 6 <= seen.count(False) <= 10
        freezes.cancel()
        await asyncio.gather(freezes, return_exceptions=True)

    loop.run_until_complete(live())


def test_each_change_is_an_event() -> None:
    frozen = Swarm(id=ClusterId("c"), change_freezes={"shop": a_freeze()})
    free = replace(frozen, change_freezes={})
    assert [action for action, _ in freeze_changes(free, frozen)] == ["begin-freeze"]
    assert [facts["stack"] for _, facts in freeze_changes(frozen, free)] == ["shop"]
    assert list(freeze_changes(frozen, frozen)) == []
    window = MaintenanceWindow(cron="0 2 * * *", length=HOUR_NS)
    closed = replace(window, closed_until=timestamp(HOUR_NS))
    shops = [replace(free, stack_windows={"shop": one} if one else {}) for one in (None, closed, window)]
    assert [list(freeze_changes(a, b)) for a, b in pairwise((*shops, free))] == [
        [("close-window", {"stack": "shop", "message": closed.words("shop")})],
        [("open-window", {"stack": "shop", "message": "the maintenance window of stack shop is open"})],
        [("remove-window", {"stack": "shop", "message": "the maintenance window of stack shop was removed"})],
    ]
    assert all(_holds_others(a, b) for a, b in pairwise((*shops, free)))
    windows = [None, window, closed, window, None]
    pairs = pairwise(windows)
    found = [
        [action for action, _ in freeze_changes(replace(free, window=a), replace(free, window=b))]
        for a, b in pairs
    ]
    assert found == [["open-window"], ["close-window"], ["open-window"], ["remove-window"]]


@pytest.mark.parametrize(
    "verb", ["stop", "start", "update/abort?version=1", "update/promote", "update/switch-back"]
)
async def test_a_strict_freeze_refuses_each_operation_on_a_service(verb: str) -> None:
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:

        def freeze(tx: Transaction) -> None:
            swarm = cluster_of(tx)
            tx.put(replace(swarm, change_freezes={CLUSTER: a_freeze(is_strict=True)}))
            tx.put(NORTH)

        await api.store.update(freeze)
        # A deploy that has begun may end, but these requests do not check that there is one.
        for headers in ({}, {REVISION_HEADER: "1"}):
            async with client.post(f"/skep/services/{NORTH.id}/{verb}", headers=headers) as response:
                assert "the cluster is frozen until" in await response.text()

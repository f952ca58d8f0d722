"""Where services would run, asked of the scheduler: nothing is written, and every one takes room from the next."""

import asyncio
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.aio.time_slices import STEP
from skep.api.formats.service_form import settled
from skep.manager.routes import ManagerApi, application
from skep.manager.routes.extensions import placement
from skep.manager.routes.extensions.placement import accounting_of
from skep.manager.scheduler.explaining.dry_run import BATCH, DryRun
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.model.container import ContainerSpec, Mount
from skep.model.node import Availability
from skep.model.options.affinity import ANTI_AFFINITY
from skep.model.options.labels import MIN_AVAILABLE
from skep.model.service import (
    REPLICAS_MAX,
    Placement,
    ResourceRequirements,
    Resources,
    Service,
    ServiceSpec,
    UpdateConfig,
    UpdateOrder,
)
from skep.model.staging.updates import UPDATE, UPDATE_STEPS
from skep.model.swarm import Swarm
from skep.model.task import TaskState, VolumeAttachment
from skep.model.values.meta import Version
from skep.model.volume import PublishState
from skep.store.interface import Object, View
from skep.store.memory import MemoryStore
from tests.conformance.manager import a_manager_api
from tests.support.builders import a_cluster_volume, a_node, a_service, a_service_spec, a_task, with_disks
from tests.support.managers.counted_calls import most_calls_between_pauses
from tests.support.managers.wire_rig import until
from tests.unit.manager.scheduler.test_full_disks import full

GIB = 1 << 30
NODES = 3000


def named(service: Service) -> str:
    return service.spec.name


@pytest.fixture
async def cluster():
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        for node in api.store.view().find(type(a_node("x"))):
            await put(api, replace(node, spec=replace(node.spec, availability=Availability.DRAIN)))
        yield api, client


async def put(api: ManagerApi, *objects: Object) -> None:
    for one in objects:
        await api.store.update(lambda tx, one=one: tx.put(one))


async def asked(cluster: Any, *specs: dict[str, Any]) -> list[Any]:
    api, client = cluster
    before = api.store.view().revision
    async with client.post("/skep/services/placement", json=specs) as response:
        answer = await response.json()
        assert response.status == 200, answer
    assert api.store.view().revision == before, "it wrote something"
    return answer


def a_spec(
    name: str, *, replicas: int = 1, memory: int = 0, constraint: str = "", **fields: Any
) -> dict[str, Any]:
    template: dict[str, Any] = {"ContainerSpec": {"Image": "busybox:1"}}
    if memory:
        template["Resources"] = {"Reservations": {"MemoryBytes": memory}}
    if constraint:
        template["Placement"] = {"Constraints": [constraint]}
    mode = {"Mode": {"Replicated": {"Replicas": replicas}}}
    return {"Name": name, "TaskTemplate": template, **mode, **fields}


def shares(answer: Any) -> dict[str, int]:
    return {one["Hostname"]: one["Tasks"] for one in answer["Nodes"]}


async def two_nodes(api: ManagerApi) -> None:
    has = Resources(nano_cpus=4 * 10**9, memory_bytes=4 * GIB)
    await put(api, a_node("n1", has=has, labels={"zone": "north"}), a_node("n2", has=has))


async def test_tasks_are_spread_and_each_service_takes_room_from_the_next(cluster) -> None:
    await two_nodes(cluster[0])
    first, second = await asked(
        cluster, a_spec("a", replicas=3, memory=2 * GIB), a_spec("b", replicas=2, memory=2 * GIB)
    )
    assert sorted(shares(first).values()) == [1, 2]
    assert first["Error"] == ""
    assert sum(shares(second).values()) == 1
    assert second["Desired"] == 2
    assert "no suitable node (insufficient resources on 2 nodes" in second["Error"]
    reasons = {one["Hostname"]: one["Reasons"] for one in second["Verdicts"]}
    assert reasons["n1"] == ["insufficient resources: 2048 MiB of memory requested, 0 not reserved"]


async def test_what_no_node_meets_is_named(cluster) -> None:
    await two_nodes(cluster[0])
    north, nowhere = await asked(
        cluster,
        a_spec("a", replicas=2, constraint="node.labels.zone==north"),
        a_spec("b", constraint="node.labels.zone==west"),
    )
    assert shares(north) == {"n1": 2}
    assert shares(nowhere) == {}
    assert "; no suitable node (scheduling constraints not satisfied on 2 nodes" in nowhere["Error"]
    assert nowhere["Error"].startswith("needs node.labels.zone==west; ")
    (huge,) = await asked(cluster, a_spec("c", memory=64 * GIB))
    assert huge["Error"] == "needs 65536 MiB of memory; the largest node, n1, has 4096 MiB"


async def test_a_global_service_is_on_the_nodes_that_meet_its_constraints(cluster) -> None:
    await two_nodes(cluster[0])
    everywhere, north = await asked(
        cluster,
        a_spec("a", Mode={"Global": {}}),
        a_spec("b", constraint="node.labels.zone==north", Mode={"Global": {}}),
    )
    assert shares(everywhere) == {"n1": 1, "n2": 1}
    assert (shares(north), north["Desired"]) == ({"n1": 1}, 1)


async def a_running_service(api: ManagerApi, **fields: Any) -> Service:
    """Four tasks of 1 GiB on n1."""
    service = a_service("web", replicas=4, reserve=Resources(memory_bytes=GIB))
    service = replace(service, spec=settled(replace(service.spec, **fields)))
    tasks = [
        a_task(service=service, slot=slot, node="n1", state=TaskState.RUNNING, id=f"t{slot}")
        for slot in (1, 2, 3, 4)
    ]
    await put(api, service, *tasks)
    return service


async def test_tasks_that_are_not_replaced_stay_where_they_are(cluster) -> None:
    api, _ = cluster
    await two_nodes(api)
    await a_running_service(api)
    (more,) = await asked(cluster, a_spec("web", replicas=6, memory=GIB))
    assert shares(more) == {"n1": 4, "n2": 2}
    (fewer,) = await asked(cluster, a_spec("web", replicas=1, memory=GIB))
    assert shares(fewer) == {"n1": 1}


@pytest.mark.parametrize(
    ("order", "fits"), [(UpdateOrder.STOP_FIRST, True), (UpdateOrder.START_FIRST, False)]
)
async def test_the_room_of_tasks_that_are_replaced_counts_as_the_order_has_it(cluster, order, fits) -> None:
    api, _ = cluster
    has = Resources(nano_cpus=4 * 10**9, memory_bytes=4 * GIB)
    await put(api, a_node("n1", has=has))
    await a_running_service(api, update_config=UpdateConfig(parallelism=1, order=order))
    spec = a_spec("web", replicas=4, memory=GIB, UpdateConfig={"Parallelism": 1, "Order": order.value})
    spec["TaskTemplate"]["ContainerSpec"]["Image"] = "busybox:2"
    (found,) = await asked(cluster, spec)
    assert (found["Error"] == "") is fits
    assert shares(found) == ({"n1": 4} if fits else {})


@pytest.mark.parametrize(
    ("minimum", "gib", "fits"), [("100%", 4, False), ("100%", 5, True), ("4", 4, False), ("3", 4, True)]
)
async def test_a_label_that_keeps_all_tasks_needs_room_for_the_new_one_too(
    cluster, minimum, gib, fits
) -> None:
    api, _ = cluster
    await put(api, a_node("n1", has=Resources(nano_cpus=4 * 10**9, memory_bytes=gib * GIB)))
    await a_running_service(api)
    labels = {MIN_AVAILABLE: minimum}
    spec = a_spec("web", replicas=4, memory=GIB, Labels=labels, UpdateConfig={"Parallelism": 1})
    spec["TaskTemplate"]["ContainerSpec"]["Image"] = "busybox:2"
    (found,) = await asked(cluster, spec)
    assert (found["Error"] == "") is fits


PORT = {"TargetPort": 80, "PublishedPort": 9090, "PublishMode": "host", "Protocol": "tcp"}


@pytest.mark.parametrize("mode", [{"Global": {}}, {"Replicated": {"Replicas": 2}}])
@pytest.mark.parametrize("ours", [True, False])
async def test_start_first_stops_a_task_first_that_has_the_host_port_of_the_new_one(
    cluster, mode, ours
) -> None:
    """As the update does.  The port of another service stays in use."""
    api, _ = cluster
    await two_nodes(api)
    spec = a_spec("web" if ours else "other")
    spec |= {"Mode": mode, "EndpointSpec": {"Ports": [PORT]}, "UpdateConfig": {"Order": "start-first"}}
    made = settled(msgspec.convert({**spec, "Name": "web"}, ServiceSpec))
    await put(api, replace(a_service("web"), spec=made))
    (service,) = api.store.view().find(Service, name="web")
    tasks = [
        a_task(service=service, node=node, state=TaskState.RUNNING, id=f"t{node}") for node in ("n1", "n2")
    ]
    await put(api, *tasks)
    spec["TaskTemplate"]["ContainerSpec"]["Image"] = "busybox:2"
    (found,) = await asked(cluster, spec)
    assert shares(found) == ({"n1": 1, "n2": 1} if ours else {})
    assert ("host-mode port already in use" in found["Error"]) is not ours


@pytest.mark.parametrize("order", ["start-first", "stop-first"])
async def test_tasks_that_run_apart_may_start_next_to_the_ones_that_they_replace(cluster, order) -> None:
    """As the scheduler places them.  There is no third node for a third task."""
    api, _ = cluster
    await two_nodes(api)
    labels = {ANTI_AFFINITY: "web"}
    service = a_service("web", replicas=2)
    service = replace(service, spec=settled(replace(service.spec, labels=labels)))
    tasks = [
        a_task(service=service, slot=slot, node=f"n{slot}", state=TaskState.RUNNING, id=f"t{slot}")
        for slot in (1, 2)
    ]
    await put(api, service, *tasks)
    other = a_task(service=service, slot=1, node="n1", state=TaskState.RUNNING, id="t0")
    await put(api, replace(other, spec_version=Version(index=9)))  # of an update that was replaced
    for replicas in (2, 3):
        spec = a_spec("web", replicas=replicas, Labels=labels, UpdateConfig={"Order": order})
        spec["TaskTemplate"]["ContainerSpec"]["Image"] = "busybox:2"
        (found,) = await asked(cluster, spec)
        assert shares(found) == {"n1": 1, "n2": 1}
        assert (found["Error"] == "") is (replicas == 2)


async def test_a_task_that_is_stopping_already_gives_its_host_port_to_the_new_one(cluster) -> None:
    api, _ = cluster
    await two_nodes(api)
    spec = a_spec("web") | {"Mode": {"Global": {}}, "EndpointSpec": {"Ports": [PORT]}}
    await put(api, replace(a_service("web"), spec=settled(msgspec.convert(spec, ServiceSpec))))
    (service,) = api.store.view().find(Service, name="web")
    for node, desired in (("n1", TaskState.SHUTDOWN), ("n2", TaskState.RUNNING)):
        state = TaskState.RUNNING
        await put(api, a_task(service=service, node=node, state=state, desired=desired, id=f"t{node}"))
    (found,) = await asked(cluster, spec)
    assert (shares(found), found["Error"]) == ({"n1": 1, "n2": 1}, "")


@pytest.mark.parametrize(
    ("order", "zone", "node"),
    [
        (UpdateOrder.STOP_FIRST, "", "n1"),
        (UpdateOrder.STOP_FIRST, "south", "n2"),
        (UpdateOrder.START_FIRST, "", ""),
    ],
)
async def test_a_cluster_volume_goes_with_the_task_that_is_replaced(cluster, order, zone, node) -> None:
    """With stop-first it is unpublished for the new task, which may be on another node; beside it there is none."""
    api, _ = cluster
    nodes = a_node("n1", labels={"zone": "north"}), a_node("n2", labels={"zone": "south"})
    volume = a_cluster_volume("orders", on={"n1": PublishState.PUBLISHED})
    mount = Mount(type="cluster", source="orders", target="/d")
    spec = a_service_spec("db", update=UpdateConfig(parallelism=1, order=order))
    container = ContainerSpec(image="busybox:1", mounts=(mount,))
    spec = settled(replace(spec, task_template=replace(spec.task_template, container_spec=container)))
    service = a_service("db", spec=spec)
    attachment = VolumeAttachment(id=volume.id, source="orders", target="/d")
    task = replace(a_task("t1", service=service, node="n1"), volumes=(attachment,))
    await put(api, *map(with_disks, nodes), volume, service, task)
    planned = a_spec("db", constraint=f"node.labels.zone=={zone}" if zone else "")
    planned["UpdateConfig"] = {"Parallelism": 1, "Order": order.value}
    planned["TaskTemplate"]["ContainerSpec"] = {
        "Image": "busybox:2",
        "Mounts": [{"Type": "cluster", "Source": "orders", "Target": "/d"}],
    }
    (found,) = await asked(cluster, planned)
    assert shares(found) == ({node: 1} if node else {})
    assert ("cannot fulfill requested CSI volume mounts" in found["Error"]) is (not node)


async def test_an_update_stays_on_a_full_node_and_a_scale_up_does_not_go_there(cluster) -> None:
    api, _ = cluster
    await put(api, full("n1"))
    await a_running_service(api)
    spec = a_spec("web", replicas=4, memory=GIB)
    spec["TaskTemplate"]["ContainerSpec"]["Image"] = "busybox:2"
    (updated,) = await asked(cluster, spec)
    assert (shares(updated), updated["Error"]) == ({"n1": 4}, "")
    (scaled,) = await asked(cluster, a_spec("web", replicas=5, memory=GIB))
    assert shares(scaled) == {"n1": 4}
    assert "disk full on 1 node" in scaled["Error"]


@pytest.mark.parametrize("order", list(UpdateOrder))
async def test_a_task_with_data_in_a_local_volume_returns_to_its_node_where_it_fits(cluster, order) -> None:
    api, _ = cluster
    await two_nodes(api)
    spec = a_service_spec("db", update=UpdateConfig(parallelism=1, order=order))
    mount = Mount(type="volume", source="data", target="/d")
    container = ContainerSpec(image="busybox:1", mounts=(mount,))
    spec = settled(replace(spec, task_template=replace(spec.task_template, container_spec=container)))
    service = a_service("db", spec=spec)
    busy = [a_task(f"b{number}", service=a_service("b"), node="n1") for number in range(3)]
    await put(api, service, a_task("t1", service=service, slot=1, node="n1"), *busy)
    planned = a_spec("db", memory=GIB)
    planned["UpdateConfig"] = {"Parallelism": 1, "Order": order.value}
    planned["TaskTemplate"]["ContainerSpec"] = {
        "Image": "busybox:2",
        "Mounts": [{"Type": "volume", "Source": "data", "Target": "/d"}],
    }
    (found,) = await asked(cluster, planned)
    assert shares(found) == {"n1": 1}
    (more,) = await asked(cluster, {**planned, "Mode": {"Replicated": {"Replicas": 2}}})
    assert shares(more) == {"n1": 1, "n2": 1}
    planned["TaskTemplate"]["Placement"] = {"Constraints": ["node.hostname!=n1"]}
    (elsewhere,) = await asked(cluster, planned)
    assert shares(elsewhere) == {"n2": 1}


async def test_secrets_and_configs_need_not_exist_and_do_not_move_tasks(cluster) -> None:
    api, _ = cluster
    await two_nodes(api)
    secret = {"SecretName": "s", "File": {"Name": "s", "UID": "0", "GID": "0", "Mode": 292}}
    spec = a_spec("a")
    spec["TaskTemplate"]["ContainerSpec"]["Secrets"] = [secret]
    (found,) = await asked(cluster, spec)
    assert (sum(shares(found).values()), found["Error"]) == (1, "")


async def test_what_leaves_a_service_makes_room_for_the_next(cluster) -> None:
    api, _ = cluster
    await put(api, a_node("n1", has=Resources(nano_cpus=4 * 10**9, memory_bytes=4 * GIB)))
    await a_running_service(api)
    fewer, more = await asked(
        cluster, a_spec("web", replicas=1, memory=GIB), a_spec("b", replicas=3, memory=GIB)
    )
    assert (shares(fewer), shares(more)) == ({"n1": 1}, {"n1": 3})


async def test_start_first_needs_room_for_as_many_as_are_updated_at_once(cluster) -> None:
    api, _ = cluster
    await put(api, a_node("n1", has=Resources(nano_cpus=4 * 10**9, memory_bytes=5 * GIB)))
    await a_running_service(api)
    for at_once, fits in ((1, True), (2, False)):
        spec = a_spec(
            "web", replicas=4, memory=GIB, UpdateConfig={"Parallelism": at_once, "Order": "start-first"}
        )
        spec["TaskTemplate"]["ContainerSpec"]["Image"] = "busybox:2"
        (found,) = await asked(cluster, spec)
        assert (found["Error"] == "") is fits


@pytest.mark.parametrize(
    ("labels", "image", "gib", "fits"),
    [
        ({UPDATE: "blue-green"}, "busybox:2", 7, False),
        ({UPDATE: "blue-green"}, "busybox:2", 8, True),
        (
            {UPDATE: "blue-green"},
            "busybox:1",
            4,
            False,
        ),  # an update by force, which has no steps, starts first
        ({UPDATE: "blue-green"}, "busybox:1", 5, True),
        ({UPDATE: "canary"}, "busybox:2", 4, False),
        ({UPDATE: "canary"}, "busybox:2", 5, True),
        ({UPDATE: "canary", UPDATE_STEPS: "10%,50%"}, "busybox:2", 5, False),
        ({UPDATE: "canary", UPDATE_STEPS: "10%,50%"}, "busybox:2", 6, True),
    ],
)
async def test_a_staged_update_needs_room_for_all_old_tasks_and_the_new_ones(
    cluster, labels: dict[str, str], image: str, gib: int, fits: bool
) -> None:
    api, _ = cluster
    await put(api, a_node("n1", has=Resources(nano_cpus=4 * 10**9, memory_bytes=gib * GIB)))
    await a_running_service(api, labels=labels)
    spec = a_spec("web", replicas=4, memory=GIB, Labels=labels)
    spec["TaskTemplate"]["ContainerSpec"]["Image"] = image
    spec["TaskTemplate"]["ForceUpdate"] = 1
    (found,) = await asked(cluster, spec)
    assert (found["Error"] == "") is fits
    assert fits or "insufficient resources on 1 node" in found["Error"]
    reasons = {one["Hostname"]: one["Reasons"] for one in found.get("Verdicts") or ()}
    assert found.get("Old", 0) == (0 if fits else 4)
    assert fits or reasons["n1"][0].startswith("insufficient resources: 1024 MiB of memory requested, 0 not")


async def test_what_the_cluster_would_refuse_is_said_and_the_others_are_placed(cluster) -> None:
    await two_nodes(cluster[0])
    bad, good = await asked(cluster, a_spec("a", constraint="what is this"), a_spec("b"))
    assert bad["Error"] == "constraint expected one operator from ==, !="
    assert sum(shares(good).values()) == 1


async def test_too_many_at_once_are_refused(cluster) -> None:
    _, client = cluster
    jobs = {"Mode": {"ReplicatedJob": {"MaxConcurrent": 10**9, "TotalCompletions": 10**9}}}
    for spec in (a_spec("a", replicas=10**9), a_spec("a", **jobs)):
        async with client.post("/skep/services/placement", json=[spec]) as response:
            assert response.status == 400
            assert "too much at once" in (await response.json())["message"]


async def test_services_on_all_nodes_count_against_the_bound_as_often_as_there_are_nodes(cluster) -> None:
    api, client = cluster
    await two_nodes(api)
    everywhere = {"Mode": {"Global": {}}}
    assert [one["Desired"] for one in await asked(cluster, a_spec("a", **everywhere))] == [2]
    almost = a_spec("b", replicas=REPLICAS_MAX - 2)  # there are three nodes, with the manager
    async with client.post("/skep/services/placement", json=[almost, a_spec("a", **everywhere)]) as response:
        assert "too much at once" in (await response.json())["message"]


async def test_nothing_about_many_nodes_or_tasks_is_looked_at_without_a_pause(cluster) -> None:
    api, _ = cluster
    service = a_service("a", spec=settled(a_service_spec("a", is_global=True)))
    await put(api, *(a_node(f"n{n}") for n in range(4 * STEP)), service)
    await put(api, *(a_task(f"t{n}", service=service, node=f"n{n}") for n in range(2 * STEP)))
    view = api.store.view()
    steps = list(DryRun(view, await accounting_of(view), named).placing(service.spec))
    assert steps[-1].desired == 4 * STEP
    assert len(steps) > 4 + 2 + 2 * STEP // BATCH


async def test_two_are_made_at_a_time_and_few_wait(cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    api, client = cluster
    may_go_on, begun = asyncio.Event(), 0

    async def slowly(view: View) -> Accounting:
        nonlocal begun
        begun += 1
        await may_go_on.wait()
        return await accounting_of(view)

    monkeypatch.setattr(placement, "accounting_of", slowly)

    async def ask() -> int:
        async with client.post("/skep/services/placement", json=[a_spec("a")]) as response:
            return int(response.status)

    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(ask()) for _ in range(10)]
        await until(lambda: begun == 2 and api.plans.waiting == 8)
        assert await ask() == 500
        may_go_on.set()
    assert [one.result() for one in asking] == [200] * 10


async def test_one_that_takes_too_long_ends(cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_WITHIN_S", 0.0)
    _, client = cluster
    async with client.post("/skep/services/placement", json=[a_spec("a")]) as response:
        assert response.status == 500
        assert "send fewer services at once" in (await response.json())["message"]


@pytest.mark.parametrize(
    "template",
    [
        {"placement": Placement(constraints=("node.labels.zone!=a", "node.labels.zone!=b"))},
        {"placement": Placement(constraints=("node.labels.zone==a",))},
        {"resources": ResourceRequirements(reservations=Resources(memory_bytes=1 << 60))},
        {"resources": ResourceRequirements(reservations=Resources(memory_bytes=1))},
    ],
)
async def test_no_step_looks_at_more_than_some_nodes(template: dict[str, Any]) -> None:
    """Counted are calls between two pauses, which are the same on any machine."""
    store = MemoryStore(SystemClock())
    await store.update_each(lambda tx, n: tx.put(a_node(f"n{n}")), range(NODES))
    view = store.view()
    dry_run = DryRun(view, await accounting_of(view), named)
    spec = settled(a_service_spec("a", replicas=10))
    spec = replace(spec, task_template=replace(spec.task_template, **template))
    assert most_calls_between_pauses(dry_run.placing(spec)) < 7 * NODES


async def test_a_service_of_higher_priority_comes_first_and_says_what_stops_for_it(cluster) -> None:
    api, _ = cluster
    await two_nodes(api)
    await a_running_service(api)
    low, high = a_spec("low", memory=4 * GIB), a_spec("high", memory=4 * GIB, Labels={"skep.priority": "1"})
    first, second = await asked(cluster, low, high)
    assert (first["Name"], shares(first), first["Error"]) == ("high", {"n2": 1}, "")
    assert "no suitable node" in second["Error"]
    (alone,) = await asked(cluster, {**high, "Mode": {"Replicated": {"Replicas": 2}}})
    assert "no suitable node" in alone["Error"]
    assert "Preempted" not in alone
    (swarm,) = api.store.view().find(Swarm)
    await put(api, replace(swarm, spec=replace(swarm.spec, labels={"skep.preemption": "true"})))
    (both,) = await asked(cluster, {**high, "Mode": {"Replicated": {"Replicas": 2}}})
    assert (shares(both), both["Error"]) == ({"n1": 1, "n2": 1}, "")
    assert both["Preempted"] == [{"Name": "web", "Tasks": 4}]
    (all_nodes,) = await asked(cluster, {**high, "Mode": {"Global": {}}})
    assert (shares(all_nodes), all_nodes["Preempted"]) == ({"n1": 1, "n2": 1}, [{"Name": "web", "Tasks": 4}])

"""Lists: filters, counts, and that a long one does not hold the loop."""

import asyncio

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer
from msgspec.structs import replace

from skep.api.formats.service_form import settled
from skep.errors import Unavailable
from skep.manager.control.services import create_service
from skep.manager.routes import application
from skep.model.node import Availability, Node, NodeState
from skep.model.service import (
    GlobalJob,
    Placement,
    ReplicatedJob,
    RestartCondition,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceSpec,
)
from skep.model.swarm import Freeze, Swarm
from skep.model.task import ContainerStatus, Restart, Task, TaskState, TaskStatus
from skep.model.task_end import EndCause, KeptLine, TaskEnd
from skep.model.values.ids import NodeId
from skep.model.values.times import ZERO_TIME, Timestamp
from skep.store.kinds import Revocation
from skep.store.transactions.updates import NO_LEADER
from tests.conformance.manager import a_manager_api
from tests.support.builders import a_node, a_service_spec, a_task
from tests.support.harness.own_time import own_time


@pytest.fixture
async def cluster():
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        yield api, client


async def a_stored_service(api, spec: ServiceSpec) -> Service:
    return await api.update(create_service, settled(spec), new_id=api.new_id, new_name=str, now=api.now())


async def put(api, *objects) -> None:
    await api.store.update_each(lambda tx, one: tx.put(one), objects)


async def ids(client, path: str, **filters: str) -> list[str]:
    wanted = msgspec.json.encode({key.replace("_", "-"): [value] for key, value in filters.items()}).decode()
    response = await client.get(path, params={"filters": wanted})
    assert response.status == 200, await response.text()
    return [item["ID"] for item in await response.json()]


async def test_a_task_that_no_node_accepts_is_to_run_though_the_one_before_it_still_does(cluster):
    """It would else be nowhere in ``docker service ps --filter desired-state=running``."""
    api, client = cluster
    web = await a_stored_service(api, a_service_spec("web"))
    refused = TaskStatus(state=TaskState.PENDING, err="no suitable node (...)")
    await put(
        api,
        a_task("t1", service=web, node="n1"),
        replace(a_task("t2", service=web, desired=TaskState.READY), status=refused),
        replace(
            a_task("t3", service=web, desired=TaskState.READY), status=TaskStatus(state=TaskState.PENDING)
        ),
        replace(a_task("t4", service=web, desired=TaskState.SHUTDOWN), status=refused),
    )
    assert await ids(client, "/tasks", desired_state="running") == ["t1", "t2"]
    assert await ids(client, "/tasks", desired_state="ready") == ["t2", "t3"]


async def test_tasks_are_found_by_whose_and_where_they_are(cluster):
    api, client = cluster
    web = await a_stored_service(api, a_service_spec("web"))
    db = await a_stored_service(api, a_service_spec("db"))
    (node,) = api.store.view().find(Node)
    one = a_task("t1", service=web, node=node.id)
    two = a_task("t2", service=db, desired=TaskState.SHUTDOWN)
    await put(api, one, two)
    assert await ids(client, "/tasks") == ["t1", "t2"]
    assert await ids(client, "/tasks", service="web") == ["t1"]
    assert await ids(client, "/tasks", service=db.id) == ["t2"]
    assert await ids(client, "/tasks", node="m1") == ["t1"]
    assert await ids(client, "/tasks", desired_state="shutdown") == ["t2"]
    assert await ids(client, "/tasks", name="web.1") == ["t1"]
    assert await ids(client, "/tasks", id="t2") == ["t2"]


async def test_a_task_that_waits_for_its_next_attempt_has_the_failure_before_it_as_its_error(cluster):
    """``docker service create`` shows it as its progress; engines show nothing there."""
    api, client = cluster
    web = await a_stored_service(api, a_service_spec("web"))
    container = ContainerStatus(container_id="c1", exit_code=3)
    status = TaskStatus(
        state=TaskState.FAILED,
        err="task: non-zero exit (3)",
        container_status=container,
        end=TaskEnd(cause="exit", lines=(KeptLine(text="boom"),)),
    )
    failed = replace(a_task("t1", service=web, desired=TaskState.SHUTDOWN), status=status)
    waits = a_task("t2", service=web, state=TaskState.READY, desired=TaskState.READY)
    waits = replace(
        waits, restart=Restart(failures=4, delay=10**9, not_before=Timestamp("2020-01-01T10:00:00Z"))
    )
    await put(api, failed, waits)
    shown = {one["ID"]: one["Status"]["Err"] for one in await (await client.get("/tasks")).json()}
    assert shown == {
        "t1": "task: non-zero exit (3)",
        "t2": 'exit 3, last line "boom"; next attempt in 0 s (crash loop, 4th)',
    }


async def test_a_node_that_is_down_has_the_time_of_its_last_heartbeat(cluster):
    api, client = cluster
    stamp = Timestamp("2026-01-31T11:59:59Z")
    down = replace(a_node("n1", state=NodeState.DOWN), silent_since=stamp)
    await put(api, down, replace(a_node("n2"), silent_since=stamp))
    shown = {one["ID"]: one.get("SilentSince") for one in await (await client.get("/nodes")).json()}
    assert (shown["n1"], shown["n2"]) == (stamp, None)


async def test_tasks_are_up_to_date_while_their_template_is_the_same(cluster):
    api, client = cluster
    web = await a_stored_service(api, a_service_spec("web"))
    await put(api, replace(a_task("t1", service=web), spec_version=web.spec_version))
    up_to_date = {"filters": '{"service": ["web"], "_up-to-date": ["true"]}'}

    async def found() -> int:
        return len(await (await client.get("/tasks", params=up_to_date)).json())

    assert await found() == 1
    await put(api, replace(web, spec=replace(web.spec, labels={"a": "b"})))
    assert await found() == 1
    web = api.store.view().get(Service, web.id)
    template = replace(web.spec.task_template, force_update=1)
    await put(api, replace(web, spec=replace(web.spec, task_template=template)))
    assert await found() == 0


async def test_a_task_is_up_to_date_while_its_node_fits_another_placement(cluster):
    api, client = cluster
    await put(api, a_node("n1", labels={"a": "b"}))
    web = await a_stored_service(api, a_service_spec("web"))
    await put(api, replace(a_task("t1", service=web, node="n1"), spec_version=web.spec_version))
    for constraint, expected in (("node.labels.a==b", ["t1"]), ("node.labels.a==c", [])):
        web = api.store.view().get(Service, web.id)
        template = replace(web.spec.task_template, placement=Placement(constraints=(constraint,)))
        await put(api, replace(web, spec=replace(web.spec, task_template=template)))
        response = await client.get("/tasks", params={"filters": '{"_up-to-date": ["true"]}'})
        assert [one["ID"] for one in await response.json()] == expected


async def test_a_status_counts_tasks(cluster):
    api, client = cluster
    web = await a_stored_service(api, a_service_spec("web", replicas=3))
    await put(api, a_task("t1", service=web), a_task("t2", service=web, state=TaskState.FAILED))
    (shown,) = await (await client.get("/v1.41/services?status=true")).json()
    assert shown["ServiceStatus"] == {"RunningTasks": 1, "DesiredTasks": 3, "CompletedTasks": 0}
    (shown,) = await (await client.get("/v1.40/services?status=true")).json()
    assert "ServiceStatus" not in shown


async def test_of_a_global_service_the_nodes_count_that_may_have_a_task(cluster):
    """Not those of its tasks that wait, come twice during an update, or are on nodes that may have none."""
    api, client = cluster
    web = await a_stored_service(
        api, a_service_spec("web", is_global=True, constraints=("node.labels.a==b",))
    )
    fits = {"a": "b"}
    await put(
        api,
        a_node("n1", labels=fits),
        a_node("n2", labels=fits),
        a_node("n3"),
        a_node("n4", labels=fits, state=NodeState.DOWN),
        a_node("n5", labels=fits, availability=Availability.DRAIN),
        a_node("n6", labels=fits, availability=Availability.PAUSE),
        a_node("n7", labels=fits, availability=Availability.PAUSE),
        a_task("t1", service=web, slot=0, node="n1"),
        a_task("t2", service=web, slot=0, node="n1", state=TaskState.READY, desired=TaskState.READY),
        a_task("t3", service=web, slot=0, node="n4"),
        a_task("t4", service=web, slot=0, node="n7"),
    )
    (shown,) = await (await client.get("/v1.41/services?status=true")).json()
    assert shown["ServiceStatus"]["DesiredTasks"] == 3


async def test_of_a_job_its_runs_count_and_what_they_have_completed(cluster):
    api, client = cluster
    job = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=2, total_completions=5))
    job_service = await a_stored_service(api, replace(a_service_spec("job"), mode=job))
    iteration = job_service.job_status.job_iteration

    def run(id: str, slot: int, state: TaskState, desired: TaskState = TaskState.COMPLETE) -> Task:
        return replace(
            a_task(id, service=job_service, slot=slot, state=state, desired=desired), job_iteration=iteration
        )

    await put(
        api,
        run("t1", 1, TaskState.COMPLETE),
        run("t2", 2, TaskState.FAILED, TaskState.SHUTDOWN),
        run("t3", 2, TaskState.COMPLETE),
        run("t4", 3, TaskState.RUNNING),
    )
    (shown,) = await (await client.get("/v1.41/services?status=true")).json()
    status = {"RunningTasks": 1, "DesiredTasks": 2, "CompletedTasks": 2, "TotalTasks": 5}
    assert shown["ServiceStatus"] == status


async def test_of_a_global_job_the_total_is_what_has_completed_and_what_has_not(cluster):
    api, client = cluster
    job = await a_stored_service(
        api, replace(a_service_spec("job"), mode=ServiceMode(global_job=GlobalJob()))
    )
    for node, state in (("n1", TaskState.COMPLETE), ("n2", TaskState.COMPLETE), ("n3", TaskState.RUNNING)):
        task = a_task(node, service=job, slot=0, node=node, state=state, desired=TaskState.COMPLETE)
        await put(api, a_node(node), replace(task, job_iteration=job.job_status.job_iteration))
    (shown,) = await (await client.get("/v1.41/services?status=true")).json()
    status = {"RunningTasks": 1, "DesiredTasks": 1, "CompletedTasks": 2, "TotalTasks": 3}
    assert shown["ServiceStatus"] == status


@pytest.mark.parametrize(
    ("states", "done"),
    [
        ([TaskState.COMPLETE], 1),
        ([TaskState.FAILED, TaskState.COMPLETE], 1),
        ([TaskState.COMPLETE, TaskState.RUNNING], 0),
        ([TaskState.COMPLETE, TaskState.FAILED], 0),
    ],
)
async def test_a_slot_of_a_one_shot_service_is_completed_with_its_youngest_task(cluster, states, done):
    api, client = cluster
    once = RestartPolicy(condition=RestartCondition.NONE)
    web = await a_stored_service(api, a_service_spec("migrate", replicas=1, restart=once))
    for number, state in enumerate(states):
        desired = state if state is TaskState.RUNNING else TaskState.SHUTDOWN
        task = a_task(f"t{number}", service=web, state=state, desired=desired)
        await put(api, replace(task, created_at=Timestamp(f"2026-11-24T10:00:0{number}Z")))
    (shown,) = await (await client.get("/v1.41/services?status=true")).json()
    assert (shown["ServiceStatus"]["DesiredTasks"], shown["ServiceStatus"]["CompletedTasks"]) == (1, done)
    explained = await (await client.get("/skep/services/migrate/explain")).json()
    assert (explained["IsHealthy"], explained.get("Completed", 0)) == (
        done or TaskState.RUNNING in states,
        done,
    )


async def test_a_one_shot_service_is_completed_on_nodes_that_may_have_its_tasks_only(cluster):
    api, client = cluster
    once = RestartPolicy(condition=RestartCondition.ON_FAILURE)
    web = await a_stored_service(api, a_service_spec("fix", is_global=True, restart=once))
    for node, availability in (("n1", Availability.ACTIVE), ("n2", Availability.DRAIN)):
        task = a_task(f"t{node}", service=web, slot=0, node=node, state=TaskState.COMPLETE)
        await put(
            api, a_node(node, availability=availability), replace(task, desired_state=TaskState.SHUTDOWN)
        )
    (shown,) = await (await client.get("/v1.41/services?status=true")).json()
    assert shown["ServiceStatus"] == {"RunningTasks": 0, "DesiredTasks": 2, "CompletedTasks": 1}  # m1 and n1


async def test_what_is_ours_is_not_shown(cluster):
    api, client = cluster
    web = await a_stored_service(api, a_service_spec("web"))
    await put(api, replace(a_task("t1", service=web), spec_version=web.spec_version))
    await put(api, replace(web, spec=replace(web.spec, labels={"skep.on-disconnect": "stop"})))
    assert api.store.view().get(Service, web.id).past_disconnects
    service = await (await client.get("/services/web")).json()
    task = await (await client.get("/tasks/t1")).json()
    (node,) = await (await client.get("/nodes")).json()
    assert not {"SpecVersion", "RemovedAt", "PastDisconnects"} & (service.keys() | task.keys())
    assert not {"Session", "Certificate", "Attachments"} & node.keys()


async def test_a_removed_service_is_hidden_and_its_tasks_are_not(cluster):
    api, client = cluster
    web = await a_stored_service(api, a_service_spec("web"))
    await put(api, a_task("t1", service=web))
    assert (await client.delete("/services/web")).status == 200
    assert await ids(client, "/services") == []
    assert await ids(client, "/tasks") == ["t1"]
    response = await client.get("/tasks", params={"filters": '{"service": ["web"]}'})
    assert (response.status, await response.json()) == (404, {"message": "service web not found"})


async def test_three_thousand_tasks_are_listed_without_holding_the_loop(cluster):
    api, client = cluster
    web = await a_stored_service(api, a_service_spec("web"))
    tasks = [a_task(f"t{number:05}", service=web) for number in range(3000)]
    await api.store.update_each(lambda tx, task: tx.put(task), tasks)
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        while True:
            before = own_time()
            await asyncio.sleep(0)
            longest_s = max(longest_s, own_time() - before)

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch())
        assert len(await ids(client, "/tasks", service="web")) == 3000
        watching.cancel()
    assert longest_s < 0.1


async def test_without_a_quorum_reads_fail_in_dockers_words_unless_stale_ones_are_asked_for(
    cluster, monkeypatch
):
    api, client = cluster

    async def no_quorum() -> None:
        raise Unavailable(NO_LEADER)

    monkeypatch.setattr(api.store, "barrier", no_quorum)
    for path in (
        "/services",
        "/services/web",
        "/tasks",
        "/nodes",
        "/swarm",
        "/secrets",
        "/networks",
        "/configs",
    ):
        response = await client.get(path)
        assert (response.status, await response.json()) == (503, {"message": NO_LEADER}), path
    response = await client.get("/services", headers={"X-Skep-Stale": "1"})
    assert (response.status, await response.json()) == (200, [])


async def test_bits_of_javascript_and_paths_in_names_are_only_words(cluster):
    _, client = cluster
    for word in ("..", "%2e%2e%2fetc", "a%00b", "%3Cscript%3E", "x" * 5000):
        response = await client.get(f"/services/{word}")
        assert response.status == 404


async def listed(client, path: str) -> dict[str, dict]:
    return {item["ID"]: item for item in await (await client.get(path)).json()}


async def test_a_long_list_of_nodes_shows_every_change(cluster):
    api, client = cluster
    nodes = [a_node(id) for id in ids_of(1500)]
    await put(api, *nodes)
    assert len(await listed(client, "/nodes")) == 1501
    await put(api, replace(nodes[7], spec=replace(nodes[7].spec, availability=Availability.DRAIN)))
    await api.store.update(lambda tx: tx.delete(Node, "n0008"))
    shown = await listed(client, "/nodes")
    assert shown["n0007"]["Spec"]["Availability"] == "drain"
    assert shown["n0006"]["Spec"]["Availability"] == "active"
    assert "n0008" not in shown
    assert len(shown) == 1500


async def test_a_freeze_shows_on_nodes_that_were_listed_before_it(cluster):
    api, client = cluster
    ready = [a_node(id) for id in ids_of(200)]
    down = [replace(node, status=replace(node.status, state=NodeState.DOWN)) for node in ready]
    await put(api, *down)

    async def messages() -> set[str]:
        shown = await listed(client, "/nodes")
        return {shown[node.id]["Status"].get("Message", "") for node in down}

    before = await messages()
    assert len(before) == 1
    (swarm,) = api.store.view().find(Swarm)
    freeze = Freeze(since="2026-01-01T00:00:00Z", nodes=tuple(node.id for node in down), ready_before=201)
    await put(api, replace(swarm, freeze=freeze))
    (frozen,) = await messages()
    assert "200 of 201 nodes went down at once" in frozen
    (swarm,) = api.store.view().find(Swarm)
    await put(api, replace(swarm, freeze=None))
    assert await messages() == before


def ids_of(count: int) -> list[str]:
    return [f"n{number:04}" for number in range(count)]


async def test_a_long_list_of_services_shows_every_change(cluster):
    api, client = cluster
    stored = [await a_stored_service(api, a_service_spec(name)) for name in ids_of(200)]
    assert len(await listed(client, "/services")) == 200
    changed = replace(stored[3], spec=replace(stored[3].spec, labels={"a": "b"}))
    await put(api, changed)
    shown = await listed(client, "/services")
    assert shown[changed.id]["Spec"]["Labels"] == {"a": "b"}
    assert shown[stored[4].id]["Spec"]["Labels"] == {}


@pytest.mark.parametrize("kind", ["secrets", "configs"])
async def test_files_are_found_by_the_beginning_of_their_name_in_any_case(cluster, kind):
    _, client = cluster
    made = {}
    for name in ("db_password", "DB_User", "web"):
        response = await client.post(f"/{kind}/create", json={"Name": name, "Data": "eA=="})
        made[name] = (await response.json())["ID"]
    both = sorted([made["db_password"], made["DB_User"]])
    assert sorted(await ids(client, f"/{kind}", name="DB")) == both
    assert sorted(await ids(client, f"/{kind}", name="db_")) == both
    assert await ids(client, f"/{kind}", name="password") == []
    assert await ids(client, f"/{kind}", id=made["web"][:8]) == [made["web"]]
    if kind == "secrets":
        assert await ids(client, "/secrets", names="WEB") == [made["web"]]
        assert await ids(client, "/secrets", names="WE") == []


async def test_a_run_that_was_unhealthy_names_its_health_check(cluster):
    api, client = cluster
    sick = await a_stored_service(api, a_service_spec("sick"))
    end = TaskEnd(
        cause=EndCause.UNHEALTHY.value, health_command="exit 1", health_failures=2, health_exit_code=1
    )
    status = TaskStatus(state=TaskState.FAILED, err="dockerexec: unhealthy container", end=end)
    crashed = TaskStatus(state=TaskState.FAILED, err="task: non-zero exit (7)")
    await put(
        api,
        replace(a_task("t1", node="n1", service=sick, slot=1), status=status),
        replace(a_task("t2", node="n1", service=sick, slot=1), status=crashed),
    )
    response = await client.get("/skep/services/sick/runs", params={"tail": "0"})
    unhealthy = 'unhealthy: its health check "exit 1" failed 2 times in a row, last: exit 1, no output'
    errors = [one["Err"] for one in (await response.json())["Runs"]]
    assert errors == [unhealthy, "task: non-zero exit (7)"]


async def test_a_run_on_a_removed_node_has_its_name(cluster):
    api, client = cluster
    job = await a_stored_service(api, a_service_spec("job"))
    status = TaskStatus(state=TaskState.ORPHANED)
    await put(api, replace(a_task("t1", node="n9", service=job, slot=1), status=status))
    await put(api, Revocation(id=NodeId("n9"), until=ZERO_TIME, hostname="worker9"))
    response = await client.get("/skep/services/job/runs", params={"tail": "0"})
    assert [one["NodeName"] for one in (await response.json())["Runs"]] == ["worker9"]

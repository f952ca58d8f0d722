"""Commands that look at services, nodes and networks, against a real manager's API."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.manager.orchestrator.replacement.disruption_mode import end_freeze
from skep.model.node import NodeState
from skep.model.service import GlobalJob, JobStatus, Service, ServiceMode
from skep.model.swarm import Freeze, Swarm
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId
from skep.model.values.times import ZERO_TIME
from skep.store.interface import Transaction
from skep.store.level import NOTIFICATIONS, REGISTRATIONS, SCHEDULES
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.clients.command_rig import HANGS, Cluster, a_cluster
from tests.support.store.store_transactions import put


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """With a service that runs, and one that does not."""
    async with a_cluster(tmp_path) as made:
        # Without ``monitor``, each test would wait for 5 s until the tasks of ``web`` count as stable.
        soon = "deploy: {replicas: 2, update_config: {monitor: 1ms}}"
        made.write(f"name: shop\nservices: {{web: {{image: busybox, {soon}}}, db: {{image: {HANGS}}}}}")
        code, _, err = await made.deploy("--detach")
        assert code == 0, err
        code, _, err = await made.run("service", "wait", "shop_web")
        assert (code, err.splitlines()[-1]) == (0, "shop_web: 2 of 2 tasks run")
        yield made


async def test_a_wait_that_is_over_names_what_does_not_run(cluster: Cluster) -> None:
    code, _, err = await cluster.run("service", "wait", "--timeout", "0.5", "shop_web", "shop_db")
    text = "Error: not done within 0.5 s: shop_db: 0 of 1 tasks run. Run skep explain shop_db."
    assert (code, err.splitlines()[-1]) == (1, text)


async def test_a_rollback_of_a_scheduled_job_waits_for_no_run(cluster: Cluster) -> None:
    spec = {
        "Name": "tick",
        "Labels": {"skep.cron": "* * * * *"},
        "TaskTemplate": {"ContainerSpec": {"Image": HANGS}},
        "Mode": {"ReplicatedJob": {}},
    }
    await cluster.store.update(lambda tx: tx.raise_level(SCHEDULES))
    async with cluster.requests() as client:
        made = await client.post("/services/create", spec, timeout_s=10.0)
        await client.post(f"/skep/services/{made['ID']}/run", timeout_s=10.0)
    code, _, err = await cluster.run("service", "rollback", "--to", "1", "--timeout", "5", "tick")
    assert (code, err) == (0, "tick: its next run has this spec\n")


async def test_a_node_a_network_and_a_task_are_explained_by_their_names(cluster: Cluster) -> None:
    code, out, err = await cluster.run("explain", "m1")
    assert code == 0, err
    assert out.splitlines()[0] == "m1: ready"
    assert "  tasks: 1 assigned, 2 running" in out.splitlines()
    _, out, _ = await cluster.run("explain", "shop_default")
    assert out.splitlines()[0] == "shop_default: overlay network of the swarm, used by shop_db, shop_web"
    _, out, _ = await cluster.run("explain", "shop_db.1")
    assert out.startswith("shop_db.1: ")
    code, _, err = await cluster.run("explain", "shop")
    assert (code, err) == (
        1,
        "Error: no such service, task, node or network: shop. Run skep status to list services and nodes.\n",
    )


async def test_the_decision_about_a_tasks_node_is_shown_while_it_runs_and_after_its_end(
    cluster: Cluster,
) -> None:
    (web,) = (one for one in cluster.store.view().find(Service) if one.spec.name == "shop_web")
    first = next(one for one in cluster.store.view().find(Task, service_id=web.id) if one.slot == 1)

    async def decision(name: str) -> list[str]:
        code, out, err = await cluster.run("explain", name)
        assert code == 0, err
        return [line for line in out.splitlines() if line.startswith("  placed: ")]

    (placed,) = await decision("shop_web.1")
    assert placed.startswith("  placed: 1 of 1 nodes suitable; the chosen node had ")
    failed = TaskStatus(state=TaskState.FAILED, err="task: non-zero exit (3)")
    await cluster.store.update(lambda tx: tx.put(replace(tx.get(Task, first.id), status=failed)))
    assert await decision(first.id) == [placed]


@pytest.mark.parametrize(
    "words",
    [
        ("reboot-lock", "take", "m1"),
        ("upgrade", "--to", "99.0.0", "--command", "false"),
        ("upgrade", "--system", "--command", "false"),
    ],
    ids=["lock", "upgrade", "reboots"],
)
async def test_maintenance_waits_for_the_end_of_the_clusters_freeze(
    cluster: Cluster, words: tuple[str, ...]
) -> None:
    end = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    code, _, err = await cluster.run("cluster", "freeze", "--until", end, "--reason", "sale")
    assert code == 0, err
    code, _, err = await cluster.run(*words)
    assert (code, "the cluster is frozen until" in err, "--override-freeze" in err) == (1, True, True), err
    await cluster.run("cluster", "unfreeze")
    _, _, err = await cluster.run(*words)
    assert "frozen" not in err


async def test_what_would_let_a_task_run_is_shown_for_its_service_and_for_itself(cluster: Cluster) -> None:
    placement = {"Constraints": ["node.labels.disk==ssd"]}
    spec = {"Name": "fast", "TaskTemplate": {"ContainerSpec": {"Image": "busybox"}, "Placement": placement}}
    async with cluster.requests() as client:
        made = await client.post("/services/create", spec, timeout_s=10.0)
    change = "  smallest change: m1 would run it without the constraint node.labels.disk == ssd"
    async with asyncio.timeout(20), cluster.store.watch(Task) as watch:
        while not any(one.status.err for one in cluster.store.view().find(Task, service_id=made["ID"])):
            await anext(watch)
    for name in ("fast", "fast.1"):
        _, out, err = await cluster.run("explain", name)
        assert change in out.splitlines(), (out, err)


async def test_a_budget_that_can_never_be_kept_is_said_when_its_service_is_created_and_changed(
    cluster: Cluster,
) -> None:
    mount = {"Type": "volume", "Source": "data", "Target": "/data"}
    spec = {
        "Name": "kept",
        "Labels": {"skep.min-available": "5"},
        "TaskTemplate": {"ContainerSpec": {"Image": "busybox"}},
        "Mode": {"Replicated": {"Replicas": 3}},
    }
    async with cluster.requests() as client:
        made = await client.post("/services/create", spec, timeout_s=10.0)
        found = await client.get("/services/kept", timeout_s=10.0)
        writes = {**spec, "TaskTemplate": {"ContainerSpec": {"Image": "busybox", "Mounts": [mount]}}}
        path = f"/services/kept/update?version={found['Version']['Index']}"
        changed = await client.post(path, writes, timeout_s=10.0)
    assert made["Warnings"] == [
        "label skep.min-available=5 counts as 3, because the service has no more tasks"
    ]
    assert "a drain leaves them on their node until you run skep node drain --now" in changed["Warnings"][-1]


async def test_a_service_is_stopped_and_started_and_returns_to_a_former_spec_by_its_number(
    cluster: Cluster,
) -> None:
    def web() -> Service:
        (found,) = (one for one in cluster.store.view().find(Service) if one.spec.name == "shop_web")
        return found

    code, _, err = await cluster.run("service", "stop", "shop_web")
    assert (code, web().spec.replicas, web().spec.given_replicas) == (0, 0, 2), err
    _, out, _ = await cluster.run("explain", "shop_web")
    assert out.splitlines()[0] == "shop_web: stopped: skep service start shop_web starts its tasks"
    code, _, err = await cluster.run("service", "start", "shop_web")
    assert (code, web().spec.replicas) == (0, 2), err
    batch = replace(a_service_spec("batch"), mode=ServiceMode(global_job=GlobalJob()))
    await cluster.store.update(put, replace(a_service("batch", spec=batch), job_status=JobStatus()))
    _, _, err = await cluster.run("service", "start", "batch")
    assert err == "batch: a job without a schedule was not stopped (skep job run starts a new run)\n"

    cluster.write("name: shop\nservices: {web: {image: busybox, deploy: {replicas: 3}}}")
    code, _, err = await cluster.deploy("--detach")
    assert code == 0, err
    code, out, err = await cluster.run("service", "history", "shop_web", "--output", "json")
    first, second = json.loads(out)
    assert (first["Number"], second["Number"]) == (1, 2), err
    assert first["By"] == second["By"] != ""
    assert first["At"] < second["At"]
    _, out, _ = await cluster.run("service", "history", "shop_web")
    head, *_, last = out.splitlines()
    assert head.split() == ["REVISION", "WRITTEN", "BY", "CHANGES"]
    assert last.startswith("2 (now)")
    assert f" {second['By']} " in last
    _, out, _ = await cluster.run("service", "diff", "shop_web")
    assert "Mode.Replicated.Replicas: 2 -> 3" in out.splitlines()
    code, _, err = await cluster.run("service", "rollback", "--to", "1", "--detach", "shop_web")
    assert (code, web().spec.replicas) == (0, 2), err


async def test_a_registered_service_is_explained_by_its_name(cluster: Cluster) -> None:
    await cluster.store.update(lambda tx: tx.raise_level(REGISTRATIONS))
    async with cluster.requests() as client:
        for number in (1, 2):
            body = {"Service": "db", "Instance": f"db{number}", "Address": f"192.0.2.{number}", "Port": 5432}
            await client.request("PUT", f"/skep/registrations/db@db{number}", body=body, timeout_s=10.0)
    code, out, err = await cluster.run("explain", "db")
    assert code == 0, err
    assert out.splitlines()[:3] == [
        "db: registered outside of the cluster, 2 instances",
        "  db1 at 192.0.2.1:5432",
        "  db2 at 192.0.2.2:5432",
    ]
    _, out, _ = await cluster.run("explain", "db@db2")
    assert out.splitlines()[1] == "  db2 at 192.0.2.2:5432"
    code, _, err = await cluster.run("explain", "db@db3")
    assert (code, "no such service" in err) == (1, True)


async def test_nodes_of_one_name_are_told_apart(cluster: Cluster) -> None:
    """A machine that left the cluster and joined again stays in the list under its former ID until it is removed."""
    former = a_node("8x2k", state=NodeState.DOWN)
    former = replace(former, description=replace(former.description, hostname="m1"))
    await cluster.store.update(lambda tx: tx.put(former))
    code, _, err = await cluster.run("explain", "m1")
    assert code == 1
    assert re.fullmatch(
        r"Error: node m1 is ambiguous \(2 matches found\): use an ID: .*\b8x2k \(down\).*\n", err
    ), err
    code, out, _ = await cluster.run("explain", "8x2k")
    assert (code, out.splitlines()[0]) == (0, "m1: down")


async def test_a_node_that_is_there_is_not_forgotten_and_one_that_drains_names_its_tasks(
    cluster: Cluster,
) -> None:
    code, _, err = await cluster.run("node", "forget", "m1")
    assert (code, "m1 is ready, not down" in err) == (1, True)
    code, out, err = await cluster.run("node", "drain", "--wait", "--now", "m1")
    drained, undo = out.splitlines()
    assert (code, drained) == (0, "m1 is drained: no tasks are left"), err
    assert undo == "To give it tasks again, run docker node update --availability active m1."
    _, out, _ = await cluster.run("explain", "m1")
    assert "its availability is drain" in out


async def test_a_node_that_may_be_cut_off_is_forgotten_by_force_only(cluster: Cluster) -> None:
    """Else a script that forgets all nodes that are down would run their tasks twice."""
    task = a_task("t9", node="w9", state=TaskState.PREPARING)

    def cut_off(tx: Transaction) -> None:
        (swarm,) = tx.find(Swarm)
        tx.put(replace(swarm, freeze=Freeze(since=ZERO_TIME, nodes=(NodeId("w9"),), ready_before=1)))
        tx.put(a_node("w9", state=NodeState.DOWN))
        tx.put(task)

    await cluster.store.update(cut_off)
    code, _, err = await cluster.run("node", "forget", "w9")
    assert code == 1
    assert "it may be cut off while its containers run" in err
    assert "or use --force" in err
    code, out, err = await cluster.run("node", "forget", "--force", "w9")
    assert (code, out) == (0, "w9\n"), err
    await cluster.store.update(end_freeze)


async def test_an_update_is_paused_and_aborted(cluster: Cluster) -> None:
    cluster.write(f"name: shop\nservices: {{web: {{image: {HANGS}, deploy: {{replicas: 2}}}}}}")
    assert (await cluster.deploy("--detach"))[0] == 0
    code, out, err = await cluster.run("update", "pause", "shop_web")
    assert code == 0, err
    assert out.startswith("shop_web: paused: manually paused. Next: skep update resume shop_web")
    code, out, err = await cluster.run("update", "abort", "shop_web")
    assert (code, out) == (0, "shop_web: rollback started: manually requested rollback\n"), err
    code, _, err = await cluster.run("service", "wait", "--timeout", "30", "shop_web")
    assert (code, err) == (0, "shop_web: 2 of 2 tasks run\n"), "the user requested the spec that runs"


async def test_logs_are_those_of_a_service_or_a_task_by_its_name(cluster: Cluster) -> None:
    service = cluster.store.view().resolve(Service, "shop_web")
    assert service is not None
    second = next(
        one for one in cluster.store.view().find(Task) if (one.service_id, one.slot) == (service.id, 2)
    )
    for words in (("shop_web",), ("--tail", "7", "shop_web.2"), ("-n", "7", second.id)):
        code, _, err = await cluster.run("logs", *words, DOCKER_API_VERSION="1.47")
        assert code == 0, err
    whole, by_name, by_id = cluster.logs.asked
    assert (whole.services, whole.tasks) == ((service.id,), ())
    assert (by_name.services, by_name.tasks, by_name.tail) == ((), (second.id,), 7)
    assert by_id == by_name
    code, _, err = await cluster.run("logs", "some-container", DOCKER_API_VERSION="1.47")
    assert code == 1
    # Clients before 23 have words of their own.
    assert re.search("page not found|No such container", err), "containers are the node's"
    assert len(cluster.logs.asked) == 3


async def test_several_names_are_done_or_named_each(cluster: Cluster) -> None:
    """A mistyped name stops no service.  Removed objects are named, also after one that does not exist."""
    code, out, err = await cluster.run("service", "stop", "shop_web", "nosuch")
    assert (code, out) == (1, "")
    assert "service nosuch not found" in err
    (web,) = cluster.store.view().find(Service, name="shop_web")
    assert "skep.stopped" not in web.spec.labels
    async with cluster.requests() as client:
        for name in ("a", "b"):
            await client.post("/skep/notify/create", {"Name": name, "URL": "https://h/x"}, timeout_s=10.0)
    code, out, err = await cluster.run("notify", "rm", "none", "a", "void", "b")
    assert (code, out.splitlines()) == (1, ["a", "b"])
    assert err.splitlines() == [
        "Error: notification target void not found. List targets with skep notify ls.",
        "Error: notification target none not found. List targets with skep notify ls.",
    ]


async def test_a_target_for_an_unknown_stack_is_added_with_a_word(cluster: Cluster) -> None:
    await cluster.store.update(lambda tx: tx.raise_level(NOTIFICATIONS))
    words = ("notify", "add", "ops", "https://hooks.example.org/x", "--stack")
    code, out, err = await cluster.run(*words, "nosuch")
    assert (code, out) == (0, "ops\n"), err
    assert "The stack nosuch has no services yet. Run skep stack ls" in err

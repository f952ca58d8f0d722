"""What ``skep node evict`` prints while the managers work, and ``drain`` before."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from sim.world.time import VirtualLoop
from skep.api.client.client import ApiClient
from skep.cli.cluster.node import (
    _drain,
    _Progress,
    drain_and_wait,
    left_behind,
    stops_first,
    without_node,
)
from skep.cli.formatting import named
from skep.cli.main import main
from skep.errors import SkepError, Unavailable
from skep.manager.routes import ManagerApi
from skep.manager.services.freezes import set_freeze
from skep.model.container import ContainerSpec, Mount
from skep.model.node import Availability, EngineDescription, Node
from skep.model.node_reports.departures import STAYS
from skep.model.node_reports.node_refusals import NO_NODE
from skep.model.options.freezes import CLUSTER, FreezeRequest
from skep.model.options.labels import DRAIN_NOW, MIN_AVAILABLE
from skep.model.options.schedules import CRON
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL
from skep.model.service import (
    GlobalJob,
    JobStatus,
    ReplicatedJob,
    RestartCondition,
    RestartPolicy,
    ServiceMode,
)
from skep.model.task import TaskState
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS, timestamp
from skep.stack.progress import UNPLACED_S
from tests.support.builders import a_node, a_service, a_task
from tests.support.store.store_transactions import put


def a_state(*done: bool, waits_for: str = "", complete: bool = False) -> dict[str, Any]:
    steps = [{"Text": f"step {number}", "Done": is_done} for number, is_done in enumerate(done)]
    return {
        "NodeID": "n3", "Hostname": "m3", "Steps": steps, "WaitingFor": waits_for, "Complete": complete
    }  # fmt: skip


def test_each_step_and_each_reason_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = _Progress()
    assert not progress.show(a_state(False, False))
    assert not progress.show(a_state(True, False, waits_for="manager m2 cannot be reached"))
    assert not progress.show(a_state(True, False, waits_for="manager m2 cannot be reached"))
    assert progress.show(a_state(True, True, complete=True))
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "done: step 0",
        "done: step 1",
        "m3 is evicted. All its keys are revoked or replaced.",
        "It stops its containers when it reaches a manager. Run docker swarm leave --force there to remove them.",
    ]
    assert err.split("\n") == ["      manager m2 cannot be reached", ""]


def test_nothing_happens_without_consent() -> None:
    done = CliRunner().invoke(main, ["--host", "unix:///nowhere", "node", "evict", "m3"], input="n\n")
    assert done.exit_code == 1
    assert "Remove m3" in done.output


def test_a_drained_node_names_the_services_that_no_other_node_takes() -> None:
    services = [{"ID": "s1", "Spec": {"Name": "web"}}, {"ID": "s2", "Spec": {"Name": "db"}}]
    refused = {"State": "pending", "Err": "no suitable node (1 node not available for new tasks)"}
    waiting = {"State": "pending", "Err": "waits for db to be healthy"}
    tasks = [
        {"ServiceID": "s1", "Status": refused},
        {"ServiceID": "s1", "Status": refused},
        {"ServiceID": "s2", "Status": waiting},
        {"ServiceID": "other", "Status": refused},
    ]
    assert without_node(services, tasks) == ["web: no other node takes 2 tasks. Run skep explain web."]


async def test_a_drain_names_the_services_that_have_no_task_elsewhere(
    cluster: tuple[ManagerApi, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    manager, host = cluster
    alone, spread, agent = a_service("alone"), a_service("spread"), a_service("agent", is_global=True)
    tasks = [
        a_task(node="w1", service=alone, slot=1),
        a_task(node="w1", service=alone, slot=2),
        a_task(node="w2", service=alone, slot=1, state=TaskState.FAILED, desired=TaskState.SHUTDOWN),
        a_task(node="w1", service=spread, slot=1),
        a_task(node="w2", service=spread, slot=2),
        a_task(node="w1", service=agent, slot=0),
    ]
    objects = [a_node("w1"), a_node("w2"), alone, spread, agent, *tasks]
    await manager.store.update(lambda tx: [tx.put(one) for one in objects])
    await _drain(host, "w1", None)
    assert capsys.readouterr().err == "", "replacements start first"
    assert manager.store.view().get(Node, "w1").spec.availability is Availability.DRAIN
    await _drain(host, "w1", None, now=True)
    assert capsys.readouterr().err == "alone has all its tasks on w1, and is down until they run elsewhere\n"
    assert manager.store.view().get(Node, "w1").spec.labels == {DRAIN_NOW: "true"}
    await _drain(host, "w1", None)
    assert manager.store.view().get(Node, "w1").spec.labels == {}, "the last command counts"


@pytest.mark.parametrize("desired", [TaskState.RUNNING, TaskState.READY], ids=["runs", "waits-for-restart"])
async def test_a_drain_names_the_local_volumes_that_stay_behind_before_it_begins(
    cluster: tuple[ManagerApi, Any], capsys: pytest.CaptureFixture[str], desired: TaskState
) -> None:
    manager, host = cluster
    spec = a_service("db").spec
    container = ContainerSpec(image="i", mounts=(Mount(type="volume", source="data", target="/data"),))
    template = replace(spec.task_template, container_spec=container)
    db = a_service("db", spec=replace(spec, task_template=template))
    objects = [
        a_node("w1"),
        a_node("w2"),
        db,
        a_task(node="w1", service=db, slot=1, state=min(desired, TaskState.RUNNING), desired=desired),
        a_task(node="w2", service=db, slot=2),
    ]
    await manager.store.update(lambda tx: [tx.put(one) for one in objects])
    await _drain(host, "w1", None)
    assert capsys.readouterr().err == (
        "db stops its tasks on w1 before their replacements start (they write to the volume data)\n"
        "db has local volumes on w1 (data): the data stays on w1, and a task that starts elsewhere has empty volumes\n"
    )


async def test_a_drain_says_what_keeps_a_task_on_the_node(
    cluster: tuple[ManagerApi, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    manager, host = cluster
    web, shop = a_service("web"), a_service("shop")
    shop = replace(shop, spec=replace(shop.spec, labels={MIN_AVAILABLE: "2"}))
    refused = a_task("new", slot=1, service=web, state=TaskState.PENDING, desired=TaskState.RUNNING)
    refused = replace(
        refused, status=replace(refused.status, err="no suitable node (disk is full on 1 node)")
    )
    tasks = [
        a_task("old", node="w1", service=web, slot=1, state=TaskState.RUNNING, desired=TaskState.RUNNING),
        refused,
    ]
    await manager.store.update(lambda tx: [tx.put(one) for one in (a_node("w1"), a_node("w2"), web, *tasks)])
    with pytest.raises(Unavailable, match="To stop it all the same, run skep node drain --now w1"):
        await _drain(host, "w1", 1.0)
    assert (
        "1 task left: web.1. web.1: it stays on w1, which is drained: its replacement does not run yet: no"
        in (capsys.readouterr().err)
    )
    task = a_task("shop", node="w1", service=shop, slot=1, state=TaskState.RUNNING, desired=TaskState.RUNNING)
    await manager.store.update(lambda tx: [tx.put(one) for one in (shop, task)])
    with pytest.raises(Unavailable):
        await _drain(host, "w1", 1.0)
    why = "1 task is available, and 1 must stay available (skep.min-available)"
    assert f"shop.1: it stays on w1, which is drained: {why}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        (ServiceMode(), "before their replacements start (they write to the volume data-2)"),
        (ServiceMode(replicated_job=ReplicatedJob()), "before their replacements start, because it is a job"),
    ],
    ids=["service", "job"],
)
async def test_a_drain_names_the_volumes_of_services_and_jobs_as_the_node_knows_them(
    cluster: tuple[ManagerApi, Any], capsys: pytest.CaptureFixture[str], mode: ServiceMode, why: str
) -> None:
    """Docker's filter by desired state leaves out the tasks of jobs, which are to complete."""
    manager, host = cluster
    mount = Mount(type="volume", source="data-{{.Task.Slot}}", target="/data")
    spec = a_service("db").spec
    template = replace(spec.task_template, container_spec=ContainerSpec(image="i", mounts=(mount,)))
    is_job = mode.replicated_job is not None
    spec = replace(spec, task_template=template, mode=mode if is_job else spec.mode)
    db = a_service("db", spec=spec)
    task = a_task(
        node="w1",
        service=db,
        slot=3 if is_job else 2,
        desired=TaskState.COMPLETE if is_job else TaskState.RUNNING,
    )
    if is_job:
        db, task = replace(db, job_status=JobStatus()), replace(task, job_iteration=Version())
    label = {SLOT_VOLUMES_LABEL: "data-1=db.1@5 data-2=db.2@5 data-2=other.2@5 logs-2=db.2@5"}
    node = a_node("w1")
    node = replace(node, description=replace(node.description, engine=EngineDescription(labels=label)))
    await manager.store.update(lambda tx: [tx.put(one) for one in (node, a_node("w2"), db, task)])
    await _drain(host, "w1", None)
    down = "" if is_job else ", and is down until they run elsewhere"
    assert capsys.readouterr().err == (
        f"db stops its tasks on w1 {why}{down}\n"
        "db has local volumes on w1 (data-2): the data stays on w1, and a task that starts elsewhere has empty "
        "volumes\n"
    )


def a_spec(*mounts: dict[str, Any], **labels: str) -> dict[str, Any]:
    template = {"ContainerSpec": {"Image": "i", "Mounts": list(mounts)}, "Newer": 1}
    return {"Name": "db", "TaskTemplate": template, "Labels": labels}


@pytest.mark.parametrize(
    ("mount", "data"),
    [
        ({"Type": "volume", "Source": "data", "Target": "/d"}, "the volume data"),
        ({"Type": "bind", "Source": "/srv", "Target": "/d"}, "the host path /srv"),
        ({"Type": "cluster", "Source": "disk", "Target": "/d"}, "the cluster volume disk"),
    ],
)
def test_each_kind_of_data_that_one_task_writes_is_named_before_a_drain(
    mount: dict[str, Any], data: str
) -> None:
    said = stops_first(a_spec(mount), "w1", is_away=True, now=False)
    assert said == (
        f"db stops its tasks on w1 before their replacements start (they write to {data}), and is down until they "
        "run elsewhere"
    )
    assert stops_first(a_spec(mount | {"ReadOnly": True}), "w1", is_away=True, now=False) == ""
    first = a_spec(mount) | {"UpdateConfig": {"Order": "start-first"}}
    assert stops_first(first, "w1", is_away=True, now=False) == ""


def test_only_data_that_stays_on_the_node_is_named() -> None:
    data = {"Type": "volume", "Source": "data", "Target": "/d"}
    nfs = {"DriverConfig": {"Name": "local", "Options": {"type": "nfs", "device": ":/x"}}}
    assert left_behind(a_spec(data), "w1").startswith("db has local volumes on w1 (data): the data stays on")
    assert left_behind(a_spec(data | {"VolumeOptions": nfs}), "w1") == ""
    assert left_behind(a_spec({"Type": "bind", "Source": "/d", "Target": "/d"}), "w1") == ""
    assert left_behind(a_spec(data, **{"skep.volume-affinity": "required"}), "w1") == (
        "db has local volumes on w1 (data), and waits until w1 accepts tasks again (skep.volume-affinity=required)"
    )


def test_names_beyond_the_first_few_are_counted() -> None:
    assert named(list("ab")) == "a, b"
    assert named(list("abcdefg")) == "a, b, c, d, e and 2 more"


class DownNode:
    """Managers of a node that is down, with a task that runs there."""

    async def get(self, path: str, **_: object) -> Any:
        return {
            "/nodes/w9": {"ID": "n9", "Version": {"Index": 1}, "Spec": {}, "Status": {"State": "down"}},
            "/services": [{"ID": "s1", "Spec": {"Name": "web"}}],
            "/tasks": [{"ID": "t1", "ServiceID": "s1", "Slot": 3, "Status": {"State": "running"}}],
        }[path]

    async def request(self, *_: object, **__: object) -> None:
        """The update of the node."""


async def test_a_drain_of_a_node_that_is_down_says_why_its_tasks_are_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(Unavailable, match=r"1 task left: web\.3\. w9 is down and reports no end") as raised:
        await drain_and_wait(cast("ApiClient", DownNode()), "w9", 0.01)
    assert "run skep node forget w9" in str(raised.value)
    assert "w9 is down" in capsys.readouterr().err


async def test_a_drain_ends_when_someone_else_gives_the_node_tasks_again(
    cluster: tuple[ManagerApi, Any],
) -> None:
    manager, host = cluster
    service = a_service("web")
    for one in (a_node("w1"), service, a_task("t1", node="w1", service=service)):
        await manager.store.update(put, one)

    async def activate() -> None:
        async with manager.store.watch(Node) as watch:
            async for _ in watch:
                node = manager.store.view().get(Node, "w1")
                if node.spec.availability is Availability.DRAIN:
                    break
        await manager.store.update(
            put, replace(node, spec=replace(node.spec, availability=Availability.ACTIVE))
        )

    async with asyncio.TaskGroup() as group:
        group.create_task(activate())
        with pytest.raises(Unavailable, match="w1 is no longer drained, because someone else has set it to"):
            await _drain(host, "w1", 10.0)


class PinnedTasks(DownNode):
    """Managers of a drained node with two tasks.  The replacement of the second one starts after ``starts_after``
    looks.  The explanations name first what the tasks need.
    """

    def __init__(self, starts_after: int, desired: str = "running") -> None:
        self._left = starts_after
        self._desired = desired

    async def get(self, path: str, *, filters: Mapping[str, Sequence[str]] | None = None, **_: object) -> Any:
        if path == "/tasks":
            slots = range(1, 3 if self._left else 2)
            is_here = filters == {"node": ["w9"]}
            self._left -= is_here
            status = (
                {"State": "running"} if is_here else {"State": "pending", "Err": f"{NO_NODE} (constraints)"}
            )
            desired = self._desired if is_here else "running"
            return [
                {"ID": f"t{slot}", "ServiceID": "s1", "Slot": slot, "DesiredState": desired, "Status": status}
                for slot in slots
            ]
        if path.endswith("/explain"):
            why = f"its replacement does not run yet: needs node.hostname==w9; {NO_NODE} (constraints)"
            return {"Summary": f"{STAYS} w9, which is drained: {why}"}
        if path == "/nodes/w9":
            return {"ID": "n9", "Version": {"Index": 1}, "Spec": {}, "Status": {"State": "ready"}}
        return await super().get(path)


@pytest.mark.parametrize(("starts_after", "ends_s"), [(-1, UNPLACED_S), (100, 50 + UNPLACED_S)])
def test_a_drain_ends_once_no_node_has_accepted_a_replacement_for_a_minute(
    starts_after: int, ends_s: float
) -> None:
    loop = VirtualLoop()
    try:
        with pytest.raises(
            Unavailable, match=r"no node has accepted a replacement for 60 s: .* w9 stays drained"
        ):
            loop.run_until_complete(drain_and_wait(cast("ApiClient", PinnedTasks(starts_after)), "w9", 600.0))
        assert loop.time() == pytest.approx(ends_s, abs=1.0)
    finally:
        loop.close()


def test_a_drain_waits_for_tasks_that_are_stopping_although_no_node_accepts_replacements() -> None:
    loop = VirtualLoop()
    try:
        managers = PinnedTasks(-1, desired="shutdown")
        with pytest.raises(Unavailable, match="not drained within 600 s"):
            loop.run_until_complete(drain_and_wait(cast("ApiClient", managers), "w9", 600.0))
    finally:
        loop.close()


@pytest.mark.parametrize(
    ("command", "availability"), [("activate", "active"), ("uncordon", "active"), ("cordon", "pause")]
)
def test_a_command_that_nobody_has_names_the_one_to_run(command: str, availability: str) -> None:
    found = CliRunner().invoke(main, ["node", command, "w1"])
    assert found.exit_code == 2
    assert (
        f"No such command '{command}'. Run docker node update --availability {availability} NODE."
        in found.output
    )


async def test_a_drain_waits_for_tasks_whose_service_was_removed(cluster: tuple[ManagerApi, Any]) -> None:
    manager, host = cluster
    for one in (a_node("w1"), a_task("t1", node="w1", service=a_service("gone"), slot=1)):
        await manager.store.update(put, one)
    with pytest.raises(Unavailable, match=r"left: t1 \(its service was removed\)\. Run skep explain t1"):
        await _drain(host, "w1", 0.2)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        (ServiceMode(replicated_job=ReplicatedJob()), "batch.0"),
        (ServiceMode(global_job=GlobalJob()), "batch"),
    ],
)
async def test_a_drain_names_tasks_of_jobs_by_their_slots(
    cluster: tuple[ManagerApi, Any], mode: ServiceMode, name: str
) -> None:
    """A job's slots begin at 0, which the API omits."""
    manager, host = cluster
    spec = replace(a_service("batch").spec, mode=mode)
    job = replace(a_service("batch", spec=spec), job_status=JobStatus())
    slot = 1 if mode.replicated_job is not None else 0
    task = a_task("t1", node="w1", service=job, slot=slot, desired=TaskState.COMPLETE)
    task = replace(task, job_iteration=Version())
    for one in (a_node("w1"), job, task):
        await manager.store.update(put, one)
    with pytest.raises(Unavailable, match=rf"not drained within 0\.2 s: 1 task left: {name}\. Run"):
        await _drain(host, "w1", 0.2)


@pytest.mark.parametrize(
    ("labels", "end"), [({}, ""), ({CRON: "@hourly"}, ", or else this run fails")], ids=["plain", "scheduled"]
)
async def test_a_drain_names_the_global_jobs_whose_run_it_interrupts(
    cluster: tuple[ManagerApi, Any], capsys: pytest.CaptureFixture[str], labels: dict[str, str], end: str
) -> None:
    manager, host = cluster
    spec = replace(a_service("scan").spec, mode=ServiceMode(global_job=GlobalJob()), labels=labels)
    job = replace(a_service("scan", spec=spec), job_status=JobStatus())
    task = a_task("t1", node="w1", service=job, slot=0, desired=TaskState.COMPLETE)
    for one in (a_node("w1"), a_node("w2"), job, replace(task, job_iteration=Version())):
        await manager.store.update(put, one)
    await _drain(host, "w2", None)
    assert capsys.readouterr().err == ""
    await _drain(host, "w1", None)
    words = f"scan stops its task on w1, and starts it again if w1 takes tasks again{end}"
    assert capsys.readouterr().err == f"{words}\n"


@pytest.mark.parametrize("is_global", [False, True])
async def test_a_drain_names_the_services_whose_tasks_nothing_replaces(
    cluster: tuple[ManagerApi, Any], capsys: pytest.CaptureFixture[str], is_global: bool
) -> None:
    manager, host = cluster
    mounts = (Mount(type="volume", source="data", target="/data"),)
    once = a_service("once", is_global=is_global, restart=RestartPolicy(condition=RestartCondition.NONE))
    template = replace(once.spec.task_template, container_spec=ContainerSpec(image="i", mounts=mounts))
    once = replace(once, spec=replace(once.spec, task_template=template))
    task = a_task("t1", node="w1", service=once, slot=0 if is_global else 1)
    for one in (a_node("w1"), a_node("w2"), once, task):
        await manager.store.update(put, one)
    await _drain(host, "w1", None)
    only = "once stops its tasks on w1 for good, by its restart condition none\n"
    assert capsys.readouterr().err == only, "none starts elsewhere with empty volumes"


async def test_a_drain_that_is_refused_names_no_consequences(
    cluster: tuple[ManagerApi, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    manager, host = cluster
    job = replace(a_service("scan").spec, mode=ServiceMode(global_job=GlobalJob()))
    scan = replace(a_service("scan", spec=job), job_status=JobStatus())
    task = a_task("t1", node="w1", service=scan, slot=0, desired=TaskState.COMPLETE)
    for one in (a_node("w1"), scan, replace(task, job_iteration=Version())):
        await manager.store.update(put, one)
    strict = FreezeRequest(until=timestamp(9 * 10**18), reason="sale", is_strict=True)
    await manager.update(set_freeze, CLUSTER, strict, by="alice", now_ns=9 * 10**18 - 3600 * SECOND_NS)
    with pytest.raises(SkepError, match="sale"):
        await _drain(host, "w1", None)
    assert capsys.readouterr().err == ""


async def test_a_drain_names_the_jobs_that_no_other_node_takes(
    cluster: tuple[ManagerApi, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Docker's filter by desired state leaves out the tasks of jobs, which are to complete."""
    manager, host = cluster
    spec = replace(
        a_service("batch").spec, mode=ServiceMode(replicated_job=ReplicatedJob(total_completions=2))
    )
    job = replace(a_service("batch", spec=spec), job_status=JobStatus())
    complete = TaskState.COMPLETE
    leaves = a_task("t1", node="w1", service=job, slot=1, desired=complete)
    waits = a_task("t2", service=job, slot=2, state=TaskState.PENDING, desired=complete)
    waits = replace(
        waits, status=replace(waits.status, err=f"{NO_NODE} (1 node not available for new tasks)")
    )
    for one in (a_node("w1"), job, leaves, waits):
        await manager.store.update(put, one)

    async def end() -> None:
        async with manager.store.watch(Node) as watch:
            async for _ in watch:
                if manager.store.view().get(Node, "w1").spec.availability is Availability.DRAIN:
                    break
        ended = replace(leaves, status=replace(leaves.status, state=TaskState.SHUTDOWN))
        await manager.store.update(put, ended)

    async with asyncio.TaskGroup() as group:
        group.create_task(end())
        group.create_task(_drain(host, "w1", 30.0))
    assert "batch: no other node takes 1 task. Run skep explain batch." in capsys.readouterr().err

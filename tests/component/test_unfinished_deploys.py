"""Deploys that are interrupted or killed, and the deploys that complete or undo them."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from skep.api.client.raw import RawClient
from skep.api.client.requests import PlainRequests
from skep.api.client.updates import update
from skep.errors import FailedPrecondition, Unavailable
from skep.model.network import Network
from skep.model.service import Service
from skep.model.task import Task, TaskState, TaskStatus
from skep.stack.cluster_state import existing_of
from skep.stack.compose.conversion import stack_of
from skep.stack.compose.document import parse
from skep.stack.compose.reading import ProblemReport
from skep.stack.created import CreatedObjects
from skep.stack.planning import plan_of
from skep.stack.recording import carry_out
from skep.store.interface import Transaction
from tests.support.clients.command_rig import FAILS, HANGS, Cluster, a_cluster

SOON = "deploy: {update_config: {monitor: 1ms}, restart_policy: {delay: 10ms}}"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with a_cluster(tmp_path) as made:
        yield made


def file(**images: str) -> str:
    services = ", ".join(f"{name}: {{image: {image}, {SOON}}}" for name, image in images.items())
    return f"name: shop\nservices: {{{services}}}\n"


class Client(PlainRequests):
    """Notes the paths that it reads, and waits before changes of services while ``is_held``."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(RawClient(cluster.host, None))
        self.reads: list[str] = []
        self.is_held = False
        self.reached = asyncio.Event()

    async def request(self, method: str, path: str, **options: Any) -> Any:
        if method == "GET":
            self.reads.append(path)
        if path == "/skep/services/changes" and self.is_held:
            self.reached.set()
            await asyncio.Event().wait()
        return await super().request(method, path, **options)


async def carried_out(client: Client, text: str, shown: list[str], wait_s: float = 30.0) -> None:
    made = stack_of(parse(text, "f"), "shop", {}, ProblemReport())
    plan = plan_of(made, await existing_of(client, "shop"), images={}, prune=False)
    await carry_out(
        client,
        made,
        plan,
        lambda *words: shown.append(": ".join(words)),
        wait_s,
        pytest.fail,
        {},
        CreatedObjects(),
    )


async def interrupted(client: Client, text: str) -> str:
    """Interrupt a deploy before it changes services, and return its last words."""
    shown: list[str] = []
    client.is_held = True
    deploy = asyncio.create_task(carried_out(client, text, shown))
    await client.reached.wait()
    deploy.cancel()
    with pytest.raises(asyncio.CancelledError):
        await deploy
    client.is_held = False
    return shown[-1]


async def test_a_deploy_that_is_interrupted_before_its_changes_names_what_it_has_not_done(
    cluster: Cluster,
) -> None:
    async with Client(cluster) as client:
        await carried_out(client, file(web="busybox"), [])
        last = await interrupted(client, file(web="busybox:2", db="busybox"))
    named = "shop_web: not updated; shop_db: not created"
    assert last == f"interrupted: {named}. Rerun the command to complete the deploy."


async def test_a_deploy_that_is_interrupted_after_another_has_replaced_it_names_that_one(
    cluster: Cluster,
) -> None:
    shown: list[str] = []
    async with Client(cluster) as client, Client(cluster) as other:
        client.is_held = True
        deploy = asyncio.create_task(carried_out(client, file(web="busybox"), shown))
        await client.reached.wait()
        await carried_out(other, file(web="busybox:2"), [])
        deploy.cancel()
        with pytest.raises(asyncio.CancelledError):
            await deploy
    assert shown[-1].startswith("interrupted: shop was changed meanwhile by another deploy (revision 2)")
    assert "Rerun" not in shown[-1]


async def test_a_deploy_that_waits_does_not_read_the_networks_again(cluster: Cluster) -> None:
    async with Client(cluster) as client:
        await carried_out(client, file(web="busybox"), [])
        client.reads.clear()
        with pytest.raises(Unavailable, match="not done within"):
            await carried_out(client, file(web=HANGS), [], 4.0)
    looks = client.reads.count("/services")
    assert looks >= 6, client.reads
    assert client.reads.count("/networks") <= 5, client.reads


async def waiting(client: Client, text: str, words: str) -> asyncio.Task[None]:
    """Start a deploy, and return it once it has shown ``words``."""
    shown: list[str] = []
    deploy = asyncio.create_task(carried_out(client, text, shown))
    while words not in shown:
        assert not deploy.done(), shown
        await asyncio.sleep(0.01)
    return deploy


async def test_a_deploy_ends_when_a_service_that_it_waits_for_is_removed(cluster: Cluster) -> None:
    async with Client(cluster) as client:
        deploy = await waiting(client, file(web=HANGS), "shop_web: 0 of 1 tasks run")
        await client.delete("/services/shop_web", timeout_s=5.0)
        with pytest.raises(FailedPrecondition, match="service shop_web was removed meanwhile"):
            async with asyncio.timeout(10.0):
                await deploy


@pytest.mark.parametrize(
    ("mode", "count"), [("global", "0 of 0 tasks run"), ("global-job", "0 of 0 tasks completed")]
)
async def test_a_deploy_is_done_with_a_global_service_for_which_no_node_is_eligible(
    cluster: Cluster, mode: str, count: str
) -> None:
    constrained = f"{{mode: {mode}, placement: {{constraints: [node.labels.gpu == yes]}}}}"
    shown: list[str] = []
    async with Client(cluster) as client:
        await carried_out(client, f"services: {{gpu: {{image: busybox, deploy: {constrained}}}}}", shown)
    assert shown[-1] == f"shop_gpu: {count}: no node is eligible"


async def test_a_deploy_is_done_with_a_job_that_ended_and_was_removed(cluster: Cluster) -> None:
    """The label removes it between two looks of the deploy."""
    job = "services: {migrate: {image: busybox, deploy: {mode: replicated-job}, x-skep: {job-ttl: 0s}}}"

    def complete(tx: Transaction) -> None:
        for task in list(tx.find(Task)):
            tx.put(replace(task, status=TaskStatus(state=TaskState.COMPLETE)))

    async with Client(cluster) as client:
        deploy = await waiting(client, job, "shop_migrate: 0 of 1 tasks completed")
        await cluster.store.update(complete)
        async with asyncio.timeout(10.0):
            await deploy
    assert cluster.names() == []


async def killed(cluster: Cluster, text: str) -> None:
    """Kill a deploy that waits for a service."""
    cluster.write(text)
    process = await cluster.start("stack", "deploy", "--resolve-image", "never")
    assert process.stderr is not None
    while b"0 of 1 tasks" not in await process.stderr.readline():
        assert process.returncode is None
    process.send_signal(signal.SIGKILL)
    await process.communicate()


def networks(cluster: Cluster) -> list[str]:
    return [one.spec.name for one in cluster.store.view().find(Network) if one.spec.name.startswith("shop")]


@pytest.mark.parametrize(
    ("image", "cause"),
    [
        (HANGS, "not done within 5 s: shop_db: 0 of 1 tasks run: m1 has not received it yet."),
        (FAILS, ": exit 3"),
    ],
    ids=["hangs", "fails"],
)
async def test_a_failed_deploy_undoes_the_killed_one_that_it_took_over(
    cluster: Cluster, image: str, cause: str
) -> None:
    await killed(cluster, file(web="busybox", db=HANGS))
    cluster.write(file(web="busybox", db=image))
    code, _, err = await cluster.deploy("--rollback-on-failure", "--timeout", "5s", "--max-failures", "3")
    assert code == 1
    said, _, reason = err.splitlines()[-1].partition(" Reason: ")
    assert "its new objects were removed, so shop has no services again." in said
    assert "shop_db: " in reason
    assert cause in reason
    assert "previous revision cannot be deployed" not in err
    assert "stack history" not in err, "it has no revisions"
    assert "skep explain" not in err, "nothing of it is left to explain"
    assert (cluster.names(), networks(cluster)) == ([], [])
    assert (await cluster.run("stack", "history", "--format", "{{.State}}", "shop"))[1] == ""


async def test_the_undo_of_a_killed_deploy_keeps_what_was_there_before(cluster: Cluster) -> None:
    cluster.write(file(web="busybox"))
    code, _, err = await cluster.deploy()
    assert code == 0, err
    await killed(cluster, file(web="busybox", db=HANGS))
    cluster.write(file(web="busybox", db=FAILS))
    code, _, err = await cluster.deploy("--rollback-on-failure", "--max-failures", "3")
    assert (code, "shop is back at revision 1." in err) == (1, True), err
    assert (cluster.names(), networks(cluster)) == (["shop_web"], ["shop_default"])


async def test_a_deploy_that_took_over_a_killed_one_records_its_failure(cluster: Cluster) -> None:
    await killed(cluster, file(db=HANGS))
    code, _, err = await cluster.deploy("--timeout", "2s")
    assert code == 1, err
    _, listed, _ = await cluster.run("stack", "history", "--format", "{{.Revision}} {{.State}}", "shop")
    assert listed.startswith("1 failed: not done within 2 s: shop_db: 0 of 1 tasks run"), listed


def image_of(cluster: Cluster, name: str) -> str:
    (found,) = (one for one in cluster.store.view().find(Service) if one.spec.name == name)
    assert found.spec.task_template.container_spec is not None
    return found.spec.task_template.container_spec.image.partition(":")[0]


async def test_an_undo_restores_the_services_that_the_revision_does_not_have(cluster: Cluster) -> None:
    cluster.write(file(web="busybox", old="busybox"))
    assert (await cluster.deploy())[0] == 0
    cluster.write(file(web="busybox:2"))
    assert (await cluster.deploy())[0] == 0
    cluster.write(file(web="busybox:2", old=FAILS))
    code, _, err = await cluster.deploy("--rollback-on-failure", "--max-failures", "3")
    assert (code, "shop is back at revision 2. Reason: shop_old: " in err) == (1, True), err
    assert ": exit 3" in err.partition("Reason: ")[2]
    assert image_of(cluster, "shop_old") == "busybox"


def with_image(image: str) -> Callable[[Mapping[str, Any]], Any]:
    def changed(service: Mapping[str, Any]) -> Any:
        service["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"] = image
        return service["Spec"]

    return changed


async def test_an_undo_keeps_the_services_of_a_killed_deploy_that_run(cluster: Cluster) -> None:
    """All of them may be in use since, although no revision says that it was deployed."""
    await killed(cluster, file(web="busybox", db=HANGS))
    async with cluster.requests() as client:
        await update(client, "services", "shop_db", with_image("busybox"), timeout_s=10.0)
    code, _, err = await cluster.run("service", "wait", "shop_web", "shop_db")
    assert code == 0, err
    cluster.write(file(web=FAILS, db="busybox"))
    code, _, err = await cluster.deploy("--rollback-on-failure", "--max-failures", "3")
    words = (
        "no earlier revision of shop was deployed, so its updated services have their previous specs again"
    )
    assert (code, words in err) == (1, True), err
    assert image_of(cluster, "shop_web") == "busybox"
    assert (cluster.names(), networks(cluster)) == (["shop_db", "shop_web"], ["shop_default"])

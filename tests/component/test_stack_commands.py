"""``skep stack`` as a command against a real manager's API, scheduler and orchestrator; only nodes are made up."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from msgspec.structs import replace

from skep.api.raw import RawClient
from skep.api.requests import PlainRequests
from skep.api.server import runner
from skep.manager.routes import application
from skep.model.network import Network
from skep.model.node import Node
from skep.model.secret import Config
from skep.model.service import Service
from skep.model.task import Task, TaskState, TaskStatus
from skep.stack import waiting
from skep.stack.conversion import stack_of
from skep.stack.deploying import existing_of
from skep.stack.document import parse
from skep.stack.planning import plan_of
from skep.stack.reading import Report
from skep.stack.recording import carry_out, known_revisions
from skep.stack.revisions import KEPT
from skep.store.interface import Store, Transaction
from tests.conformance.manager import a_manager_api
from tests.support.builders import a_docker_node
from tests.support.control_loops import leading
from tests.support.playground_rig import SKEP

HANGS = "hangs"
"""An image whose tasks never start."""
FILE = "name: shop\nservices: {web: {image: busybox}, db: {image: %s}}\n"


class Cluster:
    """A folder with a Compose file, and a manager's API on a socket in it."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder = folder
        self.store = store
        self.host = f"unix://{folder}/api.sock"

    def write(self, text: str) -> None:
        (self.folder / "compose.yaml").write_text(text)

    async def start(self, *words: str, **environment: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(SKEP, "--host", self.host, "stack", *words),
            cwd=self.folder,
            env=os.environ | environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *words: str, **environment: str) -> tuple[int | None, str, str]:
        """Exit code, output and errors of ``skep stack WORDS``."""
        process = await self.start(*words, **environment)
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    async def deploy(self, *words: str) -> tuple[int | None, str, str]:
        return await self.run("deploy", "--resolve-image", "never", *words)

    def names(self) -> list[str]:
        return sorted(one.spec.name for one in self.store.view().find(Service))

    def requests(self) -> PlainRequests:
        return PlainRequests(RawClient(self.host, None))


def _with_plugins(tx: Transaction) -> None:
    """The node can run what a stack has."""
    (node,) = tx.find(Node)
    description = replace(a_docker_node().description, hostname=node.description.hostname)
    tx.put(replace(node, description=description))


def _reported(tx: Transaction) -> None:
    """What nodes would report of their tasks."""
    for task in list(tx.find(Task)):
        container = task.spec.container_spec
        is_ending = task.desired_state > TaskState.RUNNING
        state = TaskState.SHUTDOWN if is_ending else TaskState.RUNNING
        if (
            task.status.state is TaskState.ASSIGNED
            and container
            and (is_ending or HANGS not in container.image)
        ):
            tx.put(replace(task, status=TaskStatus(state=state)))
        elif task.status.state is TaskState.RUNNING and is_ending:
            tx.put(replace(task, status=TaskStatus(state=TaskState.SHUTDOWN)))


async def _nodes(store: Store) -> None:
    async with store.watch(Task) as watch:
        await store.update(_reported)
        async for _ in watch:
            await store.update(_reported)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with a_cluster(tmp_path) as made:
        yield made


@asynccontextmanager
async def a_cluster(folder: Path) -> AsyncIterator[Cluster]:
    async with a_manager_api() as api:
        await api.store.update(_with_plugins)
        served = runner(application(api))
        await served.setup()
        await web.UnixSite(served, str(folder / "api.sock")).start()
        try:
            async with leading(api.store), asyncio.TaskGroup() as group:
                nodes = group.create_task(_nodes(api.store))
                yield Cluster(folder, api.store)
                nodes.cancel()
        finally:
            await served.cleanup()


async def test_an_interrupted_deploy_says_its_state_and_repeating_completes_it(cluster: Cluster) -> None:
    cluster.write(FILE % HANGS)
    process = await cluster.start("deploy", "--resolve-image", "never")
    assert process.stderr is not None
    while b"shop_db: 0 of 1 tasks run" not in await process.stderr.readline():
        assert process.returncode is None
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == 1
    said = "interrupted: shop_db: 0 of 1 tasks run; the same command again completes it"
    assert said in err.decode().splitlines()
    _, listed, _ = await cluster.run("history", "--format", "{{.Revision}} {{.State}}", "shop")
    assert listed == "1 interrupted\n"

    cluster.write(FILE % "busybox")
    code, _, err_text = await cluster.deploy()
    assert code == 0, err_text
    _, listed, _ = await cluster.run("history", "--format", "{{.Revision}} {{.State}}", "shop")
    assert listed == "1 interrupted\n2 deployed\n"


async def test_a_deploy_waits_or_is_detached_and_names_what_does_not_run(cluster: Cluster) -> None:
    cluster.write(FILE % HANGS)
    code, _, err = await cluster.deploy("--timeout", "1")
    assert code == 1
    assert err.splitlines()[-1] == "Error: not done within 1 s: shop_db: 0 of 1 tasks run"
    cluster.write(FILE.replace("web", "api") % HANGS)
    code, _, err = await cluster.deploy("--detach")
    assert (code, "shop_api created" in err.replace(":", ""), "tasks run" in err) == (0, True, False), err
    assert cluster.names() == ["shop_api", "shop_db", "shop_web"]
    code, _, err = await cluster.deploy("--detach", "--prune")
    assert (code, cluster.names()) == (0, ["shop_api", "shop_db"]), err
    code, _, err = await cluster.deploy("--rollback-on-failure", "--detach")
    assert (code, "not with --detach or --only" in err) == (2, True)


async def test_a_plan_ends_with_two_if_something_would_change_and_writes_nothing(cluster: Cluster) -> None:
    cluster.write(FILE % "busybox")
    code, out, _ = await cluster.run("plan", "--resolve-image", "never")
    assert (code, "+ service shop_db" in out, "1 task: m1" in out) == (2, True, True), out
    view = cluster.store.view()
    written = [one.spec.name for one in view.find(Network)] + [one.spec.name for one in view.find(Config)]
    assert [name for name in (*written, *cluster.names()) if name.startswith("shop")] == []
    code, _, err = await cluster.run("up", "--resolve-image", "never", "--timeout", "30")
    assert code == 0, err
    assert (await cluster.run("plan", "--resolve-image", "never"))[:2] == (
        0,
        "Stack shop: nothing to change\n",
    )
    cluster.write("name: shop\nservices: {web: {image: [w]}}")
    assert (await cluster.run("plan"))[0] == 1
    code, _, err = await cluster.run("down", "shop")
    assert (code, cluster.names()) == (0, []), err


async def test_ten_revisions_are_kept_and_the_configs_that_only_older_ones_name_are_removed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_LOOK_S", 0.05)
    text = "services: {web: {image: busybox, configs: [c], secrets: [s], deploy: {update_config: {monitor: 1ms}}}}\n"
    text += "configs: {c: {content: v%d}}\nsecrets: {s: {file: f}}"

    def stack(number: int) -> Any:
        return stack_of(parse(text % number, "f"), "shop", {("secrets", "s"): b"%d" % number}, Report())

    numbers = range(1, KEPT + 4)
    async with cluster.requests() as client:
        for number in numbers:
            made = stack(number)
            plan = plan_of(made, await existing_of(client, "shop"), images={}, prune=False)
            await carry_out(client, made, plan, lambda *_: None, 30.0, pytest.fail)
        assert [one.number for one in await known_revisions(client, "shop")] == list(numbers)[-KEPT:]
        kept = [stack(number) for number in list(numbers)[-KEPT:]]
        for path, section in (("/secrets", "secrets"), ("/configs", "configs")):
            found = {one["Spec"]["Name"] for one in await client.get(path)}
            wanted = {getattr(one, section)[section[0]].name for one in kept}
            assert {name for name in found if "_revision-" not in name} == wanted

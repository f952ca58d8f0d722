"""Commands against a real manager's API, scheduler and orchestrator.  Only nodes are simulated."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web
from msgspec.structs import replace

from skep.api.client.raw import RawClient
from skep.api.client.requests import PlainRequests
from skep.api.http.server import runner
from skep.manager.routes import application
from skep.model.networks.data_planes import NODE_LABEL
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task, TaskState, TaskStatus
from skep.store.interface import Store, Transaction
from skep.store.level import LEVEL
from tests.conformance.manager import CannedLogs, a_manager_api
from tests.support.builders import a_docker_node
from tests.support.machines.playground_rig import SKEP
from tests.support.managers.control_loops import leading

HANGS = "hangs"
"""Image whose tasks never start."""


FAILS = "fails"
"""Image whose tasks fail at once."""


class Cluster:
    """A directory with a Compose file, and a manager's API on a socket in it."""

    def __init__(self, folder: Path, store: Store, logs: CannedLogs) -> None:
        self.folder = folder
        self.store = store
        self.logs = logs
        self.host = f"unix://{folder}/api.sock"

    def write(self, text: str) -> None:
        (self.folder / "compose.yaml").write_text(text)

    async def start(self, *words: str, **environment: str) -> asyncio.subprocess.Process:
        # A shell's background processes ignore ctrl-c, and their children inherit that.
        return await asyncio.create_subprocess_exec(
            *("env", "--default-signal=INT", SKEP, "--host", self.host, *words),
            cwd=self.folder,
            env=os.environ | environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *words: str, **environment: str) -> tuple[int | None, str, str]:
        """Run ``skep WORDS``, and return exit code, output and errors."""
        process = await self.start(*words, **environment)
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    async def deploy(self, *words: str) -> tuple[int | None, str, str]:
        return await self.run("stack", "deploy", "--resolve-image", "never", *words)

    def names(self) -> list[str]:
        return sorted(one.spec.name for one in self.store.view().find(Service))

    def requests(self) -> PlainRequests:
        return PlainRequests(RawClient(self.host, None))


def _with_plugins(tx: Transaction) -> None:
    """Add the plugins that a stack needs to the node's description, and allow all kinds of data."""
    tx.raise_level(LEVEL)
    (node,) = tx.find(Node)
    described = a_docker_node().description
    engine = replace(described.engine, labels={NODE_LABEL: "1"})
    tx.put(replace(node, description=replace(described, engine=engine, hostname=node.description.hostname)))


def _reported(tx: Transaction) -> None:
    """Write the task states that nodes would report."""
    for task in list(tx.find(Task)):
        container = task.spec.container_spec
        is_ending = task.desired_state > TaskState.RUNNING
        state = TaskState.SHUTDOWN if is_ending else TaskState.RUNNING
        if container and FAILS in container.image and not is_ending:
            if TaskState.ASSIGNED <= task.status.state < TaskState.RUNNING:
                status = TaskStatus(state=TaskState.FAILED, err="task: non-zero exit (3)")
                tx.put(replace(task, status=status))
            continue
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


@asynccontextmanager
async def a_cluster(folder: Path) -> AsyncIterator[Cluster]:
    logs = CannedLogs()
    async with a_manager_api(logs) as api:
        await api.store.update(_with_plugins)
        served = runner(application(api))
        await served.setup()
        await web.UnixSite(served, str(folder / "api.sock")).start()
        try:
            async with leading(api.store), asyncio.TaskGroup() as group:
                nodes = group.create_task(_nodes(api.store))
                yield Cluster(folder, api.store, logs)
                nodes.cancel()
        finally:
            await served.cleanup()

"""A container has the rights that its task has when it is created."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

from skep.agent.executor.adapter import NodeFacts
from skep.agent.executor.oci import OciController, OciExecutor
from skep.engine.containers.request import TaskOptions
from skep.model.task import AssignedTask, Trust
from tests.support.builders import a_task


class Executor:
    """An executor whose image and volumes are there once ``fetched`` is set."""

    def __init__(self) -> None:
        self.engine = self.payloads = self.image_puller = self.cluster_volumes = self
        self.node = NodeFacts(hostname="n1", architecture="x86_64")
        self.asked, self.fetched = asyncio.Event(), asyncio.Event()
        self.created: list[bool] = []

    def find_by_label(self, label: str, value: str) -> None:
        """Return None: no container exists."""

    def mounts(self, *_: object) -> tuple[()]:
        return ()

    async def image(self, word: str, auth: str, *, uses_helper: bool) -> object:
        self.asked.set()
        await self.fetched.wait()
        return SimpleNamespace()

    @asynccontextmanager
    async def keep_mounted(self, _: object) -> AsyncIterator[tuple[()]]:
        yield ()

    async def create(self, request: object, *, name: str, task: TaskOptions, image: object) -> None:
        self.created.append(task.may_log_anywhere)


async def test_a_right_that_is_withdrawn_while_the_image_is_fetched_is_not_given() -> None:
    executor = Executor()
    trusted = AssignedTask(task=a_task(), service_name="web", trust=Trust(logs=True))
    controller = OciController(cast("OciExecutor", executor), trusted, "")
    preparing = asyncio.create_task(controller.prepare())
    await executor.asked.wait()
    await controller.update(AssignedTask(task=trusted.task, service_name="web"))
    executor.fetched.set()
    await preparing
    assert executor.created == [False]

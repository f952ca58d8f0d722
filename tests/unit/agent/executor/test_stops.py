"""A task whose process the kernel does not let die has not ended."""

from types import SimpleNamespace
from typing import cast

import pytest

from skep.agent.executor.oci import OciController, OciExecutor
from skep.engine.containers.container import Container, ContainerState
from skep.errors import NotFound, SkepError, Unavailable
from skep.model.task import AssignedTask
from skep.model.values.ids import ContainerId
from tests.support.builders import a_task
from tests.support.engine.oci_rig import QuickClock
from tests.support.engine.stub_engine import a_container


class Engine:
    """Its container stops at the third attempt."""

    def __init__(self, error: SkepError) -> None:
        self.error = error
        self.stops = 0
        self.retired: list[str] = []
        self.container = a_container()

    def find_by_label(self, label: str, value: str) -> Container:
        return self.container

    def get(self, id: ContainerId) -> Container:
        return self.container

    async def stop(self, id: ContainerId) -> None:
        assert self.container.state is ContainerState.RUNNING
        self.stops += 1
        if self.stops < 3:
            raise self.error

    async def retire(self, id: ContainerId) -> None:
        self.retired.append(id)


def controller_of(engine: Engine) -> OciController:
    executor = cast("OciExecutor", SimpleNamespace(engine=engine, clock=QuickClock()))
    return OciController(executor, AssignedTask(task=a_task(), service_name="web"), "")


async def test_a_stop_is_tried_again_until_the_container_has_ended() -> None:
    engine = Engine(Unavailable("tried to kill container, but did not receive an exit event"))
    await controller_of(engine).shutdown()
    assert (engine.stops, engine.retired) == (3, [engine.container.id])


async def test_a_container_that_is_gone_is_not_stopped_again() -> None:
    engine = Engine(NotFound("No such container"))
    with pytest.raises(NotFound):
        await controller_of(engine).shutdown()
    assert engine.stops == 1

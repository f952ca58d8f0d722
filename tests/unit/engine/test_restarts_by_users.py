"""``docker restart`` of containers whose policy acts on their end."""

import asyncio
from pathlib import Path

import pytest

from skep.engine.containers.container import ContainerState, PlainOptions
from tests.support.engine.stub_engine import ID, StubEngine, a_container, on_virtual_time, restart_policies


@pytest.mark.parametrize("state", [ContainerState.RUNNING, ContainerState.PAUSED])
def test_a_container_with_rm_that_its_user_restarts_stays(tmp_path: Path, state: ContainerState) -> None:
    """A paused one ends by the signal while it is being thawed, so the restart is still busy with that."""

    async def body(stubs: StubEngine) -> None:
        async def end_at_once() -> None:
            stubs.runtime.end(143)
            await asyncio.sleep(1)

        stubs.runtime.during = end_at_once
        async with restart_policies(stubs):
            restarting = asyncio.create_task(stubs.engine.stop_and_start(ID))
            if state is ContainerState.RUNNING:
                await asyncio.sleep(1)
                stubs.runtime.end(143)
            await restarting
            assert stubs.engine.get(ID).is_running
            await stubs.end()
            await asyncio.sleep(10)
            assert not stubs.bundles.saved, "it goes with its next end"

    on_virtual_time(body, tmp_path, a_container(state=state, plain=PlainOptions(auto_remove=True)))

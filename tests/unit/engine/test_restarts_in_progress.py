"""A start by the restart policy that meets one by its user."""

import asyncio
from pathlib import Path

import pytest

from skep.engine.containers.container import ContainerState, PlainOptions, RestartPolicy
from skep.errors import Unavailable
from skep.model.networks.sandbox import SandboxConfig
from tests.support.engine.stub_engine import ID, StubEngine, a_container, on_virtual_time, restart_policies


@pytest.mark.parametrize("fails", [False, True])
def test_a_restart_in_progress_uses_up_no_attempt_of_a_start_by_its_user(
    tmp_path: Path, *, fails: bool
) -> None:
    async def body(stubs: StubEngine) -> None:
        gate = asyncio.Event()

        async def wait(_: SandboxConfig) -> None:
            del stubs.steps["network.attach"]
            await gate.wait()
            if fails:
                raise Unavailable("no address")

        stubs.steps["network.attach"] = wait
        async with restart_policies(stubs):
            await asyncio.sleep(1)  # the policy's start is in progress
            starting = asyncio.create_task(stubs.engine.start(ID))
            await asyncio.sleep(1)
            gate.set()
            started = await starting
        assert started.plain is not None
        assert (started.is_running, started.plain.restarts) == (True, 0)

    policy = RestartPolicy(name="on-failure", attempts_max=1)
    ended = a_container(
        state=ContainerState.EXITED, process=None, exit_code=1, plain=PlainOptions(restart=policy)
    )
    on_virtual_time(body, tmp_path, ended)


def test_a_start_by_its_user_that_fails_before_its_adoption_leaves_the_container_ended(
    tmp_path: Path,
) -> None:
    """It counted as restarting, although no restart was due."""
    adopts_later = [True]

    async def fail(*_: object) -> None:
        raise Unavailable("not now")

    def look(*_: object) -> None:
        if adopts_later:
            adopts_later.clear()
            raise OSError("the mounts cannot be read")

    def before(stubs: StubEngine) -> None:
        stubs.steps["bundles.is_mounted"] = look

    async def body(stubs: StubEngine) -> None:
        assert not adopts_later, "its adoption has failed, and is retried"
        stubs.steps["runtime.start"] = fail
        with pytest.raises(Unavailable):
            await stubs.engine.start(ID)
        assert not stubs.engine.get(ID).is_restarting

    always = PlainOptions(restart=RestartPolicy(name="always"))
    ended = a_container(state=ContainerState.EXITED, process=None, exit_code=1, plain=always)
    on_virtual_time(body, tmp_path, ended, before=before)

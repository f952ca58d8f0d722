"""Containers whose removal, retirement, pause or thaw was not finished, because of a failure or a crash."""

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.engine.containers.container import (
    Container,
    ContainerConfig,
    ContainerState,
    MountPoint,
    PlainOptions,
    RestartPolicy,
)
from skep.engine.lifecycle.driver import KILLED_S_MAX
from skep.errors import Unavailable
from skep.model.networks.sandbox import Sandbox
from skep.model.values.ids import ContainerId
from skep.model.values.times import ZERO_TIME, timestamp
from tests.support.engine.oci_rig import Machine, memory_engine
from tests.support.engine.stub_engine import (
    ID,
    StubEngine,
    a_container,
    on_virtual_time,
    restart_policies,
)


def test_a_container_that_ends_after_its_forced_removal_has_failed_is_not_restarted(tmp_path: Path) -> None:
    """Its user no longer wants it, whatever its restart policy is."""

    async def body(stubs: StubEngine) -> None:
        async with restart_policies(stubs):
            removing = asyncio.create_task(stubs.engine.remove(ID, force=True))
            await asyncio.sleep(KILLED_S_MAX + 1)  # its process waits for a device
            with pytest.raises(Unavailable, match="could not kill"):
                await removing
            stubs.runtime.end(137)
            await asyncio.sleep(120)
        ended = stubs.engine.get(ID)
        assert (ended.state, ended.is_restarting, stubs.runtime.starts) == (ContainerState.EXITED, False, 0)

    always = PlainOptions(restart=RestartPolicy(name="always"))
    on_virtual_time(body, tmp_path, a_container(plain=always))


def test_a_task_is_retired_with_the_process_that_its_adoption_could_not_delete(tmp_path: Path) -> None:
    calls: list[ContainerId] = []

    async def delete(container: Container) -> None:
        calls.append(container.id)
        if len(calls) == 1:
            raise Unavailable("runc delete did not end in time")

    def before(stubs: StubEngine) -> None:
        stubs.steps["runtime.delete"] = delete

    async def body(stubs: StubEngine) -> None:
        assert calls == [ID], "its adoption has tried that"
        await stubs.engine.retire(ID)
        assert calls == [ID, ID]
        assert stubs.engine.get(ID).is_retired

    created = a_container(state=ContainerState.CREATED, plain=None, started_at=ZERO_TIME)
    on_virtual_time(body, tmp_path, created, before=before)


def test_a_run_that_was_thawed_before_a_crash_is_adopted_as_running(tmp_path: Path) -> None:
    def thaw(stubs: StubEngine) -> None:
        stubs.runtime.is_all_frozen = False

    async def body(stubs: StubEngine) -> None:
        assert stubs.engine.get(ID).state is ContainerState.RUNNING
        assert stubs.bundles.saved[ID].state is ContainerState.RUNNING

    on_virtual_time(body, tmp_path, a_container(state=ContainerState.PAUSED), before=thaw)


def test_a_removal_waits_until_everything_of_the_last_run_is_freed(tmp_path: Path) -> None:
    """Otherwise its volumes would stay in use after the removal."""

    async def body(stubs: StubEngine) -> None:
        gate = asyncio.Event()
        stubs.steps["volumes.unmount"] = lambda _: gate.wait()
        await stubs.end()
        removing = asyncio.create_task(stubs.engine.remove(ID))
        await asyncio.sleep(10)
        assert stubs.bundles.saved[ID].state is ContainerState.EXITED
        gate.set()
        await removing
        assert not stubs.bundles.saved

    on_virtual_time(body, tmp_path, a_container())


def test_a_pause_that_failed_after_it_has_frozen_the_container_is_shown(tmp_path: Path) -> None:
    async def late() -> None:
        raise Unavailable("runc pause did not end in time")

    async def body(stubs: StubEngine) -> None:
        stubs.runtime.during = late
        stubs.runtime.is_all_frozen = True
        with pytest.raises(Unavailable, match="did not end in time"):
            await stubs.engine.pause(ID)
        assert stubs.engine.get(ID).state is ContainerState.PAUSED

    on_virtual_time(body, tmp_path, a_container())


@pytest.mark.parametrize("state", [ContainerState.RUNNING, ContainerState.PAUSED])
def test_a_volume_has_the_user_that_still_runs_before_its_adoption(
    tmp_path: Path, state: ContainerState
) -> None:
    """Otherwise another user's end would unmount it, and its plug-in would detach it."""
    point = MountPoint(type="volume", name="data", source="/data", destination="/data")
    seen: list[set[str]] = []

    def before(stubs: StubEngine) -> None:
        async def look() -> None:
            seen.append(set(stubs.engine.volumes.users["data"]))

        stubs.steps["network.restore"] = look

    async def body(stubs: StubEngine) -> None:
        assert seen == [{ID}]
        await stubs.end()
        await asyncio.sleep(1)
        assert not stubs.engine.volumes.users["data"]

    container = a_container(state=state, config=ContainerConfig(path="sh", mounts=(point,)))
    on_virtual_time(body, tmp_path, container, before=before)


async def test_the_files_of_names_are_written_again_until_a_task_has_started(tmp_path: Path) -> None:
    """After a crash or a reboot, a task that waits for its start may have another address, or a part of a file."""
    bundles = memory_engine(tmp_path, Machine()).bundles
    created = a_container(
        state=ContainerState.CREATED, process=None, started_at=ZERO_TIME, plain=None, sandbox=on("172.18.0.2")
    )
    bundles.make(created)
    bundles.prepare(created)
    hosts, resolver = (bundles.path(ID) / name for name in ("hosts", "resolv.conf"))
    whole = resolver.read_text()
    resolver.write_text(whole[:3])
    bundles.prepare(replace(created, sandbox=on("172.18.0.3")))
    assert "172.18.0.3" in hosts.read_text()
    assert resolver.read_text() == whole
    hosts.write_text("by the container")
    bundles.prepare(replace(created, started_at=timestamp(1), sandbox=on("172.18.0.4")))
    assert hosts.read_text() == "by the container"


def on(address: str) -> Sandbox:
    return Sandbox(netns="/nonexistent", address=address)

"""The places for starts: what waits for its own container, its volumes or its caller keeps none from the others."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.engine.containers.container import (
    BeingRemoved,
    Container,
    NotRunning,
    PlainOptions,
    StillRunning,
)
from skep.engine.engine import Engine
from skep.engine.volumes.volumes import MountFailed
from skep.errors import SkepError, Unavailable
from skep.model.networks.sandbox import EndpointRequest, NetworkMode
from skep.model.values.ids import ContainerId
from tests.support.engine.oci_rig import Machine, memory_engine, new_container
from tests.support.managers.wire_rig import until

PLACES = 4
"""Of the rig's engine."""


class Rig:
    """An engine whose volumes, and whose runtime's starts, wait for a gate if they are told to."""

    def __init__(self, directory: Path) -> None:
        self.machine = Machine()
        self.steps = self.machine.steps
        self.engine: Engine = memory_engine(directory, self.machine)
        self.gates = {name: asyncio.Event() for name in ("mount", "unmount", "start")}
        self.waiting = Counter[str]()
        self.free: set[str] = set()
        """Users whose mounts do not wait."""
        self.calls: list[tuple[str, str]] = []
        self.steps["volumes.mount"] = self.mount
        self.steps["volumes.unmount"] = self.unmount
        self.steps["runtime.start"] = partial(self._pass, "start")
        self.open(*self.gates)

    def open(self, *names: str) -> None:
        for name in names:
            self.gates[name].set()

    async def mount(self, user: str) -> None:
        self.calls.append(("mount", user))
        if user not in self.free:
            await self._pass("mount")

    async def unmount(self, user: str) -> None:
        await self._pass("unmount")
        self.calls.append(("unmounted", user))

    async def _pass(self, name: str) -> None:
        self.waiting[name] += 1
        await self.gates[name].wait()
        self.waiting[name] -= 1

    async def containers(self, number: int) -> Sequence[Container]:
        return [await self.engine.add(new_container(f"c{index}")) for index in range(number)]

    async def started(self, container: Container) -> Container:
        async with asyncio.timeout(10):
            return await self.engine.start(container.id)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    async with rig.engine.running():
        yield rig
        rig.open(*rig.gates)


async def test_a_start_that_waits_for_a_removal_takes_no_place(rig: Rig) -> None:
    *stuck, other = await rig.containers(PLACES + 1)
    for one in stuck:
        await rig.started(one)
    rig.machine.is_stuck = True  # their processes do not even die
    removals = [asyncio.create_task(rig.engine.remove(one.id, force=True)) for one in stuck]
    await until(lambda: all(rig.engine.lifecycle.locks.is_held(one.id) for one in stuck))
    starts = [asyncio.create_task(rig.engine.start(one.id)) for one in stuck]
    await asyncio.wait(starts, timeout=0)  # they come first
    try:
        assert (await rig.started(other)).is_running
    finally:
        for one in stuck:
            rig.machine.end(one.id)
        await asyncio.wait([*removals, *starts])


async def test_a_start_that_waits_for_the_unmount_of_the_last_run_takes_no_place(rig: Rig) -> None:
    *ended, other = await rig.containers(PLACES + 1)
    rig.gates["unmount"].clear()
    for one in ended:
        await rig.started(one)
        rig.machine.end(one.id)
    await until(lambda: rig.waiting["unmount"] == PLACES)
    rig.calls.clear()
    again = [asyncio.create_task(rig.engine.start(one.id)) for one in ended]
    await asyncio.wait(again, timeout=0)  # they come first
    try:
        assert (await rig.started(other)).is_running
        assert rig.calls == [("mount", other.id)], "theirs follow their unmounts"
    finally:
        rig.open("unmount")
        await asyncio.wait(again)
    calls = {one.id: [what for what, user in rig.calls if user == one.id] for one in ended}
    assert calls == {one.id: ["unmounted", "mount"] for one in ended}


async def test_a_start_that_waits_for_its_mount_takes_no_place(rig: Rig) -> None:
    *slow, other = await rig.containers(PLACES + 1)
    rig.gates["mount"].clear()
    starts = [asyncio.create_task(rig.engine.start(one.id)) for one in slow]
    await until(lambda: rig.waiting["mount"] == PLACES)
    rig.free.add(other.id)
    try:
        assert (await rig.started(other)).is_running
    finally:
        rig.open("mount")
        await asyncio.wait(starts)
    assert all(start.result().is_running for start in starts)


@pytest.mark.parametrize("secret_env", [(), ("A=b",)])
async def test_no_more_than_the_places_start_at_the_same_moment(
    rig: Rig, secret_env: tuple[str, ...]
) -> None:
    rig.gates["start"].clear()
    containers = await rig.containers(PLACES + 1)
    starts = [asyncio.create_task(rig.engine.start(one.id, secret_env=secret_env)) for one in containers]
    await until(lambda: len(rig.calls) == PLACES + 1 and rig.waiting["start"] == PLACES)
    starts[-1].cancel()  # it waits for a place
    await asyncio.wait(starts[-1:])
    assert starts[-1].cancelled()
    assert ("unmounted", containers[-1].id) in rig.calls
    assert not rig.engine.get(containers[-1].id).error, "it may be started later"
    rig.open("start")
    await asyncio.gather(*starts[:-1])
    assert (await rig.started(containers[-1])).is_running


async def test_a_start_whose_caller_is_cancelled_again_and_again_has_its_turn_to_its_end(rig: Rig) -> None:
    rig.gates["start"].clear()
    (container,) = await rig.containers(1)
    starting = asyncio.create_task(rig.engine.start(container.id))
    await until(lambda: rig.waiting["start"])
    for _ in range(2):
        starting.cancel()
        await asyncio.wait([starting], timeout=0)
    removing = asyncio.create_task(rig.engine.remove(container.id, force=True))
    await asyncio.wait([removing], timeout=0)
    assert rig.engine.lifecycle.locks.is_held(container.id)
    assert rig.engine.lifecycle.starting._value == PLACES - 1
    assert not starting.done()
    rig.open("start")
    await removing
    assert starting.cancelled()
    assert rig.engine.lifecycle.starting._value == PLACES
    assert rig.machine.ended[container.id].is_set(), "it was started before"


async def test_a_mount_that_fails_is_the_error_of_its_container(rig: Rig) -> None:
    (container,) = await rig.containers(1)

    async def refuse(*_: object) -> None:
        raise MountFailed("error while mounting volume")

    rig.steps["volumes.mount"] = refuse
    with pytest.raises(MountFailed):
        await rig.started(container)
    failed = rig.engine.get(container.id)
    assert (failed.error, failed.exit_code, failed.is_running) == ("error while mounting volume", 128, False)
    assert not rig.engine.lifecycle.locks.is_held(container.id)


async def test_a_forced_removal_cuts_off_the_mount_of_its_container_alone(rig: Rig) -> None:
    unwanted, other = await rig.containers(2)
    rig.gates["mount"].clear()
    starts = [asyncio.create_task(rig.engine.start(one.id)) for one in (unwanted, other)]
    await until(lambda: rig.waiting["mount"] == 2)
    again = asyncio.create_task(rig.engine.start(unwanted.id))  # before the removal
    await asyncio.wait([again], timeout=0)
    async with asyncio.timeout(10):
        await rig.engine.remove(unwanted.id, force=True)
    with pytest.raises(NotRunning, match="is being removed"):
        await starts[0]
    with pytest.raises(SkepError):
        await again
    assert ("unmounted", unwanted.id) in rig.calls
    assert not rig.engine.has(unwanted.id)
    rig.open("mount")
    assert (await starts[1]).is_running


async def test_a_removal_that_is_given_up_leaves_a_forced_one_its_means(rig: Rig) -> None:
    (container,) = await rig.containers(1)
    rig.gates["mount"].clear()
    starting = asyncio.create_task(rig.engine.start(container.id))
    await until(lambda: rig.waiting["mount"] == 1)
    unforced = asyncio.create_task(rig.engine.lifecycle.remove(container.id, force=False))
    await asyncio.wait([unforced], timeout=0)
    unforced.cancel()
    await asyncio.wait([unforced])
    async with asyncio.timeout(10):
        await rig.engine.remove(container.id, force=True)
    with pytest.raises(NotRunning, match="is being removed"):
        await starting
    assert not rig.engine.has(container.id)


async def test_a_start_that_has_waited_for_a_removal_that_failed_is_refused(rig: Rig) -> None:
    (container,) = await rig.containers(1)
    gate = asyncio.Event()

    async def refuse_once(_: ContainerId) -> None:
        del rig.steps["bundles.discard"]
        await gate.wait()
        raise OSError("busy")

    rig.steps["bundles.discard"] = refuse_once
    lifecycle = rig.engine.lifecycle
    refused = asyncio.create_task(lifecycle.remove(container.id, force=True))
    await until(lambda: "bundles.discard" not in rig.steps)
    starting = asyncio.create_task(lifecycle.start(container.id))
    await asyncio.wait([starting], timeout=0)
    removing = asyncio.create_task(lifecycle.remove(container.id, force=True))
    await asyncio.wait([removing], timeout=0)
    gate.set()
    with pytest.raises(Unavailable):
        await refused
    async with asyncio.timeout(10):
        await removing
    with pytest.raises(BeingRemoved):
        await starting


async def test_a_removal_that_is_not_forced_waits_for_the_start(rig: Rig) -> None:
    (container,) = await rig.containers(1)
    rig.gates["mount"].clear()
    starting = asyncio.create_task(rig.engine.start(container.id))
    await until(lambda: rig.waiting["mount"] == 1)
    removing = asyncio.create_task(rig.engine.remove(container.id))
    await asyncio.wait([removing], timeout=0)
    rig.open("mount")
    assert (await starting).is_running
    with pytest.raises(StillRunning):
        await removing


async def test_a_container_whose_removal_failed_or_goes_on_is_not_started_and_stays_as_it_is(
    rig: Rig,
) -> None:
    """What is left of it may be a part: Docker refuses it in the same words."""
    container = await rig.engine.add(replace(new_container("c"), plain=PlainOptions(mode=NetworkMode.BRIDGE)))
    refused = partial(pytest.raises, BeingRemoved, match="marked for removal and cannot be started")

    async def refuse(*_: object) -> None:
        with refused():  # while it goes on
            await rig.engine.start(container.id)
        raise OSError("busy")

    rig.steps["bundles.discard"] = refuse
    with pytest.raises(Unavailable):
        await rig.engine.remove(container.id, force=True)
    del rig.steps["bundles.discard"]
    with refused():
        await rig.engine.start(container.id)
    with refused():
        await rig.engine.restart(container.id, ignore_stop=True)
    request, id = EndpointRequest(network="front"), container.id
    for operation in (
        rig.engine.update(id, lambda one: one),
        rig.engine.rename(id, "another"),
        rig.engine.networks.connect(id, request),
        rig.engine.networks.disconnect(id, "front"),
    ):
        with pytest.raises(BeingRemoved):
            await operation
    await rig.engine.remove(container.id)
    assert not rig.engine.list()


async def test_a_removal_of_an_earlier_process_ends_when_the_container_is_gone(tmp_path: Path) -> None:
    first, tries = Rig(tmp_path), 0

    async def refuse(*_: object) -> None:
        nonlocal tries
        tries += 1
        raise OSError("busy")

    first.steps["bundles.discard"] = refuse
    async with first.engine.running():
        (container,) = await first.containers(1)
        with pytest.raises(Unavailable):
            await first.engine.remove(container.id)
    second = Rig(tmp_path)
    second.steps["bundles.discard"] = refuse
    async with second.engine.running():
        await until(lambda: tries > 1)
        second.engine.store.forget(container.id)  # its user's `docker rm` went better
        name = f"remove-{container.id[:12]}"
        await until(lambda: name not in {task.get_name() for task in asyncio.all_tasks()})


async def test_a_start_that_ends_while_the_process_ends_does_not_hold_that_up(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.gates["start"].clear()
    lifecycle = rig.engine.lifecycle

    async def ends_after(starting: "asyncio.Task[Container]") -> None:
        try:
            await asyncio.Event().wait()
        finally:
            rig.open("start")
            await asyncio.wait([starting])

    async with asyncio.timeout(10), rig.engine.running():
        (container,) = await rig.containers(1)
        starting = asyncio.create_task(rig.engine.start(container.id))
        await until(lambda: rig.waiting["start"])
        lifecycle.spawn(ends_after(starting), name="the last one")
        await asyncio.sleep(0)
    assert starting.result().is_running
    assert not lifecycle.watches, "the next process watches it"

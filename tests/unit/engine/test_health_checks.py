"""A container that goes away in the middle of its probe.  The runtime is one that says when a process has started."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from skep.aio.clock import SystemClock
from skep.engine.containers import health
from skep.engine.containers.attachment import Attachment
from skep.engine.containers.container import (
    Container,
    ContainerConfig,
    ContainerState,
    ExecConfig,
    ProcessName,
)
from skep.engine.containers.execs import STARTS_MAX, Execs
from skep.engine.containers.health import HealthMonitor
from skep.engine.containers.state import ContainerStore
from skep.engine.events import Events
from skep.engine.lifecycle import machine
from skep.engine.lifecycle.life_events import Probed
from skep.engine.runtime.bundle import Bundles
from skep.engine.runtime.runtime import Runtime, StartedExec
from skep.errors import NotFound
from skep.model.container import HealthConfig
from skep.model.values.ids import ContainerId
from skep.model.values.times import timestamp
from tests.support.managers.wire_rig import until

ID = ContainerId("c" * 64)
CHECK = HealthConfig(test=("CMD", "true"), interval=1_000_000)
ENDED = ProcessName(pid=os.getpid(), start_ticks=1, boot_id="of an earlier process")


class NoDisk:
    """In the place of ``Bundles``."""

    def save(self, container: Container) -> None:
        pass

    def prepare_exec(self, container: Container, exec_id: str, requested: ExecConfig) -> Path:
        return Path("/nonexistent")

    def exec_path(self, id: ContainerId, exec_id: str) -> Path:
        return Path("/nonexistent")


class SlowRuntime:
    """In the place of ``Runtime``: a process starts when ``go`` is set, and ends when ``end`` is."""

    def __init__(self) -> None:
        self.begun, self.killed, self.end = 0, list[int](), asyncio.Event()
        self.asked, self.go = asyncio.Event(), asyncio.Event()
        self.ours, self.theirs = socket.socketpair()

    def expect_exec(self) -> None:
        pass

    async def exec(self, *words: object, **options: object) -> StartedExec:
        self.begun += 1
        self.asked.set()
        await self.go.wait()
        return StartedExec(self.begun, None, Attachment(self.theirs))

    def kill_exec(self, container: Container, pid: int) -> None:
        self.killed.append(pid)

    async def wait_exec(self, *_: object) -> int:
        await self.end.wait()
        return 137


class Rig:
    """One running container with a probe."""

    def __init__(self, check: HealthConfig = CHECK, **times: float) -> None:
        """``times``: ``ended_s`` and ``killed_s`` of the monitor."""
        clock = SystemClock()
        self.runtime = SlowRuntime()
        self.registry = ContainerStore(cast("Bundles", NoDisk()))
        events = Events(clock)
        self.execs = Execs(
            cast("Bundles", NoDisk()),
            cast("Runtime", self.runtime),
            events,
            clock,
            container=self.registry.get,
            spawn=asyncio.create_task,
        )
        self.checks = HealthMonitor(self.registry, self.execs, clock, report=self.report, **times)
        self.registry.add(
            Container(
                id=ID,
                name="c",
                image="i",
                image_id="sha256:i",
                config=ContainerConfig(path="true", healthcheck=check),
                state=ContainerState.RUNNING,
                started_at=timestamp(clock.now_ns()),
                health=health.initial(check),
            )
        )

    async def report(self, id: ContainerId, event: Probed) -> None:
        self.registry.note(machine.step(self.registry.require(id), event).container)

    def remove(self) -> None:
        """All at one moment, as a busy node process sees it."""
        self.registry.change(ID, state=ContainerState.EXITED)
        self.execs.forget(ID)
        self.registry.forget(ID)


@pytest.fixture
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    rig = Rig(**getattr(request, "param", {}))
    with rig.runtime.ours, rig.runtime.theirs:
        yield rig


async def test_the_probe_of_a_container_that_is_removed_ends_quietly(rig: Rig) -> None:
    probing = asyncio.create_task(rig.checks.run(ID))
    await rig.runtime.asked.wait()
    rig.remove()
    await asyncio.wait_for(probing, 5)


async def test_the_result_of_a_probe_is_discarded_when_its_container_has_ended_meanwhile(rig: Rig) -> None:
    probing = asyncio.create_task(rig.checks.run(ID))
    await rig.runtime.asked.wait()
    rig.execs.forget(ID)
    rig.runtime.go.set()  # and the probe fails before the end is noticed
    rig.registry.change(ID, state=ContainerState.EXITED)
    await asyncio.wait_for(probing, 5)
    kept = rig.registry.get(ID).health
    assert kept is not None
    assert kept.log == ()
    assert (rig.checks.count, rig.checks.failures) == (1, 1), "it was run all the same"


async def test_the_result_of_a_probe_is_discarded_when_its_container_has_ended_but_that_is_not_recorded_yet(
    rig: Rig,
) -> None:
    rig.registry.change(ID, process=ENDED)
    probing = asyncio.create_task(rig.checks.run(ID))
    await rig.runtime.asked.wait()
    rig.execs.forget(ID)
    rig.runtime.go.set()  # and runc cannot enter it
    await until(lambda: rig.checks.count == 1)
    await asyncio.wait([probing], timeout=0.01)
    assert rig.registry.get(ID).health == health.initial(CHECK)
    assert not probing.done(), "nothing says yet that it is unhealthy"
    rig.registry.change(ID, state=ContainerState.EXITED)
    await asyncio.wait_for(probing, 5)


async def test_the_result_of_a_probe_is_discarded_when_its_container_is_paused_meanwhile(rig: Rig) -> None:
    """A frozen probe runs into its time limit.  Source: moby, daemon/health.go (monitor)."""
    rig.runtime.theirs.setblocking(False)
    probing = asyncio.create_task(rig.checks.run(ID))
    await rig.runtime.asked.wait()
    rig.runtime.go.set()
    await until(lambda: rig.execs.of(ID)[0].pid != 0)
    rig.registry.change(ID, state=ContainerState.PAUSED)
    rig.runtime.end.set()
    rig.runtime.ours.close()
    await until(lambda: rig.checks.count > 0)
    await asyncio.wait([probing], timeout=0.01)
    assert rig.registry.get(ID).health == health.initial(CHECK)
    rig.registry.change(ID, state=ContainerState.EXITED)
    await asyncio.wait_for(probing, 5)


@pytest.mark.parametrize("rig", [{"ended_s": 0.001}], indirect=True)
async def test_a_failed_probe_counts_if_the_end_of_its_container_does_not_come(rig: Rig) -> None:
    rig.registry.change(ID, process=ENDED)
    probing = asyncio.create_task(rig.checks.run(ID))
    await rig.runtime.asked.wait()
    rig.execs.forget(ID)
    rig.runtime.go.set()
    await until(lambda: _failures(rig) > 0)
    rig.runtime.end.set()  # the next probe may have started, and no process outlives its container
    rig.registry.change(ID, state=ContainerState.EXITED)
    await asyncio.wait_for(probing, 5)


async def test_an_exec_whose_container_is_removed_while_it_starts_is_none(rig: Rig) -> None:
    exec_id = rig.execs.create(ID, ExecConfig(command=("true",)))
    starting = asyncio.create_task(rig.execs.start(exec_id))
    await rig.runtime.asked.wait()
    rig.remove()
    rig.runtime.go.set()
    with pytest.raises(NotFound, match="No such exec instance"):
        await starting
    assert rig.runtime.ours.recv(1) == b"", "its streams are let go of"


@pytest.fixture
async def hasty() -> AsyncIterator[Rig]:
    """Its probes may take a moment only."""
    check = HealthConfig(test=("CMD", "true"), interval=1_000_000, timeout=1_000_000, retries=3)
    rig = Rig(check, killed_s=0.0)
    with rig.runtime.ours, rig.runtime.theirs:
        yield rig
        rig.registry.change(ID, state=ContainerState.EXITED)


def _failures(rig: Rig) -> int:
    state = rig.registry.get(ID).health
    assert state is not None
    return state.failing_streak


async def test_a_probe_that_is_late_while_it_starts_is_killed_and_the_next_one_waits_for_its_end(
    hasty: Rig,
) -> None:
    probing = asyncio.create_task(hasty.checks.run(ID))
    await until(lambda: _failures(hasty) >= 3)
    assert hasty.runtime.begun == 1, "it still starts; the others have failed without one of their own"
    assert [one.running for one in hasty.execs.of(ID)] == [True]
    hasty.runtime.go.set()
    await until(lambda: hasty.runtime.killed)
    before = _failures(hasty)
    await until(lambda: _failures(hasty) > before)
    assert (hasty.runtime.begun, hasty.runtime.killed) == (1, [1]), "it has not ended yet"
    hasty.runtime.go.clear()
    hasty.runtime.end.set()
    await until(lambda: hasty.runtime.begun == 2)
    hasty.registry.change(ID, state=ContainerState.EXITED)
    await probing


async def test_an_exec_whose_caller_goes_while_it_starts_is_killed_and_keeps_its_place_until_it_is_gone(
    rig: Rig,
) -> None:
    exec_id = rig.execs.create(ID, ExecConfig(command=("true",)))
    starting = asyncio.create_task(rig.execs.start(exec_id))
    await rig.runtime.asked.wait()
    starting.cancel()
    await asyncio.wait([starting])
    assert rig.execs.get(exec_id).running, "conmon is at work for it"
    rig.runtime.go.set()
    await until(lambda: rig.runtime.killed)
    assert rig.execs.starting._value == STARTS_MAX - 1
    rig.runtime.end.set()
    assert (await rig.execs.wait(exec_id)).exit_code == 137
    await until(lambda: rig.execs.starting._value == STARTS_MAX)
    assert rig.runtime.ours.recv(1) == b"", "its streams are let go of"


async def test_a_probe_that_waits_for_other_execs_is_not_late(hasty: Rig) -> None:
    others = [hasty.execs.create(ID, ExecConfig(command=("true",))) for _ in range(STARTS_MAX)]
    starts = [asyncio.create_task(hasty.execs.start(one)) for one in others]
    await hasty.runtime.asked.wait()
    probing = asyncio.create_task(hasty.checks.run(ID))
    await until(lambda: len(hasty.execs.of(ID)) == STARTS_MAX + 1)
    with pytest.raises(TimeoutError):
        await until(lambda: hasty.checks.count, within_s=0.1)  # much longer than it may take
    hasty.registry.change(ID, state=ContainerState.EXITED)
    await probing
    assert len(hasty.execs.of(ID)) == STARTS_MAX, "it has left the queue"
    hasty.runtime.end.set()
    hasty.runtime.go.set()
    await asyncio.wait(starts)

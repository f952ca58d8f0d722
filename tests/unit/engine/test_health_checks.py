"""A container that goes away in the middle of its probe.  The runtime is one that says when a process has started."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from skep.aio.clock import SystemClock
from skep.engine import health
from skep.engine.attachment import Attachment
from skep.engine.bundle import Bundles
from skep.engine.cgroups import Cgroups
from skep.engine.container import Container, ContainerConfig, ContainerState, ExecConfig
from skep.engine.events import Events
from skep.engine.execs import Execs
from skep.engine.health import HealthMonitor
from skep.engine.runtime import Runtime, StartedExec
from skep.engine.state import ContainerStore
from skep.errors import NotFound
from skep.model.container import HealthConfig
from skep.model.ids import ContainerId
from skep.model.times import timestamp

ID = ContainerId("c" * 64)
CHECK = HealthConfig(test=("CMD", "true"), interval=1_000_000)


class NoDisk:
    """In the place of ``Bundles``."""

    def save(self, container: Container) -> None:
        pass

    def prepare_exec(self, container: Container, exec_id: str, requested: ExecConfig) -> Path:
        return Path("/nonexistent")


class SlowRuntime:
    """In the place of ``Runtime``: a process starts when ``go`` is set."""

    def __init__(self) -> None:
        self.asked, self.go = asyncio.Event(), asyncio.Event()
        self.ours, self.theirs = socket.socketpair()

    def expect_exec(self) -> None:
        pass

    async def exec(self, *words: object, **options: object) -> StartedExec:
        self.asked.set()
        await self.go.wait()
        return StartedExec(1, None, Attachment(self.theirs))


class Rig:
    """One running container with a probe."""

    def __init__(self) -> None:
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
            spawn=lambda work, name: pytest.fail("nothing started"),
        )
        self.checks = HealthMonitor(self.registry, self.execs, events, cast("Cgroups", None), clock)
        self.registry.add(
            Container(
                id=ID,
                name="c",
                image="i",
                image_id="sha256:i",
                config=ContainerConfig(path="true", healthcheck=CHECK),
                state=ContainerState.RUNNING,
                started_at=timestamp(clock.now_ns()),
                health=health.initial(CHECK),
            )
        )

    def remove(self) -> None:
        """All at one moment, as a busy node process sees it."""
        self.registry.change(ID, state=ContainerState.EXITED)
        self.execs.forget(ID)
        self.registry.forget(ID)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
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


async def test_an_exec_whose_container_is_removed_while_it_starts_is_none(rig: Rig) -> None:
    exec_id = rig.execs.create(ID, ExecConfig(command=("true",)))
    starting = asyncio.create_task(rig.execs.start(exec_id))
    await rig.runtime.asked.wait()
    rig.remove()
    rig.runtime.go.set()
    with pytest.raises(NotFound, match="No such exec instance"):
        await starting
    assert rig.runtime.ours.recv(1) == b"", "its streams are let go of"

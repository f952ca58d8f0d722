"""What is done after the end of a plain container, when the node refuses it or the next end comes early."""

import asyncio
import errno
from collections.abc import Callable, Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.aio.clock import Clock
from skep.engine.containers.container import (
    BeingRemoved,
    Container,
    ContainerState,
    PlainOptions,
    RestartPolicy,
    StillRunning,
)
from skep.engine.events import Events
from skep.engine.lifecycle.restart import FIRST_DELAY_S, LONGEST_DELAY_S, RestartMonitor
from skep.errors import NotFound, Unavailable
from skep.model.values.ids import ContainerId
from skep.model.values.times import timestamp
from tests.support.engine.stub_engine import (
    ID,
    StubEngine,
    a_container,
    disk_full,
    on_virtual_time,
    restart_policies,
)
from tests.support.engine.stub_engine import Body as EngineBody

ALWAYS = PlainOptions(restart=RestartPolicy(name="always"))
TO_REMOVE = PlainOptions(auto_remove=True)


class OneContainer:
    """In the place of the engine.  ``refusals``: what the next calls raise."""

    def __init__(self, clock: Clock, plain: PlainOptions) -> None:
        self.events = Events(clock)
        self.container: Container | None = a_container(plain=plain)
        self.refusals: list[Exception] = []
        self.calls: list[float] = []
        self.starts = 0
        self.started = asyncio.Event()
        self.lives = True
        """Whether a process that is started runs on."""
        self._clock = clock

    def plain_containers(self) -> list[Container]:
        return [] if self.container is None else [self.container]

    def get(self, word: str) -> Container:
        if self.container is None:
            raise NotFound(f"No such container: {word}")
        return self.container

    def set(self, state: ContainerState, **fields: Any) -> None:
        self.container = msgspec.structs.replace(self.get(ID), state=state, **fields)

    def end(self) -> None:
        now = timestamp(self._clock.now_ns())
        self.set(ContainerState.EXITED, finished_at=now)
        self.events.publish("die", self.get(ID))

    async def restart(self, id: ContainerId, *, ignore_stop: bool) -> bool:
        container = self.get(id)
        if container.is_running or (container.plain is not None and container.plain.is_stopped):
            return False
        self._call()
        self.starts += 1
        self.started.set()
        self.set(ContainerState.RUNNING, started_at=timestamp(self._clock.now_ns()))
        if not self.lives:
            self.lives = True
            self.end()  # and the monitor reads the event before this returns
            await self._clock.sleep(0.0)
            await self._clock.sleep(0.0)
        return True

    async def remove(self, word: str, *, force: bool = False, with_volumes: bool = False) -> None:
        self.get(word)
        self._call()
        self.container = None

    def _call(self) -> None:
        self.calls.append(self._clock.monotonic())
        if self.refusals:
            raise self.refusals.pop(0)


Body: TypeAlias = Callable[[OneContainer, Clock], Coroutine[Any, Any, None]]
MonitoredBody: TypeAlias = Callable[[OneContainer, Clock, RestartMonitor], Coroutine[Any, Any, None]]


def watched(plain: PlainOptions, body: Body, rng: Callable[[], float] = lambda: 1.0) -> None:
    """Run ``body`` on virtual time, with a monitor of one container that runs."""
    monitored(plain, lambda one, clock, _: body(one, clock), rng)


def monitored(plain: PlainOptions, body: MonitoredBody, rng: Callable[[], float] = lambda: 1.0) -> None:
    """The same with the monitor itself."""
    loop = VirtualLoop()

    async def whole() -> None:
        clock = VirtualClock(loop)
        one = OneContainer(clock, plain)
        monitor = RestartMonitor(one, clock, rng)
        monitoring = loop.create_task(monitor.run())
        await clock.sleep(1.0)
        await body(one, clock, monitor)
        assert not monitoring.done()
        monitoring.cancel()
        await asyncio.wait([monitoring])

    try:
        loop.run_until_complete(whole())
    finally:
        loop.close()


def test_a_container_is_started_again_however_long_the_disk_is_full() -> None:
    async def body(one: OneContainer, clock: Clock) -> None:
        one.refusals = [disk_full() for _ in range(20)]
        one.end()
        await clock.sleep(3600.0)
        pauses = [round(after - before, 3) for before, after in pairwise(one.calls)]
        assert len(one.calls) == 21
        assert pauses[:3] == [2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S, 8 * FIRST_DELAY_S]
        assert pauses == sorted(pauses)
        assert pauses[-1] == LONGEST_DELAY_S
        assert one.starts == 1
        assert one.get(ID).is_running

    watched(ALWAYS, body)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_other_shortages_of_the_node_pass_too(number: int) -> None:
    async def body(one: OneContainer, clock: Clock) -> None:
        one.refusals = [OSError(number, ""), Unavailable("not now"), NotFound("nothing to attach to")]
        one.end()
        await clock.sleep(10.0)
        assert one.get(ID).is_running

    watched(ALWAYS, body)


def test_containers_that_were_refused_together_are_not_tried_together() -> None:
    async def body(one: OneContainer, clock: Clock) -> None:
        one.refusals = [disk_full(), disk_full()]
        one.end()
        await clock.sleep(10.0)
        pauses = [after - before for before, after in pairwise(one.calls)]
        assert pauses == pytest.approx([FIRST_DELAY_S, 2 * FIRST_DELAY_S]), "half of 0.2 and 0.4"

    watched(ALWAYS, body, rng=lambda: 0.0)


def test_one_that_its_user_stops_meanwhile_is_not_tried_any_more() -> None:
    async def body(one: OneContainer, clock: Clock) -> None:
        one.refusals = [disk_full() for _ in range(1000)]
        one.end()
        await clock.sleep(10.0)
        one.set(ContainerState.EXITED, plain=msgspec.structs.replace(ALWAYS, is_stopped=True))
        tries = len(one.calls)
        await clock.sleep(3600.0)
        assert len(one.calls) == tries

    watched(ALWAYS, body)


def waits_for_its_longest_delay(one: OneContainer) -> None:
    """It has failed again and again, and fails once more."""
    one.refusals = [disk_full() for _ in range(20)]
    one.end()


def test_a_start_by_its_user_ends_the_delay_of_the_restart_before_it() -> None:
    async def body(one: OneContainer, clock: Clock, monitor: RestartMonitor) -> None:
        waits_for_its_longest_delay(one)
        await clock.sleep(600.0)
        one.refusals, began = [], clock.monotonic()
        assert began + 1.0 < one.calls[-1] + LONGEST_DELAY_S
        monitor.reset(ID)
        one.set(ContainerState.RUNNING, started_at=timestamp(clock.now_ns()))
        await clock.sleep(1.0)
        one.end()
        await clock.sleep(1.0)
        assert one.calls[-1] == pytest.approx(began + 1.0 + FIRST_DELAY_S)
        assert one.get(ID).is_running

    monitored(ALWAYS, body)


def test_the_restart_goes_on_if_the_start_by_its_user_fails() -> None:
    async def body(one: OneContainer, clock: Clock, monitor: RestartMonitor) -> None:
        waits_for_its_longest_delay(one)
        await clock.sleep(600.0)
        one.refusals, began = [], clock.monotonic()
        monitor.reset(ID)
        await clock.sleep(1.0)
        assert one.calls[-1] == pytest.approx(began + FIRST_DELAY_S)
        assert one.get(ID).is_running

    monitored(ALWAYS, body)


def test_an_end_before_the_restart_has_returned_is_followed_by_another_restart() -> None:
    async def body(one: OneContainer, clock: Clock) -> None:
        one.lives = False
        one.end()
        await clock.sleep(10.0)
        assert one.starts == 2
        assert one.get(ID).is_running

    watched(ALWAYS, body)


def test_ends_are_followed_by_restarts_at_whichever_turn_of_the_loop_they_come() -> None:
    for turns in range(12):

        async def body(one: OneContainer, clock: Clock, turns: int = turns) -> None:
            one.end()
            await one.started.wait()
            for _ in range(turns):
                await asyncio.sleep(0)
            one.end()
            await clock.sleep(10.0)
            assert one.starts == 2, turns
            assert one.get(ID).is_running

        watched(ALWAYS, body)


def test_a_removal_is_tried_until_it_succeeds() -> None:
    async def body(one: OneContainer, clock: Clock) -> None:
        one.refusals = [disk_full() if number % 2 else Unavailable("cannot remove") for number in range(16)]
        one.end()
        await clock.sleep(3600.0)
        pauses = [after - before for before, after in pairwise(one.calls)]
        assert len(one.calls) == 17
        assert pauses[-1] == pytest.approx(LONGEST_DELAY_S)
        assert one.container is None

    watched(TO_REMOVE, body)


def test_a_removal_ends_when_the_container_is_gone_and_waits_for_one_that_runs_again() -> None:
    async def body(one: OneContainer, clock: Clock) -> None:
        one.refusals = [disk_full()]
        one.end()
        await clock.sleep(FIRST_DELAY_S / 2)
        one.set(ContainerState.RUNNING)
        one.refusals = [StillRunning("container is running: stop the container before removing")]
        await clock.sleep(3600.0)
        assert len(one.calls) == 2
        one.refusals = [NotFound("No such container")]
        one.end()
        await clock.sleep(3600.0)
        assert len(one.calls) == 3

    watched(TO_REMOVE, body)


def with_engine(directory: Path, *containers: Container, body: EngineBody) -> None:
    """The same with the engine itself."""

    async def monitored(stubs: StubEngine) -> None:
        async with restart_policies(stubs):
            await body(stubs)

    on_virtual_time(monitored, directory, *containers, within_s=1e6)


def test_the_engine_starts_it_again_once_its_record_can_be_written(tmp_path: Path) -> None:
    async def body(stubs: StubEngine) -> None:
        await asyncio.sleep(1)
        stubs.bundles.is_full = True
        await stubs.end(1)
        await asyncio.sleep(600)
        assert stubs.runtime.starts == 0
        stubs.bundles.is_full = False
        await asyncio.sleep(LONGEST_DELAY_S)
        assert stubs.engine.get(ID).is_running

    with_engine(tmp_path, a_container(plain=ALWAYS), body=body)


@pytest.mark.parametrize("stops_again", [False, True])
def test_what_always_starts_after_a_reboot_is_retried_unless_it_is_stopped_again(
    tmp_path: Path, *, stops_again: bool
) -> None:
    stopped = msgspec.structs.replace(ALWAYS, is_stopped=True)
    before = a_container(state=ContainerState.EXITED, process=None, plain=stopped)

    async def body(stubs: StubEngine) -> None:
        stubs.bundles.is_full = True
        await asyncio.sleep(60)
        if stops_again:
            await stubs.engine.stop(ID)
        stubs.bundles.is_full = False
        await asyncio.sleep(3600)
        assert stubs.engine.get(ID).is_running is not stops_again

    with_engine(tmp_path, before, body=body)


def test_a_container_whose_removal_has_failed_is_left_to_its_user() -> None:
    async def body(one: OneContainer, clock: Clock) -> None:
        one.refusals += [BeingRemoved("container is marked for removal and cannot be started")] * 100
        one.end()
        await clock.sleep(1000.0)
        assert len(one.calls) == 1

    watched(ALWAYS, body)
